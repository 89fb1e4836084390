//! The server's memory while it serves a large sparse image.

use crate::Figure;
use anyhow::{Context, Result};
use postcopy::proto::page::PAGE_BYTES;
use postcopy::{Options, Session};
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::{noise, sparse};
use postcopy_tests::server::Server;
use serde_json::json;

const BYTES: u64 = 10 << 30;
const ISLANDS: u64 = 2000;
const BAR_MIB: u64 = 150;

pub(crate) fn measure() -> Result<Figure> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mem");
    let island = noise(256 << 10, 11);
    let at = |i: u64| i * (BYTES / ISLANDS) / 4096 * 4096;
    let islands: Vec<_> = (0..ISLANDS).map(|i| (at(i), &island[usize::try_from(i).unwrap_or(0)..])).collect();
    sparse(&path, BYTES, &islands);
    let server = Server::start();
    let _ = run(server.address(), ["push".as_ref(), path.as_os_str(), "mem".as_ref()]);
    let session = Session::open(server.address(), &"mem".parse()?, Options::default())?;
    let region = session.map("mem")?;
    let mut most = 0;
    for i in 0..ISLANDS {
        let offset = usize::try_from(at(i))?;
        anyhow::ensure!(
            region[offset..offset + PAGE_BYTES] == islands[usize::try_from(i)?].1[..PAGE_BYTES],
            "wrong bytes"
        );
        if i % 100 == 0 {
            most = most.max(anonymous_kib(server.pid())?);
        }
    }
    most = most.max(anonymous_kib(server.pid())?);
    Ok(Figure {
        name: "server memory beyond the mapped packs, serving a sparse image of 10 GiB".into(),
        value: format!("**{} MiB**", most >> 10),
        bar: format!("< {BAR_MIB} MiB"),
        met: most >> 10 < BAR_MIB,
        raw: json!({ "kib": most }),
    })
}

fn anonymous_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
