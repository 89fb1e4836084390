//! Installs that are ready and could not be done yet.
//!
//! An unread event keeps the kernel from installing (EAGAIN), and reading the event lets its causer go on and post the
//! next one. So nothing here waits for a timer: the pager reads all events and installs all that is ready at once, and
//! again, until that gets through ([`Pager::install_ready`]). Three and more threads that cause events without a pause
//! can overtake that for ever, because there is always one that has not run since its event was read: after
//! [`HOLD_AFTER`] the pager holds the causers where they return to user mode ([`Held`]), if it may, and lets them go
//! after the install.
//!
//! Installers hand over what they meet an event with. What the kernel has no memory for waits for a timer, ever longer.

use super::Pager;
use super::hold::Held;
use super::waiters::Wait;
use crate::install::Installed;
use crate::install::hand_over::HandedOver;
use crate::memory::Space;
use crate::options::add;
use crate::record::trace::{Cause, Stages};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long installs and events take turns before the causers of events are held. Two threads in madvise without a
/// pause let an install through within a millisecond, mostly.
pub(super) const HOLD_AFTER: Duration = Duration::from_millis(3);
/// Where no event is under way for so long, the kernel defers an install for another reason: a memory cgroup at its
/// limit answers so.
const NO_EVENT: Duration = Duration::from_millis(1);
/// How long the pager does nothing else in one go.
const TURN: Duration = Duration::from_millis(6);
/// The same once causers are held: all of them are in the kernel's way until then.
const HELD_TURN: Duration = Duration::from_millis(60);
/// The first pause before an install is tried again that the kernel has no memory for, and the longest.
const MEMORY_PAUSE: std::ops::Range<Duration> = Duration::from_millis(1)..Duration::from_millis(100);
/// How soon it is looked whether the fill has brought a page.
const FILL_PAUSE: Duration = Duration::from_millis(1);

/// What keeps an install from being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// An event that has not been read, or whose causer has not run since.
    Event,
    /// The kernel has no memory.
    Memory,
    /// The fill has asked for the page's chunk.
    Fill,
}

/// A fault whose answer is known, or will be looked for again.
#[derive(Debug)]
struct Deferred {
    space: Arc<Space>,
    obstacle: Obstacle,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Ready {
    /// By space and address.
    faults: BTreeMap<(u32, usize), Deferred>,
    /// Handed over by installers.
    handed_over: Vec<HandedOver>,
    /// Before the next attempt where there was no memory.
    memory_pause: Duration,
    memory_at: Option<Instant>,
    fill_at: Option<Instant>,
}

impl Ready {
    /// Defers a fault.
    pub(super) fn defer(&mut self, space: &Arc<Space>, address: usize, obstacle: Obstacle) {
        self.faults.insert((space.id, address), Deferred { space: Arc::clone(space), obstacle });
        self.wait_for(obstacle);
    }

    /// What keeps a fault from being answered.
    pub(super) fn obstacle(&self, at: (u32, usize)) -> Option<Obstacle> {
        self.faults.get(&at).map(|deferred| deferred.obstacle)
    }

    /// Notes that something cannot be installed because of this.
    pub(super) fn wait_for(&mut self, obstacle: Obstacle) {
        match obstacle {
            Obstacle::Event => {}
            Obstacle::Memory if self.memory_at.is_none() => {
                self.memory_pause = (self.memory_pause * 2).clamp(MEMORY_PAUSE.start, MEMORY_PAUSE.end);
                self.memory_at = Some(Instant::now() + self.memory_pause);
            }
            Obstacle::Memory => {}
            Obstacle::Fill => _ = self.fill_at.get_or_insert_with(|| Instant::now() + FILL_PAUSE),
        }
    }

    pub(super) fn hand_over(&mut self, work: HandedOver) {
        self.handed_over.push(work);
    }

    /// Whether an event is in the way of something.
    pub(super) fn is_behind_events(&self) -> bool {
        !self.handed_over.is_empty() || self.faults.values().any(|fault| fault.obstacle == Obstacle::Event)
    }

    /// When to try again what a timer is for.
    pub(super) fn next_attempt(&self) -> Option<Instant> {
        [self.memory_at, self.fill_at].into_iter().flatten().min()
    }

    /// What has come of the kernel's lack of memory: the next pause is short again.
    pub(super) fn has_memory(&mut self) {
        self.memory_pause = Duration::ZERO;
    }

    /// Takes the faults that can be tried now.
    fn take(&mut self, now: Instant) -> Vec<(usize, Arc<Space>)> {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let (memory, fill) = (is_due(self.memory_at), is_due(self.fill_at));
        self.memory_at = self.memory_at.filter(|_| !memory);
        self.fill_at = self.fill_at.filter(|_| !fill);
        let may = |obstacle| match obstacle {
            Obstacle::Event => true,
            Obstacle::Memory => memory,
            Obstacle::Fill => fill,
        };
        let faults = std::mem::take(&mut self.faults).into_iter();
        let (due, rest): (BTreeMap<_, _>, _) = faults.partition(|(_, fault)| may(fault.obstacle));
        self.faults = rest;
        due.into_iter().map(|((_, address), fault)| (address, fault.space)).collect()
    }

