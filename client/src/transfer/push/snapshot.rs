//! Labels that a snapshot's own files give: for which host and program it was made.
//!
//! A Firecracker state file (`src/vmm/src/snapshot/mod.rs`, `persist.rs` there) begins with a magic
//! number of 8 bytes, which names the architecture, and the version of its format. The description
//! of the microVM follows; its layout depends on the version, so its labels are left out unless
//! each field is plausible. Integers are little-endian, and a length of 8 bytes precedes a text.
//!
//! CRIU's images say neither version nor kernel, but CRIU's log does, which `criu dump` writes
//! beside them with `-o dump.log`.

use super::PushError;
use super::sources::{Source, SourceKind, file_error};
use postcopy_proto::provenance::Labels;
use std::os::unix::fs::FileExt;

/// Bytes of a file's beginning that are read.
const HEAD_BYTES: usize = 16 << 10;
/// Most files whose beginnings are read: a snapshot has few, a tree of files may have very many.
const MAX_FILES: usize = 256;
/// Most bytes of a text in a state file.
const MAX_TEXT_BYTES: u64 = 4096;

const MAGIC_X86_64: u64 = 0x0710_1984_8664_0000;
const MAGIC_AARCH64: u64 = 0x0710_1984_AAAA_0000;
/// Firecracker's static CPU templates on x86_64 by their numbers; `None`, the default, is 3.
const TEMPLATES: [Option<&str>; 6] = [Some("C3"), Some("T2"), Some("T2S"), None, Some("T2CL"), Some("T2A")];

/// Adds the labels of the first snapshot among the files. Keys that `labels` has already stay.
pub(super) fn add_labels(sources: &[Source], labels: &mut Labels) -> Result<(), PushError> {
    let is_at_top = |source: &&Source| !source.path.as_bytes().contains(&b'/');
    let is_file = |source: &&Source| matches!(source.kind, SourceKind::File { .. });
    let is_criu = sources.iter().any(|source| source.path.as_bytes() == b"inventory.img");
    for source in sources.iter().filter(is_at_top).filter(is_file).take(MAX_FILES) {
        let found = match (is_criu, source.path.as_bytes()) {
            (true, b"dump.log") => criu_labels(&head(source)?),
            (true, _) => continue,
            (false, _) => firecracker_labels(&head(source)?),
        };
        if found.is_empty() {
            continue;
        }
        for (key, value) in found {
            // A value that is no label, for example too long, is left out.
            if labels.get(key).is_none() {
                let _ = labels.set(key, &value);
            }
        }
        break;
    }
    Ok(())
}

/// Returns the beginning of a file.
fn head(source: &Source) -> Result<Vec<u8>, PushError> {
    let error = |e| file_error(&source.from())(e);
    let file = source.root.directory.file(&source.below).map_err(error)?;
    let mut head = vec![0; HEAD_BYTES];
    let mut read = 0;
    while read < head.len() {
        match file.read_at(&mut head[read..], read as u64).map_err(error)? {
            0 => break,
            bytes => read += bytes,
        }
    }
    head.truncate(read);
    Ok(head)
}

type Found = Vec<(&'static str, String)>;

/// Returns the labels of a state file; none for another file.
fn firecracker_labels(head: &[u8]) -> Found {
    let mut reader = Reader(head);
    let arch = match reader.u64() {
        Some(MAGIC_X86_64) => "x86_64",
        Some(MAGIC_AARCH64) => "aarch64",
        _ => return Vec::new(),
    };
    let mut found = vec![("firecracker.arch", arch.to_owned())];
    let Some(version) = reader.text().filter(|text| is_version(text)) else { return found };
    found.push(("firecracker.snapshot-version", version));
    if let Some(machine) = machine_labels(&mut reader, arch) {
        found.extend(machine);
    }
    found
}

fn is_version(text: &str) -> bool {
    text.split('.').count() == 3 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b".-+".contains(&b))
}

/// Returns the labels of the microVM's description; `None` if it has another layout.
fn machine_labels(reader: &mut Reader<'_>, arch: &str) -> Option<Found> {
    let memory_mib = reader.u64().filter(|mib| (1..=1 << 24).contains(mib))?;
    let _smt = reader.u8().filter(|smt| *smt <= 1)?;
    let template = reader.u32().filter(|template| *template <= 16)?;
    let kernel = reader.text()?;
    for _ in ["initrd", "boot arguments"] {
        match reader.u8()? {
            0 => {}
            1 => drop(reader.text()?),
            _ => return None,
        }
    }
    let page_bytes = match reader.u32()? {
        0 => 4096,
        1 => 2 << 20,
        _ => return None,
    };
    let mut found = vec![
        ("firecracker.memory-mib", memory_mib.to_string()),
        ("firecracker.kernel", kernel),
        ("firecracker.page-bytes", page_bytes.to_string()),
    ];
    if let ("x86_64", Some(Some(template))) = (arch, TEMPLATES.get(template as usize)) {
        found.push(("firecracker.cpu-template", (*template).to_owned()));
    }
    Some(found)
}

