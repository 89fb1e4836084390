//! The CPU time that servers take for a block, by the place from which they read it.

use crate::model::Costs;
use crate::restores::Images;
use crate::servers::Servers;
use anyhow::Result;

/// Starts of the server whose disk is measured: the kernel counts CPU time in steps of 10 ms.
const STARTS: u32 = 4;

/// Measures servers whose caches hold all images. `blocks` is the count of blocks that a server
/// reads to restore each image once, `distinct` the count of different ones.
#[expect(clippy::cast_precision_loss, reason = "counts")]
pub(crate) fn measure(servers: &Servers, images: &Images, blocks: u64, distinct: u64) -> Result<Costs> {
    // In the first pass each owner reads its packs from the bucket, and server 0 gets the blocks of
    // others from them.
    let restore_all = |number: usize| -> Result<f64> {
        let before = servers.cpu_seconds();
        for image in 0..images.count() {
            let _ = images.restore(&servers.addresses[number], image, 1)?;
        }
        Ok(servers.cpu_seconds() - before)
    };
    let owned = distinct as f64 / servers.addresses.len() as f64;
    let from_others = distinct as f64 - owned;
    let first = restore_all(0)?;
    let warm = restore_all(0)?;
    let serve = warm / blocks as f64;
    // Server 1 has its own blocks in memory, and gets all others from servers that have them there.
    let by_peers = restore_all(1)?;
    let peer = (by_peers - warm).max(0.0) / from_others;
    // A server that starts again has its own blocks on its disk.
    let mut from_disk = 0.0;
    for _ in 0..STARTS {
        servers.replace(0)?;
        from_disk += restore_all(0)? / f64::from(STARTS);
    }
    let disk = (from_disk - warm - from_others * peer).max(0.0) / owned;
    let bucket = (first - warm - from_others * peer).max(0.0) / distinct as f64;
    Ok(Costs { serve, disk, peer, bucket })
}
