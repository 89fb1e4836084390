//! One thread for all sessions' work that may wait: the fills' requests, and the sending of
//! recordings.
//!
//! [`spawn`] starts the thread with the first task; the thread ends with the last one. A thread for
//! each session would cost a runtime with three descriptors each, and a process may have hundreds
//! of sessions. A task must not block.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

#[derive(Debug)]
struct Running {
    runtime: Handle,
    tasks: usize,
    /// Ends the thread when it is dropped.
    _end: oneshot::Sender<()>,
    /// The process that the thread belongs to. A fork copies this record, but no thread.
    process: u32,
}

/// The thread, if there are tasks. The lock is held to count a task, and to start the thread.
static RUNNING: Mutex<Option<Running>> = Mutex::new(None);

fn running() -> MutexGuard<'static, Option<Running>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `task` in the background.
///
/// # Errors
/// If the process cannot start a thread or open descriptors.
pub(crate) fn spawn(task: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    let mut running = running();
    let process = std::process::id();
    if running.as_ref().is_some_and(|running| running.process != process) {
        // The record is leaked, because its descriptors are the parent's, too.
        std::mem::forget(running.take());
    }
    let running = match &mut *running {
        Some(running) => running,
        none => none.insert(start(process)?),
    };
    running.tasks += 1;
    let counted = Counted(process);
    running.runtime.spawn(async move {
        task.await;
        drop(counted);
    });
    Ok(())
}

fn start(process: u32) -> io::Result<Running> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (end, ended) = oneshot::channel::<()>();
    let handle = runtime.handle().clone();
    let thread = std::thread::Builder::new().name("postcopy-work".into());
    thread.spawn(move || runtime.block_on(ended))?;
    Ok(Running { runtime: handle, tasks: 0, _end: end, process })
}

/// Counts a task of this process until it is dropped, which a panic of the task does, too.
struct Counted(u32);

impl Drop for Counted {
    fn drop(&mut self) {
        let mut running = running();
        let Some(counts) = running.as_mut().filter(|running| running.process == self.0) else { return };
        counts.tasks -= 1;
        if counts.tasks == 0 {
            *running = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn tasks_run_in_one_thread_and_a_panic_ends_its_task_alone() {
        let (sender, ids) = mpsc::sync_channel(2);
        let (hold, held) = oneshot::channel::<()>();
        spawn(async move { drop(held.await) }).unwrap();
        spawn(async { panic!("a task that fails") }).unwrap();
        for _ in 0..2 {
            let sender = sender.clone();
            spawn(async move { sender.send(std::thread::current().id()).unwrap() }).unwrap();
        }
        let id = || ids.recv_timeout(Duration::from_secs(30)).unwrap();
        assert_eq!(id(), id());
        drop(hold);
    }
}
