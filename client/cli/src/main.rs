//! `postcopy`: push, look at, pull and try images; restore programs from them.

mod commands;
mod daemon;

fn main() -> std::process::ExitCode {
    commands::main()
}
