//! Makes a store of format 2 of one of format 1, whose references are texts.

use crate::store::error::OpenError;
use crate::store::layout::{Domain, FORMAT, Layout};
use crate::store::lock::StoreLock;
use crate::store::objects::Objects;
use crate::store::references;
use std::path::Path;

/// Upgrades the store in `dir`. Returns the number of its references, or `None` if the store has
/// format 2 already. The store's servers must be stopped, because those of format 1 cannot read the
/// new references. An interrupted upgrade is continued by another one.
///
/// # Errors
/// Returns [`OpenError`] if `dir` is no store of a known format, or a reference cannot be read.
///
/// # Blocking
/// Writes each reference and waits for the disk.
pub fn upgrade(dir: &Path, domain: Domain) -> Result<Option<u64>, OpenError> {
    let layout = Layout::new(dir, domain);
    match layout.check_format() {
        Ok(true) => return Ok(None),
        Ok(false) => return Err(OpenError::Missing(dir.to_owned())),
        Err(OpenError::Old(_)) => {}
        Err(error) => return Err(error),
    }
    let missing = |_| OpenError::Missing(dir.to_owned());
    let layout = Layout::new(&dir.canonicalize().map_err(missing)?, domain);
    layout.create_directories()?;
    let objects = Objects::new(&layout)?;
    let _exclusive = StoreLock::delete_objects(&layout)?;
    let _changing = StoreLock::change_references(&layout)?;
    let mut upgraded = 0;
    for reference in references::list(&layout)? {
        references::upgrade(&layout, &objects, &reference)?;
        upgraded += 1;
    }
    objects.put(&layout.format(), FORMAT.into())?;
    Ok(Some(upgraded))
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
            let path = store.layout.reference(&reference.parse().unwrap());
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
        assert_eq!(upgrade(dir.path(), Domain::DEFAULT).unwrap(), Some(2));
        assert_eq!(upgrade(dir.path(), Domain::DEFAULT).unwrap(), None);
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
        let damaged = store.layout.reference(&"a:3".parse().unwrap());
        fs::write(&damaged, "no digest").unwrap();
        let error = upgrade(dir.path(), Domain::DEFAULT).unwrap_err().to_string();
        assert!(error.contains("reference a:3"), "{error}");
        fs::write(&damaged, format!("{}\n", image.digest())).unwrap();
        assert_eq!(upgrade(dir.path(), Domain::DEFAULT).unwrap(), Some(3));
    }

    #[test]
    fn other_directories_are_not_upgraded() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(upgrade(dir.path(), Domain::DEFAULT), Err(OpenError::Missing(_))));
        fs::write(dir.path().join("letter.txt"), "dear").unwrap();
        assert!(matches!(upgrade(dir.path(), Domain::DEFAULT), Err(OpenError::NotAStore(_))));
    }
}
