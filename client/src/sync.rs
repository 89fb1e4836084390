//! What the gate is made of. The exhaustive check in tests/loom has loom's under the same names.

pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
pub(crate) use tokio::sync::Notify;
