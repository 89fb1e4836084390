//! One thread for the pagers of several sessions, where their owner asks for that.

use crate::error::SessionError;
use crate::options::Options;
use crate::pager::Start;
use crate::pager::attach::ForeignMemory;
use crate::remote::Image;
use crate::remote::ImageSource;
use crate::remote::ServerAddress;
use crate::session::Session;
use postcopy_proto::reference::Reference;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Sessions that wait to be opened.
const STARTS: usize = 16;

/// A thread that answers the faults of several sessions: for processes with hundreds of them, which would have a thread
/// each. Otherwise they are as independent as others; an error, a panic, or the end of one touches no other.
///
/// What they share is time: while the kernel keeps one waiting that installs a page (100 ms and more if the owner of much
/// memory forks, or its memory cgroup is at its limit), the faults of all others wait, too; and while one that ends makes
/// what is absent SIGBUS, which takes some 40 ms a GiB.
///
/// Its thread ends when it has been dropped and its last session has ended.
#[derive(Debug)]
pub struct SharedPager {
    starts: mpsc::Sender<Start>,
}

impl SharedPager {
    /// Starts the thread.
    ///
    /// # Errors
    /// If there is none to be had.
    pub fn new() -> io::Result<Self> {
        let (starts, mut queue) = mpsc::channel::<Start>(STARTS);
        let runtime = crate::pager::runtime()?;
        let serve = async move {
            let mut sessions = JoinSet::new();
            loop {
                tokio::select! {
                    start = queue.recv() => match start {
                        Some(start) => drop(sessions.spawn(start.serve())),
                        None => break,
                    },
                    // After a panic it has cleaned up by itself.
                    Some(_) = sessions.join_next() => {}
                }
            }
            while sessions.join_next().await.is_some() {}
        };
        let thread = std::thread::Builder::new().name("postcopy-pagers".into());
        thread.spawn(move || runtime.block_on(serve))?;
        Ok(Self { starts })
    }

    /// As [`Session::open`], on this thread.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Blocking
    /// As there.
    pub fn open(
        &self,
        address: &ServerAddress,
        reference: &Reference,
        options: Options,
    ) -> Result<Session, SessionError> {
        Session::open_by(address, reference, options, |start| self.start(start))
    }

    /// As [`Session::attach`], on this thread.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Blocking
    /// As there.
    pub fn attach(
        &self,
        address: &ServerAddress,
        image: impl Into<ImageSource>,
        options: Options,
        memory: &ForeignMemory<'_>,
    ) -> Result<Session, SessionError> {
        Session::attach_by(address, image.into(), options, memory, |start| self.start(start))
    }

    /// As [`Session::resume`], on this thread.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Blocking
    /// As there.
    pub fn resume<'a>(
        &self,
        address: &ServerAddress,
        known: &[Arc<Image>],
        state: &File,
        uffds: impl FnMut(RawFd) -> Option<BorrowedFd<'a>>,
    ) -> Result<Session, SessionError> {
        Session::resume_by(address, known, state, uffds, |start| self.start(start))
    }

    fn start(&self, start: Start) -> io::Result<()> {
        // The thread ends after this value alone; else the start is dropped, which its caller notices.
        let _ = self.starts.blocking_send(start);
        Ok(())
    }
}
