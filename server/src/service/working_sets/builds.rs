//! Builds of working sets, one at a time. One build of an image covers all recordings that were
//! stored while other builds ran.
//!
//! A request that has stored a recording joins its image's pending build, or adds one. Each build
//! is a task of its own, so a client that disconnects does not cancel it for others. No request
//! waits on a thread; all builds together use one blocking thread.

use crate::service::work;
use crate::shutdown::shutting_down;
use crate::store::StoreError;
use postcopy_proto::digest::Digest;
use postcopy_proto::v1;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tonic::Status;

/// The result of a build; `None` until it has ended.
type Outcome = Option<Result<v1::WorkingSet, Status>>;
/// Pending builds: at most one for each image.
type Waiting = HashMap<Digest, watch::Receiver<Outcome>>;

/// The queue of builds. Dropping it cancels pending builds.
#[derive(Debug)]
pub(super) struct Builds {
    /// One permit, for the change of any working set.
    turn: Arc<Semaphore>,
    /// Locked only for a look-up and a change.
    waiting: Arc<Mutex<Waiting>>,
    /// Tasks that have not ended. Locked only to add one.
    tasks: Mutex<JoinSet<()>>,
}

impl Default for Builds {
    fn default() -> Self {
        Self { turn: Arc::new(Semaphore::new(1)), waiting: Arc::default(), tasks: Mutex::default() }
    }
}

impl Builds {
    /// Waits for the permit. Until it is dropped, no set is built.
    pub(super) async fn turn(&self) -> OwnedSemaphorePermit {
        turn_of(Arc::clone(&self.turn)).await
    }

    /// Returns the result of a build of the image's working set that begins after this call. Joins
    /// a pending build, or calls `build` in its turn.
    ///
    /// # Errors
    /// Returns the errors of the build, or UNAVAILABLE when the server ends.
    pub(super) async fn next(
        &self,
        image: Digest,
        build: impl FnOnce() -> Result<v1::WorkingSet, StoreError> + Send + 'static,
    ) -> Result<v1::WorkingSet, Status> {
        let mut outcome = self.join(image, build);
        let outcome = outcome.wait_for(Option::is_some).await.map_err(|_| shutting_down())?;
        outcome.clone().expect("it was waited for")
    }

    fn join(
        &self,
        image: Digest,
        build: impl FnOnce() -> Result<v1::WorkingSet, StoreError> + Send + 'static,
    ) -> watch::Receiver<Outcome> {
        let mut waiting = lock(&self.waiting);
        if let Some(outcome) = waiting.get(&image) {
            return outcome.clone();
        }
        let (sender, outcome) = watch::channel(None);
        waiting.insert(image, outcome.clone());
        drop(waiting);
        let (turn, waiting) = (Arc::clone(&self.turn), Arc::clone(&self.waiting));
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            let turn = turn_of(turn).await;
            // This build may miss recordings that are stored from here on, so it stops being
            // joinable.
            lock(&waiting).remove(&image);
            let built = work::heavy(move |_| {
                let _turn = turn;
                build()
            });
            // All requests for this build may have ended.
            sender.send_replace(Some(built.await));
        });
        outcome
    }
}

async fn turn_of(turn: Arc<Semaphore>) -> OwnedSemaphorePermit {
    turn.acquire_owned().await.expect("it is never closed")
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::join_all;
    use futures_util::{FutureExt, poll};
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::time::Duration;

    /// A counter of builds, which end when the test permits.
    #[derive(Clone, Default)]
    struct Counted(Arc<(AtomicU32, AtomicBool)>);

    impl Counted {
        fn build(&self) -> impl FnOnce() -> Result<v1::WorkingSet, StoreError> + Send + 'static {
            let counted = self.clone();
            move || {
                let recordings = counted.0.0.fetch_add(1, Ordering::SeqCst) + 1;
                while !counted.0.1.load(Ordering::SeqCst) {
                    std::thread::park_timeout(Duration::from_millis(1));
                }
                Ok(v1::WorkingSet { recordings, ..Default::default() })
            }
        }

        fn let_go(&self) {
            self.0.1.store(true, Ordering::SeqCst);
        }

        fn count(&self) -> u32 {
            self.0.0.load(Ordering::SeqCst)
        }
    }

    #[tokio::test]
    async fn what_comes_while_one_is_built_is_in_one_next_build() {
        let (builds, counted) = (Builds::default(), Counted::default());
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let mut first = Box::pin(builds.next(a, counted.build()));
        assert!(poll!(first.as_mut()).is_pending());
        while counted.count() == 0 {
            tokio::task::yield_now().await;
        }
        let mut next: Vec<_> = (0..1000).map(|_| Box::pin(builds.next(a, counted.build()))).collect();
        for waits in &mut next {
            assert!(poll!(waits.as_mut()).is_pending());
        }
        tokio::task::yield_now().await;
        let mut other = Box::pin(builds.next(b, counted.build()));
        assert!(poll!(other.as_mut()).is_pending());
        // The first request ends.
        drop(next.swap_remove(0));
        tokio::task::yield_now().await;
        assert_eq!(counted.count(), 1, "one at a time");
        counted.let_go();
        assert_eq!(first.await.unwrap().recordings, 1);
        assert!(join_all(next).await.into_iter().all(|built| built.unwrap().recordings == 2));
        assert_eq!(other.await.unwrap().recordings, 3);
        assert!(lock(&builds.waiting).is_empty());
    }

    #[tokio::test]
    async fn all_who_waited_get_the_error_and_the_next_build_is_made() {
        let builds = Builds::default();
        let image = Digest::of(b"a");
        let missing = || Err(StoreError::NotFound("a chunk".into()));
        let turn = builds.turn().await;
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(builds.next(image, missing))).collect();
        for waits in &mut waiting {
            assert!(poll!(waits.as_mut()).is_pending());
        }
        drop(turn);
        for built in join_all(waiting).await {
            assert_eq!(built.unwrap_err().code(), tonic::Code::NotFound);
        }
        let panicked = builds.next(image, || panic!("a build")).await;
        assert_eq!(panicked.unwrap_err().code(), tonic::Code::Internal);
        assert!(builds.next(image, || Ok(v1::WorkingSet::default())).await.is_ok());
    }

    #[tokio::test]
    async fn a_build_that_nobody_waits_for_any_more_is_made_and_leaves_nothing() {
        let (builds, counted) = (Builds::default(), Counted::default());
        counted.let_go();
        let turn = builds.turn().await;
        assert!(builds.next(Digest::of(b"a"), counted.build()).now_or_never().is_none());
        // The build is pending.
        tokio::task::yield_now().await;
        drop(turn);
        drop(builds.turn().await);
        assert_eq!(counted.count(), 1);
        assert!(lock(&builds.waiting).is_empty());
    }
}
