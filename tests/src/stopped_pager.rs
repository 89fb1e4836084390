//! A pager's thread under a tracer: its calls and instructions one by one, calls that fail, and functions that panic.

use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use postcopy_proto::page::to_usize;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::path::Path;
use std::process::Command;

const EPOLL_WAIT: u64 = 232;

/// Waits until it stops: whether that is at a call of the kernel.
fn wait_for(thread: Pid) -> bool {
    let status = waitpid(thread, Some(WaitPidFlag::__WALL)).expect("it is traced");
    matches!(status, WaitStatus::PtraceSyscall(_))
}

/// Functions of a program, by the addresses of their beginnings in a process that runs it.
#[derive(Clone, Debug)]
pub struct Functions(BTreeMap<u64, String>);

impl Functions {
    /// Those of its functions that are `wanted`, by their full names.
    ///
    /// # Panics
    /// If nm(1) does not tell, or the process does not run it.
    #[must_use]
    pub fn of(program: &Path, process: Pid, wanted: impl Fn(&str) -> bool) -> Self {
        let symbols = Command::new("nm").args(["--demangle", "--defined-only"]).arg(program).output();
        let symbols = String::from_utf8(symbols.expect("nm comes with the linker").stdout).expect("names");
        let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).expect("it lives");
        let path = program.canonicalize().expect("it is there");
        let mut of_program =
            maps.lines().filter(|line| line.ends_with(path.to_str().expect("a path of ours")));
        let start = of_program.next().and_then(|line| u64::from_str_radix(line.split('-').next()?, 16).ok());
        let start = start.expect("it runs the program");
        let function = |line: &str| {
            let (address, rest) = line.split_once(' ')?;
            let name = rest.strip_prefix("t ").or(rest.strip_prefix("T "))?;
            let address = u64::from_str_radix(address, 16).ok()?;
            wanted(name).then(|| (start + address, name.to_owned()))
        };
        Self(symbols.lines().filter_map(function).collect())
    }

    /// The address of the one function that has this name.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn address(&self, name: &str) -> u64 {
        *self.0.iter().find(|(_, of)| *of == name).unwrap_or_else(|| panic!("there is no {name}")).0
    }
}

/// What a pager is about to do, or has just done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// The number of the system call.
    pub call: u64,
    /// What it has answered; None: it is about to be called.
    pub answer: Option<i64>,
}

/// The thread that serves, which goes on step by step. It goes on alone when this is dropped.
#[derive(Debug)]
pub struct StoppedPager {
    thread: Pid,
}

impl StoppedPager {
    pub(crate) fn stop(thread: Pid) -> Self {
        ptrace::seize(thread, Options::PTRACE_O_TRACESYSGOOD).expect("root may trace");
        ptrace::interrupt(thread).expect("it lives");
        wait_for(thread);
        Self { thread }
    }

    /// Waits until it has been killed.
    pub fn assert_killed(&self) {
        while waitpid(self.thread, Some(WaitPidFlag::__WALL)).is_ok() {}
    }

    /// Lets it go on until it is about to call the kernel, or comes back from it.
    ///
    /// # Panics
    /// If it ends.
    pub fn next_call(&mut self) -> Stop {
        ptrace::syscall(self.thread, None).expect("it is stopped");
        wait_for(self.thread);
        let info = ptrace::syscall_info(self.thread).expect("it is stopped at a system call");
        let call = ptrace::getregs(self.thread).expect("it is stopped").orig_rax;
        match info.op {
            nix::libc::PTRACE_SYSCALL_INFO_EXIT => {
                #[expect(unsafe_code, reason = "a union")]
                // SAFETY: `op` says which one it is.
                let answer = unsafe { info.u.exit }.sval;
                Stop { call, answer: Some(answer) }
            }
            _ => Stop { call, answer: None },
        }
    }

    /// Lets it go on for so many instructions, or until it is about to call the kernel: how many these were.
    ///
    /// # Panics
    /// If it ends.
    pub fn step(&mut self, instructions: u32) -> u32 {
        self.step_seeing(instructions, |_| {})
    }

