//! The thread that gives dropped regions back: one for all sessions of the process, alive while
//! jobs are queued.
//!
//! A dropped region goes to the pager as a command. The pager unregisters the memory, and then it
//! can be unmapped. Both steps may take a while, and a destructor must not wait. So each munmap
//! goes to the reaper's queue, and so does a command for which the pager's queue is full. The queue
//! is at most as long as there are dropped regions.

use crate::shared::{Command, Shared};
use crate::uffd::memory::Memory;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;

/// The pause before the reaper sends a command again to a pager whose queue is full.
const RETRY: Duration = Duration::from_millis(1);

/// Work that a destructor must not wait for.
#[derive(Debug)]
enum Job {
    /// Sends a command to the pager, once its queue has room.
    Send { shared: Arc<Shared>, commands: mpsc::Sender<Command>, command: Command },
    /// Unmaps memory that is no longer registered, once no installer uses it.
    GiveBack { shared: Arc<Shared>, memory: Memory },
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    has_thread: bool,
}

/// The lock is held while a job is added or taken.
static QUEUE: Mutex<Queue> = Mutex::new(Queue { jobs: VecDeque::new(), has_thread: false });

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Queues a command for a session's pager, until the pager's queue has room. Drops the command if
/// the pager has ended.
pub(crate) fn send(shared: &Arc<Shared>, commands: &mpsc::Sender<Command>, command: Command) {
    add(Job::Send { shared: Arc::clone(shared), commands: commands.clone(), command });
}

/// Unmaps memory that is no longer registered, once the installers that are inside the gate have
/// left.
pub(crate) fn give_back(shared: &Arc<Shared>, memory: Memory) {
    add(Job::GiveBack { shared: Arc::clone(shared), memory });
}

fn add(job: Job) {
    let mut queue = queue();
    queue.jobs.push_back(job);
    if !queue.has_thread {
        // If the thread does not start, the next job tries again. Until then the memory stays
        // mapped.
        let thread = std::thread::Builder::new().name("postcopy-reaper".into()).spawn(run);
        queue.has_thread = thread.is_ok();
    }
}

fn run() {
    loop {
        let job = {
            let mut queue = queue();
            let Some(job) = queue.jobs.pop_front() else {
                queue.has_thread = false;
                return;
            };
            job
        };
        match job {
            Job::GiveBack { shared, memory } => {
                shared.map.gate.pass_through();
                drop(memory);
            }
            Job::Send { shared, commands, command } => match commands.try_send(command) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Closed(command)) => drop_unsent(&shared, command),
                Err(mpsc::error::TrySendError::Full(command)) => {
                    queue().jobs.push_back(Job::Send { shared, commands, command });
                    std::thread::park_timeout(RETRY);
                }
            },
        }
    }
}

/// Drops a command of a session whose pager has ended.
pub(crate) fn drop_unsent(shared: &Shared, command: Command) {
    // If the memory is still registered, munmap would wait until another process reads its event.
    if shared.is_left_open.load(Ordering::Acquire) {
        std::mem::forget(command);
    }
}
