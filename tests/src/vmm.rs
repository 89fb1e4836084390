//! Virtual machines that are restored: `postcopy-vmm`, told line by line what to do.

use crate::binary;
use crate::faulter::patience;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use tempfile::TempDir;

/// A machine. Killed when it is dropped.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    stream: Option<BufReader<UnixStream>>,
    listener: UnixListener,
    _folder: TempDir,
}

/// What its touches have shown.
#[derive(Clone, Copy, Debug)]
pub struct Touches {
    /// How many.
    pub count: u64,
    /// Pages that held something else than they must.
    pub wrong: u64,
    /// How long the longest took, in microseconds.
    pub longest_us: u64,
}

impl Vmm {
    /// Starts one that connects to `backend`, with regions such as `small:64` or `huge:4` (MiB), whose memory should be
    /// what `truth` holds. `form` is `new` or `old`. It has not loaded its snapshot yet: see [`Vmm::loaded`].
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(backend: &Path, truth: &Path, form: &str, regions: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let path = folder.path().join("control");
        let listener = UnixListener::bind(&path).expect("a socket can be made");
        let mut command = Command::new(binary("postcopy-vmm"));
        command.arg(&path).arg(backend).arg(truth).arg(form).args(regions);
        let child = command.spawn().expect("it starts");
        Self { child, stream: None, listener, _folder: folder }
    }

    /// Waits until it has loaded its snapshot.
    ///
    /// # Panics
    /// If it has not, or found something wrong then.
    pub fn loaded(&mut self) {
        let (stream, _) = self.listener.accept().expect("it connects");
        stream.set_read_timeout(Some(patience())).expect("a socket");
        self.stream = Some(BufReader::new(stream));
        assert_eq!(self.answer(), "loaded [true, true]");
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn stream(&mut self) -> &mut BufReader<UnixStream> {
        self.stream.as_mut().expect("it has loaded")
    }

    /// Tells it something.
    ///
    /// # Panics
    /// If it has ended.
    pub fn tell(&mut self, what: &str) {
        writeln!(self.stream().get_mut(), "{what}").expect("it listens");
    }

    /// Its next answer.
    ///
    /// # Panics
    /// If there is none.
    pub fn answer(&mut self) -> String {
        let mut line = String::new();
        match self.stream().read_line(&mut line) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("the machine hangs"),
            Ok(0) | Err(_) => panic!("the machine has died"),
            Ok(_) => line.trim().to_owned(),
        }
    }

    /// Tells it something and gives its answer.
    ///
    /// # Panics
    /// If there is none.
    pub fn ask(&mut self, what: &str) -> String {
        self.tell(what);
        self.answer()
    }

    /// What it says of its touches.
    ///
    /// # Panics
    /// If it says something else.
    pub fn touches(&mut self) -> Touches {
        let answer = self.answer();
        let numbers: Vec<u64> = answer.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let &[count, wrong, longest_us] = numbers.as_slice() else { panic!("the machine says {answer:?}") };
        Touches { count, wrong, longest_us }
    }

    /// Sees that every byte is what it must be.
    ///
    /// # Panics
    /// If not.
    pub fn assert_right(&mut self) {
        assert_eq!(self.ask("check"), "wrong 0");
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// If it cannot be asked.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_some()
    }

    /// Ends it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
    }
}
