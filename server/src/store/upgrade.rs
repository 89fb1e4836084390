//! Makes a store of format 2 of one of format 1, whose references are texts.

use crate::store::error::{OpenError, StoreError};
use crate::store::format;
use crate::store::layout::{Domain, FORMAT, Layout};
use crate::store::lock::StoreLock;
use crate::store::objects::directory::{self, Directory};
use crate::store::objects::{Kind, Objects};
use crate::store::{Store, chain, lease, references};
use std::path::Path;
use std::sync::Arc;

/// Upgrades the store in `dir`. Returns the number of references that were converted. Writes the
/// chunk index and the locators of all images, so that a restore need not make them.
///
/// The store's servers must be stopped, because those of format 1 cannot read the new references.
/// If one has written to the store nevertheless, another upgrade converts these references. An
/// interrupted upgrade is continued by another one, too.
///
/// # Errors
/// Returns [`OpenError`] if `dir` is no store of a known format, a server serves an image of it, or
/// a reference cannot be read.
///
/// # Blocking
/// Reads the trailers of all packs, and waits for the disk.
pub fn upgrade(dir: &Path, domain: Domain) -> Result<u64, OpenError> {
    let layout = Layout::new(dir, domain);
    match format::is_store(&layout) {
        Ok(true) | Err(OpenError::Old(_)) => {}
        Ok(false) => return Err(OpenError::Missing(dir.to_owned())),
        Err(error) => return Err(error),
    }
    let missing = |_| OpenError::Missing(dir.to_owned());
    let layout = Layout::new(&dir.canonicalize().map_err(missing)?, domain);
    directory::create_domain(&layout)?;
    let kind = Kind::Directory(Arc::new(Directory::new(layout.root())?));
    let objects = Objects::new(layout, kind);
    let converted = convert(&objects)?;
    let store = Store::open(dir, domain)?;
    store.packs.write_index()?;
    for reference in references::list(&objects)? {
        let image = references::read(&objects, &reference)?.map(|referred| referred.image);
        if let Some(Err(error)) = image.map(|image| store.write_locators(&image)) {
            // A restore that reads it reports this, too.
            tracing::warn!("reference {reference}: {}", chain(&error));
        }
    }
    Ok(converted)
}

fn convert(objects: &Objects) -> Result<u64, OpenError> {
    let _exclusive = StoreLock::delete_objects(objects)?;
    let _changing = StoreLock::change_references(objects)?;
    if !lease::leased(objects)?.images.is_empty() {
        return Err(StoreError::Busy("a server serves images of this store: stop it first").into());
    }
    let mut converted = 0;
    for reference in references::list(objects)? {
        converted += u64::from(references::upgrade(objects, &reference)?);
    }
    objects.put(&objects.layout.format(), FORMAT.into())?;
    Ok(converted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{Image, store};
    use crate::store::{Store, layout::FORMAT_1, verify};
    use std::fs;
    use std::time::SystemTime;

    /// Makes a store of format 1 of a new one.
    fn downgrade(store: &Store, dir: &Path, references: &[(&str, &Image)]) {
        for (reference, image) in references {
            let path = store.objects.layout.reference(&reference.parse().unwrap());
            fs::write(path, format!("{}\n", image.digest())).unwrap();
        }
        fs::write(dir.join("format"), FORMAT_1).unwrap();
    }

    #[test]
    fn a_store_of_format_1_is_refused_until_it_is_upgraded() {
        let (dir, store) = store();
        let (first, second) = (Image::of_seed(1), Image::of_seed(2));
        first.push(&store, "a:1");
        second.push(&store, "a/b");
        downgrade(&store, dir.path(), &[("a:1", &first), ("a/b", &second)]);
        let error = Store::open(dir.path(), Domain::DEFAULT).unwrap_err().to_string();
        assert!(error.contains("postcopyd upgrade"), "{error}");
        let locator = store.objects.layout.locator(&first.manifest.root.segment_digests()[0]);
        fs::remove_file(&locator).unwrap();
        let lease = store.lease(&first.digest()).unwrap();
        let error = upgrade(dir.path(), Domain::DEFAULT).unwrap_err().to_string();
        assert!(error.contains("a server serves images"), "{error}");
        drop(lease);
        assert_eq!(upgrade(dir.path(), Domain::DEFAULT).unwrap(), 2);
        assert!(locator.exists() && fs::read_dir(store.objects.layout.index()).unwrap().count() == 1);
        assert_eq!(upgrade(dir.path(), Domain::DEFAULT).unwrap(), 0);
        let store = Store::open(dir.path(), Domain::DEFAULT).unwrap();
        let referred = store.refer(&"a:1".parse().unwrap()).unwrap();
        assert_eq!(referred.image, first.digest());
        let written = referred.provenance.unwrap().written.unwrap();
        assert!(written <= SystemTime::now(), "it is the file's time");
        let verified = verify(dir.path(), Domain::DEFAULT).unwrap();
        assert_eq!((verified.references, verified.damage), (2, vec![]));
    }

    #[test]
    fn an_interrupted_upgrade_is_continued_and_a_damaged_reference_stops_it() {
        let (dir, store) = store();
        let image = Image::of_seed(1);
        ["a:1", "a:2", "a:3"].iter().for_each(|reference| image.push(&store, reference));
        downgrade(&store, dir.path(), &[("a:2", &image), ("a:3", &image)]);
        let damaged = store.objects.layout.reference(&"a:3".parse().unwrap());
        fs::write(&damaged, "no digest").unwrap();
        let error = upgrade(dir.path(), Domain::DEFAULT).unwrap_err().to_string();
        assert!(error.contains("reference a:3"), "{error}");
        fs::write(&damaged, format!("{}\n", image.digest())).unwrap();
        // The first attempt has converted a:2.
        assert_eq!(upgrade(dir.path(), Domain::DEFAULT).unwrap(), 1);
        // A server of format 1 that was not stopped wrote another one.
        downgrade(&store, dir.path(), &[("a:1", &image)]);
        fs::write(dir.path().join("format"), FORMAT).unwrap();
        assert_eq!(upgrade(dir.path(), Domain::DEFAULT).unwrap(), 1);
    }

    #[test]
    fn other_directories_are_not_upgraded() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(upgrade(dir.path(), Domain::DEFAULT), Err(OpenError::Missing(_))));
        fs::write(dir.path().join("letter.txt"), "dear").unwrap();
        assert!(matches!(upgrade(dir.path(), Domain::DEFAULT), Err(OpenError::NotAStore(_))));
    }
}
