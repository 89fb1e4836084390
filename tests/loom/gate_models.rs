//! Installers and the pager at the gate.

use crate::gate::Gate;
use crate::page_models::states_of;
use crate::page_states::{PageState, PageStates};
use crate::{check, enter_alone, join, spawn, wait_for_installers};
use loom::sync::Notify;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::Arc;

const PAGES: usize = 2;

// What the kernel knows of a page.
const INSTALLED: usize = 1;
/// Its REMOVE was read: its owner goes on, and relies on zeros.
const REMOVE_READ: usize = 2;
/// Something was installed after that.
const LATE: usize = 4;

/// Added to the number of installers inside: the pager is.
const PAGER: usize = 100;
/// Or nobody may be.
const CLOSED: usize = 200;

/// A region, and the kernel that it lies in.
pub(crate) struct Memory {
    pub(crate) gate: Gate,
    pub(crate) states: PageStates,
    kernel: [AtomicUsize; PAGES],
    inside: AtomicUsize,
    /// The pager and an installer met.
    met: AtomicBool,
}

impl Memory {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            gate: Gate::default(),
            states: states_of(PAGES),
            kernel: Default::default(),
            inside: AtomicUsize::new(0),
            met: AtomicBool::new(false),
        })
    }

    /// What is done in the gate. Violations are noted, not told of by a panic: it would leave by the gate, too.
    fn inside(&self, who: usize, what: impl FnOnce()) {
        let others = self.inside.fetch_add(who, Relaxed);
        if who == PAGER && others > 0 || others >= PAGER {
            self.met.store(true, Relaxed);
        }
        what();
        self.inside.fetch_sub(who, Relaxed);
    }

    /// UFFDIO_COPY. A page that is there is left.
    fn copy(&self, page: usize) {
        if self.kernel[page].fetch_or(INSTALLED, Relaxed) & REMOVE_READ != 0 {
            self.kernel[page].fetch_or(LATE, Relaxed);
        }
    }

    /// Installs what is absent of these pages. The gate is passed.
    pub(crate) fn install(&self, run: std::ops::Range<usize>) {
        self.inside(1, || {
            run.clone().for_each(|page| self.copy(page));
            self.states.set_resident(run).unwrap();
        });
    }

    pub(crate) fn absent(&self) -> Option<std::ops::Range<usize>> {
        self.states.next_run(0..PAGES, &[PageState::Absent, PageState::Poisoned])
    }

    /// An installer as it should be.
    pub(crate) fn pass_and_install(&self) {
        let pass = self.gate.enter().expect("nobody closes the gate");
        if let Some(run) = self.absent() {
            self.install(run);
        }
        drop(pass);
    }

    /// Reads the REMOVE of the first page.
    pub(crate) fn read(&self) {
        let pass = enter_alone(&self.gate);
        self.inside(PAGER, || {
            self.kernel[0].fetch_or(REMOVE_READ, Relaxed);
            self.states.set_removed(0..1).unwrap();
        });
        drop(pass);
    }

    /// All is done: whether it was right.
    pub(crate) fn assert_right(&self) {
        assert!(!self.met.load(Relaxed), "the pager and an installer were inside together");
        assert_eq!(self.kernel[0].load(Relaxed) & LATE, 0, "a removed page was installed");
        assert_eq!(self.states.get(0), PageState::Removed);
        assert_eq!(self.states.get(1), PageState::Resident);
        assert_eq!(self.kernel[1].load(Relaxed), INSTALLED);
    }
}

#[test]
fn nothing_is_installed_after_its_removal_was_read() {
    check(|| {
        let memory = Memory::new();
        let installers = [(); 2].map(|()| spawn(&memory, Memory::pass_and_install));
        memory.read();
        assert_eq!(memory.states.get(0), PageState::Removed);
        join(installers);
        memory.assert_right();
    });
}

#[test]
fn the_pager_never_waits_for_an_installer_that_waits_for_it() {
    check(|| {
        let both = Arc::new((Gate::default(), Notify::new()));
        let waiting = spawn(&both, |(gate, pager_has_tried)| {
            let pass = gate.enter();
            pager_has_tried.wait();
            drop(pass);
        });
        let other = spawn(&both, |(gate, _)| drop(gate.enter()));
        let (gate, pager_has_tried) = &*both;
        let pass = gate.try_enter_alone();
        pager_has_tried.notify();
        drop(pass.unwrap_or_else(|| enter_alone(gate)));
        join([waiting, other]);
    });
}

