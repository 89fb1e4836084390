//! Images that are pushed and pulled: what is sent, what is kept, and that it comes back as it was.

mod cuts;
mod files;
mod labels;
mod layers;
mod pulled;
mod sent;

use postcopy_tests::cli::run;
use postcopy_tests::server::Server;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const CHUNK: usize = 64 << 10;

fn push_cli(server: &Server, path: &Path, reference: &str) -> Value {
    run(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new(reference)])
}

fn pull_cli(server: &Server, reference: &str, target: &Path) -> Value {
    run(server.address(), [OsStr::new("pull"), OsStr::new(reference), target.as_os_str()])
}

fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_else(|| panic!("{field} is no number in {report}"))
}

/// An entry of a directory, as far as images keep it.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    File { bytes: Vec<u8>, executable: bool },
    Link(Vec<u8>),
    EmptyDirectory,
}

fn tree(root: &Path) -> BTreeMap<Vec<u8>, Found> {
    let mut found = BTreeMap::new();
    tree_below(root, root, &mut found);
    found
}

fn tree_below(root: &Path, dir: &Path, found: &mut BTreeMap<Vec<u8>, Found>) {
    let mut is_empty = true;
    for entry in fs::read_dir(dir).expect("a directory") {
        is_empty = false;
        let path = entry.expect("an entry").path();
        let metadata = path.symlink_metadata().expect("it is there");
        let kind = if metadata.is_dir() {
            tree_below(root, &path, found);
            continue;
        } else if metadata.is_symlink() {
            Found::Link(fs::read_link(&path).expect("a link").as_os_str().as_bytes().to_vec())
        } else {
            let bytes = fs::read(&path).expect("a file");
            Found::File { bytes, executable: metadata.mode() & 0o100 != 0 }
        };
        let relative = path.strip_prefix(root).expect("below the root");
        found.insert(relative.as_os_str().as_bytes().to_vec(), kind);
    }
    if is_empty && dir != root {
        let relative = dir.strip_prefix(root).expect("below the root");
        found.insert(relative.as_os_str().as_bytes().to_vec(), Found::EmptyDirectory);
    }
}
