//! The daemon for Firecracker. A microVM loads a snapshot with a memory backend of type `Uffd`, and
//! connects to the daemon's socket. It sends one message: its memory's layout in JSON, with its
//! userfaultfd. It never reads from that socket, and closes it when it exits. docs/FIRECRACKER.md
//! tells how to use it.

use super::connection::Connection;
use super::log::say;
use super::resuming::{self, Attempt, Resuming};
use super::runtime_dir::{self, RuntimeDir, SessionName};
use super::served::{self, Served, Status};
use super::watching::Watched;
use super::worker::Worker;
use super::{Adopted, LOOK, Program, Setup, ensure_exists, inbox, surroundings};
use anyhow::{Context, Result, bail, ensure};
use postcopy::proto::digest::Digest;
use postcopy::{ForeignRegion, Image, LossPolicy, Sharing};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::Deserialize;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

/// The most bytes of a handshake, which hold some hundred regions.
const MAX_HANDSHAKE: usize = inbox::MAX_LOOK;
const PAGE: u64 = 4096;
/// The most names of files in a message.
const MOST_NAMES: usize = 3;
/// The end of the addresses that a process can have, with page tables of five levels.
const ADDRESSES: u64 = 1 << 56;

pub(crate) const KIND: &str = "vm";

/// The source of a virtual machine's pages.
#[derive(Debug)]
pub(crate) struct Backing {
    pub(crate) image: Arc<Image>,
    /// The name of the image, for messages.
    pub(crate) reference: String,
    /// The path of the memory's file in the image, if the user named it.
    pub(crate) file: Option<String>,
}

/// The part of a daemon that is special to Firecracker.
#[derive(Debug)]
pub(crate) struct Firecracker {
    /// The source of pages for each socket.
    pub(crate) backings: Vec<Backing>,
    /// A machine that was taken over. The mappings are empty if it left a state file.
    pub(crate) adopted: Option<(SessionName, Vec<Mapping>)>,
}

/// A span of a guest's memory, as Firecracker describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    /// The offset in the memory's file.
    offset: u64,
    /// The page size in bytes.
    page_size: Option<u64>,
    /// The field of older versions. Despite its name it is in bytes, too.
    page_size_kib: Option<u64>,
}

impl Mapping {
    fn page_bytes(&self) -> u64 {
        match self.page_size.or(self.page_size_kib).unwrap_or(PAGE) {
            // A version may mean KiB, as the name says.
            kib @ 1..PAGE => kib << 10,
            bytes => bytes,
        }
    }

    fn region(&self, file: &str) -> Result<ForeignRegion> {
        let number = |n: u64, what| usize::try_from(n).with_context(|| format!("{what} {n}"));
        let end = self.base_host_virt_addr.checked_add(self.size);
        ensure!(
            end.is_some_and(|end| end <= ADDRESSES),
            "base_host_virt_addr {:#x} with size {:#x}: a process has no such addresses",
            self.base_host_virt_addr,
            self.size
        );
        Ok(ForeignRegion {
            address: number(self.base_host_virt_addr, "base_host_virt_addr")?,
            len: number(self.size, "size")?,
            page_bytes: number(self.page_bytes(), "page_size")?,
            path: file.into(),
            offset_bytes: self.offset,
            sharing: Sharing::Private,
        })
    }
}

/// Parses the mappings of a handshake. None: the handshake is not complete.
fn parse(bytes: &[u8]) -> Result<Option<Vec<Mapping>>> {
    let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<Vec<Mapping>>();
    match values.next() {
        None => Ok(None),
        Some(Err(error)) if error.is_eof() => Ok(None),
        Some(Err(error)) => bail!(
            "its handshake is not what Firecracker sends ({error}), and is refused. Is another program connected to this \
             socket?"
        ),
        Some(Ok(mappings)) => {
            let rest = &bytes[values.byte_offset()..];
            ensure!(rest.iter().all(u8::is_ascii_whitespace), "something follows its handshake");
            ensure!(!mappings.is_empty(), "its handshake has no memory");
            Ok(Some(mappings))
        }
    }
}

