//! A store as its owner sees it: its directory, `postcopyd`'s commands on it, and single calls of its server.

use crate::binary;
use crate::server::Server;
use postcopy::proto::digest::Digest;
use postcopy::proto::manifest::Root;
use postcopy::proto::pack::{PackEntry, PackIndex};
use postcopy::proto::v1::{
    self, image_service_client::ImageServiceClient, page_service_client::PageServiceClient,
};
use postcopy::{Remote, ServerAddress};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::future::Future;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tonic::Status;
use tonic::transport::Channel;

/// The directory of a store.
#[derive(Clone, Debug)]
pub struct StoreDir(PathBuf);

impl StoreDir {
    /// The store in `root`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self(root.to_owned())
    }

    /// The store of a server.
    #[must_use]
    pub fn of(server: &Server) -> Self {
        Self::new(server.store())
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// The directory of the only domain.
    #[must_use]
    pub fn domain(&self) -> PathBuf {
        self.0.join("default")
    }

    /// All files below `part` of the domain, staged ones, too.
    #[must_use]
    pub fn files(&self, part: &str) -> BTreeSet<PathBuf> {
        let mut found = BTreeSet::new();
        files_below(&self.domain().join(part), &mut found);
        found
    }

    /// All packs.
    #[must_use]
    pub fn packs(&self) -> BTreeSet<PathBuf> {
        self.files("packs").into_iter().filter(|path| !is_staged(path)).collect()
    }

    /// All roots and segments.
    #[must_use]
    pub fn manifests(&self) -> BTreeSet<PathBuf> {
        let is_locator = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "loc");
        let manifests = self.files("manifests").into_iter();
        manifests.filter(|path| !is_staged(path) && !is_locator(path)).collect()
    }

    /// All references.
    #[must_use]
    pub fn references(&self) -> BTreeSet<PathBuf> {
        self.files("refs").into_iter().filter(|path| !is_staged(path)).collect()
    }

    /// What interrupted writes left.
    #[must_use]
    pub fn staged(&self) -> BTreeSet<PathBuf> {
        self.files("").into_iter().filter(|path| is_staged(path)).collect()
    }

    /// The file of a root or segment.
    #[must_use]
    pub fn manifest(&self, digest: &Digest) -> PathBuf {
        self.domain().join("manifests").join(digest.hex())
    }

    /// The file of a reference.
    #[must_use]
    pub fn reference(&self, name: &str, tag: &str) -> PathBuf {
        self.domain().join("refs").join(name).join("_tags").join(tag)
    }

    /// The root of an image, as it lies there.
    ///
    /// # Panics
    /// If it is not there or damaged.
    #[must_use]
    pub fn root_of(&self, image: &Digest) -> Root {
        let bytes = fs::read(self.manifest(image)).expect("the root is in the store");
        Root::parse(&bytes, image).expect("the root is sound")
    }

    /// The frames of all packs, with the pack that each lies in.
    ///
    /// # Panics
    /// If one does not parse.
    #[must_use]
    pub fn frames(&self) -> Vec<(PathBuf, PackEntry)> {
        let entries = |path: PathBuf| {
            let bytes = fs::read(&path).expect("a pack can be read");
            let index = PackIndex::parse(&bytes).expect("a pack of the store parses");
            index.entries().iter().map(|entry| (path.clone(), *entry)).collect::<Vec<_>>()
        };
        self.packs().into_iter().flat_map(entries).collect()
    }

    /// Bytes of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files("").iter().filter_map(|path| fs::metadata(path).ok()).map(|metadata| metadata.len()).sum()
    }

    /// `postcopyd COMMAND --store DIR ARGS…`, as it ended.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn postcopyd(&self, command: &str, args: &[&str]) -> Output {
        let mut postcopyd = Command::new(binary("postcopyd"));
        postcopyd.arg(command).arg("--store").arg(&self.0).args(args).stdin(Stdio::null());
        postcopyd.output().expect("postcopyd can be started")
    }

    /// What `postcopyd verify` names as damaged: object and reason.
    ///
    /// # Panics
    /// Unless it ends with status 0 where nothing is, and with 1 where something is.
    #[must_use]
    pub fn damage(&self) -> Vec<(String, String)> {
        let output = self.postcopyd("verify", &["--json"]);
        let report = json(&output);
        let text = |damage: &Value, field: &str| damage[field].as_str().expect("a text").to_owned();
        let damage = report["damage"].as_array().expect("a list of what is damaged");
        let damage: Vec<_> = damage.iter().map(|d| (text(d, "object"), text(d, "reason"))).collect();
        let expected = i32::from(!damage.is_empty());
        assert_eq!(output.status.code(), Some(expected), "{report}");
        damage
    }

    /// Sees that `postcopyd verify` finds the store sound; what it counted.
    ///
    /// # Panics
    /// If it does not.
    pub fn assert_sound(&self) -> Value {
        let output = self.postcopyd("verify", &["--json"]);
        let report = json(&output);
        assert_eq!((output.status.code(), &report["damage"]), (Some(0), &Value::Array(vec![])), "{report}");
        report
    }

    /// Returns whether a server holds the lease of an image.
    #[must_use]
    pub fn has_lease(&self) -> bool {
        let leases = fs::read_dir(self.domain().join("leases")).into_iter().flatten().flatten();
        let is_held = |path: PathBuf| File::open(path).is_ok_and(|file| file.try_lock().is_err());
        leases.map(|entry| entry.path()).any(is_held)
    }

    /// `postcopyd gc` with these arguments; its report.
    ///
    /// # Panics
    /// Unless it ends with status 0.
    #[must_use]
    pub fn gc(&self, args: &[&str]) -> Value {
        let output = self.postcopyd("gc", &[args, &["--json"]].concat());
        assert!(output.status.success(), "{}", shown(&output));
        json(&output)
    }
}

