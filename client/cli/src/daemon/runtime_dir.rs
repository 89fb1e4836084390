//! The runtime directory: the state that outlives a daemon's worker, and that another daemon may
//! take over.
//!
//! Each daemon has a directory of its own on tmpfs, which holds:
//!
//! - `lock`, which the daemon holds as long as its guardian or its worker lives;
//! - `control`, a socket;
//! - `lost`, which lists the processes that lost memory and the action that was taken, and the
//!   tasks of a restore that are served;
//! - a state file for each session, named `KIND-PID-START-COOKIE`: the process, its start time, and
//!   the connection (SO_COOKIE) that the session belongs to. These are the same for every worker.

use anyhow::{Context, Result, anyhow, ensure};
use postcopy::state_file::StateError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags, fallocate, flock};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The runtime directory of a daemon, and its lock.
#[derive(Debug)]
pub(crate) struct RuntimeDir {
    path: PathBuf,
    _lock: File,
    /// The list of losses, open from the start: to record or read a loss takes neither room in the
    /// file system nor a descriptor.
    lost: File,
}

/// The name of a session.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SessionName {
    /// The kind of the session's program: `vm` or `task`.
    pub(crate) kind: String,
    /// The pid of the session's process.
    pub(crate) pid: u32,
    /// The start time of that process, in clock ticks since boot. A later process with the same pid
    /// has another start time.
    pub(crate) start: u64,
    /// The cookie of the connection that the session was created from, or 0 without a connection.
    pub(crate) cookie: u64,
}

impl fmt::Display for SessionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}-{:x}", self.kind, self.pid, self.start, self.cookie)
    }
}

impl FromStr for SessionName {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let words: Vec<_> = text.split('-').collect();
        let &[kind, pid, start, cookie] = words.as_slice() else { return Err(()) };
        let name = Self {
            kind: kind.to_owned(),
            pid: pid.parse().map_err(drop)?,
            start: start.parse().map_err(drop)?,
            cookie: u64::from_str_radix(cookie, 16).map_err(drop)?,
        };
        // Each name has one spelling only.
        if !kind.is_empty() && name.to_string() == text { Ok(name) } else { Err(()) }
    }
}

impl SessionName {
    /// Returns whether the session's process is alive. A zombie, which has exited without a wait(2)
    /// of its parent, is not alive. A process that cannot be examined, for a lack of descriptors,
    /// is alive.
    pub(crate) fn is_alive(&self) -> bool {
        let Some(pid) = Pid::from_raw(self.pid.cast_signed()) else { return false };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return false,
            pidfd => pidfd.ok(),
        };
        // This follows pidfd_open(2), so the pidfd is of this process or of an earlier one with its
        // pid.
        let is_another = match start_of(self.pid) {
            Ok(start) => start != self.start,
            Err(error) => matches!(Errno::from_io_error(&error), Some(Errno::NOENT | Errno::SRCH)),
        };
        !is_another && !pidfd.as_ref().is_some_and(has_exited)
    }
}

/// Returns whether a process has exited. A pidfd is readable when all threads have exited.
pub(crate) fn has_exited(pidfd: &OwnedFd) -> bool {
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&Timespec::default())) == Ok(1)
}

/// Returns the start time of a process in clock ticks since boot: field 22 of proc_pid_stat(5).
///
/// # Errors
/// The process does not exist.
pub(crate) fn start_of(pid: u32) -> io::Result<u64> {
    let [start] = stat_of(pid, 22)?;
    Ok(start)
}

/// Returns `N` fields of proc_pid_stat(5), beginning with the field of number `first`.
///
/// # Errors
/// The process does not exist, or a field is not a number.
pub(crate) fn stat_of<const N: usize>(pid: u32, first: usize) -> io::Result<[u64; N]> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold any character; the state after it is field 3.
    let (_, rest) = stat.rsplit_once(')').ok_or(io::ErrorKind::InvalidData)?;
    let fields = rest.split_whitespace().skip(first - 3).take(N).map(str::parse);
    let fields: Vec<u64> = fields.collect::<Result<_, _>>().map_err(|_| io::ErrorKind::InvalidData)?;
    fields.try_into().map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Returns the default parent of daemons' directories. It is in the user's runtime directory, or in
