//! Makes the generated code again, and fails if it is not what is committed.

use std::fs;
use std::path::Path;

#[test]
fn generated_code_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let protos = [
        "lease",
        "manifest",
        "page_service",
        "image_service",
        "working_set_service",
        "peer_service",
        "mount_service",
    ]
    .map(|name| format!("postcopy/v1/{name}.proto"));
    let mut compiler = protox::Compiler::new([root.join("proto")]).expect("the proto folder");
    compiler.include_source_info(true).include_imports(true);
    compiler.open_files(&protos).expect("the .proto files compile");
    let descriptors = compiler.file_descriptor_set();

    let out = tempfile::tempdir().expect("a scratch folder");
    tonic_prost_build::configure()
        .bytes(".")
        .out_dir(out.path())
        .compile_fds(descriptors)
        .expect("code is generated");
    // Reflection needs no comments; without them the set is a third as large.
    compiler.include_source_info(false);
    fs::write(out.path().join("postcopy.v1.bin"), compiler.encode_file_descriptor_set()).expect("written");

    let mut stale = Vec::new();
    for file in ["postcopy.v1.rs", "postcopy.v1.bin"] {
        let made = fs::read(out.path().join(file)).expect("was made");
        let committed = root.join("src/generated").join(file);
        if fs::read(&committed).ok().as_ref() != Some(&made) {
            fs::write(&committed, made).expect("the source tree is writable");
            stale.push(file);
        }
    }
    assert!(stale.is_empty(), "{stale:?} were out of date and have been written anew: commit them");
}
