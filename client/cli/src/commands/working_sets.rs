//! `postcopy working-set`: lists, draws, sends and removes working sets.

use super::heat_map::HeatMap;
use super::images::{digest, with_remote};
use super::output::{Advised, LIST_SETS, Output, RECORD, bytes, counted};
use crate::daemon::{ask_to_record, runtime_dir};
use anyhow::{Context, Result, ensure};
use clap::Subcommand;
use postcopy::proto::page::PAGE_BYTES;
use postcopy::proto::reference::Reference;
use postcopy::proto::v1;
use postcopy::{Remote, RemoteError, ServerAddress};
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

impl From<&v1::WorkingSet> for Shown {
    fn from(set: &v1::WorkingSet) -> Self {
        Self {
            image: digest(&set.image),
            recordings: set.recordings,
            pages: set.pages,
            zero_pages: set.zero_pages,
            plain_bytes: set.pages.saturating_mul(PAGE_BYTES as u64),
            frame_bytes: set.frame_bytes,
        }
    }
}

impl Shown {
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
            let answer = remote.working_sets().delete_working_set(request).await;
            answer.map_err(|status| lacks(&remote, &reference, status, LIST_SETS))?;
            Ok(())
        })?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the error of a request for an image's working set. `next` is the step after the error
/// that the server lacks it.
fn lacks(remote: &Remote, reference: &Reference, status: tonic::Status, next: &'static str) -> anyhow::Error {
    let error: RemoteError = remote.failed(format!("the working set of {reference}"))(status);
    match error.is_not_found() {
        true => Advised { text: error.to_string(), next }.into(),
        false => error.into(),
    }
}

fn list(server: ServerAddress, output: Output) -> Result<()> {
    let sets = with_remote(server, |remote| async move {
        let listed = remote.working_sets().list_working_sets(v1::ListWorkingSetsRequest {}).await;
        Ok(listed.map_err(remote.failed("listing the working sets"))?.into_inner().working_sets)
    })?;
    let shown: Vec<Shown> = sets.iter().map(Shown::from).collect();
    let text = || match shown.is_empty() {
        true => "no working sets yet: record a restore (--record)".to_owned(),
        false => shown.iter().map(|set| set.text() + "\n").collect(),
    };
    output.show(&shown, text)
}

fn show(server: ServerAddress, reference: &Reference, svg: Option<PathBuf>, output: Output) -> Result<()> {
    let (set, spans, files) = with_remote(server, |remote| async move {
        let (image, _) = remote.open(reference, &[], false).await?;
        let files: Vec<_> =
            image.root().files().map(|(path, file)| (path.to_string(), file.size_bytes)).collect();
        let pages: u64 = files.iter().map(|(_, bytes)| bytes.div_ceil(PAGE_BYTES as u64)).sum();
        let request = v1::GetWorkingSetRequest { reference: reference.to_string() };
        let failed = |status| lacks(&remote, reference, status, RECORD);
        let mut parts = remote.working_sets().get_working_set(request).await.map_err(failed)?.into_inner();
        let (mut set, mut spans) = (None, Vec::new());
        while let Some(part) = parts.message().await.map_err(failed)? {
            set = set.or(part.working_set);
            spans.extend(part.pages);
            ensure!(spans.len() as u64 <= pages, "the server lists more pages than the image has");
        }
        Ok((set.context("the server's answer lacks the working set's description")?, spans, files))
    })?;
    let map = HeatMap::new(&files, &spans, "not in the set");
    if let Some(path) = svg {
        std::fs::write(&path, map.svg()).with_context(|| path.display().to_string())?;
    }
    let shown = Shown::from(&set);
    output.show(&shown, || format!("{}\n{}", shown.text(), map.text()))
}
