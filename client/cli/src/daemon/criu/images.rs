//! CRIU's description of memory in its images. pagemap-PID.img lists the pages of a task, the
//! pages-N.img that holds them, and which of them are lazy.
//!
//! A file is a header of one or two magic numbers, and messages of protocol buffers. Each message
//! follows its length (u32 in the machine's byte order). See CRIU's images/pagemap.proto and its
//! wiki, "Images".

use anyhow::{Context, Result, bail, ensure};
use postcopy::beneath::{Directory, read_at_most};
use postcopy::criu::{IMG_COMMON_MAGIC, PAGEMAP_MAGIC, is_image};
use prost::{Message, decode_length_delimiter};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

const PAGE: u64 = 4096;
/// The most dumps that a dump may be built upon. More of them mean a loop of links.
const MAX_PARENTS: usize = 64;
/// The most bytes of a pagemap: an entry has some 20 bytes, and covers a page or more.
const MAX_PAGEMAP_BYTES: u64 = 256 << 20;

/// The most bytes of runc's descriptors.json: three paths.
const MAX_DESCRIPTORS_BYTES: u64 = 3 * 4096 + 64;

const PE_PARENT: u32 = 1;
const PE_LAZY: u32 = 2;
const PE_PRESENT: u32 = 4;

/// The fields of [`PagemapHead`] and [`PagemapEntry`]: all that CRIU 4.2 writes.
const HEAD_FIELDS: &[usize] = &[1];
const ENTRY_FIELDS: &[usize] = &[1, 2, 3, 4, 5];

/// The reason to refuse unknown parts of a pagemap: pages would be read from wrong offsets.
const OTHER_FORM: &str = "which is not known here: its pages may be stored in another form (CRIU after 4.2 can compress \
                          them). Dump without compression, or with CRIU 4.2";

#[derive(Clone, PartialEq, Message)]
struct PagemapHead {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, PartialEq, Message)]
struct PagemapEntry {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    #[prost(uint32, tag = "2")]
    compat_nr_pages: u32,
    #[prost(bool, tag = "3")]
    in_parent: bool,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

/// Pages of a task that are contiguous both in memory and in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) address: u64,
    pub(crate) pages: u64,
    /// The file that holds the pages, relative to the directory of the images.
    pub(crate) file: PathBuf,
    pub(crate) offset: u64,
    /// The daemon serves the pages on page faults. `criu restore` reads pages that are not lazy.
    pub(crate) is_lazy: bool,
}

/// A run of pages of one dump.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    address: u64,
    pages: u64,
    /// The offset in the dump's own pages-N.img. None: the parent has the pages.
    offset: Option<u64>,
    is_lazy: bool,
}

