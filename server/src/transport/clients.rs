//! The open connections, by client: who may connect, and who makes room for whom.

use crate::limits::Limits;
use crate::transport::admission::Quota;
use crate::transport::budget::{Budget, Held};
use postcopy_proto::digest::Digest;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::Notify;

/// Number of connections that may be leaving at a time, however few there may be.
const MIN_LEAVING: u32 = 64;

/// The other end of a connection, as far as bounds tell clients apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Client {
    /// An IP address; of IPv6, the first 64 bits, because a host has all addresses below them.
    Ip(IpAddr),
    /// The user of a process that connected to a Unix socket.
    User(u32),
}

impl Client {
    pub(crate) fn of_ip(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(v6) => {
                let network = v6.to_bits() >> 64 << 64;
                Self::Ip(IpAddr::V6(network.into()))
            }
            v4 @ IpAddr::V4(_) => Self::Ip(v4),
        }
    }

    /// Returns a name for stored objects, which tells clients apart and does not show addresses.
    pub(crate) fn id(&self) -> [u8; 16] {
        let text = match self {
            Self::Ip(address) => format!("ip {address}"),
            Self::User(user) => format!("user {user}"),
        };
        let digest = Digest::of(text.as_bytes());
        *digest.as_bytes().first_chunk().expect("a digest has 32 bytes")
    }
}

/// An open connection.
#[derive(Debug)]
pub(crate) struct Connection {
    /// Answers that the connection has not written.
    pub(crate) unsent: Arc<Held>,
    /// Messages that have not arrived completely.
    pub(crate) unfinished: Arc<Held>,
    /// The requests that its client may have in flight.
    pub(crate) quota: Arc<Quota>,
    requests: AtomicUsize,
    /// True once it has sent a request.
    has_requested: AtomicBool,
    /// The end of its last request, or its begin.
    idle_since: Mutex<Instant>,
    close: Notify,
}

impl Connection {
    fn idle_since(&self) -> Option<Instant> {
        let since = *lock(&self.idle_since);
        self.is_idle().then_some(since)
    }

    /// Returns true if the connection has no request in flight, and no answer that it has not
    /// written.
    pub(crate) fn is_idle(&self) -> bool {
        self.requests.load(Ordering::Acquire) == 0 && self.unsent.is_empty()
    }

    /// Returns true if the connection has ever sent a request.
    pub(crate) fn has_requested(&self) -> bool {
        self.has_requested.load(Ordering::Relaxed)
    }

    /// Waits until the connection must make room for another one.
    pub(crate) async fn must_close(&self) {
        self.close.notified().await;
    }

    /// Counts a request of the connection, until the drop.
    pub(crate) fn begin_request(self: &Arc<Self>) -> ActiveRequest {
        self.has_requested.store(true, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::AcqRel);
        ActiveRequest(Arc::clone(self))
    }
}

/// A request of a connection, which is therefore not idle.
#[derive(Debug)]
pub(crate) struct ActiveRequest(Arc<Connection>);

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        *lock(&self.0.idle_since) = Instant::now();
        self.0.requests.fetch_sub(1, Ordering::AcqRel);
    }
}

#[derive(Debug)]
struct OfClient {
    connections: u32,
    quota: Arc<Quota>,
}

#[derive(Debug, Default)]
struct Open {
    last_number: u64,
    /// Number of connections that were closed for others and have not ended yet.
    leaving: u32,
    connections: HashMap<u64, (Client, Arc<Connection>)>,
    clients: HashMap<Client, OfClient>,
}

impl Open {
    fn of(&self, client: Client) -> u32 {
        self.clients.get(&client).map_or(0, |of_client| of_client.connections)
    }

    /// Closes the connection that has been idle the longest: of this client, or of any. Returns
    /// false if none is idle.
    fn close_idle(&mut self, of: Option<Client>) -> bool {
        let candidates = self.connections.iter().filter(|(_, (client, _))| of.is_none_or(|of| of == *client));
        let idle = candidates.filter_map(|(number, (_, c))| Some((c.idle_since()?, *number)));
        let Some((_, number)) = idle.min() else { return false };
        if let Some(connection) = self.remove(number) {
            connection.close.notify_one();
            self.leaving += 1;
        }
        true
    }

    fn remove(&mut self, number: u64) -> Option<Arc<Connection>> {
        let (client, connection) = self.connections.remove(&number)?;
        if let Some(of_client) = self.clients.get_mut(&client) {
            of_client.connections -= 1;
            if of_client.connections == 0 {
                self.clients.remove(&client);
            }
        }
        Some(connection)
    }
}

/// The open connections of a server.
#[derive(Debug)]
pub(crate) struct Connections {
    limits: Limits,
    unsent: Arc<Budget>,
    unfinished: Arc<Budget>,
    /// Locked for a look-up or a change, and to search for an idle connection at the limit.
    open: Mutex<Open>,
}

