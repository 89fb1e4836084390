//! The gate and the page states in the orders that threads can run in, and with the values that loads may see.
//!
//! The files are the client's own. [`sync`] and [`state`] stand here for its modules of these names, and give them
//! loom's mutexes and atomics. What the models keep for themselves is read and written with no ordering: only the gate
//! orders it.
// Where clippy takes helpers for parts of tests, too.
#![cfg(test)]

#[path = "../../client/src/gate.rs"]
mod gate;
#[expect(dead_code, reason = "states are copied and counted by others")]
#[path = "../../client/src/page_state.rs"]
mod page_state;

mod canaries;
mod gate_models;
mod page_models;

use futures_util::FutureExt;
use gate::{Gate, PagerPass};
use loom::thread::{self, JoinHandle};
use std::sync::Arc;

/// What the client has in client/src/sync.rs.
mod sync {
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use std::sync::PoisonError;

    /// Keeps one permit, as tokio's does. Waiting for it blocks the thread, and may end for no reason.
    #[derive(Debug, Default)]
    pub(crate) struct Notify(loom::sync::Notify);

    impl Notify {
        pub(crate) fn notify_one(&self) {
            self.0.notify();
        }

        pub(crate) async fn notified(&self) {
            self.0.wait();
        }
    }
}

/// What the client has in client/src/state.rs, without a file.
mod state {
    use loom::sync::atomic::AtomicU64;

    #[derive(Debug)]
    pub(crate) struct Words(Box<[AtomicU64]>);

    impl Words {
        pub(crate) fn own(count: usize) -> Self {
            Self((0..count).map(|_| AtomicU64::new(0)).collect())
        }
    }

    impl std::ops::Deref for Words {
        type Target = [AtomicU64];

        fn deref(&self) -> &[AtomicU64] {
            &self.0
        }
    }
}

/// Runs a model in the orders with at most four preemptions: any number would take minutes.
fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(model);
}

fn spawn<T: Send + Sync + 'static>(with: &Arc<T>, run: impl FnOnce(&T) + 'static) -> JoinHandle<()> {
    let with = Arc::clone(with);
    thread::spawn(move || run(&with))
}

fn join(threads: impl IntoIterator<Item = JoinHandle<()>>) {
    for thread in threads {
        thread.join().unwrap();
    }
}

/// What the pager does: tries, and tries again whenever it is told to.
fn enter_alone(gate: &Gate) -> PagerPass<'_> {
    loop {
        if let Some(pass) = gate.try_enter_alone() {
            return pass;
        }
        wait_for_installers(gate);
    }
}

fn wait_for_installers(gate: &Gate) {
    gate.installers_left().now_or_never().expect("loom's blocks");
}