/// Returns the first few of these names, and the number of the others: an image may have a million
/// files, and each refused connection writes a line to the log.
fn some_of(names: impl ExactSizeIterator<Item = String>) -> String {
    let count = names.len();
    let mut text = names.take(MOST_NAMES).collect::<Vec<_>>().join(", ");
    if count > MOST_NAMES {
        text += &format!(" and {} others", count - MOST_NAMES);
    }
    text
}

/// Returns the path of the guest's memory in the image: the file that the user named, or the only
/// one of that length.
fn memory_file(backing: &Backing, mappings: &[Mapping]) -> Result<String> {
    if let Some(file) = &backing.file {
        return Ok(file.clone());
    }
    let end = |mapping: &Mapping| mapping.offset.checked_add(mapping.size);
    let ends: Option<Vec<u64>> = mappings.iter().map(end).collect();
    let size = ends.and_then(|ends| ends.into_iter().max()).context("a region ends beyond all offsets")?;
    let files: Vec<_> = backing.image.root().files().collect();
    let fitting: Vec<_> = files.iter().filter(|(_, file)| file.size_bytes == size).collect();
    match fitting.as_slice() {
        [(path, _)] => Ok(path.to_string()),
        [] => {
            let all = some_of(files.iter().map(|(path, file)| format!("{path} ({} bytes)", file.size_bytes)));
            bail!(
                "the guest has {size} bytes of memory, and no file of {} has as many: {all}",
                backing.reference
            )
        }
        several => {
            let all = some_of(several.iter().map(|(path, _)| path.to_string()));
            bail!("several files of {} may be its memory: {all}; name one with --file", backing.reference)
        }
    }
}

impl Firecracker {
    /// Attaches a machine's memory by its handshake, or resumes it as another worker has left it.
    /// None: the machine is gone.
    fn open(&self, worker: &Arc<Worker>, connection: &Connection) -> Result<Option<Arc<Served>>> {
        for name in worker.left_by(connection.cookie) {
            match Resuming::new(name).resume(worker) {
                Attempt::Served(served) => {
                    inbox::take(&connection.stream, MAX_HANDSHAKE)?;
                    return Ok(Some(worker.add(*served)));
                }
                Attempt::NoSession => {}
                Attempt::Ended | Attempt::Failed => return Ok(None),
            }
        }
        let take = || self.take_handshake(worker, connection);
        resuming::retry_attach(worker, connection.peer, || !connection.has_hung_up(), take).map(Some)
    }

    /// Waits for the handshake, and attaches the memory that it describes.
    fn take_handshake(&self, worker: &Arc<Worker>, connection: &Connection) -> Result<Arc<Served>> {
        let (mappings, uffd, count) = connection.wait_for(worker, MAX_HANDSHAKE, |peeked| {
            let Some(mappings) = parse(&peeked.bytes)? else { return Ok(None) };
            ensure!(peeked.fds.len() == 1, "{} descriptors came, and one is a userfaultfd", peeked.fds.len());
            let uffd = peeked.fds.pop().expect("one");
            Ok(Some((mappings, uffd, peeked.bytes.len())))
        })?;
        worker.silent.remove(connection);
        let name = connection.session(KIND)?;
        let backing = &self.backings[connection.listener.min(self.backings.len() - 1)];
        let served = attach(worker, name, backing, &mappings, uffd.as_fd())?;
        // The state file holds the content of the handshake by now.
        inbox::take(&connection.stream, count)?;
        Ok(served)
    }

    /// Attaches the memory of a machine that was taken over without a state file.
    fn attach_adopted(
        &self,
        worker: &Arc<Worker>,
        name: SessionName,
        mappings: &[Mapping],
    ) -> Result<Arc<Served>> {
        let uffd = worker.setup.adopted.as_ref().context("its userfaultfd")?;
        attach(worker, name, &self.backings[0], mappings, uffd.borrow())
    }
}

