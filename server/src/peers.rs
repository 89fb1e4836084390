//! The servers of a fleet that share a bucket.
//!
//! Each pack belongs to one of the servers by rendezvous hashing: to the one with the highest hash
//! of its address and the pack's digest. A server that misses a block asks the pack's owner, which
//! reads the bucket. So each block leaves the bucket about once. All servers need the same list of
//! addresses for that; with different ones, blocks are read more often, and nothing else is lost.
//!
//! An owner that refuses a connection may be starting, and is asked again for a moment. One that
//! does not answer is left out for a while; its packs then belong to the next servers
//! in the order of hashes. After that time one request finds out whether it answers again.

use crate::store::{PackBlock, PeerReading, Peers};
use futures_util::FutureExt;
use postcopy_proto::MAX_MESSAGE_BYTES;
use postcopy_proto::digest::Digest;
use postcopy_proto::v1;
use postcopy_proto::v1::peer_service_client::PeerServiceClient;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Time in which a connection must be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Time in which a server must answer, which may have to read the bucket.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Time for which requests that fail without a usable answer are repeated, since the server may be
/// starting; and the pause between two attempts.
const RESTART_TIME: Duration = Duration::from_millis(500);
const RESTART_PAUSE: Duration = Duration::from_millis(25);
/// Pause after [`RESTART_TIME`] in which no request is repeated.
const RESTART_REST: Duration = Duration::from_secs(1);
/// Times for which a server that has not answered is left out: at first, and at most. They double.
const MIN_PAUSE: Duration = Duration::from_secs(5);
const MAX_PAUSE: Duration = Duration::from_secs(300);
/// Age from which on addresses are looked up again.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(10);
/// HTTP/2 windows of a stream and of a connection: a whole block, and some tens of them.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// A number that a server draws at its start, by which it knows its own requests.
pub type ServerId = [u8; 16];

/// The list of a fleet's servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerList {
    /// These addresses: `http://host:port`.
    Addresses(Vec<String>),
    /// All addresses of a name in the DNS, which may change, and a port.
    Dns {
        /// The name in the DNS.
        name: String,
        /// The port of all servers.
        port: u16,
    },
}

/// Text that is no list of servers.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is neither http://host:port nor dns:name:port")]
pub struct PeerListError(String);

impl FromStr for PeerList {
    type Err = PeerListError;

    /// Parses `http://host:port,http://host:port` or `dns:name:port`.
    fn from_str(text: &str) -> Result<Self, PeerListError> {
        let error = |text: &str| PeerListError(text.to_owned());
        if let Some(name) = text.strip_prefix("dns:") {
            let (name, port) = name.rsplit_once(':').ok_or_else(|| error(text))?;
            let port = port.parse().map_err(|_| error(text))?;
            return match name.is_empty() {
                true => Err(error(text)),
                false => Ok(Self::Dns { name: name.to_owned(), port }),
            };
        }
        let address = |text: &str| {
            let has_port = |rest: &str| {
                rest.rsplit_once(':')
                    .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
            };
            let is_address = text.strip_prefix("http://").is_some_and(has_port)
                && Endpoint::from_shared(text.to_owned()).is_ok();
            is_address.then(|| text.to_owned()).ok_or_else(|| error(text))
        };
        text.split(',')
            .map(|part| address(part.trim().trim_end_matches('/')))
            .collect::<Result<_, _>>()
            .map(Self::Addresses)
    }
}

/// The servers of a fleet, as one of them knows them.
#[derive(Debug)]
pub struct Fleet {
    id: ServerId,
    list: PeerList,
    /// Locked for a look-up or a change.
    members: Mutex<Members>,
    patience: Patience,
}

/// The time in which requests to servers that may be starting are repeated. All requests share it,
/// so many absent servers delay readers by [`RESTART_TIME`] in all, and not each.
#[derive(Debug, Default)]
struct Patience {
    /// The end of the present or of the last such time. Locked for a look-up or a change.
    end: Mutex<Option<Instant>>,
}

impl Patience {
    /// Returns true while a server that has not answered may be asked again.
    fn lasts(&self) -> bool {
        let now = Instant::now();
        let mut end = lock(&self.end);
        if end.is_none_or(|end| now > end + RESTART_REST) {
            *end = Some(now + RESTART_TIME);
        }
        end.is_some_and(|end| now < end)
    }
}

