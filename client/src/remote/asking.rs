//! Requests of commands and tasks: their time limits, and their repetition while a server refuses
//! them early.
//!
//! An overloaded server answers RESOURCE_EXHAUSTED or UNAVAILABLE before it does any work, and may
//! say when to come back (`grpc-retry-pushback-ms`). So the client asks again, for at most 30 s.
//! A server or proxy that closes a connection in order (GOAWAY) names the last request that it
//! processes. The client sends later ones again over the next connection, as gRPC's own clients do
//! ("transparent retries" of gRPC proposal A6).
//!
//! A proxy that reloads, and a server that starts again, cut requests in the middle. The client
//! sends all but changes again, for at most 10 s without an answer: every other request has the
//! same effect once and twice.

use super::backoff::Backoff;
use super::{MAX_SILENCE, RemoteError, ServerAddress};
use std::future::Future;
use std::time::{Duration, Instant};
use tonic::{Code, Response, Status};

/// The longest time in which the client repeats a request that the server refuses.
const MAX_REFUSED: Duration = Duration::from_secs(30);
/// The longest time in which the client repeats a request after its connection was cut. A server
/// that starts again takes a second or two.
const MAX_CUT: Duration = Duration::from_secs(10);
/// The longest time for the answer to other requests. Three packs of 16 MiB at a time take
/// this long at 0.12 Mbit/s, and a commit may check a million chunks on a slow disk. The keep-alive
/// of the connection finds a lost server much sooner.
const MAX_WORK: Duration = Duration::from_secs(3600);
/// The key of the time after which the server wants the next attempt.
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// The longest time that a request may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// 30 s, for a question.
    Short,
    /// An hour, for an upload, a commit, or a look for missing chunks. For the last, a server whose
    /// chunk index is lost reads the trailers of all its packs.
    Long,
    /// An hour, for a change that must not be repeated without the server's word: the server may
    /// have made it before the connection was cut, or a proxy answers UNAVAILABLE after that.
    Change,
}

/// Sends a request, and again while the server refuses it. `attempt` sends it once.
///
/// # Errors
/// [`RemoteError::Status`]: the server's answer. [`RemoteError::Wrong`]: none came in time.
pub(super) async fn ask<T, F>(
    server: &ServerAddress,
    what: &str,
    patience: Patience,
    attempt: impl FnMut() -> F,
) -> Result<T, RemoteError>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    let silence = match patience {
        Patience::Short => MAX_SILENCE,
        Patience::Long | Patience::Change => MAX_WORK,
    };
    ask_within(server, what, (silence, patience == Patience::Change), attempt).await
}

async fn ask_within<T, F>(
    server: &ServerAddress,
    what: &str,
    (silence, is_change): (Duration, bool),
    mut attempt: impl FnMut() -> F,
) -> Result<T, RemoteError>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    let repeated = if is_change { Repeated::Unprocessed } else { Repeated::Cut };
    repeat(repeated, || {
        let answer = tokio::time::timeout(silence, attempt());
        async move {
            let answer = answer.await;
            let answer = answer.map_err(|_| server.wrong(what, format!("none came within {silence:?}")))?;
            Ok(answer.map_err(server.status(what))?.into_inner())
        }
    })
    .await
}

/// Repeats `attempt` while the server refuses it, for at most 30 s; after a cut, for at most 10 s.
///
/// # Errors
/// The error of the last attempt.
pub(crate) async fn repeat<T, F>(repeated: Repeated, mut attempt: impl FnMut() -> F) -> Result<T, RemoteError>
where
    F: Future<Output = Result<T, RemoteError>>,
{
    let mut attempts = Attempts::new(repeated);
    loop {
        match attempt().await {
            Err(error) => attempts.after(error).await?,
            done => return done,
        }
    }
}

/// The failures of a request after which the client sends it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repeated {
    /// No server has processed the request, or the server has said when to send it again.
    Unprocessed,
    /// The server has refused the request.
    Refused,
    /// The server has refused the request, or the connection was cut meanwhile.
    Cut,
}

/// The failed attempts at one request since the last answer.
#[derive(Debug)]
pub(crate) struct Attempts {
    repeated: Repeated,
    /// The time of the first failure.
    since: Option<Instant>,
    backoff: Backoff,
}

impl Attempts {
    pub(crate) fn new(repeated: Repeated) -> Self {
        Self { repeated, since: None, backoff: Backoff::new() }
    }

    /// Pauses until the next attempt is due.
    ///
    /// # Errors
    /// `error`, if there is no next attempt.
    pub(crate) async fn after(&mut self, error: RemoteError) -> Result<(), RemoteError> {
        let Some(pause) = self.pause_after(&error) else { return Err(error) };
        tokio::time::sleep(pause).await;
        Ok(())
    }

