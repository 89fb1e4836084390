//! postcopyd: keeps page images and serves their pages over gRPC.

mod cli;

use clap::Parser;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;
use tracing_subscriber::EnvFilter;

/// Time that the runtime's threads may take to finish a file operation at the end.
const RUNTIME_TIMEOUT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let json = cli.json();
    let filter = EnvFilter::try_from_env("POSTCOPY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into(), json),
    };
    let outcome = runtime.block_on(cli.run());
    runtime.shutdown_timeout(RUNTIME_TIMEOUT);
    outcome.unwrap_or_else(|error| fail(&error, json))
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
