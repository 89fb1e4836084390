//! The commands for whole images: push, pull, verify, list, inspect, remove, tag.

use super::interrupts;
use super::origin::{self, Restorer};
use super::output::{self, Advised, INSPECT, Output, bytes, complain, counted, printable, time};
use crate::daemon::criu;
use anyhow::{Context, Result, bail, ensure};
use globset::{Glob, GlobBuilder, GlobSet, GlobSetBuilder};
use indicatif::{ProgressBar, ProgressStyle};
use postcopy::proto::digest::Digest;
use postcopy::proto::manifest::EntryKind;
use postcopy::proto::path::ImagePath;
use postcopy::proto::provenance::Provenance;
use postcopy::proto::reference::{Reference, TagReference};
use postcopy::proto::v1;
use postcopy::pull::{self, PullReport, Pulling};
use postcopy::push::{self, PushOptions};
use postcopy::{Image, Patience, Remote, RemoteError, ServerAddress};
use serde::Serialize;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write;
use std::future::Future;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

/// Connects, and runs `work` on all cores.
pub(super) fn with_remote<T, W: Future<Output = Result<T>>>(
    server: ServerAddress,
    work: impl FnOnce(Remote) -> W,
) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("a runtime")?;
    runtime.block_on(async { work(Remote::connect(server).await?).await })
}

/// Returns the digest that a server has sent.
///
/// # Errors
/// It is none.
pub(super) fn digest(remote: &Remote, bytes: &[u8]) -> Result<Digest, RemoteError> {
    Digest::try_from(bytes).map_err(|reason| remote.wrong("digest", reason))
}

