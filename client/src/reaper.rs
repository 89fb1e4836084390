//! Gives regions back that were dropped: one thread for all sessions of the process, as long as there is something to do.
//!
//! A dropped region goes to the pager as a command, and its memory is unmapped after the pager has unregistered it. Both
//! may take a while, and a destructor must not wait. So where the pager's queue is full, and for each munmap, the work
//! goes to the reaper's queue, which is as long as there are such regions.

use crate::shared::{Command, Shared};
use crate::uffd::memory::Memory;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;

/// How soon a command is sent again to a pager whose queue is full.
const RETRY: Duration = Duration::from_millis(1);

/// Something that a destructor does not wait for.
#[derive(Debug)]
enum Job {
    /// Send this to the pager, once its queue has room.
    Send { shared: Arc<Shared>, commands: mpsc::Sender<Command>, command: Command },
    /// Unmap memory that is no longer registered, once no installer uses it.
    GiveBack { shared: Arc<Shared>, memory: Memory },
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    has_thread: bool,
}

/// Held for adding or taking a job.
static QUEUE: Mutex<Queue> = Mutex::new(Queue { jobs: VecDeque::new(), has_thread: false });

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends a command to a session's pager when its queue has room; drops it where the pager has ended.
pub(crate) fn send(shared: &Arc<Shared>, commands: &mpsc::Sender<Command>, command: Command) {
    add(Job::Send { shared: Arc::clone(shared), commands: commands.clone(), command });
}

/// Unmaps memory that is no longer registered, once the installers that are inside the gate have left.
pub(crate) fn give_back(shared: &Arc<Shared>, memory: Memory) {
    add(Job::GiveBack { shared: Arc::clone(shared), memory });
}

fn add(job: Job) {
    let mut queue = queue();
    queue.jobs.push_back(job);
    if !queue.has_thread {
        // Without a thread the next job tries again; until then the memory stays mapped.
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
    // An munmap of memory that is still registered would wait for somebody to read its event.
    if shared.is_left_open.load(Ordering::Acquire) {
        std::mem::forget(command);
    }
}