#[derive(Debug)]
struct Pagemap {
    pages_file: String,
    /// The length that the file of pages must have.
    pages_bytes: u64,
    runs: Vec<Run>,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// Splits a file into its messages, and checks its magic number.
fn messages(bytes: &[u8], magic: u32) -> Result<Vec<&[u8]>> {
    let first = u32_at(bytes, 0).context("it is too short")?;
    // Files since CRIU 2.0 begin with a common number before their own.
    let (found, mut at) = match first {
        IMG_COMMON_MAGIC => (u32_at(bytes, 4).context("it is too short")?, 8),
        other => (other, 4),
    };
    ensure!(found == magic, "its magic number is {found:#x}, not {magic:#x}");
    let mut messages = Vec::new();
    while at < bytes.len() {
        let len = u32_at(bytes, at).context("it ends within a length")?;
        let len = usize::try_from(len).context("a length")?;
        let message = bytes.get(at + 4..).and_then(|rest| rest.get(..len));
        messages.push(message.context("it ends within a message")?);
        at += 4 + len;
    }
    Ok(messages)
}

/// Checks that a message has no other fields than these.
fn ensure_known(mut message: &[u8], fields: &[usize]) -> Result<()> {
    while !message.is_empty() {
        let key = decode_length_delimiter(&mut message)?;
        let (field, wire_type) = (key >> 3, key & 7);
        ensure!(fields.contains(&field), "field {field}, {OTHER_FORM}");
        let len = match wire_type {
            0 => decode_length_delimiter(&mut message).map(|_| 0)?,
            1 => 8,
            2 => decode_length_delimiter(&mut message)?,
            5 => 4,
            other => bail!("field {field} is of wire type {other}"),
        };
        message = message.get(len..).with_context(|| format!("it ends within field {field}"))?;
    }
    Ok(())
}

fn parse_pagemap(bytes: &[u8]) -> Result<Pagemap> {
    let mut messages = messages(bytes, PAGEMAP_MAGIC)?.into_iter();
    let head = messages.next().context("it has no head")?;
    ensure_known(head, HEAD_FIELDS).context("its head")?;
    let head = PagemapHead::decode(head).context("its head")?;
    let mut runs: Vec<Run> = Vec::new();
    let mut offset = 0_u64;
    for (index, message) in messages.enumerate() {
        ensure_known(message, ENTRY_FIELDS).with_context(|| format!("entry {index}"))?;
        let entry = PagemapEntry::decode(message).with_context(|| format!("entry {index}"))?;
        let pages = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
        let end = pages.checked_mul(PAGE).and_then(|len| entry.vaddr.checked_add(len));
        ensure!(
            end.is_some() && entry.vaddr.is_multiple_of(PAGE),
            "entry {index}: {pages} pages at {:#x}",
            entry.vaddr
        );
        let last_end = runs.last().map_or(0, |last| last.address + last.pages * PAGE);
        ensure!(entry.vaddr >= last_end, "entry {index} is not after the one before");
        // Entries without flags are of versions that had none.
        let flags = entry.flags.unwrap_or(if entry.in_parent { PE_PARENT } else { PE_PRESENT });
        let unknown = flags & !(PE_PARENT | PE_LAZY | PE_PRESENT);
        ensure!(unknown == 0, "entry {index}: flag {unknown:#x}, {OTHER_FORM}");
        let is_in_parent = entry.in_parent || flags & PE_PARENT != 0;
        let is_here = !is_in_parent && flags & PE_PRESENT != 0;
        if is_here || is_in_parent {
            let run = Run {
                address: entry.vaddr,
                pages,
                offset: is_here.then_some(offset),
                is_lazy: flags & PE_LAZY != 0,
            };
            runs.push(run);
        }
        if is_here {
            offset = offset.checked_add(pages * PAGE).context("more pages than a file can have")?;
        }
    }
    Ok(Pagemap { pages_file: format!("pages-{}.img", head.pages_id), pages_bytes: offset, runs })
}

/// The tasks' memory in a directory of images.
#[derive(Debug)]
pub(crate) struct Dump {
    /// The memory of each task, by the pid that the images have for it.
    tasks: BTreeMap<u32, Vec<Extent>>,
    /// Shared memory, which is never lazy.
    shared: Vec<Extent>,
}

impl Dump {
    /// Reads the images in `directory`, whose path is `path`.
    ///
    /// # Errors
    /// The file that is missing or malformed.
    pub(crate) fn read(directory: &Directory, path: &Path) -> Result<Self> {
        let shown = || path.display().to_string();
        let (mut tasks, mut shared) = (BTreeMap::new(), Vec::new());
        for name in directory.names() {
            let name = name.with_context(shown)?;
            let Some(name) = name.to_str() else { continue };
            if let Some(pid) = pid_of_pagemap(name) {
                tasks.insert(pid, read_chain(directory, path, name)?);
            } else if name.starts_with("pagemap-shmem-") && name.ends_with(".img") {
                let extents = read_chain(directory, path, name)?;
                shared.extend(extents.into_iter().map(|extent| Extent { is_lazy: false, ..extent }));
            }
        }
        ensure!(
            !tasks.is_empty(),
            "{} has no pagemap-PID.img: it is not a directory of CRIU's images",
            shown()
        );
        Ok(Self { tasks, shared })
    }

    /// Returns the memory of a task.
    pub(crate) fn task(&self, pid: u32) -> Option<&[Extent]> {
        self.tasks.get(&pid).map(Vec::as_slice)
    }

    /// Returns the bytes that `criu restore` reads itself: of shared memory, and of private memory.
    pub(crate) fn not_lazy_bytes(&self) -> (u64, u64) {
        let bytes =
            |extents: &[Extent]| extents.iter().filter(|e| !e.is_lazy).map(|e| e.pages * PAGE).sum::<u64>();
        (bytes(&self.shared), self.tasks.values().map(|extents| bytes(extents)).sum())
    }