#[derive(Debug, Default)]
struct Members {
    members: Vec<Arc<Member>>,
    looked_up: Option<Instant>,
}

/// A server of the fleet.
#[derive(Debug)]
struct Member {
    address: String,
    /// Made at the first request, in the runtime that needs it.
    channel: OnceLock<Channel>,
    is_self: AtomicBool,
    /// Locked for a look-up or a change.
    left_out: Mutex<Option<LeftOut>>,
}

/// The time for which a server is left out.
#[derive(Clone, Copy, Debug)]
struct LeftOut {
    since: Instant,
    until: Instant,
    /// The pause after the next failure.
    next_pause: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fleet {
    /// Makes the view of a server on its fleet.
    #[must_use]
    pub fn new(list: PeerList) -> Self {
        let id = fastrand::u128(..).to_le_bytes();
        let members = match &list {
            PeerList::Addresses(addresses) => addresses.iter().cloned().map(Member::new).collect(),
            PeerList::Dns { .. } => Vec::new(),
        };
        let members = Mutex::new(Members { members, looked_up: None });
        Self { id, list, members, patience: Patience::default() }
    }

    /// Returns the number of this server.
    #[must_use]
    pub fn id(&self) -> &ServerId {
        &self.id
    }

    /// Looks the name up if the last look-up is old; keeps the addresses if that fails.
    ///
    /// # Blocking
    /// Waits for the resolver of the system.
    pub async fn refresh(&self) {
        let PeerList::Dns { name, port } = &self.list else { return };
        {
            let mut members = lock(&self.members);
            if members.looked_up.is_some_and(|at| at.elapsed() < LOOKUP_INTERVAL) {
                return;
            }
            members.looked_up = Some(Instant::now());
        }
        let mut addresses: Vec<String> = match tokio::net::lookup_host((name.as_str(), *port)).await {
            Ok(found) => found.map(|address| format!("http://{address}")).collect(),
            Err(error) => return tracing::warn!("the peers of dns:{name}:{port} stay as they were: {error}"),
        };
        addresses.sort_unstable();
        addresses.dedup();
        let mut members = lock(&self.members);
        let known = |address: String| {
            let known = members.members.iter().find(|member| member.address == address).cloned();
            known.unwrap_or_else(|| Member::new(address))
        };
        members.members = addresses.into_iter().map(known).collect();
    }

    /// Returns the server that a pack belongs to.
    fn owner(&self, pack: &Digest) -> Option<Arc<Member>> {
        let members = lock(&self.members);
        let present = members.members.iter().filter(|member| !member.is_left_out());
        let owner = present.max_by_key(|member| (member.score(pack), &member.address)).cloned();
        owner.filter(|owner| !owner.is_self.load(Ordering::Relaxed))
    }

    /// Asks the owner for a block.
    async fn ask(self: Arc<Self>, owner: Arc<Member>, request: v1::ReadBlockRequest) -> Option<PackBlock> {
        let asked = Instant::now();
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, self.answer(&owner, request)).await;
        match answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("it does not answer"))) {
            Ok(v1::ReadBlockResponse { pack_bytes, data }) => {
                owner.works(asked);
                Some(PackBlock { bytes: data, pack_bytes })
            }
            Err(status) => {
                owner.failed(&status, asked);
                None
            }
        }
    }

    async fn answer(
        &self,
        owner: &Member,
        request: v1::ReadBlockRequest,
    ) -> Result<v1::ReadBlockResponse, Status> {
        let mut client =
            PeerServiceClient::new(owner.channel()?).max_decoding_message_size(MAX_MESSAGE_BYTES);
        loop {
            match client.read_block(request.clone()).await {
                Err(status) if has_no_answer(&status) && self.patience.lasts() => {
                    tokio::time::sleep(RESTART_PAUSE).await;
                }
                answer => return answer.map(tonic::Response::into_inner),
            }
        }
    }
}

impl Peers for Arc<Fleet> {
    fn read(&self, pack: &Digest, block: u64) -> Option<PeerReading> {
        let owner = self.owner(pack)?;
        owner.begin_probe();
        let block = u32::try_from(block).ok()?;
        let request = v1::ReadBlockRequest { pack: (*pack).into(), block, server: self.id.to_vec().into() };
        // The request goes on after its waiters have left, so that its failure is noted.
        let fleet = self.clone();
        Some(async move { tokio::spawn(fleet.ask(owner, request)).await.ok().flatten() }.boxed())
    }

