//! The working set: its frames, received on the bulk lane and installed by the pool.

use super::installer::{Arrived, Job};
use super::{Fill, WINDOW_BYTES, pool};
use crate::memory::Spaces;
use crate::remote::Purpose::Bulk;
use crate::remote::lane::BulkLane;
use crate::remote::set_stream::SetStream;
use crate::remote::{MAX_ATTEMPTS, RemoteError};
use postcopy_proto::page::PAGE_BYTES;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tonic::transport::Channel;

/// Time for which attempts at the working set fail before the fill logs a warning.
const SET_SILENCE: Duration = Duration::from_secs(1);

/// The failed attempts at the working set.
#[derive(Debug, Default)]
pub(super) struct WorkingSet {
    pub(super) failures: u32,
    /// Number of attempts that failed by a wrong answer. The fill gives up after [`MAX_ATTEMPTS`]
    /// of them.
    wrong: u32,
    /// Time of the first failure.
    since: Option<Instant>,
    is_reported: bool,
}

/// The outcome of an attempt at the working set.
pub(super) enum SetOutcome {
    Received(Box<BulkLane>),
    /// The server has answered wrongly [`MAX_ATTEMPTS`] times, or the process has no thread to
    /// install.
    GivenUp,
    /// The attempt failed, for example because the server cannot be reached. The fill retries as
    /// long as the session lives.
    Failed,
}

impl Fill {
    /// Receives the working set and returns its lane for reuse. Until the set has arrived, page
    /// faults fetch its pages.
    pub(super) async fn bring_working_set(
        &self,
        channel: Option<Channel>,
        attempts: &mut WorkingSet,
    ) -> SetOutcome {
        let threads = match pool::join() {
            Ok(threads) => threads,
            Err(error) => {
                tracing::warn!("no thread for the working set: {error}");
                return SetOutcome::GivenUp;
            }
        };
        self.shared.set_filling(true);
        let received = self.receive_working_set(channel).await;
        self.all_installed().await;
        drop(threads);
        self.shared.set_filling(false);
        let image = self.shared.image.digest();
        let error = match received {
            Ok(lane) => {
                let refused = self.filling.refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if let Some(reason) = refused {
                    tracing::warn!("{reason}: page faults fetch its pages");
                }
                return SetOutcome::Received(Box::new(lane));
            }
            Err(error) => error,
        };
        let is_wrong = matches!(error, RemoteError::Wrong { .. });
        let set = attempts;
        set.failures += 1;
        set.wrong += u32::from(is_wrong);
        let since = *set.since.get_or_insert_with(Instant::now);
        let is_given_up = set.wrong >= MAX_ATTEMPTS;
        if (is_given_up || since.elapsed() > SET_SILENCE) && !set.is_reported && !self.shared.has_ended() {
            set.is_reported = true;
            let next = if is_given_up { "page faults fetch its pages" } else { "the fill tries again" };
            tracing::warn!("the working set of image {image} could not be fetched: {error}; {next}");
        }
        if is_given_up { SetOutcome::GivenUp } else { SetOutcome::Failed }
    }

    async fn receive_working_set(&self, channel: Option<Channel>) -> Result<BulkLane, RemoteError> {
        let server = &self.shared.address;
        // The request is sent at once. Frames that arrive before the session has memory wait in the
        // lane's window.
        let ask = async {
            let channel = match channel {
                Some(channel) => channel,
                None => server.connect(Bulk).await?,
            };
            Ok(SetStream::over(channel, server, &self.shared.image))
        };
        let prepare = async {
            self.wait_while(Spaces::is_empty).await;
            // Frames are verified against segments, which may not have arrived yet.
            self.bring_segments(&self.shared.spaces()).await?;
            self.wait_while(|spaces| !spaces.spaces().all(|space| space.is_registered())).await;
            Ok(())
        };
        let (stream, prepared) = tokio::join!(ask, prepare);
        let (mut stream, ()) = (stream?, prepared?);
        loop {
            let part = stream.next();
            let Some(part) = self.unless_ended(part).await else { return Ok(stream.into_lane()) };
            let Some(part) = part? else { return Ok(stream.into_lane()) };
            let pages = part.pages.clamp(1, WINDOW_BYTES / PAGE_BYTES);
            let pages = u32::try_from(pages).expect("at most the window");
            let permit = Arc::clone(&self.window).acquire_many_owned(pages).await;
            let permit = permit.expect("the window is never closed");
            self.job(Job::new(Arrived::WorkingSet(part.frames.into()), permit, Duration::ZERO));
        }
    }
}
