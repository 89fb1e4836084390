//! The threads that install what the bulk lanes deliver: one for each core, shared by all sessions
//! of the process.
//!
//! The threads exist while a fill is at work ([`join`]). Sessions take turns: a thread installs one
//! job of a session, then one of the next session. A session that meets an obstacle (no memory, or
//! a pager that is slow to take pages that were handed over) loses its turns for a while; no thread
//! waits for it.

use super::installer::{Installer, Job, Tools};
use crate::shared::Shared;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The first and the longest time for which a session has no turn after an obstacle.
const OBSTACLE_PAUSE: Range<Duration> = Duration::from_micros(200)..Duration::from_millis(50);
/// Time after which a thread that gives way checks again if faults have become rare.
const GIVE_WAY: Duration = Duration::from_millis(2);

/// A session's part in the pool.
#[derive(Debug)]
pub(super) struct Filling {
    pub(super) shared: Arc<Shared>,
    /// The latest reason for refusing a chunk, which is reported when the fill gives up.
    pub(super) refused: Mutex<Option<String>>,
    /// The session's jobs. The lock is taken under the pool's lock, and held for one look or
    /// change.
    queue: Mutex<Queue>,
}

/// The jobs of a session. The fill's window bounds their number, because each holds at least one
/// page of it.
#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// The time before which the session has no turn.
    not_before: Option<Instant>,
    pause: Duration,
}

impl Filling {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, refused: Mutex::default(), queue: Mutex::default() }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of the pool, as the module describes it.
#[derive(Debug)]
struct Pool {
    /// Sessions that have jobs, in the order of their turns.
    turns: VecDeque<Arc<Filling>>,
    /// Number of fills that are at work.
    fills: usize,
    /// Number of all threads, and of those that give way to faults.
    threads: usize,
    giving_way: usize,
    /// The process that the threads belong to. A fork copies this record, but no thread.
    process: u32,
}

/// The one pool of the process. The lock is held to choose the next job, never during an install.
static POOL: Mutex<Pool> = Mutex::new(Pool::EMPTY);
/// Wake threads when a job is added, and when the last fill ends. The first is for threads that
/// never give way, the second for those that do.
static CHANGED: [Condvar; 2] = [Condvar::new(), Condvar::new()];

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the pool's threads alive. A fill holds one while it is at work.
#[derive(Debug)]
pub(super) struct Membership(());

/// Starts the threads that are missing.
///
/// # Errors
/// If the process cannot start a thread, and the pool has none that never gives way.
pub(super) fn join() -> io::Result<Membership> {
    let mut pool = pool();
    let process = std::process::id();
    if pool.process != process {
        std::mem::forget(std::mem::replace(&mut *pool, Pool { process, ..Pool::EMPTY }));
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    while pool.threads < cores {
        // The first half of the threads never gives way.
        let gives_way = pool.threads - pool.giving_way >= cores.div_ceil(2);
        let thread = std::thread::Builder::new().name("postcopy-install".into());
        match thread.spawn(move || Thread { gives_way, is_counted: true }.run()) {
            Ok(_) => pool.count(gives_way),
            Err(error) if pool.threads == pool.giving_way => return Err(error),
            Err(_) => break,
        }
    }
    pool.fills += 1;
    Ok(Membership(()))
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut pool = pool();
        pool.fills -= 1;
        if pool.fills == 0 {
            CHANGED.iter().for_each(Condvar::notify_all);
        }
    }
}

/// Adds a job. The session's fill must hold a [`Membership`].
pub(super) fn add(filling: &Arc<Filling>, job: Job) {
    let mut pool = pool();
    let mut queue = filling.queue();
    queue.jobs.push_back(job);
    if queue.jobs.len() == 1 {
        pool.turns.push_back(Arc::clone(filling));
    }
    CHANGED.iter().for_each(Condvar::notify_one);
}

/// The next action of a thread.
enum Next {
    Install(Arc<Filling>, Job),
    /// Wait for a change, at most until this time.
    Wait(Option<Instant>),
    End,
}

impl Pool {
    const EMPTY: Self = Self { turns: VecDeque::new(), fills: 0, threads: 0, giving_way: 0, process: 0 };

    fn count(&mut self, gives_way: bool) {
        self.threads += 1;
        self.giving_way += usize::from(gives_way);
    }

    fn discount(&mut self, gives_way: bool) {
        self.threads -= 1;
        self.giving_way -= usize::from(gives_way);
    }

    fn next(&mut self, gives_way: bool, now: Instant) -> Next {
        let mut until: Option<Instant> = None;
        let mut wait_until = |at| until = Some(until.map_or(at, |until| until.min(at)));
        for place in 0..self.turns.len() {
            let filling = Arc::clone(&self.turns[place]);
            if gives_way && filling.shared.cores.are_shared(now) {
                wait_until(now + GIVE_WAY);
                continue;
            }
            let mut queue = filling.queue();
            match queue.not_before {
                Some(at) if at > now && !filling.shared.has_ended() => wait_until(at),
                _ => {
                    self.turns.remove(place);
                    let job = queue.jobs.pop_front().expect("a session whose turn it is has jobs");
                    if !queue.jobs.is_empty() {
                        self.turns.push_back(Arc::clone(&filling));
                    }
                    drop(queue);
                    return Next::Install(filling, job);
                }
            }
        }
        match self.fills {
            0 if self.turns.is_empty() => Next::End,
            _ => Next::Wait(until),
        }
    }

    /// Notes the outcome of a job. If an obstacle stopped it, `stopped` is its rest, which is
    /// retried later.
    fn after(&mut self, filling: &Arc<Filling>, stopped: Option<Job>) {
        let mut queue = filling.queue();
        let Some(job) = stopped else {
            (queue.not_before, queue.pause) = (None, Duration::ZERO);
            return;
        };
        queue.pause = (queue.pause * 2).clamp(OBSTACLE_PAUSE.start, OBSTACLE_PAUSE.end);
        queue.not_before = Some(Instant::now() + queue.pause);
        queue.jobs.push_front(job);
        if queue.jobs.len() == 1 {
            self.turns.push_back(Arc::clone(filling));
        }
    }
}

/// A thread of the pool.
struct Thread {
    gives_way: bool,
    is_counted: bool,
}

impl Thread {
    fn run(mut self) {
        let mut tools = Tools::default();
        let mut pool = pool();
        loop {
            match pool.next(self.gives_way, Instant::now()) {
                Next::Install(filling, job) => {
                    drop(pool);
                    let stopped = Installer::new(&filling, &mut tools).install(job);
                    pool = self::pool();
                    pool.after(&filling, stopped);
                }
                Next::Wait(until) => {
                    let changed = &CHANGED[usize::from(self.gives_way)];
                    pool = match until {
                        None => changed.wait(pool).unwrap_or_else(PoisonError::into_inner),
                        Some(until) => {
                            let most = until.saturating_duration_since(Instant::now());
                            changed.wait_timeout(pool, most).unwrap_or_else(PoisonError::into_inner).0
                        }
                    };
                }
                Next::End => {
                    // The lock is held since the decision to end, so a fill that joins later starts
                    // another thread.
                    pool.discount(self.gives_way);
                    self.is_counted = false;
                    return;
                }
            }
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // A thread that is still counted here has panicked.
        if self.is_counted {
            pool().discount(self.gives_way);
        }
    }
}
