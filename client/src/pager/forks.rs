//! The pages that a fork has emptied in a child (MADV_WIPEONFORK).
//!
//! Absent pages of such mappings read zeros in the child, and the FORK event does not report them.
//! The pager answers the event first, because reading the mappings takes long (0.1 s for 20,000)
//! and the forker waits. Until the mappings have been read, the child is *undecided*: the session
//! installs nothing in its memory ([`Entrance::enter`]) and does not read its userfaultfd, so the
//! child's faults and events wait in the kernel. At most one thread reads mappings, while there are
//! such children ([`Forks::begin`]). After [`LOOK`] the pager serves a child as if the fork had
//! emptied nothing, and counts it.
//!
//! [`Entrance::enter`]: crate::install::Entrance::enter

use super::{Pager, Watched};
use crate::memory::Space;
use crate::options::add;
use crate::processes::{Child, Process, Search};
use crate::shared::Shared;
use crate::state_file::StateError;
use crate::uffd::AsyncUffd;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// The time that the search for a child and its mappings may take.
const LOOK: Duration = Duration::from_secs(1);
/// The most results that wait for the pager. If there are more, the thread waits.
const LOOKED: usize = 64;

/// A child whose mappings are to be read.
#[derive(Debug)]
struct Look {
    parent: u32,
    child: Arc<Space>,
    since: u64,
    until: Instant,
}

/// The result for a child, or `None` if its mappings could not be read.
#[derive(Debug)]
pub(super) struct Looked {
    space: u32,
    child: Option<Child>,
}

/// The work of the thread. The lock is held for one look or change, never during a system call.
#[derive(Debug, Default)]
struct Queue {
    looks: VecDeque<Look>,
    /// True while a thread takes entries from the queue.
    has_thread: bool,
    /// The known process of each space.
    known: HashMap<u32, Process>,
}

/// The undecided children of a session, as the module describes them.
#[derive(Debug)]
pub(super) struct Forks {
    queue: Arc<Mutex<Queue>>,
    sender: mpsc::Sender<Looked>,
    looked: mpsc::Receiver<Looked>,
    undecided: Vec<(Arc<Space>, Instant)>,
}

impl Forks {
    /// Makes the state of a session whose first process is `owner`, if that is known.
    pub(super) fn new(owner: Option<Process>) -> Self {
        let (sender, looked) = mpsc::channel(LOOKED);
        let known = owner.into_iter().map(|owner| (0, owner)).collect();
        let queue = Arc::new(Mutex::new(Queue { known, ..Queue::default() }));
        Self { queue, sender, looked, undecided: Vec::new() }
    }

    /// Returns the next child whose mappings were read, or could not be.
    pub(super) async fn next(&mut self) -> Looked {
        // The channel never closes, because `self` holds a sender.
        self.looked.recv().await.unwrap_or(Looked { space: 0, child: None })
    }

    /// Returns true if a child is undecided. Forgets children that have exited.
    pub(super) fn has_undecided(&mut self) -> bool {
        self.undecided.retain(|(child, _)| !child.is_gone());
        !self.undecided.is_empty()
    }

    /// Queues the reading of the mappings of a child, which was forked at `since` (in ticks since
    /// boot) or later.
    fn begin(&mut self, shared: &Arc<Shared>, parent: u32, child: &Arc<Space>, since: u64) {
        let until = Instant::now() + LOOK;
        self.undecided.push((Arc::clone(child), until));
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.looks.push_back(Look { parent, child: Arc::clone(child), since, until });
        if queue.has_thread {
            return;
        }
        let (of_thread, sender, shared) = (Arc::clone(&self.queue), self.sender.clone(), Arc::clone(shared));
        let thread = std::thread::Builder::new().name("postcopy-forks".into());
        // Without a thread the children wait until `LOOK` is over, or until the next fork starts
        // one.
        queue.has_thread = thread.spawn(move || work(&of_thread, &sender, &shared)).is_ok();
    }
}

