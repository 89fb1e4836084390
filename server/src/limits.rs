//! The bounds of what clients can make a server hold, in one place.
//!
//! A server may talk to strangers. Each of them gets connections, requests, and memory for
//! answers up to these bounds. Beyond them the server refuses at once with RESOURCE_EXHAUSTED and a
//! time to retry, or waits before it reads more of a request.

/// The bounds of one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most open connections. At the limit a new connection replaces the one that has been idle
    /// the longest; without an idle one it is refused.
    pub connections: u32,
    /// Most open connections of one client: an IP address (an IPv6 network of 64 bits), or a user
    /// of a Unix socket.
    pub connections_per_client: u32,
    /// Most requests at a time on one connection.
    pub requests_per_connection: u32,
    /// Most bytes of answers that connections have not written, beyond
    /// [`Limits::unsent_bytes_per_connection`] of each.
    pub unsent_bytes: usize,
    /// Bytes of unwritten answers that each connection may always have.
    pub unsent_bytes_per_connection: usize,
    /// Most bytes of messages that have not arrived completely, beyond
    /// [`Limits::unfinished_bytes_per_connection`] of each connection.
    pub unfinished_bytes: usize,
    /// Bytes of unfinished messages that each connection may always have.
    pub unfinished_bytes_per_connection: usize,
}

impl Limits {
    /// Sets the number of connections. One client may have half of them.
    #[must_use]
    pub fn with_connections(self, connections: u32) -> Self {
        Self { connections, connections_per_client: connections.div_ceil(2), ..self }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            connections_per_client: 2048,
            requests_per_connection: 256,
            unsent_bytes: 256 << 20,
            unsent_bytes_per_connection: 128 << 10,
            unfinished_bytes: 256 << 20,
            unfinished_bytes_per_connection: 64 << 10,
        }
    }
}
