//! The daemon for CRIU. `criu restore --lazy-pages` connects to `lazy-pages.socket` in its work
//! directory. Every task that it restores sends its pid and its userfaultfd. After the last task,
//! `criu restore` sends a message. All memory of the tasks is registered only from then on.
//! This daemon replaces `criu lazy-pages`; docs/CRIU.md tells how to use it.

mod images;

pub(crate) use images::{Dump, ensure_whole};

use super::connection::Connection;
use super::log::say;
use super::resuming::{self, Attempt, Resuming};
use super::runtime_dir::{self, SessionName};
use super::served::{self, Served, Status};
use super::worker::Worker;
use super::{LOOK, Program, inbox, surroundings};
use anyhow::{Context, Result, ensure};
use postcopy::beneath::Directory;
use postcopy::proto::digest::Digest;
use postcopy::{Content, ForeignRegion, Image, Sharing};
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The message of `criu restore` after all tasks have been restored ("RSTF").
const RESTORE_FINISHED: i32 = 0x5253_5446;
const PID_BYTES: usize = 4;
/// The length of a task's message: a byte is sent with each descriptor.
const TASK_BYTES: usize = PID_BYTES + 1;
pub(super) const KIND: &str = "task";
/// The longest silence of a restore before its first task, once no other restore is waited for.
const EAGER: Duration = Duration::from_secs(600);

/// The interval between two checks of the sessions.
const EXIT_LOOK: Duration = Duration::from_millis(250);

/// The part of a daemon that is special to CRIU.
#[derive(Debug)]
pub(crate) struct Criu {
    pub(crate) image: Arc<Image>,
    /// The directory of CRIU's files in the image: empty, or a path that ends in a slash.
    pub(crate) prefix: String,
    pub(crate) dump: Dump,
    /// Fetch all pages in the background once all tasks have been restored.
    pub(crate) fill: bool,
    /// The start and the length of the wait for `criu restore` to connect. None: the wait has no
    /// end.
    patience: Option<(Instant, Duration)>,
    /// True once a restore has connected; the daemon accepts no other.
    is_taken: AtomicBool,
}

/// The tasks of a restore.
#[derive(Debug, Default)]
struct Tasks {
    served: Vec<Arc<Served>>,
    /// The tasks that an earlier worker has left, and that are still to be resumed.
    resuming: Vec<Resuming>,
    /// True once all tasks have been restored.
    is_restored: bool,
}

impl Tasks {
    fn of_predecessor(names: impl IntoIterator<Item = SessionName>) -> Self {
        Self { resuming: names.into_iter().map(Resuming::new).collect(), ..Self::default() }
    }

    fn is_empty(&self) -> bool {
        self.served.is_empty() && self.resuming.is_empty()
    }

    /// Waits until the first task is resident or gone, or the next check of all is due. Waiting for
    /// one task suffices, because the loop ends only when all tasks have ended.
    fn wait(&self, worker: &Worker) {
        let next_attempt = self.resuming.iter().map(Resuming::until_next).min();
        let timeout = next_attempt.map_or(EXIT_LOOK, |next| next.min(EXIT_LOOK));
        match self.served.first() {
            Some(served) => served.wait(timeout),
            None => worker.wait(None, timeout),
        }
    }

    fn has(&self, name: &SessionName) -> bool {
        self.served.iter().any(|served| served.name == *name)
            || self.resuming.iter().any(|resuming| resuming.name() == name)
    }

    /// Tries to resume the tasks that an earlier worker has left.
    fn resume(&mut self, worker: &Worker) {
        let Self { served: all, resuming, is_restored } = self;
        resuming.retain_mut(|resuming| match resuming.attempt(worker) {
            Attempt::Failed => true,
            Attempt::NoSession | Attempt::Ended => false,
            Attempt::Served(served) => {
                let served = worker.add(*served);
                if *is_restored {
                    restored(&served);
                }
                all.push(served);
                false
            }
        });
    }
}