/// Does the work that a machine needs: see [`Tend`](super::watching::Tend).
fn tend(worker: &Worker, machine: &mut Watched) -> bool {
    let served = Arc::clone(&machine.served);
    let pid = served.name.pid;
    loop {
        machine.receive();
        match served.look() {
            Status::Ended => {
                served::finish([&*served]);
                tracing::info!("vm {pid}: is gone");
                worker.remove(&served.name);
                return false;
            }
            Status::Resident if worker.is_stopping() => {
                let _ = served.end();
                served::finish([&*served]);
                tracing::info!("vm {pid}: all of its memory is resident");
                worker.remove(&served.name);
                return false;
            }
            _ => {}
        }
        if !worker.is_stopping() {
            if machine.has_exited() {
                let _ = served.end();
                served::finish([&*served]);
                tracing::info!("vm {pid}: is gone");
                worker.remove(&served.name);
                return false;
            }
            if machine.is_idle() {
                return true;
            }
        } else {
            // The fill must be complete before the daemon ends: a fault on an absent page would
            // wait for ever.
            if let Err(error) = served.fill() {
                tracing::warn!("vm {pid}: {error}");
            }
            if worker.is_past_deadline() {
                served.leave();
                say_left(worker, &served.name, Some(served.session().image().digest()));
                served::finish([&*served]);
                return false;
            }
        }
        worker.wait(machine.stream.as_deref(), LOOK);
    }
}

/// Applies the loss policy to a process whose handshake was refused. It has registered memory that
/// no daemon serves, and its snapshot load waits for that memory. A process that has sent no
/// userfaultfd does not wait for memory, so it is left alone. Under `wait` no other worker serves
/// the process either, so that is recorded as a loss.
fn refuse(worker: &Worker, connection: &Connection) {
    if let Ok(name) = connection.session(KIND)
        && connection.has_sent_userfaultfd()
    {
        if worker.setup.options.on_loss == LossPolicy::Wait {
            worker.setup.runtime.note_loss(&name, "was left without its memory");
        }
        served::lose_unserved(&worker.setup, &name);
    }
}

/// Reports that a machine is left, and the command that takes it over.
pub(crate) fn say_left(worker: &Worker, name: &SessionName, image: Option<Digest>) {
    let (pid, setup) = (name.pid, &worker.setup);
    let reference = setup.reference_of(image).unwrap_or_else(|| "REF".to_owned());
    // Names both places, because another shell may have other variables.
    let text = format!(
        "left: vm {pid}, which sleeps until it is taken over: \
         postcopy firecracker --adopt {pid} --image {reference} --server {} --runtime-dir {}",
        quoted(&setup.address.to_string()),
        quoted(&setup.runtime.root().display().to_string())
    );
    tracing::warn!("{text}");
    say(&text);
    setup.runtime.note_loss(name, "was left without memory that had not arrived");
}

