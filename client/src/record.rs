//! What a session records: the order of first faults, for the server to make a working set of ([`recorder`]), and a
//! trace of what happened when ([`trace`]). A background task sends the one, a thread writes the other: what the
//! pager and the installers have noted.

pub(crate) mod recorder;
pub mod trace;
