//! The processes of children, and the pages that their forks have emptied (MADV_WIPEONFORK).
//!
//! Absent pages of such mappings read zeros in the child, and the FORK event reports neither them
//! nor the child's pid. The pager answers the event first, because reading the mappings takes long
//! (0.1 s for 20,000) and the forker waits. Until the mappings have been read, the child is
//! *undecided*: the session installs nothing in its memory ([`Entrance::enter`]) and does not read
//! its userfaultfd, so the child's faults and events wait in the kernel.
//!
//! At most one thread searches, while there are such children ([`Forks::begin`]). In each round it
//! reads the mappings of new processes, each process once, and decides all children for which that
//! is enough: a process that may be the child has its regions registered, and was started since the
//! fork. Several such processes are enough if their forks have emptied the same memory. The pager
//! serves a child as if the fork had emptied nothing, and counts it, once a round that began
//! [`LOOK`] after the fork has found nothing. A burst of forks may take longer, as long as the
//! thread reads one process after the other.
//!
//! [`Entrance::enter`]: crate::install::Entrance::enter

use super::identify::identify;
use super::{Pager, Watched};
use crate::memory::{Space, Spaces};
use crate::options::{LossPolicy, add};
use crate::processes::{Candidates, Mappings, Process, join};
use crate::shared::Shared;
use crate::state_file::StateError;
use crate::uffd::AsyncUffd;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// The time that the search for a child may take.
const LOOK: Duration = Duration::from_secs(1);
/// The first and the longest pause between rounds that find nothing.
const PAUSES: Range<Duration> = Duration::from_micros(100)..Duration::from_millis(10);
/// The time after which the search covers all processes, because the parent may not have the child.
const ELSEWHERE: Duration = Duration::from_millis(5);
/// The most results that wait for the pager. If there are more, the thread waits.
const LOOKED: usize = 64;

/// A child that the thread searches for.
#[derive(Clone, Debug)]
struct Look {
    parent: u32,
    child: Arc<Space>,
    /// The earliest time at which the child was started, in ticks since boot.
    since: u64,
    begun: Instant,
}

/// A result of the search.
#[derive(Debug)]
pub(super) enum Looked {
    /// The addresses that a child's fork has emptied, or `None` if they are unknown.
    Wiped { space: u32, wiped: Option<Vec<Range<usize>>> },
    /// The process of this space is known for certain.
    Identified(Arc<Space>),
}

/// The children that were found among the candidates in a round.
type Found = Vec<(u32, Option<Process>, Option<Vec<Range<usize>>>)>;

/// The work of the thread.
#[derive(Debug, Default)]
struct Queue {
    looks: Vec<Look>,
    /// True while a thread searches.
    has_thread: bool,
    /// The time when the thread has last read a process.
    progress: Option<Instant>,
    /// The processes that are probably those of these spaces.
    known: HashMap<u32, Process>,
    /// The processes that earlier threads have read.
    candidates: Candidates,
}

/// The undecided children of a session, as the module describes them.
#[derive(Debug)]
pub(super) struct Forks {
    /// The lock is held for one look or change, never during a system call.
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

    /// Returns the next result of the search.
    pub(super) async fn next(&mut self) -> Looked {
        match self.looked.recv().await {
            Some(looked) => looked,
            // The channel never closes, because `self` holds a sender.
            None => std::future::pending().await,
        }
    }

    /// Returns true if a child is undecided. Forgets children that have exited.
    pub(super) fn has_undecided(&mut self) -> bool {
        self.undecided.retain(|(child, _)| !child.is_gone());
        !self.undecided.is_empty()
    }

    /// Begins the search for a child, which was forked at `since` (in ticks since boot) or later.
    fn begin(&mut self, shared: &Arc<Shared>, parent: u32, child: &Arc<Space>, since: u64) {
        let begun = Instant::now();
        self.undecided.push((Arc::clone(child), begun));
        let mut queue = lock(&self.queue);
        queue.looks.push(Look { parent, child: Arc::clone(child), since, begun });
        if queue.has_thread {
            return;
        }
        let queue_of_thread = Arc::clone(&self.queue);
        let (sender, shared) = (self.sender.clone(), Arc::clone(shared));
        let search = move || {
            Search { queue: &queue_of_thread, sender: &sender, shared: &shared }.run();
        };
        let thread = std::thread::Builder::new().name("postcopy-forks".into());
        // Without a thread the children wait until `LOOK` is over, or until the next fork starts
        // one.
        queue.has_thread = thread.spawn(search).is_ok();
    }

