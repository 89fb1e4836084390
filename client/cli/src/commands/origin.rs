//! Where an image comes from: shown before a restore, and compared with this host, so that a
//! restore of the wrong image fails before anything starts.

use super::output::printable;
use anyhow::{Result, bail};
use postcopy::Image;
use postcopy::proto::digest::Digest;
use postcopy::proto::provenance::Provenance;
use postcopy::proto::reference::Reference;
use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// The program that restores the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Restorer {
    Firecracker,
    Criu,
}

/// This host, as far as images depend on it.
#[derive(Debug)]
struct Host {
    arch: &'static str,
    /// The processor's vendor, as /proc/cpuinfo names it; `None` where it does not.
    cpu_vendor: Option<String>,
    /// The sizes of its huge pages in bytes.
    huge_page_bytes: Vec<u64>,
}

impl Host {
    fn this() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let vendor = cpuinfo.lines().find_map(|line| line.strip_prefix("vendor_id")?.split_once(": "));
        Self {
            arch: std::env::consts::ARCH,
            cpu_vendor: vendor.map(|(_, vendor)| vendor.to_owned()),
            huge_page_bytes: huge_page_sizes(Path::new("/sys/kernel/mm/hugepages")),
        }
    }

    /// Returns the first label that does not fit this host, and why.
    fn mismatch(&self, restorer: Restorer, provenance: &Provenance) -> Option<String> {
        let label = |key: &str| provenance.labels.get(key);
        let arch = label(match restorer {
            Restorer::Firecracker => "firecracker.arch",
            Restorer::Criu => "criu.arch",
        });
        if let Some(arch) = arch.filter(|arch| *arch != self.arch) {
            return Some(format!("it is of a host of {arch}, this host is {}", self.arch));
        }
        if restorer != Restorer::Firecracker {
            return None;
        }
        if let Some(bytes) = label("firecracker.page-bytes").and_then(|bytes| bytes.parse::<u64>().ok())
            && bytes > 4096
            && !self.huge_page_bytes.contains(&bytes)
        {
            return Some(format!("its memory is of pages of {bytes} bytes, this host has none of this size"));
        }
        let template = label("firecracker.cpu-template")?;
        let needs = match template {
            "T2A" => "AuthenticAMD",
            "C3" | "T2" | "T2S" | "T2CL" => "GenuineIntel",
            _ => return None,
        };
        match &self.cpu_vendor {
            Some(vendor) if vendor != needs => {
                Some(format!("its CPU template {template} is for {needs}, this host's processor is {vendor}"))
            }
            _ => None,
        }
    }
}

/// Returns the sizes of the kernel's huge pages in bytes, from the names of the folders in `dir`,
/// for example `hugepages-2048kB`.
fn huge_page_sizes(dir: &Path) -> Vec<u64> {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let size = |name: &str| name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok();
    names.filter_map(|name| Some(size(name.to_str()?)? << 10)).collect()
}

/// Checks that a reference stands for the expected image.
///
/// # Errors
/// Names both digests.
pub(super) fn ensure_expected(reference: &Reference, image: &Image, expected: Option<&Digest>) -> Result<()> {
    let digest = image.digest();
    match expected {
        Some(expected) if *expected != digest => bail!(
            "{reference} is {digest}{}, and --expect names {expected}. Restore the expected image by its digest (NAME@{expected}), or name the present one",
            age(image.provenance())
        ),
        _ => Ok(()),
    }
}

/// Checks that an image fits this host, as far as its labels tell.
///
/// # Errors
/// Names the label that does not fit.
pub(super) fn ensure_fits(reference: &Reference, image: &Image, restorer: Restorer) -> Result<()> {
    let mismatch = image.provenance().and_then(|provenance| Host::this().mismatch(restorer, provenance));
    match mismatch {
        Some(mismatch) => bail!(
            "{reference} does not fit this host: {mismatch}. Restore it on a host that it fits, or push it again with other labels (--label)"
        ),
        None => Ok(()),
    }
}

