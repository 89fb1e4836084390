//! CRIU, from the folder that `tests/setup` fetches it into: programs that are dumped, and restored in a pid namespace of
//! their own, so that none is in the way of another and all end with the value that started them.

use crate::wait_until;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// Where CRIU is.
#[derive(Clone, Debug)]
pub struct Criu {
    folder: PathBuf,
}

impl Criu {
    /// Finds it, and sees that it works here.
    ///
    /// # Errors
    /// Why not.
    ///
    /// # Panics
    /// If there is no home.
    pub fn find() -> Result<Self, String> {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        let folder = cache.expect("a home").join("postcopy/debian-13");
        let criu = Self { folder };
        if !criu.folder.join("installed.txt").exists() {
            return Err(format!("CRIU is not in {}: run tests/setup test", criu.folder.display()));
        }
        let checked =
            criu.command("usr/sbin/criu").arg("check").output().map_err(|error| error.to_string())?;
        let said = [&checked.stdout[..], &checked.stderr].concat();
        if checked.status.success() { Ok(criu) } else { Err(String::from_utf8_lossy(&said).into_owned()) }
    }

    /// A program of that folder, with its own libraries.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        self.command_by(&self.folder.join("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"), program)
    }

    /// The same, to be dumped: by a loader of its own, which is made in `folder`. What runs by the same one as criu cannot be
    /// restored by it (PR_SET_MM_MAP: EBUSY).
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn command_to_dump(&self, program: &str, folder: &Path) -> Command {
        let loader = folder.join("loader");
        let made = fs::copy(self.folder.join("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"), &loader);
        made.expect("a file can be copied");
        self.command_by(&loader, program)
    }

    fn command_by(&self, loader: &Path, program: &str) -> Command {
        let libraries = self.folder.join("usr/lib/x86_64-linux-gnu");
        let mut command = Command::new(loader);
        command.arg("--library-path").arg(&libraries).arg(self.folder.join(program)).stdin(Stdio::null());
        command
    }

    /// Dumps a process and all below it into a new directory; they are killed by that.
    ///
    /// # Panics
    /// If it does not succeed; with its log.
    pub fn dump(&self, pid: u32, images: &Path) {
        assert_success(&self.try_dump(pid, images, &[], &[]), images);
    }

    /// The same with more arguments, and variables of the environment; what it has said.
    ///
    /// # Panics
    /// If it cannot be run.
    #[must_use]
    pub fn try_dump(&self, pid: u32, images: &Path, more: &[&str], variables: &[(&str, &str)]) -> Output {
        fs::create_dir_all(images).expect("a directory can be made");
        let mut command = self.command("usr/sbin/criu");
        command
            .args(["dump", "-v2", "-o", "dump.log", "-t", &pid.to_string(), "-D"])
            .arg(images)
            .args(more)
            .envs(variables.iter().copied());
        command.output().expect("criu can be run")
    }

    /// Restores what was dumped, in a pid namespace of its own, and goes on while criu waits for its end.
    ///
    /// # Panics
    /// If it cannot be run.
    #[must_use]
    pub fn restore<A: AsRef<OsStr>>(&self, images: &Path, more: impl IntoIterator<Item = A>) -> Restored {
        let criu = self.command("usr/sbin/criu");
        let mut command = Command::new("unshare");
        // Not criu itself as the namespace's first process: it would be told of orphans' ends, and take them for its own
        // tasks'.
        let init = ["sh", "-c", "\"$@\"; exit $?", "sh"];
        command.args(["--fork", "--pid", "--kill-child", "--mount-proc"]).args(init);
        command.arg(criu.get_program()).args(criu.get_args());
        command.args(["restore", "-v3", "-o", "restore.log", "-D"]).arg(images).args(more);
        // That of an earlier restore.
        let _ = fs::remove_file(images.join("restore.log"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let images = images.to_owned();
        Restored { child: Some(child.expect("unshare can be run")), images, here: None }
    }

    /// The same in the pid namespace that it was dumped in, where it can be dumped again.
    ///
    /// # Panics
    /// If it cannot be restored; with criu's log.
    #[must_use]
    pub fn restore_here<A: AsRef<OsStr>>(
        &self,
        images: &Path,
        more: impl IntoIterator<Item = A>,
    ) -> Restored {
        let (mut command, pidfile) = (self.command("usr/sbin/criu"), images.join("restored.pid"));
        let _ = fs::remove_file(&pidfile);
        command.args(["restore", "-d", "-v3", "-o", "restore.log", "--pidfile", "restored.pid", "-D"]);
        let output = command.arg(images).args(more).output().expect("criu can be run");
        let restored =
            Restored { child: None, images: images.to_owned(), here: numbers(&pidfile).first().copied() };
        assert!(output.status.success(), "criu restore: {}\n{}", output.status, restored.log());
        restored
    }
}

/// Sees that criu has succeeded.
///
/// # Panics
/// If not; with its log.
pub fn assert_success(output: &Output, images: &Path) {
    let log = fs::read_to_string(images.join("dump.log")).unwrap_or_default();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "criu: {} {said}\n{log}", output.status);
}