    /// Identifies children among the processes that were read, unless the thread works on them.
    /// Returns the spaces that it has found a process for. Some are found only when others have
    /// exited.
    pub(super) fn identify(&self, spaces: &Spaces) -> Vec<Arc<Space>> {
        let mut queue = lock(&self.queue);
        if queue.has_thread {
            return Vec::new();
        }
        // Only this thread starts another one, which then takes the candidates.
        let candidates = std::mem::take(&mut queue.candidates);
        drop(queue);
        let found = identify(spaces, candidates.list());
        lock(&self.queue).candidates = candidates;
        found
    }

    /// Takes the children out that are still undecided long after their forks, although the thread
    /// does not read processes any more.
    fn take_late(&mut self) -> Vec<u32> {
        let mut queue = lock(&self.queue);
        let is_stuck = queue.progress.is_none_or(|progress| progress.elapsed() > LOOK);
        let is_late = |begun: &Instant| is_stuck && begun.elapsed() > LOOK + LOOK / 4;
        let late = self.undecided.iter().filter(|(_, begun)| is_late(begun));
        let late: Vec<_> = late.map(|(child, _)| child.id).collect();
        queue.looks.retain(|look| !late.contains(&look.child.id));
        late
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread that searches.
struct Search<'a> {
    queue: &'a Mutex<Queue>,
    sender: &'a mpsc::Sender<Looked>,
    shared: &'a Shared,
}

impl Search<'_> {
    /// Searches until all children are decided, or the session has ended.
    fn run(&self) {
        let mut candidates = std::mem::take(&mut lock(self.queue).candidates);
        candidates.forget_exited();
        let (mut pause, mut is_idle) = (PAUSES.start, false);
        loop {
            let spaces = self.shared.spaces();
            let (looks, known) = {
                let mut queue = lock(self.queue);
                if queue.looks.is_empty() || self.shared.has_ended() {
                    queue.looks.clear();
                    queue.has_thread = false;
                    queue.candidates = candidates;
                    return;
                }
                let looks = queue.looks.clone();
                // A child may be newer than the spaces that were read above.
                let is_searched = |space| looks.iter().any(|look| look.child.id == space);
                queue.known.retain(|space, _| spaces.space(*space).is_some() || is_searched(*space));
                (looks, queue.known.clone())
            };
            let begun = Instant::now();
            let has_new = self.read_new(&mut candidates, &looks, &known, is_idle);
            let found = self.decide(&candidates, &looks, &known, |look| {
                !has_new && begun.saturating_duration_since(look.begun) > LOOK
            });
            is_idle = !has_new && found.is_empty();
            let identified = match has_new && self.wants_processes() {
                true => identify(&self.shared.spaces(), candidates.list()),
                false => Vec::new(),
            };
            if !self.tell(found, identified) {
                return;
            }
            if is_idle {
                std::thread::park_timeout(pause);
                pause = (pause * 2).min(PAUSES.end);
            } else {
                pause = PAUSES.start;
            }
        }
    }

    /// Returns true if the loss policy signals processes.
    fn wants_processes(&self) -> bool {
        matches!(self.shared.options.on_loss, LossPolicy::Kill | LossPolicy::Pause)
    }

    /// Reads the mappings of new processes. Returns true if there were any.
    fn read_new(
        &self,
        candidates: &mut Candidates,
        looks: &[Look],
        known: &HashMap<u32, Process>,
        is_idle: bool,
    ) -> bool {
        let since = looks.iter().map(|look| look.since).min().unwrap_or(0);
        let parents: BTreeSet<u32> =
            looks.iter().filter_map(|look| known.get(&look.parent)).map(|process| process.pid).collect();
        let parents: Vec<u32> = parents.into_iter().collect();
        let is_elsewhere =
            |look: &Look| !known.contains_key(&look.parent) || is_idle && look.begun.elapsed() > ELSEWHERE;
        let parents = (!looks.iter().any(is_elsewhere)).then_some(&*parents);
        let known: HashSet<Process> = known.values().copied().collect();
        candidates.read_new(parents, since, &known, || lock(self.queue).progress = Some(Instant::now()))
    }

