//! The messages of /dev/fuse, as far as a read-only file system needs them: fuse(4), and
//! include/uapi/linux/fuse.h of Linux, whose names the constants have.
//!
//! Numbers are in the byte order of this machine. A message of the kernel is parsed with every
//! length checked, although the kernel is trusted, so that no code here is unsafe.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// The versions of the protocol that this code speaks. An older kernel has a smaller minor number.
pub(crate) const MAJOR: u32 = 7;
pub(crate) const MINOR: u32 = 40;
/// The node of the file system's root.
pub(crate) const ROOT_ID: u64 = 1;
/// Bytes of the longest message that the kernel sends to a read-only file system.
pub(crate) const MAX_REQUEST_BYTES: usize = 64 << 10;

const IN_HEADER_BYTES: usize = 40;
const OUT_HEADER_BYTES: u32 = 16;

// Flags of INIT.
pub(crate) const ASYNC_READ: u64 = 1 << 0;
pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
pub(crate) const READDIRPLUS_AUTO: u64 = 1 << 14;
pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
pub(crate) const MAX_PAGES: u64 = 1 << 22;
pub(crate) const INIT_EXT: u64 = 1 << 30;
pub(crate) const HAS_RESEND: u64 = 1 << 39;

// Flags of OPEN's answer.
pub(crate) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
pub(crate) const FOPEN_CACHE_DIR: u32 = 1 << 3;

// Notifications.
const NOTIFY_STORE: i32 = 4;
const NOTIFY_RESEND: i32 = 7;

/// A request of the kernel.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) operation: Operation<'a>,
}

/// The kernel's request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Operation<'a> {
    Init {
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Lookup {
        name: &'a OsStr,
    },
    GetAttr,
    ReadLink,
    Open,
    OpenDir,
    Read {
        offset: u64,
        bytes: u32,
    },
    ReadDir {
        handle: u64,
        offset: u64,
        bytes: u32,
        with_attributes: bool,
    },
    CloseDir {
        handle: u64,
    },
    Seek {
        offset: u64,
        whence: u32,
    },
    /// The last user of an open file has closed it.
    Release {
        handle: u64,
    },
    StatFs,
    /// Nothing is written.
    Close,
    Access,
    /// Has no answer: the kernel forgets nodes or requests, which have nothing here to forget.
    Forget,
    Destroy,
    Unsupported,
}

/// The bytes of a message that are not parsed yet.
struct Parser<'a>(&'a [u8]);

impl<'a> Parser<'a> {
    fn u32(&mut self) -> Option<u32> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_ne_bytes(*value))
    }

    fn u64(&mut self) -> Option<u64> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_ne_bytes(*value))
    }

    fn name(&mut self) -> Option<&'a OsStr> {
        let end = self.0.iter().position(|byte| *byte == 0)?;
        Some(OsStr::from_bytes(&self.0[..end]))
    }
}

impl<'a> Request<'a> {
    /// Parses a message; `None` if it is too short.
    pub(crate) fn parse(message: &'a [u8]) -> Option<Self> {
        let (header, arguments) = message.split_at_checked(IN_HEADER_BYTES)?;
        let mut header = Parser(header);
        let (_length, opcode) = (header.u32()?, header.u32()?);
        let (unique, node) = (header.u64()?, header.u64()?);
        let operation = Operation::parse(opcode, &mut Parser(arguments))?;
        Some(Self { unique, node, operation })
    }
}

impl<'a> Operation<'a> {
    fn parse(opcode: u32, arguments: &mut Parser<'a>) -> Option<Self> {
        Some(match opcode {
            1 => Self::Lookup { name: arguments.name()? },
            2 | 36 | 42 => Self::Forget,
            3 => Self::GetAttr,
            5 => Self::ReadLink,
            14 => Self::Open,
            15 => {
                let (_handle, offset) = (arguments.u64()?, arguments.u64()?);
                Self::Read { offset, bytes: arguments.u32()? }
            }
            17 => Self::StatFs,
            18 => Self::Release { handle: arguments.u64()? },
            25 => Self::Close,
            29 => Self::CloseDir { handle: arguments.u64()? },
            26 => {
                let (_major, minor) = (arguments.u32()?, arguments.u32()?);
                let (max_readahead, low) = (arguments.u32()?, arguments.u32()?);
                let high = if u64::from(low) & INIT_EXT == 0 { 0 } else { arguments.u32()? };
                Self::Init { minor, max_readahead, flags: u64::from(high) << 32 | u64::from(low) }
            }
            27 => Self::OpenDir,
            28 | 44 => {
                let (handle, offset) = (arguments.u64()?, arguments.u64()?);
                Self::ReadDir { handle, offset, bytes: arguments.u32()?, with_attributes: opcode == 44 }
            }
            34 => Self::Access,
            46 => {
                let (_handle, offset) = (arguments.u64()?, arguments.u64()?);
                Self::Seek { offset, whence: arguments.u32()? }
            }
            38 => Self::Destroy,
            _ => Self::Unsupported,
        })
    }
}

