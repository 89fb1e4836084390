//! Compares the wire with `baseline/postcopy.v1.bin`, the descriptors of older clients and servers.
//!
//! A set of descriptors is written down as facts, one a line. Each fact names a message, a field, a
//! value or a method, and states what peers depend on. A wire that keeps all facts of the baseline
//! extends it, so comparing two wires is comparing two sets of lines.
//! `baseline/postcopy.v1.txt` has the facts of the baseline, for readers and for diffs.
//!
//! At a release the wire becomes the baseline: copy `src/generated/postcopy.v1.bin` to `baseline`,
//! and run this test, which writes the text anew.

use protox::prost_reflect::{Cardinality, DescriptorPool, EnumDescriptor, MessageDescriptor};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The most numbers of one reserved range that become facts: it may end with `max`.
const MOST_RESERVED: usize = 1000;

const BASELINE: &[u8] = include_bytes!("../baseline/postcopy.v1.bin");

/// The facts of a message. A field is its number, its label and type, its name (which JSON and
/// grpcurl use), and its oneof.
fn facts_of_message(message: &MessageDescriptor, facts: &mut Vec<String>) {
    let of = message.full_name();
    facts.push(format!("message {of}"));
    for field in message.fields() {
        let oneof = field.containing_oneof().filter(|oneof| !oneof.is_synthetic());
        let label = match field.cardinality() {
            Cardinality::Repeated if field.is_packed() => "packed ",
            Cardinality::Repeated => "repeated ",
            Cardinality::Required => "required ",
            Cardinality::Optional if field.field_descriptor_proto().proto3_optional() => "optional ",
            Cardinality::Optional => "",
        };
        let oneof = oneof.map_or(String::new(), |oneof| format!(" of oneof {}", oneof.name()));
        let (number, kind, name) = (field.number(), field.kind(), field.name());
        facts.push(format!("{of} {number}: {label}{kind:?} {name}{oneof}"));
    }
    let reserved = message.reserved_ranges().flat_map(|range| range.take(MOST_RESERVED));
    facts.extend(reserved.map(|number| format!("{of} {number}: reserved")));
}

fn facts_of_enum(values: &EnumDescriptor, facts: &mut Vec<String>) {
    let of = values.full_name();
    facts.push(format!("enum {of}"));
    facts.extend(values.values().map(|value| format!("{of} {}: {}", value.number(), value.name())));
    let reserved = values.reserved_ranges().flat_map(|range| range.take(MOST_RESERVED));
    facts.extend(reserved.map(|number| format!("{of} {number}: reserved")));
}

/// Returns the facts of a set of descriptors, in the order of the .proto files.
fn facts(pool: &DescriptorPool) -> Vec<String> {
    let mut facts = Vec::new();
    for service in pool.services() {
        facts.push(format!("service {}", service.full_name()));
        for method in service.methods() {
            let stream = |is_streaming| if is_streaming { "stream " } else { "" };
            facts.push(format!(
                "rpc /{}/{}: {}{} -> {}{}",
                service.full_name(),
                method.name(),
                stream(method.is_client_streaming()),
                method.input().full_name(),
                stream(method.is_server_streaming()),
                method.output().full_name(),
            ));
        }
    }
    pool.all_enums().for_each(|values| facts_of_enum(&values, &mut facts));
    pool.all_messages().for_each(|message| facts_of_message(&message, &mut facts));
    facts
}