    /// Returns the children that have exited, that the candidates decide, or that are `given_up`.
    fn decide(
        &self,
        candidates: &Candidates,
        looks: &[Look],
        known: &HashMap<u32, Process>,
        given_up: impl Fn(&Look) -> bool,
    ) -> Found {
        // After the processes were read: the spaces of all these looks are among them.
        let spaces = self.shared.spaces();
        let mut known: HashSet<Process> = known.values().copied().collect();
        let mut found = Vec::new();
        for look in looks {
            let id = look.child.id;
            if look.child.uffd.is_owner_gone() {
                found.push((id, None, None));
            } else if let Some((process, mappings)) = matching(candidates, look, &spaces, &known) {
                known.extend(process);
                found.push((id, process, Some(mappings.wiped.clone())));
            } else if given_up(look) {
                found.push((id, None, None));
            }
        }
        found
    }

    /// Reports the results to the pager. Returns false if the session has ended.
    fn tell(&self, found: Found, identified: Vec<Arc<Space>>) -> bool {
        let ids: HashSet<u32> = found.iter().map(|(space, ..)| *space).collect();
        let mut queue = lock(self.queue);
        queue.looks.retain(|look| !ids.contains(&look.child.id));
        queue.known.extend(found.iter().filter_map(|(space, process, _)| Some((*space, (*process)?))));
        drop(queue);
        let wiped = found.into_iter().map(|(space, _, wiped)| Looked::Wiped { space, wiped });
        let identified = identified.into_iter().map(Looked::Identified);
        // If the session has ended, there is no receiver.
        wiped.chain(identified).all(|looked| self.sender.blocking_send(looked).is_ok())
    }
}

/// Returns the mappings of the processes that may be a child, and the process if there is only one.
/// Returns `None` if there are none, or if their forks have emptied different memory.
fn matching<'a>(
    candidates: &'a Candidates,
    look: &Look,
    spaces: &Spaces,
    known: &HashSet<Process>,
) -> Option<(Option<Process>, &'a Mappings)> {
    let mut regions = Vec::new();
    spaces.regions_of(look.child.id).for_each(|region| join(&mut regions, region.addresses()));
    // Many processes share their mappings.
    let mut compared: HashMap<*const Mappings, bool> = HashMap::new();
    let mut matching = candidates.list().iter().filter(|candidate| {
        let has_most = || candidate.mappings.have_most(&regions);
        candidate.process.start >= look.since
            && !known.contains(&candidate.process)
            && *compared.entry(Arc::as_ptr(&candidate.mappings)).or_insert_with(has_most)
    });
    let first = matching.next()?;
    let mut process = Some(first.process);
    for other in matching {
        if other.mappings.wiped != first.mappings.wiped {
            return None;
        }
        process = None;
    }
    Some((process, &first.mappings))
}

impl Pager {
    /// Watches all new spaces. Undecided children of `parent`, which were forked at `since` or
    /// later, are watched once their mappings have been read.
    pub(super) fn watch(&mut self, parent: u32, since: u64) -> io::Result<()> {
        let shared = Arc::clone(&self.on_exit.shared);
        let spaces = shared.spaces();
        // New spaces have the highest ids.
        for space in spaces.spaces_after(self.last_space) {
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

    /// Serves a child whose mappings were read, or could not be, and keeps a process that was
    /// identified for a successor.
    pub(super) fn looked(&mut self, looked: Looked) {
        match looked {
            Looked::Wiped { space, wiped } => self.decided(space, wiped),
            Looked::Identified(space) => self.note_process(&space),
        }
    }

    fn decided(&mut self, space: u32, wiped: Option<Vec<Range<usize>>>) {
        let undecided = &mut self.forks.undecided;
        let Some(index) = undecided.iter().position(|(child, _)| child.id == space) else { return };
        let (space, _) = undecided.swap_remove(index);
        if space.is_gone() {
            return;
        }
        let shared = Arc::clone(&self.on_exit.shared);
        match wiped {
            // If the child has exited, there is nothing to count.
            None if space.uffd.is_owner_gone() => {}
            None => add(&shared.counters.unseen_forks, 1),
            Some(wiped) => {
                let spaces = shared.spaces();
                let regions = wiped.iter().flat_map(|addresses| {
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
        for space in self.forks.take_late() {
            self.decided(space, None);
        }
    }
}