    fn distrust(&self, pack: &Digest) {
        if let Some(owner) = self.owner(pack) {
            owner.leave_out(&Status::data_loss(format!("it has sent a damaged frame of pack {pack}")));
        }
    }
}

impl Member {
    fn new(address: String) -> Arc<Self> {
        let (channel, is_self) = (OnceLock::new(), AtomicBool::new(false));
        Arc::new(Self { address, channel, is_self, left_out: Mutex::default() })
    }

    fn score(&self, pack: &Digest) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(pack.as_bytes()).update(self.address.as_bytes());
        u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("32 bytes"))
    }

    fn is_left_out(&self) -> bool {
        lock(&self.left_out).is_some_and(|left_out| Instant::now() < left_out.until)
    }

    /// After its pause, leaves the server out for all but the present request.
    fn begin_probe(&self) {
        if let Some(left_out) = &mut *lock(&self.left_out) {
            left_out.until = Instant::now() + ANSWER_TIMEOUT;
        }
    }

    /// Ends the time for which the server is left out, if it was asked within that time.
    fn works(&self, asked: Instant) {
        let mut left_out = lock(&self.left_out);
        if left_out.is_some_and(|left_out| left_out.since <= asked) {
            *left_out = None;
        }
    }

    fn failed(&self, status: &Status, asked: Instant) {
        match status.code() {
            Code::FailedPrecondition => self.is_self.store(true, Ordering::Relaxed),
            _ if has_no_answer(status) => self.leave_out(status),
            _ => self.works(asked),
        }
    }

    fn leave_out(&self, status: &Status) {
        let mut left_out = lock(&self.left_out);
        let pause = match *left_out {
            // Another request has failed at the same time.
            Some(left_out) if left_out.until > Instant::now() + ANSWER_TIMEOUT => return,
            Some(left_out) => left_out.next_pause,
            None => MIN_PAUSE,
        };
        let (since, next_pause) = (Instant::now(), (2 * pause).min(MAX_PAUSE));
        *left_out = Some(LeftOut { since, until: since + pause, next_pause });
        let (code, message) = (status.code(), status.message());
        tracing::warn!(peer = self.address, ?pause, "left out: {code}: {message}");
    }

    fn channel(&self) -> Result<Channel, Status> {
        if let Some(channel) = self.channel.get() {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(self.address.clone());
        let endpoint = endpoint.map_err(|e| Status::invalid_argument(e.to_string()))?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .connect_lazy();
        Ok(self.channel.get_or_init(|| channel).clone())
    }
}