/// /run for root. If that directory is not in memory, it is in /dev/shm, with the user's number in
/// its name: all users share that directory.
pub(crate) fn default_root() -> PathBuf {
    let of_user = std::env::var_os("XDG_RUNTIME_DIR").filter(|_| !rustix::process::geteuid().is_root());
    let run = of_user.map_or_else(|| PathBuf::from("/run"), PathBuf::from);
    match is_in_memory(&run) {
        Ok(true) => run.join("postcopy"),
        _ => PathBuf::from(format!("/dev/shm/postcopy-{}", rustix::process::geteuid().as_raw())),
    }
}

fn is_in_memory(path: &Path) -> io::Result<bool> {
    let kind = rustix::fs::statfs(path)?.f_type;
    Ok([TMPFS_MAGIC, RAMFS_MAGIC].contains(&i128::from(kind)))
}

/// Creates the parent of daemons' directories, if there is none, and locks it: others that create
/// theirs wait until the result is dropped.
///
/// # Errors
/// It cannot be created, is not in memory, or other users could change it.
pub(crate) fn open_root(root: &Path) -> Result<File> {
    let shown = root.display();
    let created = fs::DirBuilder::new().recursive(true).mode(0o700).create(root);
    created.map_err(|error| anyhow!("{shown}: {error}. {ANOTHER}"))?;
    ensure_private(root)?;
    let in_memory = is_in_memory(root).with_context(|| shown.to_string())?;
    ensure!(in_memory, "{shown} is not on tmpfs, where page states must be. {ANOTHER}");
    // Other daemons that are creating their directories do not hold their own locks yet.
    let all = File::open(root).with_context(|| shown.to_string())?;
    flock(&all, FlockOperation::LockExclusive).with_context(|| shown.to_string())?;
    Ok(all)
}

