//! Sends the changed pages of chunks, and learns the digests of the new chunks.
//!
//! The server makes the new chunks of the base's. Its answer has the chaining values of the base's
//! pages, with which this client computes both digests: so it need not believe the server.

use super::error::PushError;
use super::reading::{Batch, ChangedChunk, Chunk, Found};
use super::{UPLOADS, worker};
use crate::remote::{Patience, Remote, RemoteError};
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::ChunkContent;
use postcopy_proto::proof::Leaves;
use postcopy_proto::{MAX_PATCHED_BYTES, MAX_PATCHES, v1};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::task::JoinSet;

/// Bytes of patches after which a request is sent. With the longest patch it is shorter than a
/// message may be.
const REQUEST_BYTES: usize = 1 << 20;

/// Sends the changed chunks of a batch. Returns the contents of the new chunks, in order.
pub(super) async fn patch(remote: &Remote, batch: Batch) -> Result<(Batch, Vec<ChunkContent>), PushError> {
    let requests = requests(&batch);
    if requests.is_empty() {
        return Ok((batch, Vec::new()));
    }
    let (mut sending, mut answers) = (JoinSet::new(), HashMap::new());
    for (number, request) in requests.into_iter().enumerate() {
        if sending.len() >= UPLOADS
            && let Some(sent) = sending.join_next().await
        {
            let (number, answer) = sent.map_err(worker)??;
            answers.insert(number, answer);
        }
        sending.spawn(send(remote.clone(), number, request));
    }
    while let Some(sent) = sending.join_next().await {
        let (number, answer) = sent.map_err(worker)??;
        answers.insert(number, answer);
    }
    let answers: Vec<_> = (0..answers.len()).filter_map(|number| answers.remove(&number)).flatten().collect();
    let remote = remote.clone();
    let verified = tokio::task::spawn_blocking(move || {
        let contents = contents(&remote, &batch, &answers)?;
        Ok((batch, contents))
    });
    verified.await.map_err(worker)?
}

fn changed(batch: &Batch) -> impl Iterator<Item = (&Chunk, &ChangedChunk)> {
    batch.chunks.iter().filter_map(|chunk| match &chunk.found {
        Found::Changed(changed) => Some((chunk, changed)),
        Found::Read(_) | Found::Known(_) => None,
    })
}

/// Returns the requests for the changed chunks of a batch, within the bounds of one.
fn requests(batch: &Batch) -> Vec<v1::PatchChunksRequest> {
    let (mut requests, mut patches) = (Vec::new(), Vec::new());
    let (mut chunk_bytes, mut patch_bytes) = (0, 0);
    for (chunk, ChangedChunk { base, patch, .. }) in changed(batch) {
        if patches.len() >= MAX_PATCHES
            || chunk_bytes + chunk.len > MAX_PATCHED_BYTES
            || patch_bytes >= REQUEST_BYTES
        {
            requests.push(v1::PatchChunksRequest { patches: std::mem::take(&mut patches) });
            (chunk_bytes, patch_bytes) = (0, 0);
        }
        chunk_bytes += chunk.len;
        patch_bytes += patch.len();
        patches.push(v1::ChunkPatch { base: (*base).into(), patch: patch.clone().into() });
    }
    if !patches.is_empty() {
        requests.push(v1::PatchChunksRequest { patches });
    }
    requests
}

async fn send(
    remote: Remote,
    number: usize,
    request: v1::PatchChunksRequest,
) -> Result<(usize, Vec<v1::PatchedChunk>), RemoteError> {
    let count = request.patches.len();
    let request = Arc::new(request);
    let attempt = || {
        let (mut images, request) = (remote.images(), v1::PatchChunksRequest::clone(&request));
        async move { images.patch_chunks(request).await }
    };
    let chunks = remote.ask("upload of changed pages", Patience::Long, attempt).await?.chunks;
    match chunks.len() == count {
        true => Ok((number, chunks)),
        false => {
            let reason = format!("it has {} chunks, sent were {count}", chunks.len());
            Err(remote.wrong("answer to changed pages", reason))
        }
    }
}

