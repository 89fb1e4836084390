//! A file of an image as memory.

use postcopy::{Options, Session};
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::server::Server;

#[test]
fn a_mapped_file_reads_as_its_source() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let bytes = memory_like(3 << 20, 1);
    std::fs::write(&path, &bytes).unwrap();
    let _ = run(server.address(), ["push".as_ref(), path.as_os_str(), "app:v1".as_ref()]);
    let session = Session::open(server.address(), &"app:v1".parse().unwrap(), Options::default()).unwrap();
    let region = session.map("mem").unwrap();
    assert!(*region == bytes[..], "the mapped file differs from its source");
}
