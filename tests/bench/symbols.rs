//! Symbols of a shared library, resolved as the dynamic loader does it: through the hash table that lies in the file.

use anyhow::{Context, Result, ensure};
use postcopy::proto::digest::Digest;

/// Parts of an ELF file of 64 bits, by their offsets. See elf(5).
pub(crate) struct Library<'a> {
    bytes: &'a [u8],
    symbols: usize,
    strings: usize,
    hashes: usize,
    /// Virtual address, offset and length of what is loaded.
    loaded: Vec<(u64, u64, u64)>,
}

const SYMBOL_BYTES: usize = 24;
const LOAD: u32 = 1;
const DYNAMIC: u32 = 2;
const STRINGS: u64 = 5;
const SYMBOLS: u64 = 6;
const GNU_HASH: u64 = 0x6fff_fef5;

fn u32_at(bytes: &[u8], at: usize) -> Result<u32> {
    let bytes = bytes.get(at..).and_then(|bytes| bytes.first_chunk()).context("beyond the file")?;
    Ok(u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64> {
    let bytes = bytes.get(at..).and_then(|bytes| bytes.first_chunk()).context("beyond the file")?;
    Ok(u64::from_le_bytes(*bytes))
}

fn size_at(bytes: &[u8], at: usize) -> Result<usize> {
    Ok(usize::try_from(u64_at(bytes, at)?)?)
}

impl<'a> Library<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self> {
        ensure!(bytes.starts_with(b"\x7fELF\x02\x01"), "not an ELF file of 64 bits");
        let (headers, count) = (size_at(bytes, 32)?, u32_at(bytes, 56)? & 0xffff);
        let mut library = Self { bytes, symbols: 0, strings: 0, hashes: 0, loaded: Vec::new() };
        let mut dynamic = 0;
        for index in 0..count as usize {
            let header = headers + index * 56;
            let (offset, address) = (u64_at(bytes, header + 8)?, u64_at(bytes, header + 16)?);
            match u32_at(bytes, header)? {
                LOAD => library.loaded.push((address, offset, u64_at(bytes, header + 32)?)),
                DYNAMIC => dynamic = usize::try_from(offset)?,
                _ => {}
            }
        }
        loop {
            let (tag, value) = (u64_at(bytes, dynamic)?, u64_at(bytes, dynamic + 8)?);
            match tag {
                0 => return Ok(library),
                STRINGS => library.strings = library.offset(value)?,
                SYMBOLS => library.symbols = library.offset(value)?,
                GNU_HASH => library.hashes = library.offset(value)?,
                _ => {}
            }
            dynamic += 16;
        }
    }

    /// Where in the file an address lies.
    fn offset(&self, address: u64) -> Result<usize> {
        let holds = |part: &&(u64, u64, u64)| (part.0..part.0 + part.2).contains(&address);
        let (start, offset, _) = self.loaded.iter().find(holds).context("an address that is not loaded")?;
        Ok(usize::try_from(address - start + offset)?)
    }

    fn name(&self, symbol: usize) -> Result<&'a [u8]> {
        let at = self.strings + u32_at(self.bytes, self.symbols + symbol * SYMBOL_BYTES)? as usize;
        let name = self.bytes.get(at..).context("beyond the file")?;
        Ok(&name[..name.iter().position(|byte| *byte == 0).context("a name without an end")?])
    }

    /// The names of all symbols that it exports and that have bytes in the file.
    pub(crate) fn names(&self) -> Result<Vec<&'a [u8]>> {
        let (buckets, first) = (u32_at(self.bytes, self.hashes)?, u32_at(self.bytes, self.hashes + 4)?);
        let mut names = Vec::new();
        for bucket in 0..buckets {
            let mut symbol = u32_at(self.bytes, self.bucket(bucket)?)?;
            while symbol >= first {
                let name = self.name(symbol as usize)?;
                // Some are of a thread, or zeros that no file holds.
                if self.resolve(name).is_ok_and(|bytes| !bytes.is_empty()) {
                    names.push(name);
                }
                if u32_at(self.bytes, self.chain(symbol)?)? & 1 == 1 {
                    break;
                }
                symbol += 1;
            }
        }
        Ok(names)
    }

    fn bucket(&self, bucket: u32) -> Result<usize> {
        Ok(self.hashes + 16 + u32_at(self.bytes, self.hashes + 8)? as usize * 8 + bucket as usize * 4)
    }

    fn chain(&self, symbol: u32) -> Result<usize> {
        let (buckets, first) = (u32_at(self.bytes, self.hashes)?, u32_at(self.bytes, self.hashes + 4)?);
        Ok(self.bucket(buckets)? + (symbol - first) as usize * 4)
    }

    /// A symbol's bytes, at most a page of them.
    pub(crate) fn resolve(&self, name: &[u8]) -> Result<&'a [u8]> {
        let hash = name.iter().fold(5381u32, |hash, byte| hash.wrapping_mul(33).wrapping_add((*byte).into()));
        let mut symbol = u32_at(self.bytes, self.bucket(hash % u32_at(self.bytes, self.hashes)?)?)?;
        ensure!(symbol != 0, "no such symbol");
        loop {
            let found = u32_at(self.bytes, self.chain(symbol)?)?;
            if found | 1 == hash | 1 && self.name(symbol as usize)? == name {
                let at = self.symbols + symbol as usize * SYMBOL_BYTES;
                let (address, len) = (u64_at(self.bytes, at + 8)?, size_at(self.bytes, at + 16)?);
                let at = self.offset(address)?;
                return self.bytes.get(at..at + len.min(4096)).context("beyond the file");
            }
            ensure!(found & 1 == 0, "no such symbol");
            symbol += 1;
        }
    }
}

/// Resolves them all; a digest of their bytes.
pub(crate) fn resolve(bytes: &[u8], names: &[&[u8]]) -> Result<Digest> {
    let library = Library::new(bytes)?;
    let mut all = Vec::new();
    for name in names {
        all.extend_from_slice(library.resolve(name)?);
    }
    Ok(Digest::of(&all))
}