/// Marks a task as restored: all of its memory is registered.
fn restored(served: &Served) {
    served.session().hosted().set_registered();
    bring_arguments(served);
}

/// A message of `criu restore` or of a task.
#[derive(Debug)]
enum Message {
    /// A restored task: the pid that it has in the images, its pid, and its userfaultfd.
    Task { image_pid: u32, pid: u32, uffd: std::os::fd::OwnedFd },
    /// A task without memory.
    Zombie,
    /// All tasks have been restored.
    Finished,
}

fn parse(peeked: &mut inbox::Peeked) -> Result<Option<Message>> {
    let Some(pid) = peeked.bytes.first_chunk::<PID_BYTES>() else { return Ok(None) };
    match i32::from_ne_bytes(*pid) {
        RESTORE_FINISHED => Ok(Some(Message::Finished)),
        0 => anyhow::bail!("it sends a task with pid 0"),
        zombie if zombie < 0 => Ok(Some(Message::Zombie)),
        image_pid => {
            if peeked.bytes.len() < TASK_BYTES {
                return Ok(None);
            }
            // `fds` may hold descriptors of later tasks, too.
            ensure!(!peeked.fds.is_empty(), "it sends task {image_pid} without a userfaultfd");
            let uffd = peeked.fds.swap_remove(0);
            let sender = peeked
                .sender
                .with_context(|| format!("the socket does not report the sender of task {image_pid}"))?;
            let pid = sender.as_raw_nonzero().get().cast_unsigned();
            Ok(Some(Message::Task { image_pid: image_pid.cast_unsigned(), pid, uffd }))
        }
    }
}

impl Criu {
    /// Reads CRIU's files in `directory` and compares its pagemaps with those of `image`.
    ///
    /// # Errors
    /// They differ, or `directory` cannot be read.
    pub(crate) fn new(
        image: Arc<Image>,
        reference: &str,
        directory: &Path,
        fill: bool,
        wait_for_restore: Option<Duration>,
    ) -> Result<Self> {
        let prefix = prefix_in(&image, reference)?;
        let opened =
            Directory::open(directory).with_context(|| format!("--images-dir {}", directory.display()))?;
        let dump = Dump::read(&opened, directory)?;
        for name in opened.names() {
            let name = name.with_context(|| directory.display().to_string())?;
            let Some(name) = name.to_str().filter(|name| images::pid_of_pagemap(name).is_some()) else {
                continue;
            };
            let shown = || directory.join(name).display().to_string();
            let bytes = images::read_pagemap(&opened, name).with_context(shown)?;
            ensure!(
                is_same(&image, format!("{prefix}{name}").as_bytes(), &bytes),
                "{} is not that of image {}: pull that one's with `postcopy pull --criu`",
                shown(),
                image.digest()
            );
        }
        let patience = wait_for_restore.map(|patience| (Instant::now(), patience));
        Ok(Self { image, prefix, dump, fill, patience, is_taken: AtomicBool::new(false) })
    }

    /// Returns the lazy memory of a task.
    fn regions(&self, image_pid: u32) -> Result<Vec<ForeignRegion>> {
        let extents = self.dump.task(image_pid);
        let extents = extents.with_context(|| format!("there is no pagemap-{image_pid}.img"))?;
        let region = |extent: &images::Extent| {
            let file = extent.file.as_os_str().as_bytes();
            Ok(ForeignRegion {
                address: usize::try_from(extent.address)?,
                len: usize::try_from(extent.pages)? * 4096,
                page_bytes: 4096,
                path: [self.prefix.as_bytes(), file].concat(),
                offset_bytes: extent.offset,
                sharing: Sharing::Private,
            })
        };
        extents.iter().filter(|extent| extent.is_lazy).map(region).collect()
    }