/// Searches for the queued children until the queue is empty.
fn work(queue: &Mutex<Queue>, sender: &mpsc::Sender<Looked>, shared: &Shared) {
    let lock = || queue.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let spaces = shared.spaces();
        let (look, parent, known) = {
            let mut queue = lock();
            let Some(look) = queue.looks.pop_front() else {
                queue.has_thread = false;
                return;
            };
            queue.known.retain(|space, _| spaces.space(*space).is_some());
            let known: HashSet<_> = queue.known.values().copied().collect();
            let parent = queue.known.get(&look.parent).copied();
            (look, parent, known)
        };
        // The child may be newer than the spaces that were read above.
        let spaces = shared.spaces();
        let regions = spaces.regions_of(look.child.id).map(|region| region.addresses()).collect();
        let search = Search { parent, since: look.since, regions, until: look.until };
        let child = search.find(&known, || shared.has_ended() || look.child.uffd.is_owner_gone());
        if let Some(process) = child.as_ref().and_then(|child| child.process) {
            lock().known.insert(look.child.id, process);
        }
        // If the session has ended, there is no receiver.
        if sender.blocking_send(Looked { space: look.child.id, child }).is_err() {
            return;
        }
    }
}

impl Pager {
    /// Watches all new spaces. Undecided children of `parent`, which were forked at `since` or
    /// later, are watched once their mappings have been read.
    pub(super) fn watch(&mut self, parent: u32, since: u64) -> io::Result<()> {
        let shared = Arc::clone(&self.on_exit.shared);
        let spaces = shared.spaces();
        // New spaces have the highest ids.
        let last = self.last_space;
        for space in spaces.spaces().filter(|space| last.is_none_or(|last| space.id > last)) {
            self.last_space = Some(space.id);
            match space.is_undecided() {
                true => self.forks.begin(&shared, parent, space, since),
                false => self.watch_space(space)?,
            }
        }
        Ok(())
    }

    fn watch_space(&mut self, space: &Arc<Space>) -> io::Result<()> {
        let uffd = AsyncUffd::new(Arc::clone(&space.uffd))?;
        self.watched.push(Watched { space: Arc::clone(space), uffd });
        Ok(())
    }

    /// Serves a child whose mappings were read, or could not be.
    pub(super) fn looked(&mut self, looked: Looked) {
        let undecided = &mut self.forks.undecided;
        let Some(index) = undecided.iter().position(|(child, _)| child.id == looked.space) else { return };
        let (space, _) = undecided.swap_remove(index);
        if space.is_gone() {
            return;
        }
        let shared = Arc::clone(&self.on_exit.shared);
        match looked.child {
            // If the child has exited, there is nothing to count.
            None if space.uffd.is_owner_gone() => {}
            None => add(&shared.counters.unseen_forks, 1),
            Some(child) => {
                let spaces = shared.spaces();
                let regions = child.wiped.iter().flat_map(|addresses| {
                    let regions = spaces.overlapping(&space, addresses);
                    regions.into_iter().map(|region| (region.pages_in(addresses), region))
                });
                for (pages, region) in regions.filter(|(_, region)| !region.is_shared()) {
                    if let Err(error) = region.set_removed(pages) {
                        self.broken.get_or_insert(StateError::from(error).to_string());
                        return;
                    }
                }
            }
        }
        space.set_decided();
        if let Err(error) = self.watch_space(&space) {
            self.broken.get_or_insert(format!("the userfaultfd of a child cannot be watched: {error}"));
        }
        shared.fill_work.notify_one();
        shared.outcome.pages_changed();
    }

    /// Serves the children whose mappings were not read in time.
    pub(super) fn give_up_looks(&mut self) {
        let late: Vec<_> =
            self.forks.undecided.iter().filter(|(_, until)| Instant::now() > *until + LOOK / 4).collect();
        let late: Vec<_> = late.into_iter().map(|(child, _)| child.id).collect();
        for space in late {
            self.looked(Looked { space, child: None });
        }
    }
}