/// Returns a line that says which image a reference is, how old, and its labels.
pub(super) fn line(reference: &Reference, image: &Image) -> String {
    let mut line = format!("{reference} is {}{}", image.digest(), age(image.provenance()));
    for (number, (key, value)) in image.provenance().into_iter().flat_map(|p| p.labels.iter()).enumerate() {
        let separator = if number == 0 { "; labels: " } else { ", " };
        let _ = write!(line, "{separator}{key}={}", printable(value));
    }
    line
}

/// Returns `, pushed … ago`, or nothing if the time is unknown.
pub(super) fn age(provenance: Option<&Provenance>) -> String {
    let Some(written) = provenance.and_then(|provenance| provenance.written) else { return String::new() };
    // A server's clock may be ahead of this host's.
    let age = SystemTime::now().duration_since(written).unwrap_or_default();
    // The two largest units say enough.
    let unit = [86_400, 3600, 60, 1].into_iter().find(|unit| age.as_secs() >= *unit).unwrap_or(1);
    let smaller = if unit == 86_400 { 3600 } else { unit.min(60) };
    let rounded = Duration::from_secs(age.as_secs() / smaller * smaller);
    format!(", pushed {} ago", humantime::format_duration(rounded))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn provenance(labels: &[(&str, &str)]) -> Provenance {
        let mut provenance = Provenance::default();
        labels.iter().for_each(|(key, value)| provenance.labels.set(key, value).unwrap());
        provenance
    }

    fn host(vendor: Option<&str>) -> Host {
        let cpu_vendor = vendor.map(ToOwned::to_owned);
        Host { arch: "x86_64", cpu_vendor, huge_page_bytes: vec![2 << 20] }
    }

    #[test]
    fn an_image_of_another_architecture_or_processor_does_not_fit() {
        let mismatch = |host: &Host, restorer, labels: &[(&str, &str)]| {
            host.mismatch(restorer, &provenance(labels)).unwrap_or_default()
        };
        let intel = host(Some("GenuineIntel"));
        let arm = [("firecracker.arch", "aarch64")];
        assert!(mismatch(&intel, Restorer::Firecracker, &arm).contains("of aarch64, this host is x86_64"));
        assert_eq!(mismatch(&intel, Restorer::Criu, &arm), "");
        assert!(mismatch(&intel, Restorer::Criu, &[("criu.arch", "aarch64")]).contains("aarch64"));
        let amd = [("firecracker.arch", "x86_64"), ("firecracker.cpu-template", "T2A")];
        assert!(mismatch(&intel, Restorer::Firecracker, &amd).contains("AuthenticAMD"));
        assert_eq!(mismatch(&host(Some("AuthenticAMD")), Restorer::Firecracker, &amd), "");
        assert_eq!(mismatch(&host(None), Restorer::Firecracker, &amd), "");
        assert_eq!(mismatch(&intel, Restorer::Firecracker, &[("firecracker.cpu-template", "T2CL")]), "");
        assert_eq!(mismatch(&intel, Restorer::Firecracker, &[]), "");
        let pages = |bytes: &'static str| [("firecracker.page-bytes", bytes)];
        for fits in ["4096", "2097152", "", "many"] {
            assert_eq!(mismatch(&intel, Restorer::Firecracker, &pages(fits)), "");
        }
        assert!(mismatch(&intel, Restorer::Firecracker, &pages("1073741824")).contains("1073741824 bytes"));
        let own = [("firecracker.cpu-template", "our-own")];
        assert_eq!(mismatch(&host(Some("AuthenticAMD")), Restorer::Firecracker, &own), "");
    }

    #[test]
    fn an_age_has_two_units() {
        let of = |seconds: u64| {
            let written = SystemTime::now().checked_sub(Duration::from_secs(seconds));
            age(Some(&Provenance { written, ..Provenance::default() }))
        };
        assert_eq!(of(0), ", pushed 0s ago");
        assert_eq!(of(3 * 60 + 20), ", pushed 3m ago");
        assert_eq!(of(2 * 3600 + 5 * 60 + 9), ", pushed 2h 5m ago");
        assert_eq!(of(4 * 86_400 + 2 * 3600 + 61), ", pushed 4days 2h ago");
        assert_eq!(age(None), "");
    }
}
