//! Shutdown in order: the server refuses new requests, and the requests in flight finish.

use tokio::sync::watch;
use tonic::Status;

/// The register of requests in flight. It tells them when the server begins to end.
#[derive(Clone, Debug)]
pub struct Drain {
    /// True once the server ends. Each request in flight holds a receiver.
    ending: watch::Sender<bool>,
}

/// A request or stream, in flight until this is dropped.
#[derive(Debug)]
pub struct InFlight {
    ending: watch::Receiver<bool>,
}

impl Default for Drain {
    fn default() -> Self {
        Self { ending: watch::Sender::new(false) }
    }
}

impl Drain {
    /// Counts a request as in flight.
    ///
    /// # Errors
    /// Returns UNAVAILABLE once the server ends.
    pub fn enter(&self) -> Result<InFlight, Status> {
        let in_flight = InFlight { ending: self.ending.subscribe() };
        if *in_flight.ending.borrow() { Err(shutting_down()) } else { Ok(in_flight) }
    }

    /// Refuses new requests from now on, and tells endless streams to finish.
    pub fn begin(&self) {
        self.ending.send_replace(true);
    }

    /// Waits until nothing is in flight.
    pub async fn idle(&self) {
        self.ending.closed().await;
    }

    /// Waits for [`Drain::begin`], without counting as in flight.
    pub async fn begun(&self) {
        // The sender lives as long as `self`, so the wait ends only with the value.
        while !*self.ending.borrow() {
            let mut ending = self.ending.subscribe();
            let _ = ending.wait_for(|ending| *ending).await;
        }
    }
}

impl InFlight {
    /// Waits until the server begins to end.
    pub async fn ending(&mut self) {
        // An error means that the server was dropped.
        let _ = self.ending.wait_for(|ending| *ending).await;
    }
}

/// Returns the status for a request that arrives too late, and for an endless stream at its end.
#[must_use]
pub fn shutting_down() -> Status {
    Status::unavailable("the server is shutting down: use another one, or try again later")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_in_flight_finishes_and_what_is_new_is_refused() {
        let drain = Drain::default();
        let mut in_flight = drain.enter().unwrap();
        drain.begin();
        in_flight.ending().await;
        assert_eq!(drain.enter().unwrap_err().code(), tonic::Code::Unavailable);
        let mut idle = Box::pin(drain.idle());
        assert!(futures_util::poll!(idle.as_mut()).is_pending());
        drop(in_flight);
        idle.await;
    }
}
