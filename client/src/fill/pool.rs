//! The threads that install what the bulk lanes bring: as many as there are cores, for all sessions of the process.
//!
//! The threads exist while a fill is at work ([`join`]). Sessions take turns: each gets one job installed, then the
//! next one. A session that cannot go on (no memory, or a pager that is slow to take what is handed over) loses its
//! turns for a while; no thread waits for it.

use super::installer::{Installer, Job, Tools};
use crate::shared::Shared;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a session first has no turn after an obstacle, and at most.
const OBSTACLE_PAUSE: Range<Duration> = Duration::from_micros(200)..Duration::from_millis(50);
/// How soon a thread that gives way looks whether faults have become rare.
const GIVE_WAY: Duration = Duration::from_millis(2);

/// A session's part in the pool.
#[derive(Debug)]
pub(super) struct Filling {
    pub(super) shared: Arc<Shared>,
    /// Why a chunk was refused most lately: reported when the fill gives up.
    pub(super) refused: Mutex<Option<String>>,
    /// Held for a look or a change, under the pool's lock.
    queue: Mutex<Queue>,
}

/// The fill's window bounds the jobs: each holds a page of it at least.
#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// The session has no turn before.
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

/// See the module.
#[derive(Debug)]
struct Pool {
    /// Sessions that have jobs, by their turns.
    turns: VecDeque<Arc<Filling>>,
    /// Fills at work.
    fills: usize,
    /// Threads, and those of them that give way to faults.
    threads: usize,
    giving_way: usize,
    /// The process that these are of: a fork copies this record, and no thread.
    process: u32,
}

/// Held for a look at whose turn it is; never over an install.
static POOL: Mutex<Pool> = Mutex::new(Pool::EMPTY);
/// There is a job, or the last fill has ended: for threads that give way, and for the others.
static CHANGED: [Condvar; 2] = [Condvar::new(), Condvar::new()];

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the pool's threads; a fill has one while it is at work.
#[derive(Debug)]
pub(super) struct Membership(());

/// Starts the threads that are missing.
///
/// # Errors
/// If there is no thread, and the process cannot start one.
pub(super) fn join() -> io::Result<Membership> {
    let mut pool = pool();
    let process = std::process::id();
    if pool.process != process {
        std::mem::forget(std::mem::replace(&mut *pool, Pool { process, ..Pool::EMPTY }));
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    while pool.threads < cores {
        // The first half never gives way.
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

/// Has a job done. Its session's fill must be a member.
pub(super) fn add(filling: &Arc<Filling>, job: Job) {
    let mut pool = pool();
    let mut queue = filling.queue();
    queue.jobs.push_back(job);
    if queue.jobs.len() == 1 {
        pool.turns.push_back(Arc::clone(filling));
    }
    CHANGED.iter().for_each(Condvar::notify_one);
}

/// What a thread does next.
enum Next {
    Install(Arc<Filling>, Job),
    /// Wait for a change, until then at most.
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

    /// A job is done, or an obstacle has stopped it: then it is tried again later.
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
                    // Under the lock of the decision: a fill that joins later starts another thread.
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
        // After a panic.
        if self.is_counted {
            pool().discount(self.gives_way);
        }
    }
}
