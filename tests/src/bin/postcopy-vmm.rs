//! A stand-in for Firecracker: what it does on the wire and to its memory when it loads a snapshot with a memory backend of
//! type `Uffd`.
//!
//! `postcopy-vmm CONTROL BACKEND TRUTH FORM KIND:MIB…` maps a region of each kind (`small` or `huge`) and length, opens a
//! userfaultfd as Firecracker does, connects to BACKEND, sends what Firecracker sends there (FORM is `new` or `old`, for the
//! two versions of its JSON), and writes to its memory twice, as the loading of a snapshot does. TRUTH is the file that
//! the guest's memory should hold. Then it does what it reads from CONTROL, answering each line:
//!
//! | | |
//! |---|---|
//! | `run THREADS SECONDS SEED` | threads touch pages at random, read and write: `touches N wrong W longest MICROSECONDS` |
//! | `touch MIB SEED` | touches so much at random, in one thread: as above |
//! | `check` | compares every byte: `wrong W`, how many pages are |
//! | `balloon PAGE COUNT` | `done`: gives pages back, as a balloon does |
//! | `hang-up` | `done`: closes the connection, and lives on |
//! | `exit` | nothing |
//!
//! What a page must hold it knows of each: what TRUTH says, zeros where it was given back, or what was written to it.

use anyhow::{Context, Result, bail};
use postcopy_tests::{PAGE, descriptors};
use rustix::fd::BorrowedFd;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::c_void;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use userfaultfd::{FeatureFlags, UffdBuilder};

/// Pages that one lock is for.
const SHARD: usize = 512;

/// What a page must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    Truth,
    Zeros,
    /// Its beginning was written to.
    Written(u64),
}

struct Guest {
    /// Address and length, in the order of the memory's file.
    regions: Vec<(usize, usize)>,
    truth: File,
    /// Whoever touches a page holds its shard: what it holds and what is known of that change together.
    shards: Vec<Mutex<Vec<Holds>>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Found {
    touches: u64,
    wrong: u64,
    longest: Duration,
}

impl Guest {
    fn pages(&self) -> usize {
        self.regions.iter().map(|(_, len)| len / PAGE).sum()
    }

    fn address(&self, page: usize) -> usize {
        let mut first = 0;
        for (address, len) in &self.regions {
            if page - first < len / PAGE {
                return address + (page - first) * PAGE;
            }
            first += len / PAGE;
        }
        unreachable!("a page of the guest")
    }

    fn bytes(&self, page: usize) -> *mut [u8; PAGE] {
        std::ptr::with_exposed_provenance_mut(self.address(page))
    }

    /// Compares a page, and with `write` writes to it then.
    #[expect(unsafe_code, reason = "memory that lives as long as the process")]
    fn touch(&self, page: usize, write: Option<u64>) -> bool {
        let mut shard = self.shards[page / SHARD].lock().expect("nobody panics with it");
        let holds = &mut shard[page % SHARD];
        let mut expected = [0; PAGE];
        if !matches!(holds, Holds::Zeros) {
            self.truth.read_exact_at(&mut expected, (page * PAGE) as u64).expect("it has all pages");
        }
        if let Holds::Written(value) = holds {
            expected[..8].copy_from_slice(&value.to_le_bytes());
        }
        let bytes = self.bytes(page);
        // SAFETY: mapped, and whoever touches it holds the lock.
        let is_right = unsafe { &*bytes } == &expected;
        if let Some(value) = write.filter(|_| *holds != Holds::Zeros) {
            // SAFETY: as above.
            unsafe { bytes.cast::<[u8; 8]>().write(value.to_le_bytes()) };
            *holds = Holds::Written(value);
        }
        is_right
    }

    fn touch_timed(&self, page: usize, write: Option<u64>, found: &mut Found) {
        let started = Instant::now();
        found.wrong += u64::from(!self.touch(page, write));
        found.touches += 1;
        found.longest = found.longest.max(started.elapsed());
    }

    fn run(&self, threads: u64, seconds: f64, seed: u64) -> Found {
        let vcpu = |thread: u64| {
            let mut random = fastrand::Rng::with_seed(seed * 1000 + thread);
            let (started, mut found) = (Instant::now(), Found::default());
            while started.elapsed().as_secs_f64() < seconds {
                let write = random.bool().then(|| random.u64(..));
                self.touch_timed(random.usize(..self.pages()), write, &mut found);
            }
            found
        };
        std::thread::scope(|scope| {
            let vcpus: Vec<_> = (0..threads).map(|thread| scope.spawn(move || vcpu(thread))).collect();
            let found = vcpus.into_iter().map(|vcpu| vcpu.join().expect("it does not panic"));
            found.fold(Found::default(), |all, one| Found {
                touches: all.touches + one.touches,
                wrong: all.wrong + one.wrong,
                longest: all.longest.max(one.longest),
            })
        })
    }

    /// Different pages, each once.
    fn touch_some(&self, pages: usize, seed: u64) -> Found {
        let mut order: Vec<usize> = (0..self.pages()).collect();
        fastrand::Rng::with_seed(seed).shuffle(&mut order);
        let mut found = Found::default();
        order.into_iter().take(pages).for_each(|page| self.touch_timed(page, None, &mut found));
        found
    }