/// Returns a word as a shell reads it.
fn quoted(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/:.,_-@=+".contains(&byte);
    match word.bytes().all(is_plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

fn attach(
    worker: &Arc<Worker>,
    name: SessionName,
    backing: &Backing,
    mappings: &[Mapping],
    uffd: std::os::fd::BorrowedFd<'_>,
) -> Result<Arc<Served>> {
    let file = memory_file(backing, mappings)?;
    let regions: Vec<_> = mappings.iter().map(|mapping| mapping.region(&file)).collect::<Result<_>>()?;
    surroundings::log_if_inside_of(name.pid);
    let served = Served::attach(&worker.setup, name, &backing.image, uffd, &regions, true)?;
    let (pid, bytes) = (served.name.pid, mappings.iter().map(|mapping| mapping.size).sum::<u64>());
    tracing::info!("vm {pid}: {} MiB of {} in {} regions", bytes >> 20, backing.reference, regions.len());
    Ok(worker.add(served))
}

impl Program for Firecracker {
    fn serve(&self, worker: &Arc<Worker>, connection: Connection) -> Option<i32> {
        match self.open(worker, &connection) {
            Ok(Some(served)) => worker.watch(served, Some(connection.stream), tend, None),
            Ok(None) => {}
            Err(error) => {
                worker.refusals.log(&format!("process {}: {error:#}", connection.peer));
                refuse(worker, &connection);
            }
        }
        None
    }

    fn serve_again(&self, worker: &Arc<Worker>, session: SessionName) -> Option<i32> {
        let pid = session.pid;
        // A person waits for the first attempt to take over a machine, so this reports its failure.
        let resumed = if self.adopted.is_some() && !worker.start.is_successor {
            Served::resume(&worker.setup, session.clone(), worker.start)
        } else {
            match Resuming::new(session.clone()).resume(worker) {
                Attempt::Served(served) => Ok(Some(*served)),
                Attempt::NoSession => Ok(None),
                Attempt::Ended | Attempt::Failed => return self.adopted.is_some().then_some(0),
            }
        };
        let served = match (resumed, &self.adopted) {
            (Ok(Some(served)), _) => Ok(Some(worker.add(served))),
            // The machine has no state file yet.
            (Ok(None), Some((_, mappings))) if !mappings.is_empty() => {
                self.attach_adopted(worker, session, mappings).map(Some)
            }
            (Ok(None), _) => Ok(None),
            (Err(error), _) => Err(error),
        };
        // A daemon that takes over a machine serves no other.
        let ends_with = |status| self.adopted.is_some().then_some(status);
        match served {
            Ok(Some(served)) => {
                if self.adopted.is_some() && !worker.start.is_successor {
                    say(&format!("ready: vm {pid} is served again"));
                }
                worker.watch(served, None, tend, ends_with(0));
                return None;
            }
            Ok(None) => tracing::error!("vm {pid}: its state file shows no session, or one that has ended"),
            Err(error) => tracing::error!("vm {pid}: {error:#}"),
        }
        ends_with(1)
    }

    fn begin(&self, worker: &Arc<Worker>) -> Result<()> {
        for ((_, path), backing) in worker.setup.listeners.iter().zip(&self.backings) {
            say(&format!(
                "ready: {} serves {} ({})",
                path.display(),
                backing.reference,
                backing.image.digest()
            ));
        }
        let Some((name, _)) = self.adopted.clone() else { return Ok(()) };
        let (worker, program) = (Arc::clone(worker), Arc::clone(&worker.program));
        let spawner = Arc::clone(&worker);
        spawner.spawn("session", move || program.serve_again(&worker, name))
    }
}

/// Takes over a machine whose daemon has died altogether. Uses the userfaultfd that the machine has
/// kept, and the state file that is left. Without a state file it uses the mappings of the process,
/// if the caller asserts that no page was ever removed.
///
/// # Errors
/// The process has no memory that can be taken over, or its daemon lives.
pub(crate) fn adopt(
    setup: &mut Setup,
    root: &Path,
    pid: u32,
    nothing_was_removed: bool,
) -> Result<(SessionName, Vec<Mapping>)> {
    ensure_exists(pid)?;
    let uffd = uffd_of(pid)?;
    let left = runtime_dir::take_over(root, pid, &setup.runtime)?;
    setup.adopted = Some(Adopted { uffd });
    if let Some(name) = left {
        return Ok((name, Vec::new()));
    }
    ensure!(
        nothing_was_removed,
        "there is no state file of process {pid} below {}. Is --runtime-dir that of the daemon that died? Only if the \
         machine has no balloon: --nothing-was-removed",
        root.display()
    );
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).context("its mappings")?;
    let mappings = registered(&smaps)?;
    let start = runtime_dir::start_of(pid).with_context(|| format!("process {pid}"))?;
    Ok((SessionName { kind: KIND.into(), pid, start, cookie: 0 }, mappings))
}

/// Duplicates the userfaultfd that a process has open.
fn uffd_of(pid: u32) -> Result<OwnedFd> {
    let process = Pid::from_raw(pid.cast_signed()).context("a pid is above 0")?;
    let process = pidfd_open(process, PidfdFlags::empty()).with_context(|| format!("process {pid}"))?;
    let directory = format!("/proc/{pid}/fd");
    let entries = std::fs::read_dir(&directory).with_context(|| directory.clone())?;
    let is_uffd = |fd: &RawFd| {
        let target = std::fs::read_link(format!("{directory}/{fd}"));
        target.is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
    };
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter(is_uffd);
    match *numbers.collect::<Vec<RawFd>>().as_slice() {
        [number] => pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).context("its userfaultfd"),
        [] => bail!(
            "process {pid} has no userfaultfd: it is not a Firecracker that was restored with backend Uffd"
        ),
        _ => bail!("process {pid} has several userfaultfds"),
    }
}