    /// Serves the tasks of a restore until all of them are resident or gone.
    fn restore(&self, worker: &Arc<Worker>, connection: &Connection) -> Result<()> {
        let mut tasks = Tasks::of_predecessor(worker.left_by(connection.cookie));
        tasks.resume(worker);
        let marker = worker.setup.runtime.finished(connection.cookie);
        if !marker.exists() {
            self.take_tasks(worker, connection, &mut tasks)?;
            // Writes the marker before it takes the message: a successor recognises the end of the
            // restore by either.
            fs::write(&marker, []).with_context(|| marker.display().to_string())?;
        }
        inbox::take(&connection.stream, PID_BYTES)?;
        tasks.is_restored = true;
        tasks.served.iter().for_each(|served| restored(served));
        tracing::info!("all tasks have been restored: {}", tasks.served.len() + tasks.resuming.len());
        self.complete(worker, tasks);
        Ok(())
    }

    /// Waits for the first complete message of a connection. `criu restore` connects first and
    /// sends its first task after it has read its images, so the time for that has no limit.
    ///
    /// # Errors
    /// The peer has hung up before that, or has sent something else.
    fn hear(&self, worker: &Worker, connection: &Connection) -> Result<()> {
        let started = Instant::now();
        loop {
            let peeked = inbox::peek(&connection.stream, 1)?;
            if !peeked.bytes.is_empty() {
                return connection.wait_for(worker, TASK_BYTES, parse).map(drop);
            }
            ensure!(!peeked.ended, "it has hung up and has sent nothing");
            ensure!(!worker.is_stopping(), "the daemon ends");
            // A silent peer must not keep a daemon that no restore needs. A restore is silent while
            // it reads memory that is not lazy.
            let is_late = self.patience.is_some_and(|(since, patience)| since.elapsed() > patience);
            ensure!(!is_late || started.elapsed() < EAGER, "it has sent nothing in {EAGER:?}");
            drop(peeked);
            worker.wait(Some(&connection.stream), LOOK);
        }
    }

    /// Returns whether this is the connection of the restore that this daemon serves. That is the
    /// first one that sends a message of a restore: others decide nothing.
    fn is_restore(&self, worker: &Arc<Worker>, connection: &Connection) -> bool {
        let runtime = &worker.setup.runtime;
        if !worker.left_by(connection.cookie).is_empty() || runtime.finished(connection.cookie).exists() {
            self.is_taken.store(true, Ordering::Release);
            return true;
        }
        // Sessions that an earlier worker has left belong to another connection.
        let is_another = worker.start.is_successor && runtime.sessions().is_ok_and(|all| !all.is_empty());
        if !is_another
            && !self.is_taken.load(Ordering::Acquire)
            && let Err(error) = self.hear(worker, connection)
        {
            worker.refusals.log(&format!("process {}: {error:#}", connection.peer));
            return false;
        }
        let is_first = !is_another && !self.is_taken.swap(true, Ordering::AcqRel);
        if !is_first {
            worker.refusals.log(&format!(
                "process {}: another restore is served here, and a daemon serves one",
                connection.peer
            ));
        }
        is_first
    }

    /// Attaches one task after another, until all have been restored.
    fn take_tasks(&self, worker: &Arc<Worker>, connection: &Connection, tasks: &mut Tasks) -> Result<()> {
        loop {
            match self.next(worker, connection, tasks)? {
                Message::Finished => return Ok(()),
                Message::Zombie => drop(inbox::take(&connection.stream, PID_BYTES)?),
                Message::Task { image_pid, pid, uffd } => {
                    let start = runtime_dir::start_of(pid).with_context(|| format!("process {pid}"))?;
                    let name = SessionName { kind: KIND.into(), pid, start, cookie: connection.cookie };
                    // An earlier worker may have attached the task and died before it took the
                    // message.
                    if !tasks.has(&name) {
                        let regions = self.regions(image_pid)?;
                        surroundings::log_if_inside_of(pid);
                        let attach = || {
                            let (setup, uffd) = (&worker.setup, uffd.as_fd());
                            Served::attach(setup, name.clone(), &self.image, uffd, &regions, false)
                        };
                        let served = resuming::retry_attach(worker, pid, || name.is_alive(), attach)
                            .with_context(|| format!("task {image_pid}"))?;
                        let bytes: usize = regions.iter().map(|region| region.len).sum();
                        tracing::info!(
                            "task {image_pid}, process {pid}: {} KiB in {} regions",
                            bytes >> 10,
                            regions.len()
                        );
                        tasks.served.push(worker.add(served));
                    }
                    inbox::take(&connection.stream, TASK_BYTES)?;
                }
            }
        }
    }

