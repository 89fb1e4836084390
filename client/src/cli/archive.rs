//! Checkpoints as podman and CRI-O write them: tar archives, perhaps compressed, of CRIU's images and what belongs to them.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use tar::EntryType;
use tempfile::TempDir;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Unpacks a checkpoint's archive into a directory that is removed with what this gives. None: it is something else, to be
/// stored as it is.
///
/// # Errors
/// If it is one and cannot be unpacked.
pub(crate) fn unpack(path: &Path) -> Result<Option<TempDir>> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let is_archive = [".tar", ".tar.gz", ".tgz", ".tar.zst"].iter().any(|end| name.ends_with(end));
    if !is_archive || !path.is_file() {
        return Ok(None);
    }
    let shown = || path.display().to_string();
    let mut file = File::open(path).with_context(shown)?;
    let mut magic = [0; 4];
    // A shorter file has no archive in it either way.
    let _ = file.read_exact(&mut magic);
    file.seek(SeekFrom::Start(0)).with_context(shown)?;
    let file = BufReader::new(file);
    let reader: Box<dyn Read> = if magic.starts_with(&GZIP_MAGIC) {
        Box::new(flate2::bufread::MultiGzDecoder::new(file))
    } else if magic == ZSTD_MAGIC {
        Box::new(zstd::stream::read::Decoder::with_buffer(file).with_context(shown)?)
    } else {
        Box::new(file)
    };
    let folder =
        tempfile::Builder::new().prefix("postcopy-checkpoint-").tempdir().context("a scratch folder")?;
    let has_images = unpack_into(reader, folder.path()).with_context(shown)?;
    Ok(has_images.then_some(folder))
}

/// Whether there were CRIU's images in it.
fn unpack_into(reader: impl Read, folder: &Path) -> Result<bool> {
    let mut archive = tar::Archive::new(reader);
    archive.set_preserve_mtime(false);
    archive.set_unpack_xattrs(false);
    let mut has_images = false;
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        has_images |= path.file_name().is_some_and(|name| name == "pstree.img");
        use EntryType::{Continuous, Directory, GNUSparse, Link, Regular, Symlink, XGlobalHeader, XHeader};
        match entry.header().entry_type() {
            XGlobalHeader | XHeader => continue,
            Regular | Continuous | GNUSparse | Directory | Symlink | Link => {}
            kind => anyhow::bail!("{}: an entry of type {kind:?} cannot be stored", path.display()),
        }
        let is_within = entry.unpack_in(folder).with_context(|| path.display().to_string())?;
        ensure!(is_within, "{} leads out of the archive", path.display());
    }
    Ok(has_images)
}