/// A program that is to be dumped; killed when it is dropped.
#[derive(Debug)]
pub struct Program(Child);

impl Program {
    /// Starts one in a session of its own, with nothing open.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(command: &Command) -> Self {
        let mut own_session = Command::new("setsid");
        own_session.arg(command.get_program()).args(command.get_args());
        own_session.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(own_session.spawn().expect("it can be started"))
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it cannot be waited for.
    pub fn wait(&mut self) {
        self.0.wait().expect("it is our child");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Makes a program of `tests/programs/NAME.c`.
///
/// # Panics
/// If the compiler does not.
#[must_use]
pub fn compile(name: &str, folder: &Path) -> PathBuf {
    compile_with(name, folder, &[])
}

/// The same with all of its libraries in it.
///
/// # Panics
/// As there.
#[must_use]
pub fn compile_statically(name: &str, folder: &Path) -> PathBuf {
    compile_with(name, folder, &["-static"])
}

fn compile_with(name: &str, folder: &Path, more: &[&str]) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(format!("{name}.c"));
    let program = folder.join(name);
    let compiled =
        Command::new("cc").args(["-O1", "-pthread"]).args(more).arg("-o").arg(&program).arg(&source).output();
    let compiled = compiled.expect("there is a compiler");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    program
}

/// The numbers in the first line of a file; none where there is none yet.
#[must_use]
pub fn numbers(path: &Path) -> Vec<u64> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// The words that a program of `tests/programs` writes to its status file.
#[must_use]
pub fn status<const N: usize>(path: &Path) -> [u64; N] {
    let bytes = fs::read(path).unwrap_or_default();
    let word = |at: usize| Some(u64::from_ne_bytes(*bytes.get(at * 8..)?.first_chunk()?));
    std::array::from_fn(|at| word(at).unwrap_or(0))
}

/// Waits until the first word of a status file is written anew, by whoever runs now.
///
/// # Panics
/// If it is not.
pub fn wait_for_status(path: &Path) {
    let file = fs::File::options().write(true).open(path);
    let reset = |file: fs::File| std::os::unix::fs::FileExt::write_all_at(&file, &[0; 8], 0);
    // It may have to be made yet.
    let _ = file.and_then(reset);
    wait_until("a status", || status::<1>(path)[0] != 0);
}

/// A program that is being restored, or has been. It and all below it are killed when this is dropped.
#[derive(Debug)]
pub struct Restored {
    /// unshare, below which it is.
    child: Option<Child>,
    images: PathBuf,
    /// Its pid, if it is in this namespace.
    here: Option<u64>,
}

impl Restored {
    /// What criu has written to its log.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.images.join("restore.log")).unwrap_or_default()
    }

    /// Waits until it runs.
    ///
    /// # Panics
    /// If it does not; with criu's log.
    pub fn assert_runs(&mut self) {
        let mut ended = false;
        wait_until("a restore", || {
            ended = self.has_ended();
            ended || self.log().contains("Restore finished successfully")
        });
        assert!(!ended, "criu restore has ended:\n{}", self.log());
    }

    /// The first process that was restored, as it is known here.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.try_pid().expect("a restored process")
    }

    fn try_pid(&self) -> Option<u32> {
        if let Some(pid) = self.here {
            return u32::try_from(pid).ok();
        }
        // Below unshare, its shell and criu.
        let below = |pid| children_of(pid).first().copied();
        below(below(below(self.child.as_ref()?.id())?)?)
    }

    /// Sends a signal to it.
    ///
    /// # Panics
    /// If it is not there.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).expect("it is there");
    }

    /// The same if it is there.
    pub fn try_signal(&self, signal: Signal) {
        if let Some(pid) = self.try_pid() {
            let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
        }
    }

    /// Whether criu has ended, which it does with the program.
    ///
    /// # Panics
    /// If it cannot be asked.
    pub fn has_ended(&mut self) -> bool {
        match &mut self.child {
            Some(child) => child.try_wait().expect("it is our child").is_some(),
            None => !Path::new(&format!("/proc/{}", self.pid())).exists(),
        }
    }

    /// Ends it, and everything below it.
    pub fn kill(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(pid) = self.here.take() {
            let process = Pid::from_raw(i32::try_from(pid).expect("a pid"));
            let _ = kill(process, Signal::SIGKILL);
            // Its pid is to be had again once whoever inherits orphans has seen its end: we, where that was asked for.
            wait_until("the end of a restored process", || {
                let _ = waitpid(process, Some(WaitPidFlag::WNOHANG));
                !Path::new(&format!("/proc/{pid}")).exists()
            });
        }
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The children of a process.
#[must_use]
pub fn children_of(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}