    /// Waits for the next message. The time between two tasks has no limit, but the time within a
    /// message has one.
    fn next(&self, worker: &Worker, connection: &Connection, tasks: &mut Tasks) -> Result<Message> {
        while inbox::peek(&connection.stream, 1)?.bytes.is_empty() {
            let ended = inbox::peek(&connection.stream, 1)?.ended;
            ensure!(!ended, "criu restore has hung up before all was restored: it has failed");
            ensure!(!worker.is_past_deadline(), "the daemon ends");
            worker.wait(Some(&connection.stream), LOOK);
            tasks.resume(worker);
        }
        connection.wait_for(worker, TASK_BYTES, parse)
    }

    /// Watches over tasks until each is resident or gone.
    fn complete(&self, worker: &Worker, mut tasks: Tasks) {
        // Ended sessions whose recording or trace may be incomplete. `served::finish` waits for
        // these; the loop does not.
        let mut ended = Vec::new();
        while !tasks.is_empty() {
            tasks.resume(worker);
            for served in &tasks.served {
                let fills = self.fill || worker.is_stopping();
                if fills && let Err(error) = served.fill() {
                    tracing::warn!("process {}: {error}", served.name.pid);
                }
            }
            tasks.wait(worker);
            ended.retain(|served: &Arc<Served>| !served.is_finished());
            tasks.served.retain(|served| {
                let pid = served.name.pid;
                match served.look() {
                    Status::Serving if worker.is_past_deadline() => {
                        if served.end() {
                            let text =
                                format!("left: process {pid}; accesses to its absent pages raise SIGBUS");
                            tracing::warn!("{text}");
                            say(&text);
                            let what = "was left; accesses to its absent pages raise SIGBUS";
                            worker.setup.runtime.note_loss(&served.name, what);
                        }
                        worker.remove(&served.name);
                        ended.push(Arc::clone(served));
                        return false;
                    }
                    Status::Serving => return true,
                    Status::Resident => {
                        let _ = served.end();
                        tracing::info!("process {pid}: all of its memory is resident");
                    }
                    Status::Ended => {
                        tracing::info!("process {pid}: has exited, or all of its memory is resident")
                    }
                }
                if served.session().progress().poisoned_pages > 0 {
                    worker.setup.runtime.note_loss(&served.name, "lost pages, which are SIGBUS");
                }
                worker.remove(&served.name);
                ended.push(Arc::clone(served));
                false
            });
        }
        served::finish(ended.iter().map(Arc::as_ref));
    }
}

impl Program for Criu {
    fn serve(&self, worker: &Arc<Worker>, connection: Connection) -> Option<i32> {
        if !self.is_restore(worker, &connection) {
            return None;
        }
        worker.silent.remove(&connection);
        match self.restore(worker, &connection) {
            Ok(()) => Some(0),
            Err(error) => {
                tracing::error!("criu restore (process {}): {error:#}", connection.peer);
                // The daemon poisons the memory of these tasks or kills them, because it no longer
                // serves them and they would read zeros.
                let sessions = worker.sessions();
                sessions.iter().for_each(|served| {
                    let _ = served.end();
                });
                for name in worker.setup.runtime.sessions().unwrap_or_default() {
                    served::kill_unsafe(&worker.setup, &name, "its session could not be resumed");
                }
                served::finish(sessions.iter().map(Arc::as_ref));
                Some(1)
            }
        }
    }

