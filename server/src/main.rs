//! postcopyd: keeps page images and serves their pages over gRPC.

mod cli;
mod end_signals;

use anyhow::Context;
use clap::Parser;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};

/// Time that the runtime's threads may take to finish a file operation at the end.
const RUNTIME_TIMEOUT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let json = cli.json();
    let level = match log_level() {
        Ok(level) => level,
        Err(error) => return fail(&error, json),
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    if cli.serves()
        && let Err(error) = end_signals::block()
    {
        return fail(&error.into(), json);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into(), json),
    };
    let outcome = runtime.block_on(cli.run());
    runtime.shutdown_timeout(RUNTIME_TIMEOUT);
    outcome.unwrap_or_else(|error| fail(&error, json))
}

/// Returns the log level that POSTCOPY_LOG names, or else that of information.
fn log_level() -> anyhow::Result<LevelFilter> {
    let named = std::env::var_os("POSTCOPY_LOG").unwrap_or_default();
    if named.is_empty() {
        return Ok(LevelFilter::INFO);
    }
    let level = named.to_str().and_then(|named| named.parse().ok());
    // Release builds leave the levels below information out.
    let level = level.filter(|level| *level <= STATIC_MAX_LEVEL);
    level.with_context(|| format!("POSTCOPY_LOG is {named:?}: it must be error, warn or info"))
}

fn fail(error: &anyhow::Error, json: bool) -> ExitCode {
    // The readers of these streams may have gone, so a failed write is no error.
    if json {
        let shown = serde_json::json!({ "error": format!("{error:#}") });
        let _ = std::io::Write::write_fmt(&mut std::io::stdout(), format_args!("{shown}\n"));
    }
    let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("postcopyd: {error:#}\n"));
    ExitCode::FAILURE
}
