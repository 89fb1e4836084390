//! The listing of a store with 100,000 references to as many images.

use crate::Figure;
use anyhow::{Context, Result, ensure};
use postcopy::proto::digest::Digest;
use postcopy::proto::manifest::{ChunkContent, ManifestBuilder};
use postcopy::proto::page::ChunkSize;
use postcopy::proto::path::ImagePath;
use postcopy::proto::v1::image_service_client::ImageServiceClient;
use postcopy::proto::v1::{ListImagesRequest, StoredReference};
use postcopy_tests::cli::postcopy;
use postcopy_tests::server::Server;
use postcopy_tests::store::StoreDir;
use prost::Message;
use serde_json::json;
use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

const REFERENCES: usize = 100_000;

pub(crate) fn measure() -> Result<Vec<Figure>> {
    let names: fn(usize) -> (String, String) = |n| (format!("app-{n:06}"), "latest".to_owned());
    let tags: fn(usize) -> (String, String) = |n| ("app".to_owned(), format!("v{n:06}"));
    let deep: fn(usize) -> (String, String) = |n| {
        (format!("team-{}/app-{}/part-{}", n % 10, n / 10 % 100, n / 1000 % 10), format!("v{}", n / 10_000))
    };
    [("names", names), ("tags of one name", tags), ("names of three parts with 10 tags each", deep)]
        .into_iter()
        .map(|(layout, reference)| list(layout, reference))
        .collect()
}

fn list(layout: &str, reference: fn(usize) -> (String, String)) -> Result<Figure> {
    let server = Server::start();
    let store = StoreDir::of(&server);
    for n in 0..REFERENCES {
        let image = write_image(&store, n)?;
        let (name, tag) = reference(n);
        let path = store.reference(&name, &tag);
        fs::create_dir_all(path.parent().context("a tag lies in a directory")?)?;
        let reference = StoredReference { image: image.into(), provenance: None };
        fs::write(path, reference.encode_to_vec())?;
    }
    let first = first_page(&server)?;
    let started = Instant::now();
    let listed = postcopy(server.address(), ["ls"]).stderr(Stdio::inherit()).output()?;
    let all = started.elapsed();
    ensure!(listed.status.success(), "ls: {}", listed.status);
    let lines = listed.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
    ensure!(lines == REFERENCES + 1, "{lines} lines");
    let kib = peak_kib(&server)?;
    let (first_ms, all_s) = (first.as_secs_f64() * 1000.0, all.as_secs_f64());
    Ok(Figure {
        name: format!("{REFERENCES} references: {layout}"),
        value: format!("first page **{first_ms:.0} ms**, `ls` **{all_s:.2} s**, {} MiB of server", kib >> 10),
        bar: "≤ 50 ms, ≤ 2 s".to_owned(),
        met: first_ms <= 50.0 && all_s <= 2.0,
        raw: json!({ "first_page_ms": first_ms, "all_seconds": all_s, "server_peak_kib": kib }),
    })
}

/// Writes an image of one file of zeros, whose name contains the number. Returns its digest.
fn write_image(store: &StoreDir, number: usize) -> Result<Digest> {
    let mut manifest = ManifestBuilder::new(ChunkSize::MIN);
    manifest.file(&ImagePath::try_from(format!("mem-{number}").as_bytes())?, 4096, false);
    manifest.chunk(ChunkContent::Zero);
    let manifest = manifest.finish()?;
    let image = manifest.root.image();
    fs::write(store.manifest(&image), &manifest.root_bytes)?;
    Ok(image)
}

/// Returns the time of the first page, right after the references were written.
fn first_page(server: &Server) -> Result<Duration> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut images = ImageServiceClient::connect(server.address().to_string()).await?;
        let started = Instant::now();
        let page = images.list_images(ListImagesRequest::default()).await?.into_inner();
        ensure!(page.images.len() == 1000, "{} references", page.images.len());
        Ok(started.elapsed())
    })
}

/// Returns the most memory that the server has had resident.
fn peak_kib(server: &Server) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid()))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(peak.trim().trim_end_matches(" kB").parse()?)
}