    /// Returns the parts of page files that `criu restore` reads itself.
    pub(crate) fn eager(&self) -> impl Iterator<Item = (&Path, Range<u64>)> {
        let all = self.tasks.values().flatten().chain(&self.shared);
        let eager = all.filter(|extent| !extent.is_lazy);
        eager.map(|extent| (extent.file.as_path(), extent.offset..extent.offset + extent.pages * PAGE))
    }
}

/// Returns the pid in the name of a task's pagemap. Pagemaps of shared memory have other names.
pub(crate) fn pid_of_pagemap(name: &str) -> Option<u32> {
    name.strip_prefix("pagemap-")?.strip_suffix(".img")?.parse().ok()
}

/// Checks that a pagemap lists as many pages as its file in `directory` holds.
fn ensure_length(directory: &Directory, shown: &Path, name: &str, pagemap: &Pagemap) -> Result<()> {
    let (path, expected) = (shown.join(&pagemap.pages_file), pagemap.pages_bytes);
    let found = match directory.file(Path::new(&pagemap.pages_file)).and_then(|file| file.metadata()) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound && expected == 0 => 0,
        Err(error) => return Err(error).with_context(|| format!("{}, the pages of {name}", path.display())),
    };
    ensure!(
        found == expected,
        "{}: it has {found} bytes, and {name} tells of {expected}: it is not whole, or its pages are stored in another form",
        path.display()
    );
    Ok(())
}

/// Checks that directories of CRIU's images, at `root` and below, are complete before they are
/// stored. Ignores directories of other files, whatever their names: CRIU's files begin with its
/// magic numbers.
///
/// # Errors
/// The directory or file, and the part that it lacks.
pub(crate) fn ensure_whole(root: &Path) -> Result<()> {
    // The code that reads all files reports those that cannot be read.
    let Ok(directory) = Directory::open(root) else { return Ok(()) };
    // Parents are checked with the dumps that are built upon them.
    let is_parent = |entry: &walkdir::DirEntry| entry.depth() > 0 && entry.file_name() == "parent";
    let walk = walkdir::WalkDir::new(root).follow_root_links(true).into_iter();
    let walk =
        walk.filter_entry(|entry| (entry.depth() == 0 || entry.file_type().is_dir()) && !is_parent(entry));
    for entry in walk.flatten() {
        let below = entry.path().strip_prefix(root).expect("walkdir stays below its root");
        let Ok(directory) = directory.directory(below) else { continue };
        ensure_whole_directory(&directory, entry.path())?;
    }
    Ok(())
}

fn ensure_whole_directory(directory: &Directory, path: &Path) -> Result<()> {
    let (mut some, mut has_inventory, mut has_pagemap, mut is_of_runc) = (None, false, false, false);
    for name in directory.names().flatten() {
        let Ok(name) = name.into_string() else { continue };
        if name.ends_with(".img") && directory.file(Path::new(&name)).is_ok_and(|file| is_image(&file)) {
            has_inventory |= name == "inventory.img";
            has_pagemap |= pid_of_pagemap(&name).is_some();
            some = Some(name);
        } else if name == "descriptors.json" {
            is_of_runc = is_list_of_descriptors(directory, &name);
        }
    }
    let some = match some {
        Some(some) => format!("{some} of CRIU"),
        None if is_of_runc => "descriptors.json of runc".to_owned(),
        None => return Ok(()),
    };
    let lacks = |what: &str| {
        format!(
            "{}: there is {some}, and no {what}: the dump has failed, or this is a part of one. Look into its log, \
             and dump again",
            path.display()
        )
    };
    ensure!(has_inventory, lacks("inventory.img"));
    ensure!(has_pagemap, lacks("pagemap-PID.img"));
    Dump::read(directory, path).map(drop)
}

/// Returns true if a file is the list of a container's standard input and outputs, which runc
/// writes before CRIU dumps.
fn is_list_of_descriptors(directory: &Directory, name: &str) -> bool {
    let read = directory.file(Path::new(name)).and_then(|file| read_at_most(&file, MAX_DESCRIPTORS_BYTES));
    read.is_ok_and(|bytes| serde_json::from_slice::<[String; 3]>(&bytes).is_ok())
}

/// Reads a pagemap of `directory`. A pagemap is a regular file.
///
/// # Errors
/// Returns the error of the system call, or the file is too long.
pub(crate) fn read_pagemap(directory: &Directory, name: &str) -> io::Result<Vec<u8>> {
    read_at_most(&directory.file(Path::new(name))?, MAX_PAGEMAP_BYTES)
}