impl RuntimeDir {
    /// Creates a directory below `root`, and removes the useless ones of daemons that have died.
    ///
    /// # Errors
    /// The directory cannot be created, is not in memory, or other users could change it.
    pub(crate) fn create(root: &Path, name: &str) -> Result<Self> {
        let _all = open_root(root)?;
        clean(root);
        let directory = |n: u32| {
            let path = root.join(format!("{name}-{}-{n}", std::process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                // The directory belongs to another daemon whose starter had this pid.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => None,
                created => Some(created.map(|()| path.clone()).with_context(|| path.display().to_string())),
            }
        };
        let path = (0..).find_map(directory).expect("some number is free")?;
        let lock = lock(&path)?.context("its lock is taken")?;
        let lost = list_of_losses(&path.join(LOSSES));
        let lost = lost.with_context(|| format!("{}: the list of losses", path.display()))?;
        Ok(Self { path, _lock: lock, lost })
    }

    /// Returns the directory that holds those of all daemons, as an absolute path.
    pub(crate) fn root(&self) -> PathBuf {
        let root = self.path.parent().unwrap_or(&self.path);
        std::path::absolute(root).unwrap_or_else(|_| root.to_owned())
    }

    /// Returns the directory's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of the file that marks the restore over a connection as finished (CRIU).
    pub(crate) fn finished(&self, cookie: u64) -> PathBuf {
        self.path.join(format!("finished-{cookie:x}"))
    }

    /// Records once, for all workers, the action against a process that lost memory or was left
    /// without some of it.
    pub(crate) fn note_loss(&self, session: &SessionName, what: &str) {
        if self.losses().iter().any(|loss| loss.starts_with(&format!("{session} "))) {
            return;
        }
        let line = format!("{session} {what}\n");
        if let Err(error) = (&self.lost).write_all(line.as_bytes()) {
            tracing::error!("{}: {error}", self.path.join(LOSSES).display());
        }
    }

    /// Records a task of a restore, for the case that this directory disappears: the list is open,
    /// so it outlives its directory.
    pub(crate) fn note_task(&self, session: &SessionName, is_served: bool) {
        let sign = if is_served { '+' } else { '-' };
        if let Err(error) = (&self.lost).write_all(format!("{sign}{session}\n").as_bytes()) {
            tracing::error!("{}: {error}", self.path.join(LOSSES).display());
        }
    }

    /// Returns the tasks that [`RuntimeDir::note_task`] has recorded as served.
    pub(crate) fn tasks(&self) -> Vec<SessionName> {
        let mut tasks = std::collections::BTreeSet::new();
        for line in self.lines() {
            let (sign, name) = line.split_at_checked(1).unwrap_or_default();
            match (sign, name.parse()) {
                ("+", Ok(name)) => drop(tasks.insert(name)),
                ("-", Ok(name)) => drop(tasks.remove(&name)),
                _ => {}
            }
        }
        tasks.into_iter().collect()
    }

    /// Returns true if the directory, which this daemon has created, does not exist any more.
    pub(crate) fn is_gone(&self) -> bool {
        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let own = self._lock.metadata().map(id).ok();
        match fs::metadata(self.path.join(LOCK)) {
            Ok(found) => Some(id(found)) != own,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    /// Returns the lines of [`RuntimeDir::note_loss`], one for each process. A line begins with the
    /// name of the session.
    pub(crate) fn losses(&self) -> Vec<String> {
        let is_loss = |line: &String| !line.starts_with(['+', '-']);
        self.lines().into_iter().filter(is_loss).collect()
    }

    fn lines(&self) -> Vec<String> {
        let read = self.lost.metadata().and_then(|lost| {
            let mut lines = vec![0; postcopy::proto::page::to_usize(lost.len())];
            // By offset: the workers share the descriptor's position.
            self.lost.read_exact_at(&mut lines, 0)?;
            Ok(lines)
        });
        let lines = read.unwrap_or_else(|error| {
            tracing::error!("{}: {error}", self.path.join(LOSSES).display());
            Vec::new()
        });
        String::from_utf8_lossy(&lines).lines().map(str::to_owned).collect()
    }

    /// Opens the state file of a session, and creates it if it does not exist.
    ///
    /// # Errors
    /// Any error of open(2).
    pub(crate) fn state(&self, session: &SessionName) -> io::Result<File> {
        self.open_state(session, true)
    }

    /// Opens the state file of a session that this worker serves. The file of a session that has
    /// ended does not exist.
    ///
    /// # Errors
    /// Any error of open(2).
    pub(crate) fn existing_state(&self, session: &SessionName) -> io::Result<File> {
        self.open_state(session, false)
    }

    fn open_state(&self, session: &SessionName, may_create: bool) -> io::Result<File> {
        let mut options = File::options();
        options.read(true).write(true).create(may_create).truncate(false).mode(0o600);
        options.open(self.path.join(session.to_string()))
    }

    /// Returns the sessions that have a state file.
    ///
    /// # Errors
    /// Any error of readdir(3).
    pub(crate) fn sessions(&self) -> io::Result<Vec<SessionName>> {
        sessions_in(&self.path)
    }

    /// Removes the files of a session that has ended.
    pub(crate) fn remove(&self, session: &SessionName) {
        // The session may have ended before it had a state file.
        let _ = fs::remove_file(self.path.join(session.to_string()));
        let _ = fs::remove_file(self.poisoning(session));
    }

    /// Returns the path of the file that marks a worker's attempt to poison a session's memory as a
    /// last resort.
    pub(crate) fn poisoning(&self, session: &SessionName) -> PathBuf {
        self.path.join(format!("poisoning-{session}"))
    }

    /// Removes the files of a daemon that ends, except for state files that another daemon may take
    /// over.
    pub(crate) fn leave(&self) {
        let _ = fs::remove_file(self.path.join("control"));
        if self.sessions().is_ok_and(|sessions| sessions.is_empty()) {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

impl Drop for RuntimeDir {
    /// Removes the directory of a daemon that could not start. Workers exit without drops.
    fn drop(&mut self) {
        self.leave();
    }
}

/// The next step after an error about the directory.
const ANOTHER: &str = "Name a directory of yours on tmpfs with --runtime-dir";

/// Checks that no other user can put files into `root` or in its place: state files and control
/// sockets decide about the memory of other programs. So this user or root owns each directory and
/// each link on the way, and no other user may write to one. A user may create names in a sticky
/// directory like /dev/shm, but may not replace those of other users.
///
/// # Errors
/// Another user could, or `root` does not exist.
pub(crate) fn ensure_private(root: &Path) -> Result<()> {
    let absolute = std::path::absolute(root).with_context(|| root.display().to_string())?;
    let mut names: Vec<_> = absolute.components().map(|part| part.as_os_str().to_owned()).collect();
    names.reverse();
    let (mut path, mut links) = (PathBuf::new(), 0);
    while let Some(name) = names.pop() {
        if name == ".." {
            path.pop();
            continue;
        }
        let next = path.join(&name);
        let metadata = fs::symlink_metadata(&next).with_context(|| next.display().to_string())?;
        ensure_ours(&next, &metadata, names.is_empty())?;
        if metadata.is_symlink() {
            links += 1;
            ensure!(links <= MAX_LINKS, "{}: it leads through too many links", root.display());
            let target = fs::read_link(&next).with_context(|| next.display().to_string())?;
            if target.is_absolute() {
                path = PathBuf::new();
            }
            names.extend(target.components().rev().map(|part| part.as_os_str().to_owned()));
        } else {
            path = next;
        }
    }
    Ok(())
}

/// The most links in a path, as in path_resolution(7).
const MAX_LINKS: u32 = 40;

/// Returns whether a user is the one that stands for all users that this user namespace lacks.
fn is_unmapped(user: u32) -> bool {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let overflow = read("/proc/sys/kernel/overflowuid").trim().parse() == Ok(user);
    let map = read("/proc/self/uid_map");
    let has_all = map.split_whitespace().eq(["0", "0", "4294967295"]);
    overflow && !has_all
}

fn ensure_ours(path: &Path, metadata: &fs::Metadata, is_last: bool) -> Result<()> {
    let (shown, own) = (path.display(), rustix::process::geteuid().as_raw());
    let owner = metadata.uid();
    // In a user namespace, directories of the system belong to a user that it does not have.
    let is_outside = || !is_last && is_unmapped(owner);
    ensure!(
        [0, own].contains(&owner) || is_outside(),
        "{shown} belongs to user {owner}, and this is user {own}. {ANOTHER}"
    );
    // The mode of a link has no meaning.
    let mode = if metadata.is_symlink() { 0 } else { metadata.mode() };
    let is_sticky = mode & 0o1000 != 0 && !is_last;
    ensure!(
        mode & 0o022 == 0 || is_sticky,
        "{shown}: other users may write to it (mode {:o}). {ANOTHER}, or run chmod go-w",
        mode & 0o7777
    );
    Ok(())
}

/// The name of the file that a living daemon has locked.
const LOCK: &str = "lock";
/// The name of the file that lists losses.
const LOSSES: &str = "lost";
/// The room that the file system allocates to that file at the start: about 600 lines. If the list
/// becomes longer in a full file system, later lines are missing, and the exit status is still that
/// of a loss.
const LOSSES_BYTES: u64 = 64 << 10;
const TMPFS_MAGIC: i128 = 0x0102_1994;
const RAMFS_MAGIC: i128 = 0x8584_58f6;

/// Takes the lock of a directory. None: its daemon lives.
fn lock(directory: &Path) -> Result<Option<File>> {
    let path = directory.join(LOCK);
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR);
    let file: File = file.with_context(|| path.display().to_string())?.into();
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Creates the list of losses, with room for its lines.
fn list_of_losses(path: &Path) -> io::Result<File> {
    let file = File::options().create_new(true).read(true).append(true).mode(0o600).open(path)?;
    // The file stays empty.
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, LOSSES_BYTES)?;
    Ok(file)
}

fn sessions_in(directory: &Path) -> io::Result<Vec<SessionName>> {
    let names = fs::read_dir(directory)?.flatten().map(|entry| entry.file_name());
    Ok(names.filter_map(|name| name.to_str()?.parse().ok()).collect())
}

/// Returns the directories of all daemons, including those that have died. Leaves out what else is
/// in `root`, because the directories of dead daemons are removed.
pub(crate) fn all(root: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(is_name))
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Returns whether a directory has the name of a daemon's: PROGRAM-PID-NUMBER.
fn is_name(name: &str) -> bool {
    let words: Vec<_> = name.split('-').collect();
    let is_number = |word: &str| word.parse::<u32>().is_ok();
    matches!(words.as_slice(), ["firecracker" | "criu", pid, number] if is_number(pid) && is_number(number))
}

/// Removes useless files of daemons that have died: state files of programs that have exited, and
/// those of CRIU's tasks, whose userfaultfd has died with the daemon.
fn clean(root: &Path) {
    for directory in all(root) {
        let Ok(Some(_lock)) = lock(&directory) else { continue };
        let sessions = sessions_in(&directory).unwrap_or_default();
        let is_useful = |session: &SessionName| session.kind == "vm" && session.is_alive();
        for session in sessions.iter().filter(|session| !is_useful(session)) {
            let _ = fs::remove_file(directory.join(session.to_string()));
        }
        if !sessions.iter().any(is_useful) {
            let _ = fs::remove_dir_all(&directory);
        }
    }
}

/// Moves the state file of a virtual machine, whose daemon has died altogether, to `to`. Returns
/// the new name of the session, or None if there was no state file.
///
/// # Errors
/// The daemon of the machine lives, or the file cannot be moved.
pub(crate) fn take_over(root: &Path, pid: u32, to: &RuntimeDir) -> Result<Option<SessionName>> {
    for directory in all(root) {
        let of_pid = |session: &SessionName| session.kind == "vm" && session.pid == pid && session.is_alive();
        let sessions = sessions_in(&directory).unwrap_or_default();
        // A state file that was never written to describes no session.
        let is_there = |session: &SessionName| {
            let state =
                File::open(directory.join(session.to_string())).map(postcopy::state_file::descriptors);
            !matches!(state, Ok(Err(StateError::Empty)))
        };
        let mut sessions = sessions.into_iter().filter(of_pid);
        let Some(session) = sessions.find(is_there) else { continue };
        let held = lock(&directory)?;
        ensure!(held.is_some(), "process {pid} is served by a daemon that lives: {}", directory.display());
        let adopted = SessionName { cookie: 0, ..session.clone() };
        fs::rename(directory.join(session.to_string()), to.path.join(adopted.to_string()))
            .with_context(|| format!("the state file {session}"))?;
        return Ok(Some(adopted));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn this_process_is_alive_and_its_pid_at_another_time_is_not() {
        let pid = std::process::id();
        let name = SessionName { kind: "vm".into(), pid, start: start_of(pid).unwrap(), cookie: 0xabc };
        assert!(name.is_alive());
        assert!(!SessionName { start: name.start + 1, ..name.clone() }.is_alive());
        assert_eq!(name.to_string().parse(), Ok(name));
    }

    fn root() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    #[test]
    fn a_root_that_another_user_owns_or_may_write_to_is_refused() {
        let folder = root();
        let refusal = |path: &Path| RuntimeDir::create(path, "criu").unwrap_err().to_string();
        for mode in [0o777, 0o770, 0o1777] {
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert!(refusal(folder.path()).contains("other users may write to it"), "{mode:o}");
        }
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        drop(RuntimeDir::create(folder.path(), "criu").unwrap());
        if rustix::process::geteuid().is_root() {
            let link = folder.path().join("link");
            std::os::unix::fs::symlink(folder.path(), &link).unwrap();
            std::os::unix::fs::lchown(&link, Some(4711), None).unwrap();
            assert!(
                refusal(&link).contains("belongs to user 4711"),
                "a link of theirs to a directory of ours"
            );
            std::os::unix::fs::chown(folder.path(), Some(4711), None).unwrap();
            assert!(refusal(folder.path()).contains("belongs to user 4711"));
        }
        assert_eq!(all(folder.path()), [] as [PathBuf; 0]);
    }

    #[test]
    fn a_root_below_a_directory_that_another_user_may_rename_in_is_refused() {
        let folder = root();
        let [parent, links] = ["parent", "links"].map(|name| folder.path().join(name));
        let inner = parent.join("inner");
        fs::create_dir_all(&inner).unwrap();
        fs::create_dir(&links).unwrap();
        std::os::unix::fs::symlink(&inner, links.join("link")).unwrap();
        let refusal = |path: &Path| ensure_private(path).unwrap_err().to_string();
        let set_mode =
            |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        for path in [&inner, &links.join("link"), &links.join("../parent/inner")] {
            set_mode(&parent, 0o777);
            assert!(refusal(path).contains("parent: other users may write to it (mode 777)"));
            set_mode(&parent, 0o1777);
            ensure_private(path).unwrap();
        }
        set_mode(&links, 0o777);
        assert!(refusal(&links.join("link")).contains("links: other users may write to it"));
        if rustix::process::geteuid().is_root() {
            set_mode(&parent, 0o755);
            std::os::unix::fs::chown(&parent, Some(4711), None).unwrap();
            assert!(refusal(&inner).contains("parent belongs to user 4711"));
        }
    }

    #[test]
    fn only_directories_of_dead_daemons_are_removed() {
        let folder = root();
        let [dead, strange] = ["firecracker-1-0", "user"].map(|name| folder.path().join(name));
        for path in [&dead, &strange] {
            fs::create_dir(path).unwrap();
        }
        let live = RuntimeDir::create(folder.path(), "criu").unwrap();
        let next = RuntimeDir::create(folder.path(), "criu").unwrap();
        assert!(!dead.exists() && strange.exists() && live.path().exists());
        let path = live.path().to_owned();
        drop((live, next));
        assert!(!path.exists(), "its daemon has not started");
    }

    proptest! {
        #[test]
        fn any_name_is_a_session_s_or_none(name in "(vm|task|)?(-[0-9a-fx+]{0,20}){0,5}") {
            if let Ok(session) = name.parse::<SessionName>() {
                prop_assert_eq!(session.to_string(), name);
            }
        }
    }
}
