//! `postcopy working-set`: lists, draws, sends and removes working sets.

use super::heat_map::HeatMap;
use super::images::{digest, with_remote};
use super::output::{Advised, LIST_SETS, Output, RECORD, bytes, counted};
use crate::daemon::{ask_to_record, runtime_dir};
use anyhow::{Context, Result};
use clap::Subcommand;
use postcopy::proto::page::PAGE_BYTES;
use postcopy::proto::reference::Reference;
use postcopy::proto::v1;
use postcopy::{Patience, Remote, RemoteError, ServerAddress};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Subcommand)]
pub(crate) enum WorkingSetCommand {
    /// List the working sets that the server has
    #[command(after_help = "Example:\n  postcopy working-set ls")]
    Ls,
    /// Draw the prefetched pages of an image's files, and their order
    #[command(after_help = "Example:\n  postcopy working-set show vm/web:v1 --svg web.svg")]
    Show {
        /// name, name:tag or name@blake3:…
        reference: Reference,
        /// Draw also into this SVG file; replaces an existing file
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
    /// Send the recordings of processes or microVMs that are restored with --record to the server
    #[command(after_help = "Example:\n  postcopy working-set send 4711")]
    Send {
        /// Process ids; processes that these have forked are included
        #[arg(required = true, value_parser = super::pid)]
        pids: Vec<u32>,
        /// The daemon's --runtime-dir [default: that of the daemons]
        #[arg(long, value_name = "DIR", env = "POSTCOPY_RUNTIME_DIR")]
        runtime_dir: Option<PathBuf>,
    },
    /// Remove an image's working set and its recordings
    #[command(after_help = "Example:\n  postcopy working-set rm vm/web:v1")]
    Rm {
        /// name, name:tag or name@blake3:…
        reference: Reference,
    },
}

#[derive(Debug, Serialize)]
struct Shown {
    image: String,
    recordings: u32,
    pages: u64,
    zero_pages: u64,
    plain_bytes: u64,
    frame_bytes: u64,
}

impl Shown {
    fn of(remote: &Remote, set: &v1::WorkingSet) -> Result<Self, RemoteError> {
        let plain_bytes = set.pages.checked_mul(PAGE_BYTES as u64);
        let plain_bytes = plain_bytes.filter(|_| set.zero_pages <= set.pages).ok_or_else(|| {
            remote.wrong("working set", format!("{} pages, {} of zeros", set.pages, set.zero_pages))
        })?;
        Ok(Self {
            image: digest(remote, &set.image)?.to_string(),
            recordings: set.recordings,
            pages: set.pages,
            zero_pages: set.zero_pages,
            plain_bytes,
            frame_bytes: set.frame_bytes,
        })
    }

    fn text(&self) -> String {
        format!(
            "{}  {} as {}, of {}",
            self.image,
            bytes(self.plain_bytes),
            bytes(self.frame_bytes),
            counted(self.recordings.into(), "recording", "recordings")
        )
    }
}

pub(crate) fn run(server: ServerAddress, command: WorkingSetCommand, output: Output) -> Result<ExitCode> {
    match command {
        WorkingSetCommand::Ls => list(server, output)?,
        WorkingSetCommand::Show { reference, svg } => show(server, &reference, svg, output)?,
        WorkingSetCommand::Send { pids, runtime_dir } => {
            let root = runtime_dir.unwrap_or_else(runtime_dir::default_root);
            pids.iter().try_for_each(|pid| ask_to_record(&root, *pid))?;
        }
        WorkingSetCommand::Rm { reference } => with_remote(server, |remote| async move {
            let request = v1::DeleteWorkingSetRequest { reference: reference.to_string() };
            let ask = || {
                let (mut sets, request) = (remote.working_sets(), request.clone());
                async move { sets.delete_working_set(request).await }
            };
            let removed = remote.ask(&what(&reference), Patience::Change, ask).await;
            removed.map_err(|error| lacks(error, LIST_SETS))?;
            Ok(())
        })?,
    }
    Ok(ExitCode::SUCCESS)
}

fn what(reference: &Reference) -> String {
    format!("the working set of {reference}")
}

/// Returns the error of a request for an image's working set. `next` is the step after the error
/// that the server lacks it.
fn lacks(error: RemoteError, next: &'static str) -> anyhow::Error {
    match error.is_not_found() {
        true => Advised { text: error.to_string(), next }.into(),
        false => error.into(),
    }
}

fn list(server: ServerAddress, output: Output) -> Result<()> {
    let shown = with_remote(server, |remote| async move {
        let ask = || {
            let mut sets = remote.working_sets();
            async move { sets.list_working_sets(v1::ListWorkingSetsRequest {}).await }
        };
        let listed = remote.ask("listing the working sets", Patience::Short, ask).await?;
        let shown = listed.working_sets.iter().map(|set| Shown::of(&remote, set));
        Ok(shown.collect::<Result<Vec<_>, _>>()?)
    })?;
    let text = || match shown.is_empty() {
        true => "no working sets yet: record a restore (--record)".to_owned(),
        false => shown.iter().map(|set| set.text() + "\n").collect(),
    };
    output.show(&shown, text)
}

fn show(server: ServerAddress, reference: &Reference, svg: Option<PathBuf>, output: Output) -> Result<()> {
    let (shown, spans, files) = with_remote(server, |remote| async move {
        let (image, _) = remote.open(reference, &[], false).await?;
        let files: Vec<_> =
            image.root().files().map(|(path, file)| (path.to_string(), file.size_bytes)).collect();
        let pages_of = |bytes: u64| bytes.div_ceil(PAGE_BYTES as u64);
        let pages: u64 = files.iter().map(|(_, bytes)| pages_of(*bytes)).sum();
        let wrong = |reason: &str| remote.wrong("working set", reason);
        let request = v1::GetWorkingSetRequest { reference: reference.to_string() };
        let lacks = |error| lacks(error, RECORD);
        let ask = || {
            let (mut sets, request) = (remote.working_sets(), request.clone());
            async move { sets.get_working_set(request).await }
        };
        let mut parts = remote.ask(&what(reference), Patience::Short, ask).await.map_err(lacks)?;
        let (mut set, mut spans, mut listed) = (None, Vec::new(), 0_u64);
        while let Some(part) = remote.next_of(&what(reference), &mut parts).await.map_err(lacks)? {
            if part.pages.is_empty() && (set.is_some() || part.working_set.is_none()) {
                return Err(wrong("a part of it is empty").into());
            }
            for span in &part.pages {
                let file = files.get(span.file as usize).map_or(0, |(_, bytes)| pages_of(*bytes));
                if span.count == 0 || u64::from(span.first) + u64::from(span.count) > file {
                    return Err(wrong("it has pages beyond the image's files").into());
                }
                listed += u64::from(span.count);
            }
            set = set.or(part.working_set);
            spans.extend(part.pages);
            if listed > pages {
                return Err(wrong("it lists more pages than the image has").into());
            }
        }
        let set = set.ok_or_else(|| wrong("it lacks its description"))?;
        let shown = Shown::of(&remote, &set)?;
        if shown.image != image.digest().to_string() {
            return Err(wrong("it is that of another image").into());
        }
        Ok((shown, spans, files))
    })?;
    let map = HeatMap::new(&files, &spans, "not in the set");
    if let Some(path) = svg {
        std::fs::write(&path, map.svg()).with_context(|| path.display().to_string())?;
    }
    output.show(&shown, || format!("{}\n{}", shown.text(), map.text()))
}
