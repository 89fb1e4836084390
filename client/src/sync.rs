//! The synchronization primitives of the gate and the page states. The exhaustive check in
//! tests/loom replaces them with loom's, under the same names.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
pub(crate) use tokio::sync::Notify;
