//! A thread that runs the pagers of several sessions, for programs that ask for it.

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

/// The capacity of the queue of sessions that are to be opened.
const STARTS: usize = 16;

/// A thread that answers the page faults of several sessions. It suits processes with hundreds of
/// sessions, which would else have one thread for each. In all other respects the sessions are
/// independent: an error, a panic or the end of one does not affect the others.
///
/// The sessions share the thread's time. While the kernel delays an install of one session, the
/// faults of all others wait: 100 ms and more if the owner of much memory forks, or its memory
/// cgroup is at its limit. The others also wait while an ending session poisons its absent pages,
/// which takes some 40 ms a GiB.
///
/// The thread ends when this value has been dropped and the last session has ended.
#[derive(Debug)]
pub struct SharedPager {
    starts: mpsc::Sender<Start>,
}

impl SharedPager {
    /// Starts the thread.
    ///
    /// # Errors
    /// The error of starting a thread or its runtime.
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
                    // A session that panicked has already cleaned up in its own destructors.
                    Some(_) = sessions.join_next() => {}
                }
            }
            while sessions.join_next().await.is_some() {}
        };
        let thread = std::thread::Builder::new().name("postcopy-pagers".into());
        thread.spawn(move || runtime.block_on(serve))?;
        Ok(Self { starts })
    }

    /// Opens an image as [`Session::open`] does, with the pager on this thread.
    ///
    /// # Errors
    /// As for [`Session::open`].
    ///
    /// # Blocking
    /// As for [`Session::open`].
    pub fn open(
        &self,
        address: &ServerAddress,
        reference: &Reference,
        options: Options,
    ) -> Result<Session, SessionError> {
        Session::open_by(address, reference, options, |start| self.start(start))
    }

    /// Attaches to memory as [`Session::attach`] does, with the pager on this thread.
    ///
    /// # Errors
    /// As for [`Session::attach`].
    ///
    /// # Blocking
    /// As for [`Session::attach`].
    pub fn attach(
        &self,
        address: &ServerAddress,
        image: impl Into<ImageSource>,
        options: Options,
        memory: &ForeignMemory<'_>,
    ) -> Result<Session, SessionError> {
        Session::attach_by(address, image.into(), options, memory, |start| self.start(start))
    }

    /// Resumes a session as [`Session::resume`] does, with the pager on this thread.
    ///
    /// # Errors
    /// As for [`Session::resume`].
    ///
    /// # Blocking
    /// As for [`Session::resume`].
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
        // Fails only if the thread has ended, which needs a panic. The start is dropped then, and
        // its caller gets [`SessionError::Ended`].
        let _ = self.starts.blocking_send(start);
        Ok(())
    }
}