    fn serve_again(&self, worker: &Arc<Worker>, session: SessionName) -> Option<i32> {
        // The connection of a served session stays open. An earlier worker failed to serve this
        // session's connection.
        let is_restored = worker.setup.runtime.finished(session.cookie).exists();
        let tasks = Tasks { is_restored, ..Tasks::of_predecessor([session]) };
        self.complete(worker, tasks);
        Some(0)
    }

    fn begin(&self, worker: &Arc<Worker>) -> Result<()> {
        for (_, path) in &worker.setup.listeners {
            let path = std::path::absolute(path)?;
            say(&format!("ready: {} ({})", path.display(), self.image.digest()));
        }
        Ok(())
    }

    fn end_idle(&self, worker: &Worker) -> Option<i32> {
        let (since, patience) = self.patience?;
        // An earlier worker may have served a restore.
        let is_idle = || {
            !self.is_taken.load(Ordering::Acquire)
                && worker.setup.runtime.sessions().is_ok_and(|all| all.is_empty())
        };
        if worker.is_stopping() || since.elapsed() < patience || !is_idle() {
            return None;
        }
        tracing::error!(
            "no criu restore has connected within {patience:?}: the daemon ends (--wait-for-restore)"
        );
        Some(1)
    }
}

/// Fetches and installs the arguments and the environment of a process. The kernel does not wait
/// for absent pages when a program reads these in /proc, so the program would read nothing.
fn bring_arguments(served: &Served) {
    // A process that has exited needs none.
    let Ok(fields) = runtime_dir::stat_of::<4>(served.name.pid, 48) else { return };
    let [arguments, arguments_end, environment, environment_end] =
        fields.map(postcopy::proto::page::to_usize);
    served.session().hosted().bring(&(arguments..arguments_end));
    served.session().hosted().bring(&(environment..environment_end));
}

/// Returns the directory of CRIU's files in an image. Errors name the image by `reference`.
///
/// # Errors
/// The image has no such directory, or several.
pub(crate) fn prefix_in(image: &Image, reference: &str) -> Result<String> {
    let lacks = |file| {
        format!(
            "{reference} has no {file}: it is not an image of a CRIU dump. Push the directory that `criu dump` wrote"
        )
    };
    let is_parent = |prefix: &str| prefix.split('/').any(|part| part == "parent");
    let prefixes: BTreeSet<String> = image
        .root()
        .files()
        .filter_map(|(path, _)| Some(path.to_string().strip_suffix("pstree.img")?.to_owned()))
        .filter(|prefix| (prefix.is_empty() || prefix.ends_with('/')) && !is_parent(prefix))
        .collect();
    let mut prefixes = prefixes.into_iter();
    let first = prefixes.next().with_context(|| lacks("pstree.img"))?;
    ensure!(prefixes.next().is_none(), "{reference} has several directories of CRIU's images");
    let is_pagemap =
        |path: &str| path.strip_prefix(&first).is_some_and(|name| images::pid_of_pagemap(name).is_some());
    ensure!(image.root().files().any(|(path, _)| is_pagemap(&path.to_string())), lacks("pagemap-PID.img"));
    Ok(first)
}

/// Returns whether a file of the image has exactly these bytes.
fn is_same(image: &Image, path: &[u8], bytes: &[u8]) -> bool {
    let Some(file) = image.file(path).filter(|file| file.size_bytes == bytes.len() as u64) else {
        return false;
    };
    let chunks = bytes.chunks(image.root().chunk_size().bytes());
    chunks.zip(file.first_chunk.0..).all(|(chunk, index)| {
        match image.content(postcopy::proto::page::ChunkIndex(index)) {
            Content::Zero => chunk.iter().all(|byte| *byte == 0),
            Content::Data(digest) => digest == Digest::of(chunk),
            _ => false,
        }
    })
}