    #[expect(unsafe_code, reason = "giving back its own memory")]
    fn balloon(&self, first: usize, count: usize) -> Result<()> {
        for page in first..first + count {
            let mut shard = self.shards[page / SHARD].lock().expect("nobody panics with it");
            // SAFETY: mapped, and whoever touches it holds the lock.
            unsafe { rustix::mm::madvise(self.bytes(page).cast(), PAGE, Advice::LinuxDontNeed) }?;
            shard[page % SHARD] = Holds::Zeros;
        }
        Ok(())
    }

    /// The same of many pages at once, which are one event.
    #[expect(unsafe_code, reason = "giving back its own memory")]
    fn balloon_at_once(&self, first: usize, count: usize) -> Result<()> {
        let shards = first / SHARD..(first + count).div_ceil(SHARD);
        let mut held: Vec<_> =
            self.shards[shards.clone()].iter().map(|shard| shard.lock().expect("nobody panics")).collect();
        // SAFETY: mapped, and whoever touches it holds the locks.
        unsafe { rustix::mm::madvise(self.bytes(first).cast(), count * PAGE, Advice::LinuxDontNeed) }?;
        for page in first..first + count {
            held[page / SHARD - shards.start][page % SHARD] = Holds::Zeros;
        }
        Ok(())
    }
}

fn pointer(address: usize) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(address)
}

#[expect(unsafe_code, reason = "mappings that live as long as the process")]
fn map(kind: &str, len: usize) -> Result<usize> {
    let huge = match kind {
        "small" => MapFlags::empty(),
        "huge" => MapFlags::HUGETLB,
        _ => bail!("{kind} is no kind of memory"),
    };
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | huge;
    // SAFETY: a new mapping, anywhere.
    let mapped = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)
    };
    Ok(mapped?.expose_provenance())
}

/// What Firecracker sends.
fn handshake(form: &str, regions: &[(usize, usize, usize)]) -> String {
    let mut offset = 0;
    let region = |(address, len, page_bytes): &(usize, usize, usize)| {
        let sizes = match form {
            "old" => format!(r#""page_size_kib":{page_bytes}"#),
            _ => format!(r#""page_size":{page_bytes},"page_size_kib":{page_bytes}"#),
        };
        let text = format!(r#"{{"base_host_virt_addr":{address},"size":{len},"offset":{offset},{sizes}}}"#);
        offset += len;
        text
    };
    format!("[{}]", regions.iter().map(region).collect::<Vec<_>>().join(","))
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, control, backend, truth, form, spans @ ..] = args.as_slice() else { bail!("see the source") };
    let mut control = UnixStream::connect(control)?;
    let mut regions = Vec::new();
    for span in spans {
        let (kind, mib) = span.split_once(':').context("KIND:MIB")?;
        let len = mib.parse::<usize>()? << 20;
        regions.push((map(kind, len)?, len, if kind == "huge" { 2 << 20 } else { PAGE }));
    }
    let uffd = UffdBuilder::new()
        .require_features(FeatureFlags::EVENT_REMOVE)
        .close_on_exec(true)
        .non_blocking(true)
        .user_mode_only(false)
        .create()?;
    for (address, len, _) in &regions {
        uffd.register(pointer(*address), *len)?;
    }
    let mut backend = Some(UnixStream::connect(backend)?);
    #[expect(unsafe_code, reason = "the userfaultfd crate does not give a borrowed descriptor")]
    // SAFETY: `uffd` owns it, and outlives the borrow.
    let descriptor = unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) };
    descriptors::send(backend.as_ref().context("a socket")?, descriptor, &handshake(form, &regions));
    let regions: Vec<_> = regions.into_iter().map(|(address, len, _)| (address, len)).collect();
    let shards = regions.iter().map(|(_, len)| len / PAGE).sum::<usize>().div_ceil(SHARD);
    let shards = (0..shards).map(|_| Mutex::new(vec![Holds::Truth; SHARD])).collect();
    let guest = Guest { regions, truth: File::open(truth)?, shards };
    // Within the call that loads the snapshot, the thread that serves the API does this.
    let early = [1, guest.pages() - 1].map(|page| guest.touch(page, Some(page as u64)));
    writeln!(control, "loaded {early:?}")?;
    let mut lines = BufReader::new(control.try_clone()?).lines();
    while let Some(line) = lines.next().transpose()? {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |i: usize| words.get(i).context("a number").and_then(|word| Ok(word.parse::<usize>()?));
        let told = |found: Found| {
            let Found { touches, wrong, longest } = found;
            format!("touches {touches} wrong {wrong} longest {}", longest.as_micros())
        };
        let answer = match words[0] {
            "run" => told(guest.run(number(1)? as u64, words[2].parse()?, number(3)? as u64)),
            "touch" => told(guest.touch_some((number(1)? << 20) / PAGE, number(2)? as u64)),
            "check" => {
                let wrong = (0..guest.pages()).filter(|page| !guest.touch(*page, None)).count();
                format!("wrong {wrong}")
            }
            "balloon" if number(2)? > 64 => {
                guest.balloon_at_once(number(1)?, number(2)?).map(|()| "done".to_owned())?
            }
            "balloon" => guest.balloon(number(1)?, number(2)?).map(|()| "done".to_owned())?,
            "hang-up" => {
                backend = None;
                "done".to_owned()
            }
            "exit" => return Ok(()),
            other => bail!("{other} is not known"),
        };
        writeln!(control, "{answer}")?;
    }
    // As Firecracker does: the connection and the userfaultfd are kept to the end.
    drop((backend, uffd));
    Ok(())
}