    /// Takes it that the kernel's lack of memory is in the way, and no event.
    fn suspect_memory(&mut self) {
        let mut is_in_the_way = !self.handed_over.is_empty();
        for fault in self.faults.values_mut().filter(|fault| fault.obstacle == Obstacle::Event) {
            (fault.obstacle, is_in_the_way) = (Obstacle::Memory, true);
        }
        if is_in_the_way {
            self.wait_for(Obstacle::Memory);
        }
        // Their installers try again after a while.
        self.handed_over.drain(..).for_each(|work| work.done(Installed::NoMemory));
    }
}

impl Pager {
    /// Defers a fault that an outcome of the kernel is in the way of.
    pub(super) fn defer(&mut self, space: &Arc<Space>, address: usize, obstacle: Obstacle) {
        if obstacle == Obstacle::Memory {
            add(&self.shared().counters.memory_waits, 1);
        }
        self.waiters.add(space, address, Wait::Fault, Instant::now());
        self.ready.defer(space, address, obstacle);
    }

    /// Whether installs wait for nothing but events.
    pub(super) fn has_ready(&self) -> bool {
        self.ready.is_behind_events() || self.requests.has_ready()
    }

    /// Reads events and installs all that is ready, again and again, until all is installed or other work has its turn.
    pub(super) fn install_ready(&mut self) {
        let started = Instant::now();
        let (mut held, mut last_event): (Option<Held>, _) = (None, started);
        self.try_ready();
        while self.has_ready() && self.broken.is_none() {
            if self.read_in_turns() {
                last_event = Instant::now();
            } else if last_event.elapsed() > NO_EVENT {
                self.ready.wait_for(Obstacle::Memory);
                let at = self.ready.next_attempt().unwrap_or(last_event);
                self.requests.suspect_memory(at);
                self.ready.suspect_memory();
                break;
            }
            let turn = if held.is_some() { HELD_TURN } else { TURN };
            if !self.has_ready() || started.elapsed() > turn {
                break;
            }
            if held.is_none() && started.elapsed() > HOLD_AFTER {
                held = self.hold_causers();
            }
        }
        self.shared().map.gate.stop_waiting();
        self.let_go(held);
    }

    /// Holds the threads that cause events, if the session may do so and knows their processes.
    pub(super) fn hold_causers(&self) -> Option<Held> {
        let shared = self.shared();
        let held = Held::hold_causers(shared)?;
        add(&shared.counters.holds, 1);
        Some(held)
    }

    /// Lets held threads go: they stop when the calls are over whose events are read here.
    pub(super) fn let_go(&mut self, held: Option<Held>) {
        let Some(mut held) = held else { return };
        let since = Instant::now();
        while !held.release() && since.elapsed() < HELD_TURN {
            self.read_in_turns();
        }
        self.shared().map.gate.stop_waiting();
        self.lingering.extend(held.into_threads());
    }

    /// Lets threads go that did not stop in time when they were to be held.
    pub(super) fn release_lingering(&mut self) {
        let mut held = Held::of(std::mem::take(&mut self.lingering));
        held.release();
        self.lingering = held.into_threads();
    }

    /// Reads one message of each space that has one, and tries all that is ready after each. Two causers share a core
    /// with each other, or with this thread: the kernel lets an install through only in the microseconds in which both
    /// have run since their events were read, and none has caused another one. So nothing is done in between.
    /// Gives whether there was a message, or an event is under way.
    fn read_in_turns(&mut self) -> bool {
        let mut is_under_way = false;
        let shared = Arc::clone(&self.on_exit.shared);
        let watched: Vec<_> = self.watched.iter().map(|watched| Arc::clone(&watched.space)).collect();
        for space in &watched {
            if !space.uffd.is_readable().unwrap_or(true) {
                is_under_way |= space.uffd.has_event();
                continue;
            }
            is_under_way = true;
            // Installers are inside, for a piece of 64 KiB each; new ones wait.
            let Some(pass) = shared.map.gate.try_enter_alone() else { break };
            let read = self.read_some(space, 1);
            drop(pass);
            self.faults();
            if let Err(stopped) = read {
                self.unreadable = self.stopped(stopped);
            }
            // At one time or another after the reading: a fixed one could miss the causers' windows for ever. More
            // attempts keep the causers out, which need the same locks.
            if fastrand::bool() {
                self.try_ready();
            }
        }
        if !is_under_way {
            self.try_ready();
        }
        is_under_way
    }

    /// Tries all that is ready once, and what a timer is over for.
    pub(super) fn try_ready(&mut self) {
        let now = Instant::now();
        for (address, space) in self.ready.take(now) {
            if !space.is_gone() {
                self.fault(&space, address);
            }
        }
        for (chunk, frame) in self.requests.take_ready(now) {
            self.install(chunk, frame);
        }
        for work in std::mem::take(&mut self.ready.handed_over) {
            self.install_handed_over(work);
        }
        if !self.ready.faults.values().any(|fault| fault.obstacle == Obstacle::Fill) {
            self.behind.clear();
        }
    }

    fn install_handed_over(&mut self, work: HandedOver) {
        let spaces = self.shared().spaces();
        if work.deadline <= Instant::now().into_std() || !spaces.holds(&work.region) {
            // Another pass brings what is left.
            return work.done(Installed::All);
        }
        let install = || work.install();
        let (region, pages) = (&work.region, &work.pages);
        match self.shared().installing(region, pages, Cause::Background, Stages::default(), install) {
            Installed::Deferred => self.ready.hand_over(work),
            installed => work.done(installed),
        }
    }
}
