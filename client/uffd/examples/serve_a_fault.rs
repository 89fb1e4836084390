//! Serves one page fault of this process: the smallest pager.

use postcopy_uffd::memory::Memory;
use postcopy_uffd::{Event, MESSAGE_WORDS, Outcome, PAGE_BYTES, Uffd};
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::sync::atomic::AtomicU64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Sixteen absent pages. Registered, an access to one of them is a fault.
    let memory = Memory::reserve(16 * PAGE_BYTES)?;
    let uffd = Uffd::open(0)?;
    uffd.register(memory.start(), memory.len())?;

    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Without a pager the thread below would sleep for ever.
            if let Err(error) = serve_one(&uffd) {
                eprintln!("the pager ends: {error}");
                std::process::exit(1);
            }
        });
        // This thread sleeps here until the pager has installed page 3.
        let byte = memory.slice(memory.len())[3 * PAGE_BYTES];
        println!("page 3 begins with {byte}");
    });
    Ok(())
}

/// Waits for a fault, and fills its page with sevens.
fn serve_one(uffd: &Uffd) -> io::Result<()> {
    let words = [const { AtomicU64::new(0) }; MESSAGE_WORDS];
    while uffd.read_messages(&words)? == 0 {
        poll(&mut [PollFd::new(uffd, PollFlags::IN)], None)?;
    }
    let event = Event::of(words.map(AtomicU64::into_inner));
    let Event::Fault { address, .. } = event else {
        return Err(io::Error::other(format!("not a fault: {event:?}")));
    };
    println!("a fault at {address:#x}");
    match uffd.copy(address, &[7; PAGE_BYTES]) {
        Outcome::Done => Ok(()),
        other => Err(io::Error::other(format!("the page cannot be installed: {other:?}"))),
    }
}
