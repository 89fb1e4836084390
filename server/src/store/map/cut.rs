//! What happens when a mapped file is cut, or its disk fails, while its bytes are being read.
//!
//! The kernel sends SIGBUS to the thread that touches a page which is no longer there. The handler looks the
//! address up in the list of maps that are watched, puts a page of zeros there, notes that in the list, and lets the
//! thread go on. An address that nobody watches is left to whoever handled SIGBUS before.
//!
//! A handler may interrupt anything, so the list is read without locks: spans are never freed, only used again.

use rustix::mm::{MapFlags, ProtFlags};
use std::ffi::{c_int, c_void};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A range of addresses that is watched, if it is used.
#[derive(Debug)]
pub(super) struct Span {
    /// Changed under [`CHANGE`] but for the release.
    used: AtomicBool,
    start: AtomicUsize,
    len: AtomicUsize,
    cut: AtomicBool,
    /// The span that was listed before this one.
    next: Option<&'static Span>,
}

/// The span that was listed last.
static LIST: AtomicPtr<Span> = AtomicPtr::new(std::ptr::null_mut());

/// Held to change the list, and which spans are used.
static CHANGE: Mutex<()> = Mutex::new(());

/// For the handler, which may not ask.
static PAGE_BYTES: AtomicUsize = AtomicUsize::new(0);

/// The handler before ours; or why ours could not be installed.
static PREVIOUS: OnceLock<Result<libc::sigaction, i32>> = OnceLock::new();

impl Span {
    pub(super) fn was_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Ends the watching, before the memory is unmapped.
    pub(super) fn release(&self) {
        self.len.store(0, Ordering::Release);
        self.used.store(false, Ordering::Release);
    }

    fn contains(&self, address: usize) -> bool {
        let start = self.start.load(Ordering::Acquire);
        let len = self.len.load(Ordering::Acquire);
        // The span may be used again meanwhile; start and length must be of one map.
        (start..start + len).contains(&address) && self.start.load(Ordering::Acquire) == start
    }
}

fn spans() -> impl Iterator<Item = &'static Span> {
    // SAFETY: null, or a span that was leaked when it was listed.
    let first = unsafe { LIST.load(Ordering::Acquire).as_ref() };
    std::iter::successors(first, |span| span.next)
}

/// Watches a map from now on.
///
/// # Errors
/// What sigaction(2) answers.
pub(super) fn watch(start: usize, len: usize) -> io::Result<&'static Span> {
    PREVIOUS.get_or_init(install).map_err(io::Error::from_raw_os_error)?;
    let _change = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    let free = spans().find(|span| !span.used.load(Ordering::Acquire));
    let span = free.unwrap_or_else(|| {
        let next = spans().next();
        let (start, len) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (used, cut) = (AtomicBool::new(true), AtomicBool::new(false));
        let span: &'static Span = Box::leak(Box::new(Span { used, start, len, cut, next }));
        LIST.store(std::ptr::from_ref(span).cast_mut(), Ordering::Release);
        span
    });
    span.used.store(true, Ordering::Release);
    span.cut.store(false, Ordering::Release);
    span.start.store(start, Ordering::Release);
    span.len.store(len, Ordering::Release);
    Ok(span)
}

fn install() -> Result<libc::sigaction, i32> {
    PAGE_BYTES.store(rustix::param::page_size(), Ordering::Release);
    // SAFETY: all of it zero is a valid sigaction.
    let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    ours.sa_sigaction = (on_bus_error as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void)) as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `on_bus_error` has the form that SA_SIGINFO asks for, and does only what a handler may.
    match unsafe { libc::sigaction(libc::SIGBUS, &ours, &mut previous) } {
        0 => Ok(previous),
        _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
    }
}

extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: SA_SIGINFO gives a handler a siginfo that lives as long as the handler runs.
    let info_of_signal = unsafe { &*info };
    // SAFETY: for SIGBUS the kernel gives the address that was touched; for a signal that somebody sent it is no
    // address, and fits no span.
    let address = unsafe { info_of_signal.si_addr() }.addr();
    if let Some(span) = spans().find(|span| span.contains(address)) {
        span.cut.store(true, Ordering::Release);
        let page = PAGE_BYTES.load(Ordering::Acquire);
        let start = std::ptr::without_provenance_mut(address / page * page);
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        // SAFETY: the page is one of a watched map, which is read-only and lives as long as whoever touches it; its
        // bytes were about to be read and are checked afterwards. rustix calls the kernel without errno.
        if unsafe { rustix::mm::mmap_anonymous(start, page, ProtFlags::READ, flags) }.is_ok() {
            return;
        }
    }
    pass_on(signal, info, context);
}

/// Does what would have been done without this module.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
    let Some(Ok(previous)) = PREVIOUS.get() else { return };
    if matches!(previous.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) {
        // The touch is repeated, and then deadly, as it is without a handler.
        // SAFETY: restores what stood there before.
        unsafe { libc::sigaction(libc::SIGBUS, previous, std::ptr::null_mut()) };
        return;
    }
    // SAFETY: neither of the two special values, so a handler; one that takes fewer arguments ignores the others.
    let handler = unsafe { std::mem::transmute::<usize, Handler>(previous.sa_sigaction) };
    handler(signal, info, context);
}
