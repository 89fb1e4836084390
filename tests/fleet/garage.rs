//! Garage, a distributed object store: three nodes on loopback, each object on all of them.

use anyhow::{Context, Result, bail, ensure};
use postcopy_tests::wait_until;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// The number of nodes. Reads and writes need two of them.
pub(crate) const NODES: usize = 3;
const BUCKET: &str = "fleet";
const ACCESS_KEY: &str = "GK0123456789abcdef01234567";
const SECRET_KEY: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// The nodes; killed when dropped.
pub(crate) struct Garage {
    nodes: Vec<Node>,
    _dir: TempDir,
}

struct Node {
    program: PathBuf,
    config: PathBuf,
    log: PathBuf,
    api_port: u16,
    child: Child,
}

/// The folder of the programs that `tests/setup fleet` has built or installed.
pub(crate) fn cache() -> Result<PathBuf> {
    let cache = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(cache);
    Ok(cache.context("no HOME")?.join("postcopy"))
}

fn program() -> Result<PathBuf> {
    let path = match std::env::var_os("POSTCOPY_GARAGE") {
        Some(path) => PathBuf::from(path),
        None => cache()?.join("garage/bin/garage"),
    };
    ensure!(path.exists(), "{} is not there: run `tests/setup fleet`", path.display());
    Ok(path)
}

pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl Node {
    fn start(program: &Path, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let [rpc_port, api_port] = [free_port()?, free_port()?];
        let (config, log) = (dir.join("garage.toml"), dir.join("log"));
        let dir = dir.display();
        let text = format!(
            "metadata_dir = \"{dir}/meta\"\ndata_dir = \"{dir}/data\"\ndb_engine = \"sqlite\"\n\
             replication_factor = {NODES}\nrpc_bind_addr = \"127.0.0.1:{rpc_port}\"\n\
             rpc_public_addr = \"127.0.0.1:{rpc_port}\"\nrpc_secret = \"{SECRET_KEY}\"\n\
             [s3_api]\ns3_region = \"garage\"\napi_bind_addr = \"127.0.0.1:{api_port}\"\n\
             root_domain = \".s3.garage\"\n"
        );
        std::fs::write(&config, text)?;
        let child = Self::spawn(program, &config, &log, api_port)?;
        Ok(Self { program: program.to_owned(), config, log, api_port, child })
    }

    fn spawn(program: &Path, config: &Path, log: &Path, api_port: u16) -> Result<Child> {
        let log = std::fs::File::options().create(true).append(true).open(log)?;
        let mut command = Command::new(program);
        command.arg("-c").arg(config).arg("server").env("RUST_LOG", "garage=warn");
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("{} cannot be started", program.display()))?;
        wait_until("a node of Garage listens", || TcpStream::connect(("127.0.0.1", api_port)).is_ok());
        Ok(child)
    }

    /// Runs a command of Garage at this node, and returns what it prints.
    fn run(&self, args: &[&str]) -> Result<String> {
        let output = Command::new(&self.program).arg("-c").arg(&self.config).args(args).output()?;
        if !output.status.success() {
            let (error, log) = (String::from_utf8_lossy(&output.stderr), self.log.display());
            bail!("garage {args:?}: {error} (its log is {log})");
        }
        Ok(String::from_utf8(output.stdout)?)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Garage {
    /// Starts the nodes, and makes a bucket and a key.
    pub(crate) fn start() -> Result<Self> {
        let (program, dir) = (program()?, tempfile::tempdir()?);
        let node = |number| Node::start(&program, &dir.path().join(format!("node-{number}")));
        let nodes = (0..NODES).map(node).collect::<Result<Vec<_>>>()?;
        let first = &nodes[0];
        for node in &nodes {
            let name = node.run(&["node", "id", "-q"])?;
            let name = name.trim();
            if !std::ptr::eq(node, first) {
                first.run(&["node", "connect", name])?;
            }
            let id = name.split('@').next().unwrap_or(name);
            first.run(&["layout", "assign", "-z", "here", "-c", "10G", id])?;
        }
        first.run(&["layout", "apply", "--version", "1"])?;
        first.run(&["key", "import", "--yes", "-n", "fleet", ACCESS_KEY, SECRET_KEY])?;
        first.run(&["bucket", "create", BUCKET])?;
        first.run(&["bucket", "allow", "--read", "--write", BUCKET, "--key", "fleet"])?;
        Ok(Self { nodes, _dir: dir })
    }

    /// Returns the ports of the nodes' S3 API.
    pub(crate) fn ports(&self) -> Vec<u16> {
        self.nodes.iter().map(|node| node.api_port).collect()
    }

    /// Kills a node (SIGKILL).
    pub(crate) fn kill(&mut self, node: usize) -> Result<()> {
        let child = &mut self.nodes[node].child;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Starts a node that was killed.
    pub(crate) fn start_again(&mut self, node: usize) -> Result<()> {
        let node = &mut self.nodes[node];
        node.child = Node::spawn(&node.program, &node.config, &node.log, node.api_port)?;
        Ok(())
    }

    /// Returns the URL of a store in the bucket.
    pub(crate) fn url(prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// Sets the credentials, and the address of a node or of what stands before it, in a command's
    /// environment.
    pub(crate) fn set(command: &mut Command, port: u16) {
        command.env("AWS_ENDPOINT", format!("http://127.0.0.1:{port}")).env("AWS_ALLOW_HTTP", "true");
        command.env("AWS_ACCESS_KEY_ID", ACCESS_KEY).env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
        // Garage has no conditional writes.
        command.env("AWS_REGION", "garage").env("AWS_CONDITIONAL_PUT", "disabled");
    }
}
