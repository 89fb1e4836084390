//! The layout of a store's directory.
//!
//! ```text
//! format                             version of the layout
//! <domain>/packs/<ab>/<digest>
//! <domain>/manifests/<digest>        roots and segments
//! <domain>/manifests/<digest>.loc    locators of segments, see `locators.rs`
//! <domain>/index/<digest>            runs of the chunk index, see `index.rs`
//! <domain>/refs/<name>/_tags/<tag>   an encoded StoredReference
//! <domain>/condemned/<digest>        empty; its time is when gc condemned the object
//! <domain>/leases/<image>            empty; locked by who serves the image, see `lease.rs`
//! <domain>/working-sets/<image>/     see `working_sets.rs`
//! <domain>/lock                      see `lock.rs`
//! ```

use crate::store::error::{OpenError, StoreError, io_error};
use postcopy_proto::digest::Digest;
use postcopy_proto::reference::TagReference;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The content of the file `format`.
pub(crate) const FORMAT: &str = "postcopy store 2\n";
/// The content in a store of the format before, whose references are texts.
pub(crate) const FORMAT_1: &str = "postcopy store 1\n";

/// A group of images that share chunks. No chunk is found or deduplicated across domains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Domain(&'static str);

impl Domain {
    /// The one domain of a server that does not authenticate.
    pub const DEFAULT: Self = Self("default");
}

/// The paths of one domain of a store.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    root: PathBuf,
    domain: PathBuf,
}

impl Layout {
    pub(crate) fn new(root: &Path, domain: Domain) -> Self {
        Self { root: root.to_owned(), domain: root.join(domain.0) }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn format(&self) -> PathBuf {
        self.root.join("format")
    }

    pub(crate) fn domain(&self) -> &Path {
        &self.domain
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.domain.join("lock")
    }

    pub(crate) fn packs(&self) -> PathBuf {
        self.domain.join("packs")
    }

    pub(crate) fn pack(&self, pack: &Digest) -> PathBuf {
        let hex = pack.hex();
        self.packs().join(&hex[..2]).join(hex)
    }

    pub(crate) fn manifests(&self) -> PathBuf {
        self.domain.join("manifests")
    }

    /// Returns the path of a root or a segment.
    pub(crate) fn manifest(&self, digest: &Digest) -> PathBuf {
        self.manifests().join(digest.hex())
    }

    pub(crate) fn locator(&self, segment: &Digest) -> PathBuf {
        self.manifests().join(format!("{}.loc", segment.hex()))
    }

    /// Returns the directory of the runs. It is made with the first run.
    pub(crate) fn index(&self) -> PathBuf {
        self.domain.join("index")
    }

    pub(crate) fn references(&self) -> PathBuf {
        self.domain.join("refs")
    }

    pub(crate) fn reference(&self, reference: &TagReference) -> PathBuf {
        let name = self.references().join(reference.name.as_str());
        name.join("_tags").join(reference.tag.as_str())
    }

    pub(crate) fn leases(&self) -> PathBuf {
        self.domain.join("leases")
    }

    pub(crate) fn lease(&self, image: &Digest) -> PathBuf {
        self.leases().join(image.hex())
    }

    pub(crate) fn working_sets(&self) -> PathBuf {
        self.domain.join("working-sets")
    }

    pub(crate) fn working_set(&self, image: &Digest) -> PathBuf {
        self.working_sets().join(image.hex())
    }

    pub(crate) fn recordings(&self, image: &Digest) -> PathBuf {
        self.working_set(image).join("recordings")
    }

    pub(crate) fn sets(&self, image: &Digest) -> PathBuf {
        self.working_set(image).join("sets")
    }

    pub(crate) fn set(&self, image: &Digest, pack: &Digest) -> PathBuf {
        self.sets(image).join(pack.hex())
    }

    /// Returns the path of the file that names the packs to send.
    pub(crate) fn current_set(&self, image: &Digest) -> PathBuf {
        self.working_set(image).join("current")
    }

    pub(crate) fn condemned_dir(&self) -> PathBuf {
        self.domain.join("condemned")
    }

    pub(crate) fn condemned(&self, object: &Digest) -> PathBuf {
        self.condemned_dir().join(object.hex())
    }

    /// Returns true for a store of the version that this code knows, false for an empty or missing
    /// directory.
    pub(crate) fn check_format(&self) -> Result<bool, OpenError> {
        let path = self.format();
        let mut found = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(80).read_to_end(&mut found));
        match read {
            Ok(_) if found == FORMAT.as_bytes() => Ok(true),
            Ok(_) if found == FORMAT_1.as_bytes() => Err(OpenError::Old(self.root.clone())),
            Ok(_) => {
                let found = String::from_utf8_lossy(&found).trim_end().to_owned();
                Err(OpenError::Format { path, found, known: FORMAT.trim_end() })
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.check_empty().map(|()| false),
            Err(e) => Err(io_error(&path)(e).into()),
        }
    }

    /// Rejects a directory with other content, for example a home directory named by mistake.
    fn check_empty(&self) -> Result<(), OpenError> {
        let entries = match fs::read_dir(&self.root) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(io_error(&self.root))?,
        };
        for entry in entries {
            let entry = entry.map_err(io_error(&self.root))?;
            // Another process may be writing `format`, or was killed while it did.
            if !entry.file_name().as_encoded_bytes().starts_with(b"format#") {
                return Err(OpenError::NotAStore(self.root.clone()));
            }
        }
        Ok(())
    }

    /// Creates the missing directories, and makes them durable. Changes nothing in a complete store,
    /// which may lie on a read-only file system.
    pub(crate) fn create_directories(&self) -> Result<(), StoreError> {
        let dirs = [self.packs(), self.manifests(), self.references(), self.condemned_dir(), self.leases()];
        let lock = self.lock();
        if dirs.iter().all(|dir| dir.is_dir()) && lock.exists() {
            return Ok(());
        }
        for dir in dirs {
            fs::create_dir_all(&dir).map_err(io_error(&dir))?;
        }
        File::options().create(true).append(true).open(&lock).map_err(io_error(&lock))?;
        sync_dir(&self.domain)?;
        sync_dir(&self.root)
    }

    /// Returns true if other users may read the store.
    pub(crate) fn is_open_to_others(&self) -> bool {
        use std::os::unix::fs::PermissionsExt;
        fs::metadata(&self.domain).is_ok_and(|metadata| metadata.permissions().mode() & 0o007 != 0)
            && fs::metadata(&self.root).is_ok_and(|metadata| metadata.permissions().mode() & 0o007 != 0)
    }
}

/// Makes the entries of a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error(dir))
}

/// Returns the digest that names a file in `packs/`, `manifests/`, `condemned/` or `leases/`.
pub(crate) fn digest_of_name(name: &std::ffi::OsStr) -> Option<Digest> {
    Digest::from_hex(name.to_str()?).ok()
}

/// Returns true for the name of a staged file of object_store, `name#1`.
pub(crate) fn is_staged(name: &std::ffi::OsStr) -> bool {
    let Some((_, number)) = name.to_str().and_then(|name| name.rsplit_once('#')) else { return false };
    !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())
}