#[test]
fn a_pager_that_gave_up_is_told_by_the_last_installer_and_goes_first() {
    check(|| {
        let both = Arc::new((Gate::default(), AtomicUsize::new(0)));
        let first = both.0.enter();
        assert!(both.0.try_enter_alone().is_none());
        // These come in between, and wait in front.
        let late = [(); 2].map(|()| {
            spawn(&both, |(gate, late)| {
                let pass = gate.enter();
                late.fetch_add(1, Relaxed);
                drop(pass);
            })
        });
        let (gate, late_inside) = &*both;
        drop(first);
        wait_for_installers(gate);
        let pass = gate.try_enter_alone().expect("nobody else came in");
        assert_eq!(late_inside.fetch_add(0, Relaxed), 0);
        drop(pass);
        join(late);
    });
}

#[test]
fn a_pager_that_stops_waiting_lets_installers_in() {
    check(|| {
        let both = Arc::new((Gate::default(), Notify::new()));
        let first = spawn(&both, |(gate, other_has_been_in)| {
            let pass = gate.enter();
            other_has_been_in.wait();
            drop(pass);
        });
        let other = spawn(&both, |(gate, other_has_been_in)| {
            drop(gate.enter());
            other_has_been_in.notify();
        });
        drop(both.0.try_enter_alone());
        both.0.stop_waiting();
        join([first, other]);
        assert!(both.0.try_enter_alone().is_some());
    });
}

/// Memory that its session lets go of.
#[derive(Default)]
struct Mapping {
    gate: Gate,
    ended: AtomicBool,
    unmapped: AtomicBool,
    touched_unmapped: AtomicBool,
}

impl Mapping {
    fn install(&self) {
        let pass = self.gate.enter();
        if !self.ended.load(Relaxed) && self.unmapped.load(Relaxed) {
            self.touched_unmapped.store(true, Relaxed);
        }
        drop(pass);
    }

    fn unmap(&self) {
        self.ended.store(true, Relaxed);
        self.gate.pass_through();
        self.unmapped.store(true, Relaxed);
    }

    fn assert_right(&self) {
        assert!(!self.touched_unmapped.load(Relaxed));
        assert!(self.gate.try_enter_alone().is_some(), "nobody is left inside");
    }
}

#[test]
fn what_ended_before_all_have_left_can_be_unmapped() {
    check(|| {
        let mapping = Arc::new(Mapping::default());
        let installers = [(); 2].map(|()| spawn(&mapping, Mapping::install));
        mapping.unmap();
        join(installers);
        mapping.assert_right();
    });
}

#[test]
fn the_pager_passes_beside_those_who_wait_for_installers_to_leave() {
    check(|| {
        let mapping = Arc::new(Mapping::default());
        let threads = [spawn(&mapping, Mapping::install), spawn(&mapping, Mapping::unmap)];
        drop(enter_alone(&mapping.gate));
        join(threads);
        mapping.assert_right();
    });
}

#[test]
fn nobody_is_inside_a_closed_gate_or_enters_it() {
    check(|| {
        let both = Arc::new((Gate::default(), AtomicUsize::new(0), AtomicBool::new(false)));
        let installers = [(); 2].map(|()| {
            spawn(&both, |(gate, inside, came_late)| {
                for _ in 0..2 {
                    let Some(pass) = gate.enter() else { return };
                    let others = [inside.fetch_add(1, Relaxed), inside.fetch_sub(1, Relaxed)];
                    came_late.fetch_or(others.into_iter().any(|others| others >= CLOSED), Relaxed);
                    drop(pass);
                }
            })
        });
        let (gate, inside, came_late) = &*both;
        // The pager may end while it waits.
        drop(gate.try_enter_alone());
        gate.close();
        assert_eq!(inside.fetch_add(CLOSED, Relaxed), 0);
        assert!(gate.enter().is_none());
        join(installers);
        assert!(!came_late.load(Relaxed));
    });
}