/// Returns true unless the status shows that the server works: it has no such block, is busy, or is
/// this server.
fn has_no_answer(status: &Status) -> bool {
    !matches!(status.code(), Code::NotFound | Code::ResourceExhausted | Code::FailedPrecondition)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn fleet(addresses: &[&str]) -> Arc<Fleet> {
        Arc::new(Fleet::new(PeerList::Addresses(addresses.iter().map(ToString::to_string).collect())))
    }

    fn owners(fleet: &Arc<Fleet>) -> Vec<String> {
        (0..3000u32).map(|n| fleet.owner(&Digest::of(&n.to_le_bytes())).unwrap().address.clone()).collect()
    }

    #[test]
    fn lists_are_parsed_and_others_named() {
        let list = |text: &str| text.parse::<PeerList>();
        let two = ["http://a:7070", "http://10.0.0.1:80"].map(str::to_owned).to_vec();
        assert_eq!(list("http://a:7070, http://10.0.0.1:80/"), Ok(PeerList::Addresses(two)));
        assert_eq!(list("http://[::1]:7070"), Ok(PeerList::Addresses(vec!["http://[::1]:7070".to_owned()])));
        let dns = PeerList::Dns { name: "postcopy.svc".to_owned(), port: 7070 };
        assert_eq!(list("dns:postcopy.svc:7070"), Ok(dns));
        for bad in [
            "",
            "a:7070",
            "http://a",
            "http://:1",
            "https://a:1",
            "dns:a",
            "dns::1",
            "dns:a:x",
            "http://a:1,,",
        ] {
            assert!(list(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn packs_are_shared_evenly_and_few_move_when_a_server_goes() {
        let addresses = ["http://a:1", "http://b:1", "http://c:1", "http://d:1"];
        let (all, fewer) = (fleet(&addresses), fleet(&addresses[..3]));
        let (before, after) = (owners(&all), owners(&fewer));
        let mut counts: HashMap<&String, u32> = HashMap::new();
        before.iter().for_each(|owner| *counts.entry(owner).or_default() += 1);
        assert!(counts.len() == 4 && counts.values().all(|count| (650..850).contains(count)), "{counts:?}");
        let moved = before.iter().zip(&after).filter(|(before, after)| before != after);
        assert!(moved.into_iter().all(|(before, _)| before == "http://d:1"));
        // The order of the list does not matter.
        let turned: Vec<_> = addresses.iter().rev().copied().collect();
        assert_eq!(owners(&fleet(&turned)), before);
        // A server that does not answer is left out, and its packs have other owners.
        let members = lock(&all.members).members.clone();
        members[3].failed(&Status::unavailable("gone"), Instant::now());
        assert_eq!(owners(&all), after);
    }

    #[tokio::test]
    async fn a_server_that_cannot_be_reached_answers_nothing_and_is_left_out() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let fleet = fleet(&[&address]);
        let pack = Digest::of(b"pack");
        assert_eq!(fleet.read(&pack, 0).expect("another server").await, None);
        assert!(fleet.read(&pack, 0).is_none(), "left out");
        // After the pause one request asks it, and the next pause is longer.
        let member = lock(&fleet.members).members[0].clone();
        let end_pause = || lock(&member.left_out).as_mut().unwrap().until = Instant::now();
        end_pause();
        let probe = fleet.read(&pack, 0).expect("a probe");
        assert!(fleet.read(&pack, 0).is_none(), "one is enough");
        assert_eq!(probe.await, None);
        let LeftOut { until, next_pause, .. } = lock(&member.left_out).unwrap();
        assert!(until > Instant::now() + MIN_PAUSE && next_pause == 4 * MIN_PAUSE, "{next_pause:?}");
        end_pause();
        assert!(fleet.read(&pack, 0).is_some());
    }

    #[tokio::test]
    async fn many_servers_that_are_gone_are_waited_for_together() {
        let listeners: Vec<_> =
            (0..50).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let address = |listener: &std::net::TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let addresses: Vec<_> = listeners.iter().map(address).collect();
        drop(listeners);
        let fleet = fleet(&addresses.iter().map(String::as_str).collect::<Vec<_>>());
        let started = Instant::now();
        for number in 0..1000u32 {
            if let Some(asked) = fleet.read(&Digest::of(&number.to_le_bytes()), 0) {
                assert_eq!(asked.await, None);
            }
        }
        assert!(lock(&fleet.members).members.iter().all(|member| member.is_left_out()));
        assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    }

    #[test]
    fn a_server_that_sends_damaged_frames_is_left_out() {
        let fleet = fleet(&["http://127.0.0.1:9", "http://127.0.0.1:10"]);
        let pack = Digest::of(b"pack");
        let owner = fleet.owner(&pack).unwrap();
        fleet.distrust(&pack);
        assert!(owner.is_left_out() && fleet.owner(&pack).unwrap().address != owner.address);
        // The answer to an older request does not change that.
        owner.works(Instant::now().checked_sub(Duration::from_secs(1)).unwrap());
        assert!(owner.is_left_out());
        owner.works(Instant::now());
        assert!(!owner.is_left_out());
    }

    #[tokio::test]
    async fn the_addresses_of_a_name_are_looked_up() {
        let fleet = Fleet::new("dns:localhost:7070".parse().unwrap());
        assert!(fleet.owner(&Digest::of(b"pack")).is_none());
        fleet.refresh().await;
        let owner = fleet.owner(&Digest::of(b"pack")).unwrap();
        assert!(owner.address.ends_with(":7070"), "{}", owner.address);
        let other = Fleet::new("dns:no-such-name.invalid:7070".parse().unwrap());
        other.refresh().await;
        assert!(other.owner(&Digest::of(b"pack")).is_none());
    }
}
