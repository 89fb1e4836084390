//! Deferred faults and installs: what the pager must try again.
//!
//! An unread event blocks installs (EAGAIN), and reading the event lets its causer continue and
//! post the next one. So the pager uses no timer for them: it reads all events, tries all deferred
//! work at once, and repeats both until the installs succeed ([`Pager::install_ready`]). Three and
//! more threads that cause events without a pause can block installs for ever, because one of them
//! always has not run since its event was read. After a millisecond the pager holds the causers
//! where they return to user mode ([`Held`]), if the session permits it, and releases them after
//! the install.
//!
//! Installers hand over an install that an event blocks. An install for which the kernel lacks
//! memory waits for a timer, with back-off.

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

/// Time without an event after which the pager takes it that EAGAIN has another reason: a memory
/// cgroup at its limit causes it, too.
const NO_EVENT: Duration = Duration::from_millis(1);
/// The least number of attempts without an event in that time. On busy cores the pager itself may
/// not run for that time.
const NO_EVENT_ATTEMPTS: u32 = 8;
/// The longest time for which the pager does nothing but read events and install.
const TURN: Duration = Duration::from_millis(6);
/// The longest such time while causers are held. It is longer because every causer blocks installs
/// until it is held.
const HELD_TURN: Duration = Duration::from_millis(60);
/// The first and the longest pause before the retry of an install for which the kernel lacks
/// memory.
const MEMORY_PAUSE: std::ops::Range<Duration> = Duration::from_millis(1)..Duration::from_millis(100);
/// Pause before the pager checks again if the fill has installed a page.
const FILL_PAUSE: Duration = Duration::from_millis(1);

/// The reason for which an install is deferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// An event that is unread, or whose causer has not run since it was read.
    Event,
    /// A lack of memory in the kernel.
    Memory,
    /// A request of the fill for the page's chunk.
    Fill,
}

/// A deferred fault, with the reason.
#[derive(Debug)]
struct Deferred {
    space: Arc<Space>,
    obstacle: Obstacle,
}

/// The deferred work of a pager, as the module describes it.
#[derive(Debug, Default)]
pub(super) struct Ready {
    /// The deferred faults, by space and address.
    faults: BTreeMap<(u32, usize), Deferred>,
    /// The installs that installers have handed over.
    handed_over: Vec<HandedOver>,
    /// The current pause after a lack of memory, and the time of the next attempt.
    memory_pause: Duration,
    memory_at: Option<Instant>,
    fill_at: Option<Instant>,
}

impl Ready {
    /// Adds a deferred fault.
    pub(super) fn defer(&mut self, space: &Arc<Space>, address: usize, obstacle: Obstacle) {
        self.faults.insert((space.id, address), Deferred { space: Arc::clone(space), obstacle });
        self.wait_for(obstacle);
    }

    /// Returns the reason for which the fault at an address of a space is deferred.
    pub(super) fn obstacle(&self, at: (u32, usize)) -> Option<Obstacle> {
        self.faults.get(&at).map(|deferred| deferred.obstacle)
    }

    /// Starts the timer for a kind of obstacle, if it has one.
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

    /// Returns true if an event blocks any of the deferred work.
    pub(super) fn is_behind_events(&self) -> bool {
        !self.handed_over.is_empty() || self.faults.values().any(|fault| fault.obstacle == Obstacle::Event)
    }

    /// Returns the time of the next attempt at work that waits for a timer.
    pub(super) fn next_attempt(&self) -> Option<Instant> {
        [self.memory_at, self.fill_at].into_iter().flatten().min()
    }

    /// Makes the next pause short again, after an install has succeeded.
    pub(super) fn has_memory(&mut self) {
        self.memory_pause = Duration::ZERO;
    }

    /// Takes the faults whose answer can be tried now.
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