    fn pause_after(&mut self, error: &RemoteError) -> Option<Duration> {
        let (pause, most) = match pause_of_refusal(error, self.repeated, &mut self.backoff) {
            Some(pause) => (pause, MAX_REFUSED),
            None if self.repeated == Repeated::Cut && is_cut(error) => (self.backoff.pause(), MAX_CUT),
            None => return None,
        };
        let since = self.since.get_or_insert_with(Instant::now);
        (since.elapsed() + pause <= most).then_some(pause)
    }
}

/// Returns true if the connection was lost, or cannot be made again. Whoever sends a request has
/// connected to the server before.
fn is_cut(error: &RemoteError) -> bool {
    match error {
        RemoteError::Connect { is_denied, .. } => !is_denied,
        RemoteError::Status { status, .. } => super::is_of_connection(status),
        _ => false,
    }
}

/// Returns the pause before the next attempt, if the server has refused the request early.
/// RESOURCE_EXHAUSTED without a time to retry is no early refusal: the server's disk is full.
fn pause_of_refusal(error: &RemoteError, repeated: Repeated, backoff: &mut Backoff) -> Option<Duration> {
    let RemoteError::Status { status, .. } = error else { return None };
    if is_unprocessed(status) {
        return Some(backoff.pause());
    }
    let is_refusal = matches!(status.code(), Code::ResourceExhausted | Code::Unavailable);
    if !is_refusal || super::is_of_connection(status) {
        return None;
    }
    let pause = backoff.pause();
    match status.metadata().get(PUSHBACK).map(|text| text.to_str().ok()?.parse::<u64>().ok()) {
        None => (status.code() == Code::Unavailable && repeated != Repeated::Unprocessed).then_some(pause),
        // A server that does not want another attempt sends a negative number.
        Some(None) => None,
        // The random part keeps clients apart that were refused at once.
        Some(Some(ms)) => Some(Duration::from_millis(ms) + pause),
    }
}

/// Returns true if no server has processed the request: the client had it in a queue when the
/// connection was closed, the server's GOAWAY excludes it, or the server refused its stream.
fn is_unprocessed(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            // h2 ends only the streams after the last processed one with the peer's GOAWAY.
            let is_refused = error.reason() == Some(h2::Reason::REFUSED_STREAM);
            return error.is_remote() && (error.is_go_away() || is_refused);
        }
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled) {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: Code, pushback: Option<&'static str>) -> RemoteError {
        let mut status = Status::new(code, "too many requests");
        if let Some(pushback) = pushback {
            status.metadata_mut().insert(PUSHBACK, pushback.parse().unwrap());
        }
        RemoteError::Status { server: "here".into(), what: "a test".into(), status: Box::new(status) }
    }

    #[test]
    fn only_early_refusals_are_repeated_and_no_sooner_than_the_server_wants() {
        let pause = |error: &RemoteError| pause_of_refusal(error, Repeated::Refused, &mut Backoff::new());
        assert!(pause(&refused(Code::Unavailable, None)).unwrap() < Duration::from_millis(20));
        let wanted = Duration::from_millis(1234);
        let pushed = pause(&refused(Code::ResourceExhausted, Some("1234"))).unwrap();
        assert!((wanted..wanted + Duration::from_millis(20)).contains(&pushed), "{pushed:?}");
        for no in [
            refused(Code::ResourceExhausted, Some("-1")),
            refused(Code::ResourceExhausted, None),
            refused(Code::NotFound, None),
            refused(Code::Internal, Some("1")),
        ] {
            assert_eq!(pause(&no), None, "{no}");
        }
        let change =
            |error: &RemoteError| pause_of_refusal(error, Repeated::Unprocessed, &mut Backoff::new());
        assert_eq!(change(&refused(Code::Unavailable, None)), None);
        assert!(change(&refused(Code::ResourceExhausted, Some("1"))).is_some());
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn a_refusal_is_repeated_and_a_pause_that_is_too_long_does_not_begin() {
        let mut attempts = 0;
        let answer = repeat(Repeated::Refused, || {
            attempts += 1;
            let is_last = attempts == 5;
            async move { if is_last { Ok(7) } else { Err(refused(Code::Unavailable, Some("10"))) } }
        });
        assert_eq!(runtime().block_on(answer).unwrap(), 7);
        let started = Instant::now();
        let refused = || async { Err::<(), _>(refused(Code::Unavailable, Some("40000"))) };
        let answer = repeat(Repeated::Cut, refused);
        assert!(runtime().block_on(answer).is_err());
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_server_that_says_nothing_is_not_waited_for() {
        let server = "http://here:1".parse().unwrap();
        let silent = std::future::pending::<Result<Response<()>, Status>>;
        let answer =
            async { ask_within(&server, "answer", (Duration::from_millis(50), false), silent).await };
        let error = runtime().block_on(answer).unwrap_err();
        assert!(error.to_string().contains("none came within 50ms"), "{error}");
    }
}
