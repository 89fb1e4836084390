//! Who may touch page states and memory when.
//!
//! Installers pass the gate together, for one piece of at most 64 KiB (or a page of 2 MiB) each. The pager passes it
//! alone, around reading events and changing states by them, because reading an event is what lets the other side's
//! madvise go on: an installer that looked at a page's state before must be done with it by then.
//!
//! The pager never waits here. It tries, and is notified when the installers have left; until then new
//! installers wait in front. The mutex is held for a few instructions, never over a call into the kernel.

use crate::sync::{Condvar, Mutex, MutexGuard, Notify, PoisonError};

#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    installers_left: Notify,
}

#[derive(Debug, Default)]
struct State {
    installers: usize,
    /// How many wait until all installers have left; no new ones come in until then.
    leaving: usize,
    /// Threads that wait for `changed`: a notification is a system call, also where nobody waits.
    waiting: usize,
    pager: Pager,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Pager {
    #[default]
    Outside,
    Waiting,
    Inside,
    Ended,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic happens under the mutex.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        let mut state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state
    }

    /// Tells all who wait that `state` has changed.
    fn changed(&self, state: &State) {
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Passes as an installer, together with others. None: the pager has ended, nothing may be installed.
    ///
    /// # Blocking
    /// While the pager is inside or waits: as long as it reads events. Never call it from the pager.
    pub(crate) fn enter(&self) -> Option<InstallerPass<'_>> {
        let mut state = self.state();
        while state.leaving > 0 || matches!(state.pager, Pager::Inside | Pager::Waiting) {
            state = self.wait(state);
        }
        if state.pager == Pager::Ended {
            return None;
        }
        state.installers += 1;
        Some(InstallerPass(self))
    }

    /// Passes alone, if no installer is inside; else [`Gate::installers_left`] tells when to try again.
    pub(crate) fn try_enter_alone(&self) -> Option<PagerPass<'_>> {
        let mut state = self.state();
        if state.installers > 0 {
            state.pager = Pager::Waiting;
            return None;
        }
        state.pager = Pager::Inside;
        Some(PagerPass(self))
    }

    /// Lets installers in again after a [`Gate::try_enter_alone`] that gave None, and is not tried again.
    pub(crate) fn stop_waiting(&self) {
        let mut state = self.state();
        if state.pager == Pager::Waiting {
            state.pager = Pager::Outside;
            self.changed(&state);
        }
    }

    /// Waits until the installers have left after a [`Gate::try_enter_alone`] that gave None.
    pub(crate) async fn installers_left(&self) {
        self.installers_left.notified().await;
    }

    /// Waits until those who were inside have left.
    ///
    /// # Blocking
    /// As long as installers take for a piece each. Never call it from the pager.
    pub(crate) fn pass_through(&self) {
        let mut state = self.state();
        state.leaving += 1;
        while state.installers > 0 {
            state = self.wait(state);
        }
        state.leaving -= 1;
        if state.leaving == 0 {
            self.changed(&state);
        }
    }

    /// Closes the gate for good: the pager ends.
    ///
    /// # Blocking
    /// Until the installers that are inside have done their piece.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.pager = Pager::Ended;
        self.changed(&state);
        while state.installers > 0 {
            state = self.wait(state);
        }
    }
}

/// An installer is inside until this is dropped.
#[derive(Debug)]
pub(crate) struct InstallerPass<'a>(&'a Gate);

impl Drop for InstallerPass<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.installers -= 1;
        if state.installers == 0 {
            self.0.installers_left.notify_one();
            self.0.changed(&state);
        }
    }
}

/// The pager is inside until this is dropped.
#[derive(Debug)]
pub(crate) struct PagerPass<'a>(&'a Gate);

impl Drop for PagerPass<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.pager = Pager::Outside;
        self.0.changed(&state);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_pager_is_alone_and_comes_before_new_installers() {
        let gate = Gate::default();
        let installer = gate.enter();
        assert!(gate.try_enter_alone().is_none());
        std::thread::scope(|scope| {
            let late = scope.spawn(|| drop(gate.enter()));
            drop(installer);
            let pager = gate.try_enter_alone().expect("nobody is inside");
            assert!(!late.is_finished());
            drop(pager);
            late.join().unwrap();
        });
        assert!(gate.try_enter_alone().is_some());
    }

    #[tokio::test]
    async fn the_pager_is_told_when_the_installers_have_left() {
        let gate = Gate::default();
        let (a, b) = (gate.enter(), gate.enter());
        drop(a);
        assert!(gate.try_enter_alone().is_none());
        drop(b);
        gate.installers_left().await;
        assert!(gate.try_enter_alone().is_some());
    }

    #[test]
    fn nobody_enters_a_closed_gate() {
        let gate = Gate::default();
        let installer = gate.enter();
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| gate.close());
            drop(installer);
            closing.join().unwrap();
        });
        assert!(gate.enter().is_none());
    }
}