    /// The same; `see` is given the address of each.
    fn step_seeing(&mut self, instructions: u32, mut see: impl FnMut(u64)) -> u32 {
        const SYSCALL: i64 = 0x050f;
        for done in 0..instructions {
            let at = ptrace::getregs(self.thread).expect("it is stopped").rip;
            see(at);
            let at = std::ptr::with_exposed_provenance_mut(to_usize(at));
            if ptrace::read(self.thread, at).expect("it is stopped at an instruction") & 0xffff == SYSCALL {
                return done;
            }
            ptrace::step(self.thread, None).expect("it is stopped");
            wait_for(self.thread);
        }
        instructions
    }
}

impl StoppedPager {
    /// The functions that begin until it waits and `is_done`, by name, and how often each does.
    ///
    /// # Panics
    /// If it ends.
    pub fn functions_called(
        &mut self,
        functions: &Functions,
        mut is_done: impl FnMut() -> bool,
    ) -> BTreeMap<String, u32> {
        let mut called = BTreeMap::new();
        loop {
            self.step_seeing(u32::MAX, |at| {
                if let Some(name) = functions.0.get(&at) {
                    *called.entry(name.clone()).or_default() += 1;
                }
            });
            let waits = ptrace::getregs(self.thread).expect("it is stopped").rax == EPOLL_WAIT;
            if waits && is_done() {
                return called;
            }
            ptrace::step(self.thread, None).expect("it is stopped");
            wait_for(self.thread);
        }
    }

    /// Lets it go on until the function at this address begins for the time of this number, counted from 0. False: it waits
    /// and `is_done` before.
    ///
    /// # Panics
    /// If it ends.
    pub fn run_to(&mut self, function: u64, occurrence: u32, mut is_done: impl FnMut() -> bool) -> bool {
        self.set_breakpoint(Some(function));
        let mut left = occurrence;
        let reached = loop {
            ptrace::syscall(self.thread, None).expect("it is stopped");
            if !wait_for(self.thread) {
                if left == 0 {
                    break true;
                }
                left -= 1;
            } else if ptrace::getregs(self.thread).expect("it is stopped").orig_rax == EPOLL_WAIT && is_done()
            {
                break false;
            }
        };
        self.set_breakpoint(None);
        reached
    }

    /// One that stops this thread alone, by the processor's debug registers.
    fn set_breakpoint(&self, at: Option<u64>) {
        const REGISTERS: usize = std::mem::offset_of!(nix::libc::user, u_debugreg);
        let set = |register: usize, value: i64| {
            let offset: *mut c_void = std::ptr::without_provenance_mut(REGISTERS + register * 8);
            ptrace::write_user(self.thread, offset, value).expect("it is stopped");
        };
        set(7, 0);
        if let Some(at) = at {
            set(0, at.cast_signed());
            set(7, 1);
        }
    }

    /// Has the function at whose beginning it is not be called, and `instead` in its place.
    ///
    /// # Panics
    /// If it is not stopped.
    pub fn call_instead(self, instead: u64) {
        self.change_registers(|registers| registers.rip = instead);
    }

    fn change_registers(&self, change: impl FnOnce(&mut nix::libc::user_regs_struct)) {
        let mut registers = ptrace::getregs(self.thread).expect("it is stopped");
        change(&mut registers);
        ptrace::setregs(self.thread, registers).expect("it is stopped");
    }

    /// Has the call that it is about to make fail with `errno` instead.
    ///
    /// # Panics
    /// If it is not about to make one.
    pub fn fail_call(&mut self, errno: i32) {
        // No call has this number.
        self.change_registers(|registers| registers.orig_rax = u64::MAX);
        ptrace::syscall(self.thread, None).expect("it is stopped");
        wait_for(self.thread);
        self.change_registers(|registers| registers.rax = i64::from(-errno).cast_unsigned());
    }
}

impl Drop for StoppedPager {
    fn drop(&mut self) {
        // Fails where it has been killed.
        let _ = ptrace::detach(self.thread, None);
    }
}
