//! The lock that orders installs and events: it admits either several installers, or the pager
//! alone.
//!
//! An installer passes the gate for one piece of at most 64 KiB (or one page of 2 MiB), together
//! with other installers. The pager passes it alone, to read events and to change page states by
//! them. The reason: once the pager has read an event, the kernel lets the owner's madvise
//! continue. By then, an installer that read a page's state earlier must have finished its ioctl.
//!
//! The pager never blocks here. It tries to enter, and is notified when the installers have left;
//! until then, new installers wait outside. The mutex is held for a few instructions, never over a
//! system call.

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
    /// The number of [`Gate::pass_through`] calls that wait until all installers have left. New
    /// installers wait for them.
    leaving: usize,
    /// The number of threads that wait for `changed`. With none, the gate skips the notification,
    /// which would be a system call.
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
        // A poisoned mutex is still consistent: no code under it panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        let mut state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state
    }

    /// Notifies all waiting threads that `state` has changed.
    fn changed(&self, state: &State) {
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Enters the gate as an installer, together with other installers. Returns None if the pager
    /// has ended: then nothing may be installed.
    ///
    /// # Blocking
    /// Blocks while the pager is inside or waits to enter, for as long as it reads events. The
    /// pager must never call it.
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

    /// Enters the gate alone, if no installer is inside. Returns None otherwise; the caller then
    /// waits for [`Gate::installers_left`] and tries again.
    pub(crate) fn try_enter_alone(&self) -> Option<PagerPass<'_>> {
        let mut state = self.state();
        if state.installers > 0 {
            state.pager = Pager::Waiting;
            return None;
        }
        state.pager = Pager::Inside;
        Some(PagerPass(self))
    }

    /// Admits installers again, after [`Gate::try_enter_alone`] has returned `None` and the pager
    /// does not try again.
    pub(crate) fn stop_waiting(&self) {
        let mut state = self.state();
        if state.pager == Pager::Waiting {
            state.pager = Pager::Outside;
            self.changed(&state);
        }
    }

    /// Waits until the installers have left, after a [`Gate::try_enter_alone`] that returned None.
    pub(crate) async fn installers_left(&self) {
        self.installers_left.notified().await;
    }

    /// Waits until all installers that were inside at the call have left.
    ///
    /// # Blocking
    /// Blocks for as long as each installer takes for its piece. The pager must never call it.
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

    /// Closes the gate for good, because the pager ends.
    ///
    /// # Blocking
    /// Blocks until the installers inside have installed their piece.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.pager = Pager::Ended;
        self.changed(&state);
        while state.installers > 0 {
            state = self.wait(state);
        }
    }
}

/// An installer's pass: the installer is inside the gate until it drops the pass.
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

/// The pager's pass: the pager is inside the gate, alone, until it drops the pass.
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
            let pager = gate.try_enter_alone().expect("no installer is inside");
            assert!(!late.is_finished());
            drop(pager);
            late.join().unwrap();
        });
        assert!(gate.try_enter_alone().is_some());
    }

    #[tokio::test]
    async fn the_pager_is_notified_when_the_installers_have_left() {
        let gate = Gate::default();
        let (a, b) = (gate.enter(), gate.enter());
        drop(a);
        assert!(gate.try_enter_alone().is_none());
        drop(b);
        gate.installers_left().await;
        assert!(gate.try_enter_alone().is_some());
    }

    #[test]
    fn a_closed_gate_admits_no_installer() {
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
