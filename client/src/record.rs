//! Recordings of a session: the first-touch order, from which the server makes a working set
//! ([`recorder`]), and a trace with times ([`trace`]). The pager and the installers note both. A
//! background task sends the first, a thread writes the second.

mod bit_set;
pub(crate) mod recorder;
pub mod trace;