    /// Treats faults that wait for events as lacking memory, and returns handed-over installs to
    /// their installers.
    fn suspect_memory(&mut self) {
        let mut is_in_the_way = !self.handed_over.is_empty();
        for fault in self.faults.values_mut().filter(|fault| fault.obstacle == Obstacle::Event) {
            (fault.obstacle, is_in_the_way) = (Obstacle::Memory, true);
        }
        if is_in_the_way {
            self.wait_for(Obstacle::Memory);
        }
        // The installers retry after a pause.
        self.handed_over.drain(..).for_each(|work| work.done(Installed::NoMemory));
    }
}

impl Pager {
    /// Defers a fault whose answer the kernel could not take.
    pub(super) fn defer(&mut self, space: &Arc<Space>, address: usize, obstacle: Obstacle) {
        if obstacle == Obstacle::Memory {
            add(&self.shared().counters.memory_waits, 1);
        }
        self.waiters.add(space, address, Wait::Fault, Instant::now());
        self.ready.defer(space, address, obstacle);
    }

    /// Returns true if events block any deferred work.
    pub(super) fn has_ready(&self) -> bool {
        self.ready.is_behind_events() || self.requests.has_ready()
    }

    /// Reads events and tries all deferred work, alternately. Returns when all is installed, or
    /// when other work has its turn.
    pub(super) fn install_ready(&mut self) {
        let started = Instant::now();
        let mut held = Held::new();
        self.try_ready();
        let (mut last_event, mut quiet) = (started, 0);
        while self.has_ready() && self.broken.is_none() {
            if self.read_in_turns() {
                (last_event, quiet) = (Instant::now(), 0);
            } else if quiet > NO_EVENT_ATTEMPTS && last_event.elapsed() > NO_EVENT {
                self.ready.wait_for(Obstacle::Memory);
                let at = self.ready.next_attempt().unwrap_or(started);
                self.requests.suspect_memory(at);
                self.ready.suspect_memory();
                break;
            }
            let turn = if held.is_empty() { TURN } else { HELD_TURN };
            if !self.has_ready() || started.elapsed() > turn {
                break;
            }
            quiet += 1;
            // Without an event, another reason blocks the install.
            if last_event > started {
                held.hold_causers(self.shared());
            }
        }
        self.shared().map.gate.stop_waiting();
        self.let_go(held);
    }

    /// Releases held threads. A thread may still be in a system call whose event must be read here;
    /// it stops after that.
    pub(super) fn let_go(&mut self, mut held: Held) {
        let since = Instant::now();
        while !held.release() && since.elapsed() < HELD_TURN {
            self.read_in_turns();
        }
        self.shared().map.gate.stop_waiting();
        self.lingering.extend(held.into_threads());
    }

    /// Releases threads that did not stop in time while the pager tried to hold them.
    pub(super) fn release_lingering(&mut self) {
        let mut held = Held::of(std::mem::take(&mut self.lingering));
        held.release();
        self.lingering = held.into_threads();
    }

    /// Reads one message of each space that has one, and tries all deferred work after each. Two
    /// causers may share a core with each other or with this thread. Then the kernel admits an
    /// install only in the microseconds in which both have run since their events were read, and
    /// neither has caused another event. So the pager does nothing else in between. Returns true if
    /// there was a message, or if an event is under way.
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
            // Installers are inside the gate, each for a piece of 64 KiB; new ones wait.
            let Some(pass) = shared.map.gate.try_enter_alone() else { break };
            let read = self.read_some(space, 1);
            drop(pass);
            self.faults();
            if let Err(stopped) = read {
                self.unreadable = self.stopped(stopped);
            }
            // The attempt follows the reading at random, because a fixed order could miss the
            // causers' windows for ever. More attempts block the causers, which need the same
            // locks.
            if fastrand::bool() {
                self.try_ready();
            }
        }
        if !is_under_way {
            self.try_ready();
        }
        is_under_way
    }

    /// Tries all deferred work once, but for work whose timer is not due.
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
            // Another pass installs the rest.
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
