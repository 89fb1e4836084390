//! Work that waits for a disk or computes for long: outside of the async workers, in classes.
//!
//! Each class has threads of its own, of the 512 that the runtime has for such work. So the load of
//! a chunk never waits behind commits.

use crate::store::{Caller, StoreError};
use std::sync::LazyLock;
use std::thread::available_parallelism;
use tokio::sync::Semaphore;
use tonic::Status;

static DEMAND: Semaphore = Semaphore::const_new(128);
static READ: Semaphore = Semaphore::const_new(128);
static WRITE: Semaphore = Semaphore::const_new(32);
static OPEN: Semaphore = Semaphore::const_new(64);
static LOOK: Semaphore = Semaphore::const_new(64);
static DESCRIBE: Semaphore = Semaphore::const_new(2);
static HEAVY: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(available_parallelism().map_or(2, |cores| cores.get().clamp(2, 64))));

/// Reads a chunk or a segment that a fault may wait for.
pub(super) async fn demand<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    run(&DEMAND, work).await
}

/// Reads chunks, segments or pieces of files that no fault waits for.
pub(super) async fn read<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, Status>
where
    T: Send + 'static,
    E: Into<Status> + Send + 'static,
{
    run(&READ, work).await
}

/// Writes a part of an upload.
pub(super) async fn write<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    run(&WRITE, work).await
}

/// Resolves a reference and reads a root. Waits for no lock of the store, so a collector does not
/// delay it.
pub(super) async fn open<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    run(&OPEN, work).await
}

/// Looks up or changes a few small objects. May wait for a lock that a collector holds.
pub(super) async fn look<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    run(&LOOK, work).await
}

/// Runs `work` once one of the class's `threads` is free, in the order of the calls.
async fn run<T, E>(
    threads: &'static Semaphore,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, Status>
where
    T: Send + 'static,
    E: Into<Status> + Send + 'static,
{
    let thread = threads.acquire().await.expect("it is never closed");
    let done = tokio::task::spawn_blocking(move || {
        // Held by the work: a caller that leaves does not end it.
        let _thread = thread;
        work()
    });
    // The panic's message and place are on stderr.
    done.await.map_err(|_| Status::internal("the server panicked on this request"))?.map_err(Into::into)
}

/// Verifies an upload or an image's objects, or builds a working set. The work checks whether its
/// caller has left; dropping the future tells it.
pub(super) async fn heavy<T: Send + 'static>(
    work: impl FnOnce(&Caller) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    cancelled_with_its_caller(&HEAVY, work).await
}

/// Reads all segments of an image. The work checks whether its caller has left.
pub(super) async fn describe<T: Send + 'static>(
    work: impl FnOnce(&Caller) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    cancelled_with_its_caller(&DESCRIBE, work).await
}

async fn cancelled_with_its_caller<T: Send + 'static>(
    threads: &'static Semaphore,
    work: impl FnOnce(&Caller) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    let caller = Caller::default();
    let _waits = caller.waits();
    run(threads, move || {
        caller.check()?;
        work(&caller)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn reads_do_not_wait_for_heavy_work_and_heavy_work_ends_when_its_caller_leaves() {
        let (started, mut has_started) = tokio::sync::mpsc::channel(100);
        let heavy: Vec<_> = (0..100)
            .map(|_| {
                let started = started.clone();
                tokio::spawn(heavy(move |caller| {
                    started.try_send(()).unwrap();
                    loop {
                        caller.check()?;
                        std::thread::park_timeout(Duration::from_millis(1));
                    }
                    #[expect(unreachable_code, reason = "the type of the closure")]
                    Ok(())
                }))
            })
            .collect();
        has_started.recv().await.unwrap();
        assert!(demand(|| Ok(())).await.is_ok() && look(|| Ok(())).await.is_ok());
        heavy.iter().for_each(tokio::task::JoinHandle::abort);
        // All threads of the class are free again.
        for _ in 0..100 {
            assert!(super::heavy(|_| Ok(())).await.is_ok());
        }
    }
}
