//! Checkpoint archives of podman and CRI-O: tar files, optionally compressed, of CRIU's images and
//! their metadata.

use anyhow::{Context, Result, ensure};
use postcopy::beneath::Directory;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use tar::EntryType;
use tempfile::TempDir;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Unpacks a checkpoint's archive into a temporary directory, which is removed when the result is
/// dropped. Returns `None` for any other file; the caller stores that unchanged.
///
/// # Errors
/// Returns an error if the archive cannot be unpacked.
pub(crate) fn unpack(path: &Path) -> Result<Option<TempDir>> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let is_archive = [".tar", ".tar.gz", ".tgz", ".tar.zst"].iter().any(|end| name.ends_with(end));
    if !is_archive || !path.is_file() {
        return Ok(None);
    }
    // A file that cannot be read as an archive is stored unchanged.
    if !open(path).and_then(has_images).unwrap_or(false) {
        return Ok(None);
    }
    let shown = || path.display().to_string();
    let folder =
        tempfile::Builder::new().prefix("postcopy-checkpoint-").tempdir().context("a scratch folder")?;
    unpack_into(open(path).with_context(shown)?, folder.path()).with_context(shown)?;
    Ok(Some(folder))
}

/// Opens an archive and decompresses it.
fn open(path: &Path) -> Result<Box<dyn Read>> {
    let mut file = File::open(path)?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic)?;
    file.seek(SeekFrom::Start(0))?;
    let file = BufReader::new(file);
    Ok(if magic.starts_with(&GZIP_MAGIC) {
        Box::new(flate2::bufread::MultiGzDecoder::new(file))
    } else if magic == ZSTD_MAGIC {
        Box::new(zstd::stream::read::Decoder::with_buffer(file)?)
    } else {
        Box::new(file)
    })
}

/// Returns true if the archive contains CRIU's images.
fn has_images(reader: Box<dyn Read>) -> Result<bool> {
    for entry in tar::Archive::new(reader).entries()? {
        if entry?.path()?.file_name().is_some_and(|name| name == "pstree.img") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn unpack_into(reader: impl Read, folder: &Path) -> Result<()> {
    let mut archive = tar::Archive::new(reader);
    archive.set_preserve_mtime(false);
    archive.set_unpack_xattrs(false);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        use EntryType::{Continuous, Directory, GNUSparse, Link, Regular, Symlink, XGlobalHeader, XHeader};
        match entry.header().entry_type() {
            XGlobalHeader | XHeader => continue,
            Regular | Continuous | GNUSparse | Directory | Symlink | Link => {}
            kind => anyhow::bail!("{}: an entry of type {kind:?} cannot be stored", path.display()),
        }
        let is_within = entry.unpack_in(folder).with_context(|| path.display().to_string())?;
        ensure!(is_within, "{} leads out of the archive", path.display());
    }
    ensure_parents_within(folder)
}

/// Checks that links to the parents of CRIU's images, which a push follows, stay in the archive:
/// its author must not choose other files of this machine.
fn ensure_parents_within(folder: &Path) -> Result<()> {
    let directory = Directory::open(folder)?;
    for entry in walkdir::WalkDir::new(folder) {
        let entry = entry?;
        let path = entry.path().strip_prefix(folder).expect("walkdir stays below its root");
        if entry.path_is_symlink() && entry.file_name() == "parent" {
            ensure!(!directory.leads_out(path)?, "{} leads out of the archive", path.display());
        }
    }
    Ok(())
}