pub(crate) fn push(
    server: ServerAddress,
    path: &Path,
    reference: &TagReference,
    options: PushOptions,
    output: Output,
) -> Result<ExitCode> {
    let unpacked = super::archive::unpack(path)?;
    // Unpacking turns holes into zeros.
    ensure!(
        unpacked.is_none() || options.base.is_none(),
        "{}: an archive does not tell holes from zeros, so it cannot be pushed over a base. Push the directory \
         that was packed",
        path.display()
    );
    let path = unpacked.as_ref().map_or(path, TempDir::path);
    criu::ensure_whole(path)?;
    // The bar draws nothing if stderr is not a terminal.
    let bar = if output.json { ProgressBar::hidden() } else { ProgressBar::new(0) };
    let style = "{bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
    let on_progress = {
        let bar = bar.clone();
        Arc::new(move |done, all| {
            bar.set_length(all);
            bar.set_position(done);
        })
    };
    let pushed = with_remote(server, |remote| async move {
        Ok(push::push(&remote, path, reference, options, on_progress).await?)
    });
    bar.finish_and_clear();
    let report = pushed?;

    #[derive(Serialize)]
    struct Pushed {
        reference: String,
        image: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        base: Option<String>,
        size_bytes: u64,
        zero_bytes: u64,
        base_bytes: u64,
        deduplicated_bytes: u64,
        sent_bytes: u64,
        pack_bytes: u64,
        ratio: f64,
        seconds: f64,
    }
    let pushed = Pushed {
        reference: reference.to_string(),
        image: report.image.to_string(),
        base: report.base.as_ref().map(ToString::to_string),
        size_bytes: report.size_bytes,
        zero_bytes: report.zero_bytes,
        base_bytes: report.base_bytes,
        deduplicated_bytes: report.deduplicated_bytes,
        sent_bytes: report.sent_bytes,
        pack_bytes: report.pack_bytes,
        ratio: report.ratio(),
        seconds: report.elapsed.as_secs_f64(),
    };
    let sent = match report.sent_bytes {
        0 => "nothing: the server had all chunks already".to_owned(),
        sent => format!("{} as {} ({:.2} : 1)", bytes(sent), bytes(report.pack_bytes), report.ratio()),
    };
    let base = match report.base {
        Some(base) => format!("\n  as in base   {}, of {base}", bytes(report.base_bytes)),
        None => String::new(),
    };
    output.show(&pushed, || {
        format!(
            "{reference} is {}\n  size         {}\n  zero         {}{base}\n  deduplicated {}\n  sent         {sent}\n  time         {}",
            report.image,
            bytes(report.size_bytes),
            bytes(report.zero_bytes),
            bytes(report.deduplicated_bytes),
            time(report.elapsed),
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Amounts of memory in CRIU's images that `criu restore` reads itself.
#[derive(Clone, Copy, Debug, Serialize)]
struct NotLazy {
    /// Bytes of the shared memory in pagemap-shmem-*.img.
    shared_bytes: u64,
    private_bytes: u64,
    /// Bytes of files that the pull has written: these amounts, and all but the pages.
    written_bytes: u64,
}

fn show_pulled(
    output: Output,
    what: &str,
    report: &PullReport,
    not_lazy: Option<NotLazy>,
) -> Result<ExitCode> {
    #[derive(Serialize)]
    struct Pulled {
        image: String,
        entries: usize,
        size_bytes: u64,
        chunks: u64,
        frame_bytes: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        not_lazy: Option<NotLazy>,
    }
    let pulled = Pulled {
        image: report.image.to_string(),
        entries: report.entries,
        size_bytes: report.size_bytes,
        chunks: report.chunks,
        frame_bytes: report.frame_bytes,
        not_lazy,
    };
    output.show(&pulled, || {
        let PullReport { image, entries, size_bytes, chunks, frame_bytes } = report;
        let size = bytes(*size_bytes);
        let size = not_lazy.map_or(size.clone(), |part| format!("{} of {size}", bytes(part.written_bytes)));
        let not_lazy = not_lazy.map_or(String::new(), |NotLazy { shared_bytes, private_bytes, .. }| {
            let shared = match shared_bytes {
                0 => String::new(),
                _ => format!(
                    "{} of shared memory (pagemap-shmem-*.img; CRIU restores no shared memory lazily) and ",
                    bytes(shared_bytes)
                ),
            };
            format!(
                "\n  not lazy: {shared}{} of private memory; the daemon fetches the rest",
                bytes(private_bytes)
            )
        });
        format!(
            "{what}: {image}, {}, {size}, {} verified, {} over the wire{not_lazy}",
            counted(*entries as u64, "entry", "entries"),
            counted(*chunks, "chunk", "chunks"),
            bytes(*frame_bytes)
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The part of an image to pull.
#[derive(Debug)]
pub(crate) enum Part {
    All,
    /// The files whose paths match, and the patterns as the user wrote them.
    Only(GlobSet, String),
    /// CRIU's images without the lazy memory.
    Criu,
}

impl Part {
    pub(crate) fn of(globs: Vec<Glob>) -> Result<Self> {
        if globs.is_empty() {
            return Ok(Self::All);
        }
        let shown = globs.iter().map(|glob| format!("'{glob}'")).collect::<Vec<_>>().join(" or ");
        let mut only = GlobSetBuilder::new();
        for glob in globs {
            // Each glob keeps its meaning, except that `*` does not match a `/`.
            only.add(GlobBuilder::new(glob.glob()).literal_separator(true).build()?);
        }
        Ok(Self::Only(only.build()?, shown))
    }
}

/// Returns the bytes in these extents.
fn length(extents: &[(ImagePath, Range<u64>)]) -> u64 {
    extents.iter().map(|(_, bytes)| bytes.end - bytes.start).sum()
}

async fn pull_part(
    remote: &Remote,
    reference: &Reference,
    directory: &Path,
    part: &Part,
    expected: Option<&Digest>,
) -> Result<(PullReport, Option<NotLazy>, String)> {
    let is_wanted = |path: &ImagePath| match part {
        Part::Only(globs, _) => globs.is_match(OsStr::from_bytes(path.as_bytes())),
        Part::All | Part::Criu => true,
    };
    let mut pulling = Pulling::begin(remote, reference, directory, is_wanted).await?;
    origin::ensure_expected(reference, pulling.image(), expected)?;
    let age = origin::age(pulling.image().provenance());
    if !matches!(part, Part::Criu) {
        let all = pulling.extents_of(|_| true);
        if let Part::Only(_, globs) = part
            && all.is_empty()
        {
            let text = format!("no file of {reference} matches {globs} (--only)");
            return Err(Advised { text, next: INSPECT }.into());
        }
        pulling.fetch(all).await?;
        return Ok((pulling.finish()?, None, age));
    }
    origin::ensure_fits(reference, pulling.image(), Restorer::Criu)?;
    let prefix = criu::prefix_in(pulling.image(), &reference.to_string())?;
    // `criu restore` and the daemon write their logs and sockets into this directory.
    if let Some(link) = pulling.link_that_leads_out(|path| path.to_string().starts_with(&prefix))? {
        bail!(
            "{link} is a symbolic link that leads out of {reference}. Pull it without --criu to look into it"
        );
    }
    let is_pages = |path: &ImagePath| {
        let path = path.to_string();
        let name = path.rsplit('/').next().unwrap_or_default();
        path.starts_with(&prefix) && name.starts_with("pages-") && name.ends_with(".img")
    };
    let rest = pulling.extents_of(|path| !is_pages(path));
    let mut written_bytes = length(&rest);
    pulling.fetch(rest).await?;
    let directory = pulling.directory().directory(Path::new(&prefix)).with_context(|| prefix.clone())?;
    let dump = criu::Dump::read(&directory, Path::new(&prefix))?;
    let eager = dump.eager().map(|(file, bytes)| {
        let path = [prefix.as_bytes(), file.as_os_str().as_bytes()].concat();
        Ok((ImagePath::try_from(&path[..])?, bytes))
    });
    let eager = eager.collect::<Result<Vec<_>>>()?;
    written_bytes += length(&eager);
    pulling.fetch(eager).await?;
    let (shared_bytes, private_bytes) = dump.not_lazy_bytes();
    Ok((pulling.finish()?, Some(NotLazy { shared_bytes, private_bytes, written_bytes }), age))
}

pub(crate) fn pull(
    server: ServerAddress,
    reference: &Reference,
    directory: &Path,
    part: Part,
    expected: Option<&Digest>,
    output: Output,
) -> Result<ExitCode> {
    let part = &part;
    // Before the runtime starts its threads, which inherit the mask.
    let interrupted = interrupts::watch()?;
    let pulled = with_remote(server, |remote| async move {
        tokio::select! {
            pulled = pull_part(&remote, reference, directory, part, expected) => pulled,
            // The drop of the pull removes the files that it has written.
            signal = interrupted => {
                let signal = signal.map_or("a signal", |signal| signal.as_str());
                Err(anyhow::anyhow!("the pull was interrupted by {signal}; {} is unchanged", directory.display()))
            }
        }
    });
    let (report, not_lazy, age) = pulled?;
    show_pulled(output, &format!("{reference} -> {}{age}", directory.display()), &report, not_lazy)
}

pub(crate) fn verify(server: ServerAddress, reference: &Reference, output: Output) -> Result<ExitCode> {
    let verified = with_remote(server, |remote| async move { Ok(pull::verify(&remote, reference).await?) });
    if let Err(error) = &verified
        && let Some(pull::PullError::Damaged(damaged)) = error.downcast_ref()
    {
        // The error itself names the first one.
        for damage in &damaged[1..] {
            let (path, reason) = (printable(&damage.path.to_string()), printable(&damage.reason));
            complain(&format!("{path} chunk {}: {reason}", damage.chunk));
        }
    }
    show_pulled(output, &format!("{reference} is sound"), &verified?, None)
}

#[derive(Serialize)]
struct Summary {
    reference: String,
    image: String,
    size_bytes: u64,
    files: u32,
    chunk_size_bytes: u32,
    #[serde(skip_serializing_if = "String::is_empty")]
    damage: String,
    /// The time of the push, as RFC 3339 has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pushed: Option<String>,
    /// The image that the reference stood for before.
    #[serde(skip_serializing_if = "Option::is_none")]
    previous: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
}

impl Summary {
    fn of(remote: &Remote, image: v1::ImageSummary) -> Result<Self, RemoteError> {
        let provenance = image.provenance.map(Provenance::try_from).transpose();
        let provenance = provenance.map_err(|e| remote.wrong("provenance", e))?.unwrap_or_default();
        // A time after the year 9999 has no such text.
        let latest = SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_799);
        let pushed = provenance.written.filter(|written| *written <= latest);
        Ok(Self {
            pushed: pushed.map(|written| humantime::format_rfc3339_seconds(written).to_string()),
            previous: provenance.previous.map(|image| image.to_string()),
            labels: provenance.labels.iter().map(|(key, value)| (key.into(), value.into())).collect(),
            image: match &image.image[..] {
                // Of a damaged reference the server may not know the image.
                [] if !image.damage.is_empty() => String::new(),
                bytes => digest(remote, bytes)?.to_string(),
            },
            reference: image.reference,
            size_bytes: image.size_bytes,
            files: image.files,
            chunk_size_bytes: image.chunk_size_bytes,
            damage: image.damage,
        })
    }
}

/// Prints the references page by page: a server may have more than fit into memory.
pub(crate) fn list(server: ServerAddress, output: Output) -> Result<ExitCode> {
    with_remote(server, |remote| async move {
        let mut listing = Listing::new(output);
        let mut page_token = String::new();
        loop {
            let request = v1::ListImagesRequest { page_size: 0, page_token };
            let ask = || {
                let (mut images, request) = (remote.images(), request.clone());
                async move { images.list_images(request).await }
            };
            let page = remote.ask("listing the images", Patience::Short, ask).await?;
            page_token = page.next_page_token;
            let is_last = page_token.is_empty();
            if page.images.is_empty() && !is_last {
                return Err(remote.wrong("page of images", "it is empty, and not the last one").into());
            }
            let images = page.images.into_iter().map(|image| Summary::of(&remote, image));
            let images = images.collect::<Result<Vec<_>, _>>()?;
            // The order bounds the number of pages, and shows a page that was sent before.
            let names = listing.last.iter().chain(images.iter().map(|image| &image.reference));
            if !names.is_sorted_by(|a, b| a < b) {
                return Err(remote.wrong("page of images", "its references do not ascend").into());
            }
            if !listing.print(images, is_last)? || is_last {
                return Ok(if listing.damaged { ExitCode::FAILURE } else { ExitCode::SUCCESS });
            }
        }
    })
}

/// The output of a list of images, page by page.
#[derive(Debug)]
struct Listing {
    output: Output,
    /// The last reference of the pages that were printed.
    last: Option<String>,
    damaged: bool,
}

impl Listing {
    fn new(output: Output) -> Self {
        Self { output, last: None, damaged: false }
    }

    /// Prints a page. Returns false if the reader of the output has gone.
    fn print(&mut self, images: Vec<Summary>, is_last: bool) -> Result<bool> {
        self.damaged |= images.iter().any(|image| !image.damage.is_empty());
        let text = if self.output.json { self.json(&images, is_last)? } else { self.text(&images) };
        if let Some(image) = images.into_iter().next_back() {
            self.last = Some(image.reference);
        }
        Ok(text.is_empty() || output::is_printed(&text)?)
    }

    /// Returns a part of a JSON array.
    fn json(&self, images: &[Summary], is_last: bool) -> Result<String> {
        let mut text = String::from(if self.last.is_none() { "[" } else { "" });
        for (n, image) in images.iter().enumerate() {
            text += if self.last.is_none() && n == 0 { "\n" } else { ",\n" };
            text += &serde_json::to_string_pretty(image)?;
        }
        text += if is_last { "\n]" } else { "" };
        Ok(text)
    }

    fn text(&self, images: &[Summary]) -> String {
        let is_first = self.last.is_none();
        if images.is_empty() {
            let none = "no images yet: `postcopy push PATH NAME` stores one";
            return if is_first { none.to_owned() } else { String::new() };
        }
        let references: Vec<_> = images.iter().map(|image| printable(&image.reference)).collect();
        let width = references.iter().map(String::len).max().unwrap_or(0).max(9);
        let mut text = String::new();
        if is_first {
            let _ = writeln!(
                text,
                "{:width$}  {:>12}  {:>6}  {:>10}  IMAGE",
                "REFERENCE", "SIZE", "FILES", "CHUNK"
            );
        }
        for (image, reference) in images.iter().zip(references) {
            let (size, chunk) = (bytes(image.size_bytes), bytes(u64::from(image.chunk_size_bytes)));
            let rest = if image.damage.is_empty() { image.image.clone() } else { printable(&image.damage) };
            let _ = writeln!(text, "{reference:width$}  {size:>12}  {:>6}  {chunk:>10}  {rest}", image.files);
        }
        text
    }
}

/// Returns what the server says of an image, and the image, whose root was verified.
async fn looked_up(remote: &Remote, reference: &Reference) -> Result<(v1::GetImageResponse, Arc<Image>)> {
    let (image, _) = remote.open(reference, &[], false).await?;
    let request = v1::GetImageRequest { reference: reference.to_string() };
    let ask = || {
        let (mut images, request) = (remote.images(), request.clone());
        async move { images.get_image(request).await }
    };
    let answer = remote.ask(&format!("reading {reference}"), Patience::Short, ask).await?;
    let wrong = |reason: String| Err(remote.wrong(format!("description of {reference}"), reason).into());
    let Some(summary) = &answer.image else { return wrong("it is empty".into()) };
    let (described, root) = (digest(remote, &summary.image)?, image.root());
    if described != image.digest() {
        return wrong(format!("it is that of {described}, and the image is {}", image.digest()));
    }
    let described = (summary.size_bytes, u64::from(summary.files), summary.chunk_size_bytes);
    let expected = (root.size_bytes(), root.files().count() as u64, root.chunk_size().bytes_u32());
    if described != expected {
        return wrong(format!("bytes, files and bytes of a chunk are {described:?} for {expected:?}"));
    }
    let v1::GetImageResponse { chunks, zero_chunks, distinct_chunks, .. } = answer;
    if chunks.checked_add(zero_chunks) != Some(root.chunks()) || distinct_chunks > chunks {
        let reason = format!(
            "{chunks} chunks, {distinct_chunks} distinct, and {zero_chunks} zero of {}",
            root.chunks()
        );
        return wrong(reason);
    }
    Ok((answer, image))
}

pub(crate) fn inspect(server: ServerAddress, reference: &Reference, output: Output) -> Result<ExitCode> {
    let (answer, image, summary) = with_remote(server, |remote| async move {
        let (mut answer, image) = match looked_up(&remote, reference).await {
            // Another push may have moved the reference between the two requests.
            Err(error) if matches!(error.downcast_ref(), Some(RemoteError::Wrong { .. })) => {
                looked_up(&remote, reference).await?
            }
            found => found?,
        };
        let summary = Summary::of(&remote, answer.image.take().unwrap_or_default())?;
        Ok((answer, image, summary))
    })?;

    #[derive(Serialize)]
    struct Entry {
        path: String,
        kind: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        size_bytes: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        target: Option<String>,
    }
    #[derive(Serialize)]
    struct Inspected {
        #[serde(flatten)]
        summary: Summary,
        chunks: u64,
        zero_chunks: u64,
        distinct_chunks: u64,
        stored_bytes: u64,
        entries: Vec<Entry>,
    }
    let entry = |entry: &postcopy::proto::manifest::Entry| {
        let path = entry.path.to_string();
        match &entry.kind {
            EntryKind::File(file) if file.executable => {
                Entry { path, kind: "executable", size_bytes: Some(file.size_bytes), target: None }
            }
            EntryKind::File(file) => {
                Entry { path, kind: "file", size_bytes: Some(file.size_bytes), target: None }
            }
            EntryKind::SymbolicLink(target) => {
                let target = Some(String::from_utf8_lossy(target).into_owned());
                Entry { path, kind: "symbolic link", size_bytes: None, target }
            }
            EntryKind::EmptyDirectory => {
                Entry { path, kind: "empty directory", size_bytes: None, target: None }
            }
        }
    };
    let inspected = Inspected {
        summary,
        chunks: answer.chunks,
        zero_chunks: answer.zero_chunks,
        distinct_chunks: answer.distinct_chunks,
        stored_bytes: answer.stored_bytes,
        entries: image.root().entries().iter().map(entry).collect(),
    };
    output.show(&inspected, || {
        let summary = &inspected.summary;
        let mut text = format!(
            "{} is {}\n  size    {} in {}\n  chunks  {} of {}, {} distinct, {} zero\n  stored  {}\n",
            printable(&summary.reference),
            summary.image,
            bytes(summary.size_bytes),
            counted(summary.files.into(), "file", "files"),
            inspected.chunks + inspected.zero_chunks,
            bytes(u64::from(summary.chunk_size_bytes)),
            inspected.distinct_chunks,
            inspected.zero_chunks,
            bytes(inspected.stored_bytes),
        );
        if let Some(pushed) = &summary.pushed {
            let before =
                summary.previous.as_ref().map_or_else(String::new, |image| format!(", before it {image}"));
            let _ = writeln!(text, "  pushed  {pushed}{before}");
        }
        for (key, value) in &summary.labels {
            let _ = writeln!(text, "  label   {key}={}", printable(value));
        }
        for entry in &inspected.entries {
            let size = entry.size_bytes.map_or_else(|| "-".to_owned(), bytes);
            let target =
                entry.target.as_ref().map_or_else(String::new, |target| format!(" -> {}", printable(target)));
            let _ = writeln!(text, "  {size:>12}  {}{target}", printable(&entry.path));
        }
        text
    })?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Pointed {
    reference: String,
    image: Option<String>,
}

pub(crate) fn remove(server: ServerAddress, reference: &TagReference, output: Output) -> Result<ExitCode> {
    with_remote(server, |remote| async move {
        let request = v1::DeleteImageRequest { reference: reference.to_string() };
        let ask = || {
            let (mut images, request) = (remote.images(), request.clone());
            async move { images.delete_image(request).await }
        };
        remote.ask(&format!("removing {reference}"), Patience::Change, ask).await?;
        Ok(())
    })?;
    let removed = Pointed { reference: reference.to_string(), image: None };
    output.show(&removed, || format!("{reference} is removed"))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn tag(
    server: ServerAddress,
    source: &Reference,
    target: &TagReference,
    output: Output,
) -> Result<ExitCode> {
    let image = with_remote(server, |remote| async move {
        let request = v1::TagImageRequest { source: source.to_string(), target: target.to_string() };
        let ask = || {
            let (mut images, request) = (remote.images(), request.clone());
            async move { images.tag_image(request).await }
        };
        let answer = remote.ask(&format!("tagging {source}"), Patience::Change, ask).await?;
        let image = digest(&remote, &answer.image)?;
        if let Reference::Digest { image: named, .. } = source
            && *named != image
        {
            let reason = format!("it is {image}, to be tagged was {named}");
            return Err(remote.wrong("tagged image", reason).into());
        }
        Ok(image.to_string())
    })?;
    let tagged = Pointed { reference: target.to_string(), image: Some(image.clone()) };
    output.show(&tagged, || format!("{target} is {image}"))?;
    Ok(ExitCode::SUCCESS)
}