/// Returns the guest's memory as the mappings that are registered with a userfaultfd (`um` among
/// the VmFlags): one span, or the first 3 GiB and the rest.
fn registered(smaps: &str) -> Result<Vec<Mapping>> {
    let mut spans: Vec<(u64, u64, u64)> = Vec::new();
    let (mut span, mut page_bytes) = ((0, 0), PAGE);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let addresses = first.split_once('-').and_then(|(a, b)| Some((hex(a)?, hex(b)?)));
        if let Some((start, end)) = addresses.filter(|(start, end)| start < end) {
            (span, page_bytes) = ((start, end), PAGE);
        } else if first == "KernelPageSize:" {
            page_bytes = words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(4) << 10;
        } else if first == "VmFlags:" && words.any(|flag| flag == "um") {
            match spans.last_mut() {
                // A madvise(2) of a part has split the mapping.
                Some(last) if last.1 == span.0 && last.2 == page_bytes => last.1 = span.1,
                _ => spans.push((span.0, span.1, page_bytes)),
            }
        }
    }
    const LOW: u64 = 3 << 30;
    spans.sort_by_key(|(start, end, _)| end - start != LOW);
    let is_known = spans.len() == 1 || spans.len() == 2 && spans[0].1 - spans[0].0 == LOW;
    ensure!(
        is_known,
        "{} spans of its memory are registered: their order in the image is unknown",
        spans.len()
    );
    let mut offset = 0;
    let mapping = |(start, end, page_size): (u64, u64, u64)| {
        let mapping = Mapping {
            base_host_virt_addr: start,
            size: end - start,
            offset,
            page_size: Some(page_size),
            page_size_kib: None,
        };
        offset += end - start;
        mapping
    };
    Ok(spans.into_iter().map(mapping).collect())
}

