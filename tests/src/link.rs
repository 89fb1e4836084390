//! A network between two machines, as far as one machine can have it: a TCP proxy on loopback that delays bytes, and lets no
//! more of them through than the link carries.

use postcopy::ServerAddress;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that are forwarded together: what a large segment holds.
const PIECE_BYTES: usize = 64 << 10;
/// Pieces on their way: 16 MiB, more than any product of rate and delay here.
const PIECES: usize = 256;

/// What a link is like. All connections share its rate.
#[derive(Clone, Copy, Debug)]
pub struct Quality {
    /// There and back.
    pub round_trip: Duration,
    /// Each way.
    pub bytes_per_second: f64,
}

/// See the module. Its threads end with the connections.
#[derive(Debug)]
pub struct Link {
    address: ServerAddress,
    /// Bytes that went to the clients.
    received: Arc<AtomicU64>,
    spent: Arc<Spent>,
}

/// What the connections have taken of the machine that the link is no part of.
#[derive(Debug, Default)]
struct Spent {
    threads: AtomicUsize,
    /// Of those that have ended.
    cpu_nanoseconds: AtomicU64,
}

/// One way of the link: when it will have carried what it has been given.
#[derive(Debug)]
struct Way {
    quality: Quality,
    free_at: Mutex<Instant>,
}

impl Way {
    /// When these bytes arrive at the other end.
    fn arrival(&self, bytes: usize) -> Instant {
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        #[expect(clippy::cast_precision_loss, reason = "less than 64 KiB")]
        let takes = Duration::from_secs_f64(bytes as f64 / self.quality.bytes_per_second);
        *free_at = (*free_at).max(Instant::now()) + takes;
        *free_at + self.quality.round_trip / 2
    }
}

impl Link {
    /// A link to the server at `address`, which is `http://host:port`.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn to(address: &str, quality: Quality) -> Self {
        let target = address.trim_start_matches("http://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port of loopback");
        let own = format!("http://{}", listener.local_addr().expect("it is bound"));
        let (received, spent) = (Arc::new(AtomicU64::new(0)), Arc::new(Spent::default()));
        let way = || Arc::new(Way { quality, free_at: Mutex::new(Instant::now()) });
        let (there, back, counter, spends) = (way(), way(), Arc::clone(&received), Arc::clone(&spent));
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(&target) else { continue };
                for stream in [&client, &server] {
                    stream.set_nodelay(true).expect("a socket");
                }
                let (client_in, server_in) =
                    (client.try_clone().expect("a descriptor"), server.try_clone().expect("a descriptor"));
                forward(client_in, server, Arc::clone(&there), Arc::default(), Arc::clone(&spends));
                forward(server_in, client, Arc::clone(&back), Arc::clone(&counter), Arc::clone(&spends));
            }
        });
        Self { address: own.parse().expect("an address"), received, spent }
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> &ServerAddress {
        &self.address
    }

    /// How many bytes have come to clients so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// The CPU time of its connections, once all have ended.
    #[must_use]
    pub fn cpu_time(&self) -> Option<Duration> {
        let has_ended = self.spent.threads.load(Ordering::Acquire) == 0;
        has_ended.then(|| Duration::from_nanos(self.spent.cpu_nanoseconds.load(Ordering::Relaxed)))
    }
}

fn forward(
    mut from: TcpStream,
    mut to: TcpStream,
    way: Arc<Way>,
    counter: Arc<AtomicU64>,
    spent: Arc<Spent>,
) {
    spent.threads.fetch_add(1, Ordering::Relaxed);
    std::thread::spawn(move || {
        as_soon_as_it_may();
        let _ = carry(&mut from, &mut to, &way, &counter);
        let _ = to.shutdown(Shutdown::Write);
        let cpu = clock_gettime(ClockId::ThreadCPUTime);
        let nanoseconds = Duration::try_from(cpu).map_or(0, |cpu| cpu.as_nanos());
        spent.cpu_nanoseconds.fetch_add(u64::try_from(nanoseconds).unwrap_or(0), Ordering::Relaxed);
        spent.threads.fetch_sub(1, Ordering::Release);
    });
}

/// One thread reads and writes: what comes while a piece is on its way is on its way at once, and a lone piece wakes nobody else.
fn carry(from: &mut TcpStream, to: &mut TcpStream, way: &Way, counter: &AtomicU64) -> std::io::Result<()> {
    let mut under_way = VecDeque::<(Instant, Vec<u8>)>::new();
    let mut piece = vec![0; PIECE_BYTES];
    let mut more_come = true;
    while more_come || !under_way.is_empty() {
        let now = Instant::now();
        while let Some((arrival, piece)) = under_way.front()
            && *arrival <= now
        {
            to.write_all(piece)?;
            under_way.pop_front();
        }
        let next = under_way.front().map(|(arrival, _)| arrival.saturating_duration_since(Instant::now()));
        if !more_come || under_way.len() >= PIECES {
            std::thread::park_timeout(next.unwrap_or_default());
        } else if has_bytes(from, next) {
            let bytes = from.read(&mut piece)?;
            more_come = bytes > 0;
            counter.fetch_add(bytes as u64, Ordering::Relaxed);
            under_way.push_back((way.arrival(bytes), piece[..bytes].to_vec()));
        }
    }
    Ok(())
}

/// Whether bytes, or their end, are there before this time is over; without a time, it waits for them.
fn has_bytes(stream: &TcpStream, time: Option<Duration>) -> bool {
    let time = time.map(|time| Timespec::try_from(time).expect("less than a minute"));
    let mut polled = [PollFd::new(stream, PollFlags::IN)];
    poll(&mut polled, time.as_ref()) == Ok(1)
}

/// A network does not wait for a core: this thread goes before others, where that is allowed, and sleeps no longer than it is
/// told (50 us longer is the kernel's default, which a round trip of 0.2 ms has twice).
fn as_soon_as_it_may() {
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), -20);
    let _ = rustix::thread::set_current_timer_slack(Some(NonZeroU64::MIN));
}