/// The kind of a node, as the mode of a file has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File { is_executable: bool },
    SymbolicLink,
}

impl Kind {
    /// Returns the value of a directory entry's type.
    fn entry_type(self) -> u32 {
        self.mode_type() >> 12
    }

    fn mode_type(self) -> u32 {
        match self {
            Self::Directory => 0o040_000,
            Self::File { .. } => 0o100_000,
            Self::SymbolicLink => 0o120_000,
        }
    }
}

/// A node's attributes, as stat(2) tells them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attributes {
    pub(crate) node: u64,
    pub(crate) kind: Kind,
    pub(crate) size_bytes: u64,
    /// True if the kernel may keep the entry and the attributes for ever.
    pub(crate) is_fixed: bool,
}

/// The owner and the permissions of the files.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// The user's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
    /// The permissions of directories and executable files; other files lack those to execute.
    pub mode: u32,
}

/// Seconds for which the kernel keeps what never changes.
const FOR_EVER: u64 = 1 << 30;

/// A message to the kernel, without its header.
#[derive(Debug, Default)]
pub(crate) struct Answer(Vec<u8>);

impl Answer {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn zeros(mut self, bytes: usize) -> Self {
        self.0.resize(self.0.len() + bytes, 0);
        self
    }

    pub(crate) fn init(minor: u32, max_readahead: u32, flags: u64, max_pages: u16) -> Self {
        let [low, high] =
            [flags & 0xffff_ffff, flags >> 32].map(|half| u32::try_from(half).expect("32 bits"));
        let (background, congested) = (64, 48);
        let this = Self::default().u32(MAJOR).u32(minor.min(MINOR)).u32(max_readahead).u32(low);
        let this = this.u16(background).u16(congested).u32(4096).u32(1);
        this.u16(max_pages).u16(0).u32(high).zeros(7 * 4)
    }

    fn attributes_of(self, of: &Attributes, owner: &Owner) -> Self {
        let permissions = match of.kind {
            Kind::Directory | Kind::File { is_executable: true } => owner.mode,
            Kind::File { is_executable: false } => owner.mode & 0o444,
            Kind::SymbolicLink => 0o777,
        };
        // The holes of a file are not counted here, which would take all of the manifest. cp and
        // tar look for holes where there are fewer blocks than bytes, and take none for a hole.
        let blocks = match of.size_bytes / 512 {
            0 | 1 => of.size_bytes.div_ceil(512),
            blocks => blocks - 1,
        };
        let this = self.u64(of.node).u64(of.size_bytes).u64(blocks);
        // No times: an image has none.
        let this = this.zeros(3 * 8 + 3 * 4).u32(of.kind.mode_type() | permissions);
        this.u32(1).u32(owner.uid).u32(owner.gid).u32(0).u32(4096).u32(0)
    }

    pub(crate) fn attributes(of: &Attributes, owner: &Owner) -> Self {
        let valid = if of.is_fixed { FOR_EVER } else { 0 };
        Self::default().u64(valid).u32(0).u32(0).attributes_of(of, owner)
    }

    /// Appends an entry as LOOKUP answers it.
    fn entry_of(self, of: &Attributes, owner: &Owner) -> Self {
        let valid = if of.is_fixed { FOR_EVER } else { 0 };
        let this = self.u64(of.node).u64(0).u64(valid).u64(valid).u32(0).u32(0);
        this.attributes_of(of, owner)
    }

