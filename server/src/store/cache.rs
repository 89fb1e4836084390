//! A cache that evicts the least recently used objects.

use lru::LruCache;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct Slot<V> {
    value: Arc<V>,
    bytes: usize,
}

#[derive(Debug)]
struct Slots<K: Eq + Hash, V> {
    by_key: LruCache<K, Slot<V>>,
    bytes: usize,
}

/// Parsed objects, open packs or blocks of packs, together at most `max_bytes`, or as many as that
/// if each counts as one byte. A larger object is kept alone.
#[derive(Debug)]
pub(crate) struct Cache<K: Eq + Hash, V> {
    max_bytes: usize,
    /// Locked for a look-up or an insertion, never while an object is read or parsed.
    slots: Mutex<Slots<K, V>>,
}

impl<K: Copy + Eq + Hash, V> Cache<K, V> {
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { max_bytes, slots: Mutex::new(Slots { by_key: LruCache::unbounded(), bytes: 0 }) }
    }

    fn lock(&self) -> MutexGuard<'_, Slots<K, V>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, key: &K) -> Option<Arc<V>> {
        self.lock().by_key.get(key).map(|slot| slot.value.clone())
    }

    pub(crate) fn remove(&self, key: &K) {
        let mut slots = self.lock();
        let removed = slots.by_key.pop(key);
        slots.bytes -= removed.as_ref().map_or(0, |removed| removed.bytes);
        // The drop may take long: it unmaps a pack.
        drop(slots);
        drop(removed);
    }

    pub(crate) fn keys(&self) -> Vec<K> {
        self.lock().by_key.iter().map(|(key, _)| *key).collect()
    }

    pub(crate) fn insert(&self, key: K, value: Arc<V>, bytes: usize) {
        let mut slots = self.lock();
        let mut removed = Vec::new();
        removed.extend(slots.by_key.put(key, Slot { value, bytes }));
        slots.bytes += bytes;
        slots.bytes -= removed.first().map_or(0, |old| old.bytes);
        while slots.bytes > self.max_bytes && slots.by_key.len() > 1 {
            let Some((_, evicted)) = slots.by_key.pop_lru() else { break };
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
    use postcopy_proto::digest::Digest;

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
