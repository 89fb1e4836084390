//! `postcopy`: push, inspect, pull and measure images; restore programs from them.

mod commands;
mod daemon;

fn main() -> std::process::ExitCode {
    commands::main()
}
