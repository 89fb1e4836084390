//! Tells long work whether anyone waits for its result.

use crate::store::StoreError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The caller of long work. Work checks at each step whether the caller has left.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    has_left: Arc<AtomicBool>,
}

impl Caller {
    /// Returns a guard; when it is dropped, the caller has left.
    pub fn waits(&self) -> Waits {
        Waits(self.clone())
    }

    /// Checks that the caller still waits.
    ///
    /// # Errors
    /// [`StoreError::Abandoned`].
    pub fn check(&self) -> Result<(), StoreError> {
        match self.has_left.load(Ordering::Relaxed) {
            true => Err(StoreError::Abandoned),
            false => Ok(()),
        }
    }
}

/// The caller waits until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Waits(Caller);

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.has_left.store(true, Ordering::Relaxed);
    }
}
