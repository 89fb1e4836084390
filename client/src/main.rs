//! `postcopy`: push, look at, pull and try images; restore programs from them.

mod cli;
mod daemon;

fn main() -> std::process::ExitCode {
    cli::main()
}
