//! `postcopy`: push, look at, pull and try images.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