/// Reads a pagemap and its namesakes in the dumps that this dump is built upon. Returns the extents
/// of all its pages.
fn read_chain(directory: &Directory, path: &Path, name: &str) -> Result<Vec<Extent>> {
    let mut chain = Vec::new();
    let mut below = PathBuf::new();
    let mut parent = None;
    loop {
        let here = parent.as_ref().unwrap_or(directory);
        let shown = path.join(&below);
        match read_pagemap(here, name) {
            Ok(bytes) => {
                let pagemap =
                    parse_pagemap(&bytes).with_context(|| shown.join(name).display().to_string())?;
                ensure_length(here, &shown, name, &pagemap)?;
                chain.push((below.clone(), pagemap));
            }
            // The task did not exist when the parent was dumped.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !chain.is_empty() => break,
            Err(error) => return Err(error).with_context(|| shown.join(name).display().to_string()),
        }
        below = below.join("parent");
        parent = match here.follow("parent") {
            Ok(next) => Some(next),
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(error).with_context(|| path.join(&below).display().to_string()),
        };
        ensure!(chain.len() < MAX_PARENTS, "{}: more than {MAX_PARENTS} parents", path.display());
    }
    let mut extents = Vec::new();
    for run in &chain[0].1.runs {
        resolve(&chain, run.address, run.pages, run.is_lazy, &mut extents)
            .with_context(|| format!("{}: {name}", path.display()))?;
    }
    // CRIU writes a separate entry for the content of each pipe.
    extents.dedup_by(|next, last: &mut Extent| {
        let len = last.pages * PAGE;
        let follows = last.address + len == next.address && last.offset + len == next.offset;
        let joins = follows && last.file == next.file && last.is_lazy == next.is_lazy;
        if joins {
            last.pages += next.pages;
        }
        joins
    });
    Ok(extents)
}

