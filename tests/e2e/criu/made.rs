//! Dumps of one task that tests write themselves, without CRIU.

use postcopy_tests::cli::run;
use postcopy_tests::server::Server;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// An image file of CRIU: its magic numbers, and messages.
pub(super) fn image_file(magic: u32, messages: &[&[u8]]) -> Vec<u8> {
    let mut bytes = [0x5456_4319_u32.to_ne_bytes(), magic.to_ne_bytes()].concat();
    for message in messages {
        bytes.extend(u32::try_from(message.len()).unwrap().to_ne_bytes());
        bytes.extend(*message);
    }
    bytes
}

/// Stores a dump of one task with lazy memory, which no criu has written, as `made`. Returns its
/// directory.
pub(super) fn made_dump(server: &Server, folder: &Path) -> PathBuf {
    let dump = folder.join("made");
    fs::create_dir(&dump).unwrap();
    // pages_id 1; vaddr 0x10000, compat_nr_pages 2, flags PRESENT | LAZY, nr_pages 2.
    let pagemap: [&[u8]; 2] = [&[0x08, 1], &[0x08, 0x80, 0x80, 0x04, 0x10, 2, 0x20, 6, 0x28, 2]];
    fs::write(dump.join("inventory.img"), image_file(0x5831_3116, &[])).unwrap();
    fs::write(dump.join("pstree.img"), image_file(0x5027_3030, &[])).unwrap();
    fs::write(dump.join("pagemap-7.img"), image_file(0x5608_4025, &pagemap)).unwrap();
    fs::write(dump.join("pages-1.img"), [7; 2 * 4096]).unwrap();
    let _ = run(server.address(), [OsStr::new("push"), dump.as_os_str(), OsStr::new("made")]);
    dump
}

/// Makes a dump below `folder`, whose link `parent` leads to the directory `base` beside it. `base`
/// holds one page of the dump and a file that is not CRIU's.
pub(super) fn made_incremental_dump(server: &Server, folder: &Path) -> (PathBuf, PathBuf) {
    let (made, base) = (made_dump(server, folder), folder.join("base"));
    fs::create_dir(&base).unwrap();
    for name in ["inventory.img", "pagemap-7.img", "pages-1.img"] {
        fs::copy(made.join(name), base.join(name)).unwrap();
    }
    fs::write(base.join("id_ed25519"), "secret").unwrap();
    symlink("../base", made.join("parent")).unwrap();
    (made, base)
}
