//! The layout of a store's directory or bucket.
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
//! <domain>/leases/<random>           in a bucket: an encoded StoredLease
//! <domain>/deleting/<random>         in a bucket: an encoded StoredDeletion, see `lease/stored.rs`
//! <domain>/clock                     in a bucket: empty; its time is the bucket's
//! <domain>/working-sets/<image>/     see `working_sets.rs`
//! <domain>/damaged/<digest>          packs, roots and segments that a repair has set aside
//! <domain>/lock                      see `lock.rs`
//! ```

use postcopy_proto::digest::Digest;
use postcopy_proto::reference::TagReference;
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

    /// Returns the directories of all packs.
    pub(crate) fn pack_dirs(&self) -> Vec<PathBuf> {
        (0..=u8::MAX).map(|first| self.packs().join(format!("{first:02x}"))).collect()
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

    /// Returns the place to which a repair moves a damaged pack, root or segment.
    pub(crate) fn damaged(&self, digest: &Digest) -> PathBuf {
        self.domain.join("damaged").join(digest.hex())
    }

    pub(crate) fn leases(&self) -> PathBuf {
        self.domain.join("leases")
    }

    pub(crate) fn lease(&self, image: &Digest) -> PathBuf {
        self.leases().join(image.hex())
    }

    /// Returns the directory of the deletions that collectors of a bucket announce.
    pub(crate) fn deletions(&self) -> PathBuf {
        self.domain.join("deleting")
    }

    /// Returns the path of an object whose time of writing tells the bucket's clock.
    pub(crate) fn clock(&self) -> PathBuf {
        self.domain.join("clock")
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
}

/// Returns the digest that names an object in `packs/`, `manifests/`, `condemned/` or `leases/`.
pub(crate) fn digest_of_name(name: &str) -> Option<Digest> {
    Digest::from_hex(name).ok()
}

/// Returns true for the name of a staged file of object_store, `name#1`.
pub(crate) fn is_staged(name: &std::ffi::OsStr) -> bool {
    let Some((_, number)) = name.to_str().and_then(|name| name.rsplit_once('#')) else { return false };
    !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())
}