    pub(crate) fn entry(of: &Attributes, owner: &Owner) -> Self {
        Self::default().entry_of(of, owner)
    }

    pub(crate) fn open(handle: u64, flags: u32) -> Self {
        Self::default().u64(handle).u32(flags).u32(0)
    }

    pub(crate) fn seek(offset: u64) -> Self {
        Self::default().u64(offset)
    }

    pub(crate) fn statfs() -> Self {
        // blocks, free, available, files, free; block size, name length, fragment size.
        Self::default().zeros(5 * 8).u32(4096).u32(255).u32(4096).u32(0).zeros(6 * 4)
    }

    /// Appends a directory entry, if it fits into `max` bytes; `next` is the offset after it.
    /// Returns false if it does not fit.
    pub(crate) fn push_entry(
        &mut self,
        (name, of, next): (&OsStr, &Attributes, u64),
        plus: Option<&Owner>,
        max: usize,
    ) -> bool {
        let name = name.as_bytes();
        let mut entry = Self::default();
        if let Some(owner) = plus {
            entry = entry.entry_of(of, owner);
        }
        let length = u32::try_from(name.len()).expect("a name is short");
        entry = entry.u64(of.node).u64(next).u32(length).u32(of.kind.entry_type());
        entry.0.extend_from_slice(name);
        let padded = entry.0.len().next_multiple_of(8);
        entry.0.resize(padded, 0);
        let fits = self.0.len() + padded <= max;
        if fits {
            self.0.extend_from_slice(&entry.0);
        }
        fits
    }
}

/// Returns the header of an answer of `bytes` bytes, or of an error.
pub(crate) fn answer_header(unique: u64, error: i32, bytes: usize) -> [u8; 16] {
    header(unique, -error, bytes)
}

fn header(unique: u64, error: i32, bytes: usize) -> [u8; 16] {
    let length = OUT_HEADER_BYTES + u32::try_from(bytes).expect("an answer is short");
    let mut header = [0; 16];
    header[..4].copy_from_slice(&length.to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// Returns the message that asks for the requests again that another process has read and not
/// answered.
pub(crate) fn resend() -> [u8; 16] {
    header(0, NOTIFY_RESEND, 0)
}

/// Returns the header of a message that stores `bytes` bytes, which follow it, in the kernel's page
/// cache. They must not end behind the end of the file: the kernel would lengthen it.
pub(crate) fn store_header(node: u64, offset: u64, bytes: usize) -> [u8; 40] {
    let mut message = [0; 40];
    message[..16].copy_from_slice(&header(0, NOTIFY_STORE, 24 + bytes));
    message[16..24].copy_from_slice(&node.to_ne_bytes());
    message[24..32].copy_from_slice(&offset.to_ne_bytes());
    let bytes = u32::try_from(bytes).expect("a store is short");
    message[32..36].copy_from_slice(&bytes.to_ne_bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn owner() -> Owner {
        Owner { uid: 1, gid: 2, mode: 0o500 }
    }

    #[test]
    fn answers_have_the_kernel_s_lengths() {
        let attributes =
            Attributes { node: 7, kind: Kind::File { is_executable: false }, size_bytes: 5, is_fixed: true };
        assert_eq!(Answer::init(40, 0, 0, 1).bytes().len(), 64);
        assert_eq!(Answer::attributes(&attributes, &owner()).bytes().len(), 104);
        assert_eq!(Answer::entry(&attributes, &owner()).bytes().len(), 128);
        assert_eq!(Answer::open(0, 0).bytes().len(), 16);
        assert_eq!(Answer::statfs().bytes().len(), 80);
        let mut listing = Answer::default();
        assert!(listing.push_entry((OsStr::new("abc"), &attributes, 1), None, 32));
        assert!(!listing.push_entry((OsStr::new("d"), &attributes, 2), None, 40));
        assert_eq!(listing.bytes().len(), 32);
    }

    proptest! {
        #[test]
        fn any_message_is_parsed_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            opcode in 0u32..60,
        ) {
            let mut bytes = bytes;
            if let Some(of_opcode) = bytes.get_mut(4..8) {
                of_opcode.copy_from_slice(&opcode.to_ne_bytes());
            }
            let _ = Request::parse(&bytes);
        }
    }
}
