//! Handles a mapped file that is cut, or whose disk fails, while the server reads its bytes.
//!
//! The kernel sends SIGBUS to the thread that accesses a missing page. The handler finds the
//! address in the list of watched maps, maps a page of zeros there, notes this in the list, and
//! lets the thread continue. Other addresses go to the previous handler of SIGBUS.
//!
//! A handler may interrupt any code, so it reads the list without locks. Spans are never freed,
//! only reused.

use rustix::mm::{MapFlags, ProtFlags};
use std::ffi::{c_int, c_void};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A range of addresses, watched while `used`.
#[derive(Debug)]
pub(super) struct Span {
    /// Changed under [`CHANGE`], except for the release.
    used: AtomicBool,
    start: AtomicUsize,
    len: AtomicUsize,
    cut: AtomicBool,
    /// The next span of the list, which was added before this one.
    next: Option<&'static Span>,
}

/// The head of the list: the span that was added last.
static LIST: AtomicPtr<Span> = AtomicPtr::new(std::ptr::null_mut());

/// Locked to change the list, and the use of spans.
static CHANGE: Mutex<()> = Mutex::new(());

/// The page size, stored for the handler, which may not request it.
static PAGE_BYTES: AtomicUsize = AtomicUsize::new(0);

/// The previous handler, or the error of installing ours.
static PREVIOUS: OnceLock<Result<libc::sigaction, i32>> = OnceLock::new();

impl Span {
    pub(super) fn was_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Ends the watch. Called before the memory is unmapped.
    pub(super) fn release(&self) {
        self.len.store(0, Ordering::Release);
        self.used.store(false, Ordering::Release);
    }

    fn contains(&self, address: usize) -> bool {
        let start = self.start.load(Ordering::Acquire);
        let len = self.len.load(Ordering::Acquire);
        // The span may be reused meanwhile; start and length must belong to the same map.
        (start..start + len).contains(&address) && self.start.load(Ordering::Acquire) == start
    }
}

fn spans() -> impl Iterator<Item = &'static Span> {
    // SAFETY: the pointer is null, or a span that was leaked when it was added.
    let first = unsafe { LIST.load(Ordering::Acquire).as_ref() };
    std::iter::successors(first, |span| span.next)
}

/// Watches a map from now on.
///
/// # Errors
/// Returns the error of sigaction(2).
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
    // SAFETY: a zeroed sigaction is valid.
    let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a zeroed sigaction is valid.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    ours.sa_sigaction = (on_bus_error as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void)) as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `on_bus_error` has the signature for SA_SIGINFO, and makes only async-signal-safe
    // calls.
    match unsafe { libc::sigaction(libc::SIGBUS, &ours, &mut previous) } {
        0 => Ok(previous),
        _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
    }
}

extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: SA_SIGINFO gives a handler a siginfo that lives as long as the handler runs.
    let info_of_signal = unsafe { &*info };
    // SAFETY: for SIGBUS the kernel gives the fault address. For a signal that a process has sent
    // the field is no address, and fits no span.
    let address = unsafe { info_of_signal.si_addr() }.addr();
    if let Some(span) = spans().find(|span| span.contains(address)) {
        span.cut.store(true, Ordering::Release);
        let page = PAGE_BYTES.load(Ordering::Acquire);
        let start = std::ptr::without_provenance_mut(address / page * page);
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        // SAFETY: the page belongs to a watched map, which is read-only and outlives the access.
        // Its bytes were about to be read, and are checked afterwards. rustix calls the kernel
        // without errno.
        if unsafe { rustix::mm::mmap_anonymous(start, page, ProtFlags::READ, flags) }.is_ok() {
            return;
        }
    }
    pass_on(signal, info, context);
}

/// Passes the signal to the handler that was there before this module's.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
    let Some(Ok(previous)) = PREVIOUS.get() else { return };
    if matches!(previous.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) {
        // The access is repeated, and then kills the process, as without a handler.
        // SAFETY: this restores the previous action.
        unsafe { libc::sigaction(libc::SIGBUS, previous, std::ptr::null_mut()) };
        return;
    }
    // SAFETY: the value is neither of the two special ones, so it is a handler. One with fewer
    // parameters ignores the other arguments.
    let handler = unsafe { std::mem::transmute::<usize, Handler>(previous.sa_sigaction) };
    handler(signal, info, context);
}