/// What a program wrote, for messages.
#[must_use]
pub fn shown(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("no JSON ({error}): {}", shown(output)))
}

fn files_below(dir: &Path, found: &mut BTreeSet<PathBuf>) {
    // Directories and files come and go beside servers and collectors.
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files_below(&entry.path(), found),
            Ok(_) => {
                found.insert(entry.path());
            }
            Err(_) => {}
        }
    }
}

/// Whether a file is one of `object_store`'s staged ones, which its `list` hides.
#[must_use]
pub fn is_staged(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().contains(&b'#'))
}

/// Turns a byte of a file into another one, in place.
///
/// # Panics
/// If there is no such byte.
pub fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).expect("the file can be opened");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("the file has such a byte");
    file.write_all_at(&[byte[0] ^ 0xff], offset).expect("the file can be written");
}

/// The digest that a JSON report holds as text.
///
/// # Panics
/// If it holds none.
#[must_use]
pub fn digest(text: &Value) -> Digest {
    text.as_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("{text} is no digest"))
}

/// Single calls of a server, through the generated client, from a test that is not async.
#[derive(Debug)]
pub struct Rpc {
    runtime: tokio::runtime::Runtime,
    remote: Remote,
}

impl Rpc {
    /// Connects.
    ///
    /// # Panics
    /// If nobody answers.
    #[must_use]
    pub fn connect(address: &ServerAddress) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let remote = runtime.block_on(Remote::connect(address.clone())).expect("the server answers");
        Self { runtime, remote }
    }

    /// Waits for a call.
    pub fn wait<T>(&self, call: impl Future<Output = T>) -> T {
        self.runtime.block_on(call)
    }

    /// The connection.
    #[must_use]
    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// The generated client of the image service.
    #[must_use]
    pub fn images(&self) -> ImageServiceClient<Channel> {
        self.remote.images()
    }

    /// The generated client of the page service.
    #[must_use]
    pub fn pages(&self) -> PageServiceClient<Channel> {
        self.remote.pages()
    }

    /// A whole file by `ReadFile`.
    ///
    /// # Errors
    /// The status that the call or its stream ended with.
    pub fn read_file(&self, reference: &str, path: &str) -> Result<Vec<u8>, Status> {
        self.read_range(reference, path, 0, None)
    }

    /// A part of a file by `ReadFile`.
    ///
    /// # Errors
    /// As [`Rpc::read_file`].
    pub fn read_range(
        &self,
        reference: &str,
        path: &str,
        offset_bytes: u64,
        length_bytes: Option<u64>,
    ) -> Result<Vec<u8>, Status> {
        let path = path.as_bytes().to_vec().into();
        let request =
            v1::ReadFileRequest { reference: reference.to_owned(), path, offset_bytes, length_bytes };
        self.wait(async {
            let mut parts = self.pages().read_file(request).await?.into_inner();
            let mut bytes = Vec::new();
            while let Some(part) = parts.message().await? {
                bytes.extend_from_slice(&part.data);
            }
            Ok(bytes)
        })
    }

    /// Sends these requests on a new demand stream; the answers up to its end, and the status that it ended with.
    pub fn fetch(
        &self,
        requests: Vec<v1::FetchChunksRequest>,
    ) -> (Vec<v1::FetchChunksResponse>, Result<(), Status>) {
        self.wait(async {
            let mut answers = Vec::new();
            let mut stream = match self.pages().fetch_chunks(tokio_stream::iter(requests)).await {
                Ok(stream) => stream.into_inner(),
                Err(status) => return (answers, Err(status)),
            };
            loop {
                match stream.message().await {
                    Ok(Some(answer)) => answers.push(answer),
                    Ok(None) => return (answers, Ok(())),
                    Err(status) => return (answers, Err(status)),
                }
            }
        })
    }
}