/// Checks the answers to all changed chunks of a batch, and returns the contents of the new chunks.
fn contents(
    remote: &Remote,
    batch: &Batch,
    answers: &[v1::PatchedChunk],
) -> Result<Vec<ChunkContent>, PushError> {
    let changed: Vec<_> = changed(batch).zip(answers).collect();
    let lens: std::collections::HashSet<_> = changed.iter().map(|((chunk, _), _)| chunk.len).collect();
    let zeros: HashMap<_, _> = lens.into_iter().map(|len| (len, Digest::of(&vec![0; len]))).collect();
    let content = |((chunk, changed), answer): ((&Chunk, &ChangedChunk), &v1::PatchedChunk)| {
        let ChangedChunk { base, .. } = changed;
        if answer.chunk.is_empty() {
            return Err(PushError::BaseLost { server: remote.address().to_string(), chunk: *base });
        }
        let pages = &batch.bytes[chunk.bytes.clone()];
        let digest = digest_of(chunk.len, changed, pages, answer)
            .map_err(|reason| remote.wrong(format!("answer to changed pages of chunk {base}"), reason))?;
        match digest == zeros[&chunk.len] {
            true => Ok(ChunkContent::Zero),
            false => Ok(ChunkContent::Data(digest)),
        }
    };
    changed.into_par_iter().map(content).collect()
}

/// Returns the digest of a new chunk, and checks that the server has made this one.
///
/// # Errors
/// Returns the defect of the answer.
fn digest_of(
    len: usize,
    changed: &ChangedChunk,
    pages: &[u8],
    answer: &v1::PatchedChunk,
) -> Result<Digest, String> {
    let mut leaves = Leaves::parse(len, &answer.leaves)
        .filter(|leaves| leaves.digest() == Some(changed.base))
        .ok_or("its chaining values are not those of the chunk")?;
    leaves.replace(&changed.runs, pages).map_err(|e| e.to_string())?;
    let digest = leaves.digest().ok_or("the chunk has one page")?;
    match answer.chunk[..] == digest.as_bytes()[..] {
        true => Ok(digest),
        false => Err(format!("the server has stored another chunk than {digest}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use postcopy_proto::page::PageRun;

    #[test]
    fn a_server_that_lies_about_a_chunk_is_found_out() {
        let old: Vec<u8> = (0..256u32).flat_map(|n| [n.to_le_bytes(); 64].concat()).collect();
        let pages = [7; 8192];
        let mut new = old.clone();
        new[4096..12_288].copy_from_slice(&pages);
        let runs = vec![PageRun { first: 1, count: 2 }];
        let changed = ChangedChunk { base: Digest::of(&old), runs, patch: Vec::new() };
        let answer =
            |chunk: Digest, leaves: Vec<u8>| v1::PatchedChunk { chunk: chunk.into(), leaves: leaves.into() };
        let (digest, leaves) = (Digest::of(&new), Leaves::of(&old).to_bytes());
        let of = |answer: &v1::PatchedChunk| digest_of(old.len(), &changed, &pages, answer);
        assert_eq!(of(&answer(digest, leaves.clone())), Ok(digest));
        let other = Digest::of(b"another chunk");
        assert!(of(&answer(other, leaves.clone())).unwrap_err().contains("another chunk"));
        // The values of the new chunk, of the whole chunk but one page, and none.
        for wrong in [Leaves::of(&new).to_bytes(), leaves[32..].to_vec(), Vec::new()] {
            assert!(of(&answer(digest, wrong)).unwrap_err().contains("chaining values"));
        }
        for at in (0..leaves.len()).step_by(29) {
            let mut wrong = leaves.clone();
            wrong[at] ^= 1;
            assert!(of(&answer(digest, wrong)).is_err(), "byte {at}");
        }
    }
}
