//! The kinds of operations, and random ones.

use proptest::prelude::*;

pub(super) const MAX_PROCESSES: usize = 5;
/// The regions of [`Variant::Many`].
pub(super) const MANY: usize = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Read,
    KernelRead,
    RemoteRead,
    Write,
    KernelWrite,
    Remove,
    Storm,
    Free,
    Punch,
    Changes,
    PageOut,
    Cover,
    Unmap,
    Shrink,
    Move,
    Grow,
    MoveAndKeep,
    Regrow,
    Fork,
    Thread,
    Exit,
    Kill,
}

/// The weight of each kind, and how often [`OPERATIONS`] operations must include it.
pub(super) const KINDS: [(u32, Kind, usize); 22] = [
    (40, Kind::Read, 4000),
    (10, Kind::KernelRead, 500),
    (6, Kind::RemoteRead, 300),
    (14, Kind::Write, 500),
    (6, Kind::KernelWrite, 200),
    (14, Kind::Remove, 500),
    (3, Kind::Storm, 100),
    (4, Kind::Free, 100),
    (14, Kind::Punch, 50),
    (6, Kind::Changes, 100),
    (3, Kind::PageOut, 100),
    (4, Kind::Cover, 100),
    (4, Kind::Unmap, 100),
    (2, Kind::Shrink, 50),
    (6, Kind::Move, 100),
    (3, Kind::Grow, 50),
    (4, Kind::MoveAndKeep, 50),
    (10, Kind::Regrow, 200),
    (4, Kind::Fork, 100),
    (3, Kind::Thread, 100),
    (4, Kind::Exit, 50),
    (5, Kind::Kill, 200),
];

/// An operation. The processes and memory at its time determine the meaning of its numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    pub(super) kind: Kind,
    pub(super) process: usize,
    pub(super) page: usize,
    pub(super) pages: usize,
    pub(super) other: usize,
}

pub(super) fn any_operation() -> impl Strategy<Value = Operation> {
    let kind = proptest::strategy::Union::new_weighted(
        KINDS.iter().map(|(weight, kind, _)| (*weight, Just(*kind))).collect(),
    );
    (kind, any::<prop::sample::Index>(), any::<u16>(), 1usize..20, any::<u16>()).prop_map(
        |(kind, process, page, pages, other)| Operation {
            kind,
            process: process.index(MAX_PROCESSES),
            page: page.into(),
            pages,
            other: other.into(),
        },
    )
}

#[derive(Clone, Debug)]
pub(super) struct Scenario {
    pub(super) fill: bool,
    /// The session fetches the image's working set, first or alone.
    pub(super) working_set: bool,
    /// The session records accessed pages, and installs page by page.
    pub(super) record: bool,
    pub(super) source: PageSource,
    pub(super) variant: Variant,
    /// Processes that exit leave their pids to those that are forked later.
    pub(super) reap: bool,
    pub(super) batches: Vec<Batch>,
}

/// The kind of memory, and the events of its userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    /// Two private regions, and all events.
    Private,
    /// Only EVENT_REMOVE is asked for, as Firecracker does, and nothing is done that takes more.
    RemovesOnly,
    /// The session reports pages that were written to and removed.
    Tracked,
    /// The second region is shared memory, which is mapped twice.
    Shared,
    /// One mapping that is [`MANY`] regions of a page each, from all over the file.
    Many,
    /// The process fills its own memory, and tracks changes. It does nothing that its owner could
    /// not know of, and has no successor.
    Own,
}

impl Variant {
    pub(super) fn has(self, kind: Kind) -> bool {
        match self {
            Self::RemovesOnly => !matches!(
                kind,
                Kind::Move | Kind::Grow | Kind::MoveAndKeep | Kind::Regrow | Kind::Fork | Kind::Changes
            ),
            Self::Tracked => true,
            Self::Own => matches!(
                kind,
                Kind::Read
                    | Kind::KernelRead
                    | Kind::RemoteRead
                    | Kind::Write
                    | Kind::KernelWrite
                    | Kind::Remove
                    | Kind::Storm
                    | Kind::Free
                    | Kind::Changes
                    | Kind::PageOut
                    | Kind::Thread
            ),
            Self::Private | Self::Shared | Self::Many => kind != Kind::Changes,
        }
    }
}

/// Operations that are done at once.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    /// All are at the same place, as far as this is possible.
    pub(super) together: bool,
    pub(super) operations: Vec<Operation>,
}

/// The image that the memory is filled from, and the delay of its pages.
#[derive(Clone, Copy, Debug)]
pub(super) enum PageSource {
    Quick,
    Late,
    Large,
}

/// The variants of scenarios, in turns.
const VARIANTS: [Variant; 9] = [
    Variant::Private,
    Variant::Many,
    Variant::Shared,
    Variant::Tracked,
    Variant::RemovesOnly,
    Variant::Private,
    Variant::Shared,
    Variant::Tracked,
    Variant::Own,
];

/// Returns random scenarios of the variant whose turn it is.
pub(super) fn any_scenario(case: u64) -> impl Strategy<Value = Scenario> {
    let variant = VARIANTS[usize::try_from(case).unwrap() % VARIANTS.len()];
    let batch = (prop::bool::weighted(0.4), prop::collection::vec(any_operation(), 1..6))
        .prop_map(|(together, operations)| Batch { together, operations });
    let batches = prop::collection::vec(batch, 100..300);
    let source = prop::sample::select(vec![PageSource::Quick, PageSource::Late, PageSource::Large]);
    let record = prop::bool::weighted(0.2);
    (any::<bool>(), any::<bool>(), record, source, any::<bool>(), batches).prop_map(
        move |(fill, working_set, record, source, reap, batches)| Scenario {
            fill,
            working_set,
            record,
            source,
            variant,
            reap,
            batches,
        },
    )
}