/// The rest of a file's beginning.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*value)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Option<String> {
        let len = self.u64().filter(|len| *len <= MAX_TEXT_BYTES)?;
        let (text, rest) = self.0.split_at_checked(usize::try_from(len).ok()?)?;
        self.0 = rest;
        let text = std::str::from_utf8(text).ok()?;
        (!text.chars().any(char::is_control)).then(|| text.to_owned())
    }
}

/// Returns the labels of a log of `criu dump`, whose first lines are
/// `(00.000000) Version: 4.1 (gitid 0)` and `(00.000021) Running on HOST Linux RELEASE … MACHINE`.
fn criu_labels(head: &[u8]) -> Found {
    let mut found = Vec::new();
    for line in String::from_utf8_lossy(head).lines() {
        let line = line.split_once(") ").map_or(line, |(_, line)| line);
        if let Some(version) = line.strip_prefix("Version: ") {
            found.push(("criu.version", version.split(' ').next().unwrap_or_default().to_owned()));
        }
        if let Some(host) = line.strip_prefix("Running on ") {
            let words: Vec<_> = host.split(' ').collect();
            if let [_, "Linux", release, .., machine] = words[..] {
                found.push(("criu.kernel", release.to_owned()));
                found.push(("criu.arch", machine.to_owned()));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    /// Makes the beginning of a state file, as bincode encodes it.
    fn state_file() -> Vec<u8> {
        let mut bytes = MAGIC_X86_64.to_le_bytes().to_vec();
        bytes.extend(text("6.0.0"));
        bytes.extend(512u64.to_le_bytes());
        bytes.push(0);
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(text("/srv/vmlinux-6.1"));
        bytes.push(0);
        bytes.push(1);
        bytes.extend(text("console=ttyS0"));
        bytes.extend(1u32.to_le_bytes());
        bytes.extend([0xff; 100]);
        bytes
    }

    #[test]
    fn a_state_file_tells_of_its_machine() {
        let expected = [
            ("firecracker.arch", "x86_64"),
            ("firecracker.snapshot-version", "6.0.0"),
            ("firecracker.memory-mib", "512"),
            ("firecracker.kernel", "/srv/vmlinux-6.1"),
            ("firecracker.page-bytes", "2097152"),
            ("firecracker.cpu-template", "T2"),
        ];
        assert_eq!(firecracker_labels(&state_file()), expected.map(|(key, value)| (key, value.to_owned())));
    }

    #[test]
    fn a_machine_without_a_template_has_no_label_of_one() {
        let template_of = |number: u32| {
            let mut bytes = state_file();
            bytes[8 + 8 + 5 + 8 + 1..][..4].copy_from_slice(&number.to_le_bytes());
            let found = firecracker_labels(&bytes).into_iter();
            found.filter(|(key, _)| *key == "firecracker.cpu-template").map(|(_, value)| value).next()
        };
        let expected = [Some("C3"), Some("T2"), Some("T2S"), None, Some("T2CL"), Some("T2A"), None];
        assert_eq!([0, 1, 2, 3, 4, 5, 6].map(template_of), expected.map(|name| name.map(ToOwned::to_owned)));
    }

    #[test]
    fn another_layout_leaves_the_description_out() {
        let mut other = state_file();
        // The flag that was smt.
        other[8 + 8 + 5 + 8] = 7;
        let keys: Vec<_> = firecracker_labels(&other).into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["firecracker.arch", "firecracker.snapshot-version"]);
        assert_eq!(firecracker_labels(b"#!/bin/sh\necho"), []);
    }

    #[test]
    fn a_log_of_criu_tells_of_its_host() {
        let log = "(00.000000) Version: 4.1.1 (gitid 0)\n(00.000018) Running on a b\n\
                   (00.000021) Running on host Linux 6.18.5-amd64 #1 SMP PREEMPT Debian x86_64\n(00.1) more\n";
        let expected = [("criu.version", "4.1.1"), ("criu.kernel", "6.18.5-amd64"), ("criu.arch", "x86_64")];
        assert_eq!(criu_labels(log.as_bytes()), expected.map(|(key, value)| (key, value.to_owned())));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            cut in 0..200usize,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..5),
            noise in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut bytes = state_file();
            let length = bytes.len();
            changes.iter().for_each(|(at, byte)| bytes[at.index(length)] = *byte);
            bytes.truncate(cut);
            for bytes in [bytes, noise] {
                let mut labels = Labels::default();
                for (key, value) in firecracker_labels(&bytes).into_iter().chain(criu_labels(&bytes)) {
                    let _ = labels.set(key, &value);
                }
            }
        }
    }
}