/// Appends the extents of pages, each in the first of the dumps that holds it.
fn resolve(
    chain: &[(PathBuf, Pagemap)],
    address: u64,
    pages: u64,
    is_lazy: bool,
    extents: &mut Vec<Extent>,
) -> Result<()> {
    let Some(((directory, pagemap), parents)) = chain.split_first() else {
        bail!("{pages} pages at {address:#x} are said to be in a parent that is not there");
    };
    let (mut at, end) = (address, address + pages * PAGE);
    let first = pagemap.runs.partition_point(|run| run.address + run.pages * PAGE <= address);
    for run in &pagemap.runs[first..] {
        if at == end {
            break;
        }
        ensure!(
            run.address <= at,
            "the page at {at:#x} is said to be in {}, which lacks it",
            directory.display()
        );
        let skipped = (at - run.address) / PAGE;
        let count = (run.pages - skipped).min((end - at) / PAGE);
        match run.offset {
            Some(offset) => extents.push(Extent {
                address: at,
                pages: count,
                file: directory.join(&pagemap.pages_file),
                offset: offset + skipped * PAGE,
                is_lazy,
            }),
            None => resolve(parents, at, count, is_lazy, extents)?,
        }
        at += count * PAGE;
    }
    ensure!(at == end, "the page at {at:#x} is said to be in {}, which lacks it", directory.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use postcopy::criu::INVENTORY_MAGIC;
    use proptest::prelude::*;
    use std::fs;

    fn image(magic: &[u32], messages: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes: Vec<u8> = magic.iter().flat_map(|magic| magic.to_ne_bytes()).collect();
        for message in messages {
            bytes.extend(u32::try_from(message.len()).unwrap().to_ne_bytes());
            bytes.extend(message);
        }
        bytes
    }

    fn entry(page: u64, pages: u64, flags: u32) -> Vec<u8> {
        let (compat, in_parent) = (u32::try_from(pages).unwrap(), flags & PE_PARENT != 0);
        let entry = PagemapEntry {
            vaddr: page * PAGE,
            compat_nr_pages: compat,
            in_parent,
            flags: Some(flags),
            nr_pages: Some(pages),
        };
        entry.encode_to_vec()
    }

    fn read(path: &Path) -> Result<Dump> {
        Dump::read(&Directory::open(path)?, path)
    }

    /// Creates a file of so many pages.
    fn pages(folder: &Path, id: u32, pages: u64) {
        let file = fs::File::create(folder.join(format!("pages-{id}.img"))).unwrap();
        file.set_len(pages * PAGE).unwrap();
    }

    fn pagemap(pages_id: u32, entries: &[Vec<u8>]) -> Vec<u8> {
        let mut messages = vec![PagemapHead { pages_id }.encode_to_vec()];
        messages.extend_from_slice(entries);
        image(&[IMG_COMMON_MAGIC, PAGEMAP_MAGIC], &messages)
    }

    #[test]
    fn pages_are_found_in_their_dump_or_in_its_parents() {
        let folder = tempfile::tempdir().unwrap();
        let parent = folder.path().join("parent");
        fs::create_dir(&parent).unwrap();
        let lazy = PE_PRESENT | PE_LAZY;
        let top =
            [entry(10, 4, lazy), entry(14, 6, PE_PARENT), entry(100, 2, PE_PRESENT), entry(200, 3, lazy)];
        fs::write(folder.path().join("pagemap-7.img"), pagemap(3, &top)).unwrap();
        let below = [entry(8, 8, lazy), entry(16, 10, PE_PRESENT)];
        fs::write(parent.join("pagemap-7.img"), pagemap(1, &below)).unwrap();
        fs::write(folder.path().join("pagemap-shmem-9.img"), pagemap(4, &[entry(0, 5, PE_PRESENT)])).unwrap();
        pages(folder.path(), 3, 9);
        pages(folder.path(), 4, 5);
        pages(&parent, 1, 18);
        let dump = read(folder.path()).unwrap();
        let found: Vec<_> = dump
            .task(7)
            .unwrap()
            .iter()
            .map(|e| (e.address / PAGE, e.pages, e.file.to_str().unwrap(), e.offset / PAGE, e.is_lazy))
            .collect();
        let expected = [
            (10, 4, "pages-3.img", 0, true),
            // The parent has two entries for these pages.
            (14, 6, "parent/pages-1.img", 6, false),
            (100, 2, "pages-3.img", 4, false),
            (200, 3, "pages-3.img", 6, true),
        ];
        assert_eq!(found, expected);
        assert!(dump.task(8).is_none());
        let eager: Vec<_> =
            dump.eager().map(|(file, bytes)| (file.to_str().unwrap(), bytes.end / PAGE)).collect();
        let files = ["parent/pages-1.img", "pages-3.img", "pages-4.img"];
        assert_eq!(eager, files.into_iter().zip([12, 6, 5]).collect::<Vec<_>>());
        assert_eq!(dump.not_lazy_bytes(), (5 * PAGE, 8 * PAGE));
    }

    #[test]
    fn what_a_parent_lacks_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("pagemap-7.img"), pagemap(1, &[entry(10, 4, PE_PARENT)])).unwrap();
        let error = format!("{:#}", read(folder.path()).unwrap_err());
        assert!(error.contains("parent that is not there"), "{error}");
        fs::create_dir(folder.path().join("parent")).unwrap();
        fs::write(folder.path().join("parent/pagemap-7.img"), pagemap(1, &[entry(10, 3, PE_PRESENT)]))
            .unwrap();
        pages(&folder.path().join("parent"), 1, 3);
        let error = format!("{:#}", read(folder.path()).unwrap_err());
        assert!(error.contains("0xd000") && error.contains("lacks it"), "{error}");
    }

    #[test]
    fn images_of_before_criu_2_are_read() {
        let old =
            PagemapEntry { vaddr: 0, compat_nr_pages: 2, in_parent: false, flags: None, nr_pages: None };
        let bytes =
            image(&[PAGEMAP_MAGIC], &[PagemapHead { pages_id: 1 }.encode_to_vec(), old.encode_to_vec()]);
        let read = parse_pagemap(&bytes).unwrap();
        assert_eq!(read.runs, [Run { address: 0, pages: 2, offset: Some(0), is_lazy: false }]);
    }

    #[test]
    fn pages_that_are_not_as_many_as_their_file_has_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("pagemap-7.img"), pagemap(3, &[entry(10, 4, PE_PRESENT)])).unwrap();
        let error = || format!("{:#}", read(folder.path()).unwrap_err());
        assert!(error().contains("pages-3.img, the pages of pagemap-7.img: No such file"), "{}", error());
        for len in [3, 5] {
            pages(folder.path(), 3, len);
            let said = error();
            let expected =
                format!("pages-3.img: it has {} bytes, and pagemap-7.img tells of 16384", len * PAGE);
            assert!(said.contains(&expected), "{said}");
        }
        pages(folder.path(), 3, 4);
        assert!(read(folder.path()).is_ok());
    }

    #[test]
    fn a_dump_that_is_not_whole_is_told_from_other_directories() {
        let folder = tempfile::tempdir().unwrap();
        let dump = folder.path().join("checkpoint");
        fs::create_dir(&dump).unwrap();
        for ordinary in ["inventory.img", "pagemap-1.img", "pages-1.img", "x.img"] {
            fs::write(dump.join(ordinary), b"a disk, perhaps").unwrap();
        }
        assert!(ensure_whole(folder.path()).is_ok(), "the names alone say nothing");
        assert!(ensure_whole(&dump.join("x.img")).is_ok(), "a file");
        let error = |what: &str| {
            let said = format!("{:#}", ensure_whole(folder.path()).unwrap_err());
            assert!(said.contains("checkpoint") && said.contains(what), "{said}");
        };
        fs::write(dump.join("pagemap-7.img"), pagemap(3, &[entry(10, 4, PE_PRESENT)])).unwrap();
        error("there is pagemap-7.img of CRIU, and no inventory.img");
        fs::write(dump.join("inventory.img"), image(&[IMG_COMMON_MAGIC, INVENTORY_MAGIC], &[])).unwrap();
        error("pages-3.img");
        pages(&dump, 3, 4);
        // This file is not of a process.
        fs::remove_file(dump.join("pagemap-1.img")).unwrap();
        assert!(ensure_whole(folder.path()).is_ok());
        fs::remove_file(dump.join("pagemap-7.img")).unwrap();
        error("there is inventory.img of CRIU, and no pagemap-PID.img");
        fs::remove_file(dump.join("inventory.img")).unwrap();
        for (descriptors, is_of_runc) in
            [(r#"["/dev/null","pipe:[7]","pipe:[8]"]"#, true), (r#"{"descriptors": []}"#, false)]
        {
            fs::write(dump.join("descriptors.json"), descriptors).unwrap();
            assert_eq!(ensure_whole(folder.path()).is_err(), is_of_runc, "{descriptors}");
        }
        fs::write(dump.join("descriptors.json"), r#"["/dev/null","pipe:[7]","pipe:[8]"]"#).unwrap();
        error("there is descriptors.json of runc, and no inventory.img");
    }

    proptest! {
        #[test]
        fn what_is_unknown_in_an_entry_is_refused_by_its_number(
            before in 0..4_u32,
            flags in any::<u32>(),
            unknown in proptest::option::of((6..1_000_u64, proptest::sample::select(vec![0_u64, 1, 2, 5]))),
            is_first in any::<bool>(),
        ) {
            let mut last = entry(100, 2, flags);
            if let Some((field, wire_type)) = unknown {
                let mut bytes = Vec::new();
                prost::encode_length_delimiter(usize::try_from(field << 3 | wire_type).unwrap(), &mut bytes).unwrap();
                // The value is 3, both as a number and as a length.
                bytes.extend(match wire_type { 0 => vec![3], 1 => vec![9; 8], 2 => vec![3, 8, 9, 10], _ => vec![9; 4] });
                last = if is_first { [bytes, last].concat() } else { [last, bytes].concat() };
            }
            let mut entries: Vec<_> = (0..before).map(|n| entry(n.into(), 1, PE_PRESENT)).collect();
            entries.push(last);
            let parsed = parse_pagemap(&pagemap(1, &entries));
            let (entry, others) = (format!("entry {before}"), flags & !7);
            match unknown {
                None if others == 0 => prop_assert!(parsed.is_ok()),
                None => {
                    let said = format!("{:#}", parsed.unwrap_err());
                    prop_assert!(said.contains(&format!("{entry}: flag {others:#x}")), "{}", said);
                }
                Some((field, _)) => {
                    let said = format!("{:#}", parsed.unwrap_err());
                    prop_assert!(said.contains(&format!("{entry}: field {field},")), "{}", said);
                }
            }
        }

        #[test]
        fn any_bytes_are_a_pagemap_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..200), good in any::<bool>()) {
            let mut image = if good { pagemap(1, &[entry(3, 2, PE_PRESENT)]) } else { Vec::new() };
            image.extend(bytes);
            let _ = parse_pagemap(&image);
        }

        #[test]
        fn any_entries_are_resolved_or_refused(entries in proptest::collection::vec((0..40_u64, 0..9_u64, 0..8_u32), 0..9)) {
            let entries: Vec<_> = entries.into_iter().map(|(page, pages, flags)| entry(page, pages, flags)).collect();
            if let Ok(read) = parse_pagemap(&pagemap(1, &entries)) {
                let chain = [(PathBuf::new(), read)];
                for run in &chain[0].1.runs {
                    let mut extents = Vec::new();
                    if resolve(&chain, run.address, run.pages, run.is_lazy, &mut extents).is_ok() {
                        prop_assert_eq!(extents.iter().map(|e| e.pages).sum::<u64>(), run.pages);
                    }
                }
            }
        }
    }
}