/// Creates the runtime directory of a daemon for Firecracker.
///
/// # Errors
/// As [`RuntimeDir::create`].
pub(crate) fn runtime_dir(root: &Path) -> Result<RuntimeDir> {
    RuntimeDir::create(root, "firecracker")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HUGE: u64 = 2 << 20;
    const RECORDED: &str = r#"[{"base_host_virt_addr":139975064551424,"size":536870912,"offset":0,"page_size":4096,"page_size_kib":4096}]"#;

    #[test]
    fn a_shell_reads_a_quoted_word_as_it_was() {
        for word in ["http://host:7070", "unix:/run/a b.sock", "/it's/$HOME", "a;b", "`id`", "*"] {
            let script = format!("printf %s {}", quoted(word));
            let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }

    #[test]
    fn what_firecracker_sends_is_understood_in_all_its_versions() {
        let mappings = parse(RECORDED.as_bytes()).unwrap().unwrap();
        assert_eq!((mappings.len(), mappings[0].size, mappings[0].page_bytes()), (1, 512 << 20, 4096));
        for (text, bytes) in [
            (r#""page_size_kib":4096"#, 4096),
            (r#""page_size_kib":2097152"#, HUGE),
            (r#""page_size":2097152,"page_size_kib":2097152"#, HUGE),
            (r#""page_size_kib":2048"#, HUGE),
            (r#""something_new":[1]"#, 4096),
        ] {
            let text = format!(r#"[{{"base_host_virt_addr":4096,"size":8192,"offset":0,{text}}}]"#);
            assert_eq!(parse(text.as_bytes()).unwrap().unwrap()[0].page_bytes(), bytes, "{text}");
        }
    }

    #[test]
    fn a_region_at_addresses_of_the_kernel_is_refused() {
        let region = |base_host_virt_addr, size| {
            let (page_size, page_size_kib) = (None, None);
            Mapping { base_host_virt_addr, size, offset: 0, page_size, page_size_kib }.region("mem")
        };
        assert!(region(ADDRESSES - PAGE, PAGE).is_ok());
        for (address, size) in
            [(ADDRESSES, PAGE), (0xffff_8000_0000_0000, PAGE), (PAGE, u64::MAX - 1), (0, u64::MAX)]
        {
            let error = region(address, size).unwrap_err().to_string();
            assert!(error.contains("a process has no such addresses"), "{error}");
        }
    }

    #[test]
    fn a_message_about_many_files_names_a_few() {
        let names = |count: usize| some_of((0..count).map(|n| n.to_string()));
        assert_eq!(names(3), "0, 1, 2");
        assert_eq!(names(1_000_000), "0, 1, 2 and 999997 others");
    }

    #[test]
    fn a_part_of_a_handshake_is_waited_for_and_garbage_is_not() {
        for end in 0..RECORDED.len() {
            assert!(parse(&RECORDED.as_bytes()[..end]).unwrap().is_none(), "{end}");
        }
        for garbage in ["{}", "[]", "hello", "[1]", r#"[{"size":1}]"#, "[] []", "\0"] {
            assert!(parse(garbage.as_bytes()).is_err(), "{garbage:?}");
        }
        let twice = format!("{RECORDED}{RECORDED}");
        assert!(parse(twice.as_bytes()).is_err());
    }

    #[test]
    fn a_guest_s_memory_is_found_among_its_mappings() {
        let vma = |start: u64, end: u64, kib: u64, flags: &str| {
            format!(
                "{start:x}-{end:x} rw-p 00000000 00:00 0 \nSize: 4 kB\nKernelPageSize: {kib} kB\nVmFlags: rd wr {flags}\n"
            )
        };
        let one = vma(0x1000, 0x2000, 4, "")
            + &vma(0x10_0000, 0x18_0000, 4, "um")
            + &vma(0x18_0000, 0x20_0000, 4, "um");
        let found = registered(&one).unwrap();
        assert_eq!((found.len(), found[0].base_host_virt_addr, found[0].size), (1, 0x10_0000, 0x10_0000));
        let (low, high) = (0x7f00_0000_0000, 0x7e00_0000_0000);
        let two = vma(high, high + (1 << 30), 2048, "um") + &vma(low, low + (3 << 30), 2048, "um");
        let found = registered(&two).unwrap();
        let offsets: Vec<_> =
            found.iter().map(|m| (m.base_host_virt_addr, m.offset, m.page_bytes())).collect();
        assert_eq!(offsets, [(low, 0, HUGE), (high, 3 << 30, HUGE)]);
        assert!(registered(&vma(0, 4096, 4, "")).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_handshake_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn any_smaps_are_understood_or_refused(text in "([0-9a-f]{1,16}-[0-9a-f]{1,16}|VmFlags: um|KernelPageSize: [0-9]{1,20}|\n| ){0,20}") {
            let _ = registered(&text);
        }
    }
}
