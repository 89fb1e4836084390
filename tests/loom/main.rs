//! The gate and the page states in the orders that threads can run in, and with the values that loads may see.
//!
//! The files are the client's own. [`sync`] and [`words`] stand here for its modules of these names, and give them
//! loom's mutexes and atomics. What the models keep for themselves is read and written with no ordering: only the gate
//! orders it.
// Where clippy takes helpers for parts of tests, too.
#![cfg(test)]

#[path = "../../client/src/memory/arena.rs"]
#[expect(dead_code, reason = "a successor adopts runs")]
mod arena;
#[path = "../../client/src/memory/gate.rs"]
mod gate;
#[expect(dead_code, reason = "other code counts states and reads those that were left")]
#[path = "../../client/src/memory/page_states.rs"]
mod page_states;

mod canaries;
mod gate_models;
mod page_models;

use futures_util::FutureExt;
use gate::{Gate, PagerPass};
use loom::thread::{self, JoinHandle};
use std::sync::Arc;

/// What the client has in client/src/sync.rs.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use std::sync::Arc;
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

/// What the client has in client/src/memory/words.rs: a few words.
mod words {
    use loom::sync::atomic::AtomicU64;
    use std::io;
    use std::ops::Range;

    #[derive(Debug)]
    pub(crate) enum Words {
        Own(Box<[AtomicU64]>),
        #[expect(dead_code, reason = "models have no file")]
        Mapped(Box<[AtomicU64]>),
    }

    impl Words {
        pub(crate) fn own(count: usize) -> Self {
            Self::Own((0..count).map(|_| AtomicU64::new(0)).collect())
        }

        pub(crate) fn limit(&self) -> usize {
            let (Self::Own(words) | Self::Mapped(words)) = self;
            words.len()
        }

        pub(crate) fn reserve(&self, range: &Range<usize>) -> io::Result<()> {
            if range.end > self.limit() { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
        }

        pub(crate) fn at(&self, at: usize, count: usize) -> &[AtomicU64] {
            let (Self::Own(words) | Self::Mapped(words)) = self;
            &words[at..at + count]
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
