//! A cache that evicts the least recently used objects.

use postcopy_proto::digest::Digest;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct Slot<V> {
    value: Arc<V>,
    bytes: usize,
    used: u64,
}

#[derive(Debug)]
struct Slots<V> {
    by_digest: HashMap<Digest, Slot<V>>,
    bytes: usize,
    clock: u64,
}

/// Parsed objects or open packs by digest, together at most `max_bytes`, or as many as that if each
/// counts as one byte. A larger object is kept alone.
#[derive(Debug)]
pub(crate) struct Cache<V> {
    max_bytes: usize,
    /// Locked for a look-up or an insertion, never while an object is read or parsed.
    slots: Mutex<Slots<V>>,
}

impl<V> Cache<V> {
    pub(crate) fn new(max_bytes: usize) -> Self {
        let slots = Slots { by_digest: HashMap::new(), bytes: 0, clock: 0 };
        Self { max_bytes, slots: Mutex::new(slots) }
    }

    fn lock(&self) -> MutexGuard<'_, Slots<V>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, digest: &Digest) -> Option<Arc<V>> {
        let mut slots = self.lock();
        slots.clock += 1;
        let clock = slots.clock;
        let slot = slots.by_digest.get_mut(digest)?;
        slot.used = clock;
        Some(slot.value.clone())
    }

    pub(crate) fn remove(&self, digest: &Digest) {
        let mut slots = self.lock();
        let removed = slots.by_digest.remove(digest);
        slots.bytes -= removed.as_ref().map_or(0, |removed| removed.bytes);
        // The drop may take long: it unmaps a pack.
        drop(slots);
        drop(removed);
    }

    pub(crate) fn keys(&self) -> Vec<Digest> {
        self.lock().by_digest.keys().copied().collect()
    }

    pub(crate) fn insert(&self, digest: Digest, value: Arc<V>, bytes: usize) {
        let mut slots = self.lock();
        slots.clock += 1;
        let used = slots.clock;
        let mut removed = Vec::new();
        removed.extend(slots.by_digest.insert(digest, Slot { value, bytes, used }));
        slots.bytes += bytes;
        slots.bytes -= removed.first().map_or(0, |old| old.bytes);
        while slots.bytes > self.max_bytes && slots.by_digest.len() > 1 {
            // There are at most some thousand objects, so a search costs less than keeping an order.
            let oldest = slots.by_digest.iter().min_by_key(|(_, slot)| slot.used).map(|(digest, _)| *digest);
            let Some(evicted) = oldest.and_then(|oldest| slots.by_digest.remove(&oldest)) else { break };
            slots.bytes -= evicted.bytes;
            removed.push(evicted);
        }
        // The drops may take long: they unmap packs.
        drop(slots);
        drop(removed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_is_forgotten_first() {
        let cache = Cache::new(100);
        let digests: Vec<_> = (0..3u8).map(|i| Digest::of(&[i])).collect();
        for (i, digest) in digests.iter().enumerate().take(2) {
            cache.insert(*digest, Arc::new(i), 40);
        }
        assert!(cache.get(&digests[0]).is_some());
        cache.insert(digests[2], Arc::new(2), 40);
        assert!(cache.get(&digests[1]).is_none(), "used least recently");
        assert!(cache.get(&digests[0]).is_some() && cache.get(&digests[2]).is_some());
        cache.insert(digests[1], Arc::new(1), 1000);
        assert!(cache.get(&digests[1]).is_some(), "a large one is kept alone");
        assert!(cache.get(&digests[0]).is_none() && cache.get(&digests[2]).is_none());
    }
}