/// Returns the facts of the baseline that the present wire breaks. A field or a value may go if its
/// number is reserved.
fn broken(baseline: &DescriptorPool, present: &DescriptorPool) -> Vec<String> {
    let present: BTreeSet<_> = facts(present).into_iter().collect();
    let holds = |fact: &String| {
        let is_reserved = || {
            let (number, _) = fact.split_once(": ")?;
            present.contains(&format!("{number}: reserved")).then_some(())
        };
        present.contains(fact) || is_reserved().is_some()
    };
    facts(baseline).into_iter().filter(|fact| !holds(fact)).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Compiles the .proto files with `to` in place of `from`.
fn compiled(from: &str, to: &str) -> DescriptorPool {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let package = folder.path().join("postcopy/v1");
    fs::create_dir_all(&package).expect("a folder");
    let mut paths: Vec<PathBuf> = Vec::new();
    let mut found = 0;
    for entry in fs::read_dir(root().join("proto/postcopy/v1")).expect("the .proto files") {
        let source = entry.expect("a file").path();
        let text = fs::read_to_string(&source).expect("text");
        found += text.matches(from).count();
        let path = package.join(source.file_name().expect("a name"));
        fs::write(&path, text.replace(from, to)).expect("written");
        paths.push(path);
    }
    assert!(found > 0, "{from:?} is not in the .proto files");
    let mut compiler = protox::Compiler::new([folder.path()]).expect("a folder");
    compiler.include_imports(true);
    compiler.open_files(&paths).unwrap_or_else(|error| panic!("{to:?}: {error}"));
    compiler.descriptor_pool()
}

fn baseline() -> DescriptorPool {
    DescriptorPool::decode(BASELINE).expect("the baseline is a set of descriptors")
}

fn present() -> DescriptorPool {
    DescriptorPool::decode(postcopy_proto::FILE_DESCRIPTOR_SET).expect("descriptors")
}

#[test]
fn the_wire_extends_its_baseline() {
    let broken = broken(&baseline(), &present());
    assert!(broken.is_empty(), "older clients and servers depend on these: {broken:#?}");
}

#[test]
fn the_text_of_the_baseline_is_up_to_date() {
    let (path, text) = (root().join("baseline/postcopy.v1.txt"), facts(&baseline()).join("\n") + "\n");
    if fs::read_to_string(&path).ok().as_ref() != Some(&text) {
        fs::write(&path, text).expect("the source tree is writable");
        panic!("{} was out of date and has been written anew: commit it", path.display());
    }
}

const READ_FILE: &str = "rpc ReadFile(ReadFileRequest) returns (stream ReadFileResponse);";

/// Each of these changes breaks the fact beside it.
#[test]
fn each_incompatible_change_is_noticed() {
    let all_segments = "postcopy.v1.OpenImageRequest 3: bool all_segments";
    let zero = "postcopy.v1.ChunkAnswer 3: postcopy.v1.ZeroChunk zero of oneof result";
    let prefetch = "postcopy.v1.RequestClass 2: REQUEST_CLASS_PREFETCH";
    let read_file = "rpc /postcopy.v1.PageService/ReadFile: \
                     postcopy.v1.ReadFileRequest -> stream postcopy.v1.ReadFileResponse";
    for (from, to, fact) in [
        // A field's number, type, label, name, oneof, and all of it.
        ("bool all_segments = 3;", "bool all_segments = 9;", all_segments),
        ("bool all_segments = 3;", "uint32 all_segments = 3;", all_segments),
        ("bool all_segments = 3;", "optional bool all_segments = 3;", all_segments),
        ("bool all_segments = 3;", "repeated bool all_segments = 3;", all_segments),
        ("bool all_segments = 3;", "bool every_segment = 3;", all_segments),
        ("bool all_segments = 3;", "oneof which { bool all_segments = 3; }", all_segments),
        ("bool all_segments = 3;", "", all_segments),
        ("bool all_segments = 3;", "reserved 7 to 9;", all_segments),
        ("ZeroChunk zero = 3;", "Error zero = 3;", zero),
        ("ZeroChunk zero = 3;", "", zero),
        // A value's number, name, and all of it.
        ("REQUEST_CLASS_PREFETCH = 2;", "REQUEST_CLASS_PREFETCH = 4;", prefetch),
        ("REQUEST_CLASS_PREFETCH = 2;", "REQUEST_CLASS_AHEAD = 2;", prefetch),
        ("REQUEST_CLASS_PREFETCH = 2;", "", prefetch),
        // A method's name, request, answer, both ways of streaming, and all of it.
        (READ_FILE, "rpc ReadBytes(ReadFileRequest) returns (stream ReadFileResponse);", read_file),
        (READ_FILE, "rpc ReadFile(OpenImageRequest) returns (stream ReadFileResponse);", read_file),
        (READ_FILE, "rpc ReadFile(ReadFileRequest) returns (stream OpenImageResponse);", read_file),
        (READ_FILE, "rpc ReadFile(stream ReadFileRequest) returns (stream ReadFileResponse);", read_file),
        (READ_FILE, "rpc ReadFile(ReadFileRequest) returns (ReadFileResponse);", read_file),
        (READ_FILE, "", read_file),
        // The names of services, messages and enums, and the package.
        ("service ImageService", "service PictureService", "service postcopy.v1.ImageService"),
        ("ZeroChunk", "EmptyChunk", "message postcopy.v1.ZeroChunk"),
        ("ErrorCode", "FailureCode", "enum postcopy.v1.ErrorCode"),
        ("package postcopy.v1;", "package postcopy.v2;", "message postcopy.v1.Root"),
    ] {
        let broken = broken(&baseline(), &compiled(from, to));
        assert!(broken.iter().any(|line| line == fact), "{from:?} became {to:?}: {broken:#?}");
    }
}

#[test]
fn additions_and_reserved_numbers_are_compatible() {
    for (from, to) in [
        ("bool all_segments = 3;", "bool all_segments = 3; map<string, bytes> more = 5;"),
        ("bool all_segments = 3;", "reserved 3, 7 to 9;"),
        ("ZeroChunk zero = 3;", "ZeroChunk zero = 3; bytes parts = 5;"),
        ("REQUEST_CLASS_PREFETCH = 2;", "REQUEST_CLASS_PREFETCH = 2; REQUEST_CLASS_URGENT = 4;"),
        ("REQUEST_CLASS_PREFETCH = 2;", "reserved 2;"),
        (READ_FILE, &format!("{READ_FILE} rpc ReadAgain(ReadFileRequest) returns (ReadFileResponse);")),
        ("message ZeroChunk {}", "message ZeroChunk {} message Another {} enum Which { NONE = 0; }"),
    ] {
        let broken = broken(&baseline(), &compiled(from, to));
        assert!(broken.is_empty(), "{from:?} became {to:?}: {broken:#?}");
    }
}

/// A number that was reserved once stays reserved.
#[test]
fn a_reserved_number_is_not_used_again() {
    let before = compiled("bool all_segments = 3;", "reserved 3;");
    assert_eq!(broken(&before, &present()), ["postcopy.v1.OpenImageRequest 3: reserved"]);
    assert_eq!(broken(&before, &before), [""; 0]);
}