/// The reason for which a connection is refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The client has as many connections as one may have, and uses all of them.
    Client(Client),
    /// The server has as many connections as it may have, and all of them are used.
    Server,
}

impl Connections {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        let unsent = Budget::new(limits.unsent_bytes, limits.unsent_bytes_per_connection);
        let unfinished = Budget::new(limits.unfinished_bytes, limits.unfinished_bytes_per_connection);
        Arc::new(Self { limits, unsent, unfinished, open: Mutex::default() })
    }

    /// Admits a connection of a client, if necessary in place of an idle one.
    ///
    /// # Errors
    /// [`Refused`].
    pub(crate) fn admit(self: &Arc<Self>, client: Client) -> Result<Admitted, Refused> {
        let mut open = lock(&self.open);
        if open.leaving > (self.limits.connections / 4).max(MIN_LEAVING) {
            return Err(Refused::Server);
        }
        if open.of(client) >= self.limits.connections_per_client && !open.close_idle(Some(client)) {
            return Err(Refused::Client(client));
        }
        if open.connections.len() >= self.limits.connections as usize && !open.close_idle(None) {
            return Err(Refused::Server);
        }
        let new_client = || OfClient { connections: 0, quota: Quota::of_client() };
        let of_client = open.clients.entry(client).or_insert_with(new_client);
        of_client.connections += 1;
        let connection = Arc::new(Connection {
            unsent: Held::of(&self.unsent),
            unfinished: Held::of(&self.unfinished),
            quota: Arc::clone(&of_client.quota),
            requests: AtomicUsize::new(0),
            has_requested: AtomicBool::new(false),
            idle_since: Mutex::new(Instant::now()),
            close: Notify::new(),
        });
        open.last_number += 1;
        let number = open.last_number;
        open.connections.insert(number, (client, Arc::clone(&connection)));
        Ok(Admitted { connections: Arc::clone(self), client, connection, number })
    }

    /// Returns the number of open connections, with those that are being closed.
    pub(crate) fn count(&self) -> usize {
        let open = lock(&self.open);
        open.connections.len() + open.leaving as usize
    }
}

/// An admitted connection, open until the drop.
#[derive(Debug)]
pub(crate) struct Admitted {
    connections: Arc<Connections>,
    pub(crate) client: Client,
    pub(crate) connection: Arc<Connection>,
    number: u64,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut open = lock(&self.connections.open);
        if open.remove(self.number).is_none() {
            // It was closed for another one.
            open.leaving -= 1;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn must_close(admitted: &Admitted) -> bool {
        admitted.connection.must_close().now_or_never().is_some()
    }

    fn connections(limit: u32) -> Arc<Connections> {
        Connections::new(Limits::default().with_connections(limit))
    }

    #[test]
    fn a_new_connection_replaces_the_one_that_has_been_idle_the_longest() {
        let connections = connections(4);
        let admitted: Vec<_> = (0..4).map(|user| connections.admit(Client::User(user)).unwrap()).collect();
        let request = admitted[1].connection.begin_request();
        drop(admitted[0].connection.begin_request());
        let _fifth = connections.admit(Client::User(4)).unwrap();
        assert_eq!([0, 1, 2, 3].map(|i| must_close(&admitted[i])), [false, false, true, false]);
        drop(request);
        assert_eq!(connections.count(), 5, "one of them is leaving");
        drop(admitted);
        assert_eq!(connections.count(), 1);
    }

    #[test]
    fn a_client_shuts_out_no_other_one() {
        let connections = connections(4);
        let greedy = Client::User(1);
        let admitted: Vec<_> = (0..2).map(|_| connections.admit(greedy).unwrap()).collect();
        let requests: Vec<_> = admitted.iter().map(|a| a.connection.begin_request()).collect();
        assert_eq!(connections.admit(greedy).unwrap_err(), Refused::Client(greedy));
        let others: Vec<_> = (2..4).map(|user| connections.admit(Client::User(user)).unwrap()).collect();
        let _used: Vec<_> = others.iter().map(|a| a.connection.begin_request()).collect();
        assert_eq!(connections.admit(Client::User(9)).unwrap_err(), Refused::Server);
        drop(requests);
        let _more = connections.admit(greedy).unwrap();
        assert_eq!(admitted.iter().filter(|a| must_close(a)).count(), 1);
        assert!(!others.iter().any(must_close));
    }

    #[test]
    fn the_addresses_of_one_host_are_one_client() {
        let client = |text: &str| Client::of_ip(text.parse().unwrap());
        assert_eq!(client("::ffff:10.0.0.1"), client("10.0.0.1"));
        assert_ne!(client("10.0.0.2"), client("10.0.0.1"));
        assert_eq!(client("2001:db8::1"), client("2001:db8::ffff:1:2:3"));
        assert_ne!(client("2001:db8:0:1::1"), client("2001:db8::1"));
    }
}
