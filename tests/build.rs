//! Sources of the client that tests/loom includes leave their unit tests out where `loom` is set, and it is for this
//! package alone: with `--cfg loom` for all, hyper-util does not build.

fn main() {
    println!("cargo::rustc-cfg=loom");
    println!("cargo::rerun-if-changed=build.rs");
}
