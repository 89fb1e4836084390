//! Azurite, Microsoft's emulator of Azure Blob Storage, on loopback and in memory.

use crate::garage::{cache, free_port};
use anyhow::{Context, Result, ensure};
use postcopy_tests::wait_until;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const CONTAINER: &str = "conformance";
/// Creates the container. The account and its key are those that every Azurite has.
const CREATE: &str = "
const { BlobServiceClient, StorageSharedKeyCredential } = require('@azure/storage-blob');
const [url, container] = process.argv.slice(1);
const key = 'Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==';
const account = new StorageSharedKeyCredential('devstoreaccount1', key);
new BlobServiceClient(`${url}/devstoreaccount1`, account).createContainer(container);
";

/// A running Azurite with a container; killed when dropped.
pub(crate) struct Azurite {
    child: Child,
    url: String,
}

/// The folder of the packages that `tests/setup fleet` has installed.
fn folder() -> Result<PathBuf> {
    let folder = cache()?.join("azurite");
    ensure!(folder.exists(), "{} is not there: run `tests/setup fleet`", folder.display());
    Ok(folder)
}

fn node(folder: &Path) -> Command {
    let mut node = Command::new("node");
    node.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null());
    node
}

impl Azurite {
    pub(crate) fn start() -> Result<Self> {
        let (folder, port) = (folder()?, free_port()?);
        let mut server = node(&folder);
        server.arg("node_modules/.bin/azurite-blob").args(["--inMemoryPersistence", "--disableTelemetry"]);
        server.args(["--silent", "--skipApiVersionCheck", "--blobHost", "127.0.0.1", "--blobPort"]);
        let child = server.arg(port.to_string()).spawn().context("node cannot be started")?;
        let this = Self { child, url: format!("http://127.0.0.1:{port}") };
        wait_until("Azurite listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        let created = node(&folder).args(["-e", CREATE, &this.url, CONTAINER]).status()?;
        ensure!(created.success(), "Azurite's container cannot be created");
        Ok(this)
    }

    /// Sets the bucket of the store's tests.
    pub(crate) fn set(&self, tests: &mut Command) {
        tests.env("POSTCOPY_TEST_BUCKET", format!("az://{CONTAINER}"));
        tests.env("AZURE_STORAGE_USE_EMULATOR", "true").env("AZURE_ALLOW_HTTP", "true");
        tests.env("AZURITE_BLOB_STORAGE_URL", &self.url);
    }
}

impl Drop for Azurite {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
