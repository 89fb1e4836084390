//! `postcopy doctor`: reports the features that this kernel and these privileges allow, the effect
//! of each missing one, and the way to get it.

use super::output::Output;
use crate::daemon::surroundings;
use anyhow::Result;
use postcopy::uffd::{self, Access, FEATURES};
use serde::Serialize;
use std::fmt::Write;
use std::process::ExitCode;

#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    ok: bool,
    /// The state that the check found.
    found: String,
    /// The effect of the missing feature, and the way to get it; empty if there is no advice.
    #[serde(skip_serializing_if = "String::is_empty")]
    advice: String,
}

#[derive(Debug, Serialize)]
struct FeatureFound {
    name: &'static str,
    available: bool,
    since: &'static str,
    used_for: &'static str,
}

#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    /// True if this program can map files of images.
    can_map: bool,
    findings: Vec<Finding>,
    features: Vec<FeatureFound>,
}

pub(crate) fn doctor(pid: Option<u32>, output: Output) -> Result<ExitCode> {
    let mut report = examine();
    report.findings.extend(daemons(pid)?);
    output.show(&report, || text(&report))?;
    Ok(if report.can_map { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

fn examine() -> Report {
    let kernel = read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".to_owned());
    let probed = uffd::probe();
    let features = probed.as_ref().map_or(0, |(_, features)| *features);
    let access = probed.as_ref().ok().map(|(access, _)| *access);
    let error = probed.as_ref().err().map(|error| format!("{:#}", anyhow::Error::msg(error.to_string())));
    let has = |bit: u64| features & bit != 0;
    let named = |name: &str| FEATURES.iter().find(|f| f.name == name).is_some_and(|f| has(f.bit));
    let needed = ["EVENT_REMOVE", "EVENT_REMAP", "EVENT_UNMAP"];
    let can_map = access.is_some() && needed.iter().all(|name| named(name));

    let findings = vec![
        userfaultfd(access, error),
        kernel_faults(access),
        Finding {
            what: "lazy files in one's own program",
            ok: can_map,
            found: if can_map { "possible".into() } else { "not possible".into() },
            advice: if can_map {
                String::new()
            } else {
                format!("needs userfaultfd with {}", needed.join(", "))
            },
        },
        Finding {
            what: "poison",
            ok: named("POISON"),
            found: if named("POISON") { "a lost page is SIGBUS".into() } else { "not in this kernel".into() },
            advice: if named("POISON") {
                String::new()
            } else {
                "needs Linux 6.6; without it, lost pages of one's own program become inaccessible (SIGSEGV)"
                    .into()
            },
        },
        write_tracking(named("WP_ASYNC")),
        Finding {
            what: "children of restored processes",
            ok: named("EVENT_FORK") && access != Some(Access::UserModeOnly) && is_capable(),
            found: if is_capable() { "CAP_SYS_PTRACE".into() } else { "no CAP_SYS_PTRACE".into() },
            advice: if is_capable() {
                String::new()
            } else {
                "UFFD_FEATURE_EVENT_FORK needs CAP_SYS_PTRACE: run as root or give the program that capability".into()
            },
        },
        huge_pages(named("MISSING_HUGETLBFS")),
        transparent_huge_pages(),
        mount(&kernel),
    ];
    let features = FEATURES
        .iter()
        .map(|f| FeatureFound {
            name: f.name,
            available: has(f.bit),
            since: f.since,
            used_for: used_for(f.bit),
        })
        .collect();
    Report { kernel, can_map, findings, features }
}

/// Returns the use that postcopy makes of a feature.
fn used_for(bit: u64) -> &'static str {
    match bit {
        uffd::PAGEFAULT_FLAG_WP | uffd::WP_ASYNC => "tracking written pages, if asked for",
        uffd::EVENT_FORK => "serving the children of another process; needs CAP_SYS_PTRACE",
        uffd::EVENT_REMAP => "serving memory at its new address after mremap",
        uffd::EVENT_REMOVE => "keeping memory removed after madvise",
        uffd::MISSING_HUGETLBFS => "serving huge pages of another process",
        uffd::MISSING_SHMEM => "serving shared memory of another process",
        uffd::EVENT_UNMAP => "dropping unmapped memory from a session",
        uffd::WP_HUGETLBFS_SHMEM => "tracking written pages in private memory of huge pages and of files",
        uffd::POISON => "SIGBUS for a lost page, never a silent zero",
        _ => "not used",
    }
}

fn userfaultfd(access: Option<Access>, error: Option<String>) -> Finding {
    let found = match access {
        Some(Access::Syscall) => "by userfaultfd(2)".to_owned(),
        Some(Access::Device) => "from /dev/userfaultfd".to_owned(),
        Some(Access::UserModeOnly) => "by userfaultfd(2), user-mode faults only".to_owned(),
        None => error.unwrap_or_default(),
    };
    let advice = match access {
        Some(_) => String::new(),
        None => {
            "the kernel needs CONFIG_USERFAULTFD; a container's seccomp profile must allow userfaultfd(2) \
                 (Docker's default does not) or give it the device /dev/userfaultfd"
                .to_owned()
        }
    };
    Finding { what: "userfaultfd", ok: access.is_some(), found, advice }
}

fn kernel_faults(access: Option<Access>) -> Finding {
    let sysctl = read("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_else(|| "absent".to_owned());
    let ok = matches!(access, Some(Access::Syscall | Access::Device));
    let advice = if ok {
        String::new()
    } else {
        "read(2) and similar calls on absent memory fail with EFAULT: access the memory first. To serve them, too: run as root, \
         or allow the user to open /dev/userfaultfd (Linux 6.1), or set the sysctl vm.unprivileged_userfaultfd=1"
            .to_owned()
    };
    let found = if ok { "served".to_owned() } else { "not served".to_owned() };
    Finding {
        what: "faults of the kernel on a program's behalf",
        ok,
        found: format!("{found} (vm.unprivileged_userfaultfd is {sysctl})"),
        advice,
    }
}

fn write_tracking(wp_async: bool) -> Finding {
    let scan = uffd::pagemap_scan_works();
    let ok = wp_async && scan;
    Finding {
        what: "write tracking",
        ok,
        found: format!(
            "WP_ASYNC {}, PAGEMAP_SCAN {}",
            if wp_async { "yes" } else { "no" },
            if scan { "yes" } else { "no" }
        ),
        advice: if ok {
            String::new()
        } else {
            "both need Linux 6.7; without them a session cannot list changed pages".into()
        },
    }
}

fn huge_pages(feature: bool) -> Finding {
    let meminfo = read("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = meminfo.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    let (total, free) = (field("HugePages_Total:").unwrap_or(0), field("HugePages_Free:").unwrap_or(0));
    let advice = match (feature, total) {
        (false, _) => "MISSING_HUGETLBFS needs Linux 4.11 with CONFIG_HUGETLBFS",
        (true, 0) => {
            "none are reserved; sysctl vm.nr_hugepages=N reserves N of 2 MiB (only guests on huge pages need them)"
        }
        _ => "",
    };
    Finding {
        what: "hugetlb pages of 2 MiB",
        ok: feature && total > 0,
        found: format!("{free} of {total} free"),
        advice: advice.to_owned(),
    }
}

fn transparent_huge_pages() -> Finding {
    let setting = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_else(|| "absent".to_owned());
    Finding { what: "transparent huge pages", ok: true, found: setting, advice: String::new() }
}

/// Returns the finding about `postcopy mount`. No file tells if the kernel sends requests again,
/// so this looks at its version.
fn mount(kernel: &str) -> Finding {
    let has_device = std::path::Path::new("/dev/fuse").exists();
    let is_root = rustix::process::geteuid().is_root();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has_program = std::env::split_paths(&path).any(|folder| folder.join("fusermount3").exists());
    let mut version = kernel.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    let resends = (version.next(), version.next()) >= (Some(6), Some(9));
    let advice = match (has_device, is_root || has_program, resends) {
        (false, ..) => "needs /dev/fuse (CONFIG_FUSE_FS); a container must be given the device",
        (_, false, _) => "users that are not root mount by fusermount3 (package fuse3)",
        (.., false) => "before Linux 6.9, reads that a killed worker had not answered are EIO",
        _ => "",
    };
    Finding {
        what: "images as files (postcopy mount)",
        ok: has_device && (is_root || has_program),
        found: if has_device { "/dev/fuse".into() } else { "no /dev/fuse".into() },
        advice: advice.to_owned(),
    }
}

/// Returns the findings for a daemon that this shell would start.
///
/// # Errors
/// As [`surroundings::is_outside_of`].
fn daemons(pid: Option<u32>) -> Result<Vec<Finding>> {
    let outside = pid.map(surroundings::is_outside_of).transpose()?.unwrap_or_default();
    let finding = |found: surroundings::Finding| {
        let advice = if found.is_good { "" } else { found.advice };
        Finding { what: found.what, ok: found.is_good, found: found.text, advice: advice.to_owned() }
    };
    // This process ends soon, so the protections that it gives itself show those that a daemon
    // would get.
    Ok(surroundings::prepare().into_iter().chain(outside).map(finding).collect())
}

fn is_capable() -> bool {
    const CAP_SYS_PTRACE: u32 = 19;
    let status = read("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    bits >> CAP_SYS_PTRACE & 1 == 1
}

fn text(report: &Report) -> String {
    let mut text = format!("Linux {}\n", report.kernel);
    for finding in &report.findings {
        let mark = if finding.ok { "ok " } else { "-- " };
        let _ = writeln!(text, "{mark} {:<43} {}", finding.what, finding.found);
        if !finding.advice.is_empty() {
            let _ = writeln!(text, "      {}", finding.advice);
        }
    }
    let verdict = if report.can_map { "can" } else { "cannot" };
    let _ = writeln!(text, "Files of images {verdict} be mapped lazily here.");
    text += "Features of userfaultfd:\n";
    for feature in &report.features {
        let mark = if feature.available { "ok " } else { "-- " };
        let _ = writeln!(text, "{mark} {:<20} since {:<5} {}", feature.name, feature.since, feature.used_for);
    }
    text
}
