//! The address of a server: TCP or a Unix socket.

use socket2::SockRef;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener, ToSocketAddrs};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use tokio::net::{TcpListener, UnixListener};

/// Most unsent bytes that a TCP connection holds. No urgent answer can overtake them, and the
/// kernel's own limit is 4 MiB, which take 0.3 s at 100 Mbit/s. Sent bytes without an
/// acknowledgement do not count, so a long link stays busy: the server must write more before these
/// are sent, within 1 ms at 1 Gbit/s.
const MAX_UNSENT_BYTES: u32 = 128 << 10;

/// An address to listen at; its text is `host:port` or `unix:/path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// The addresses of the host, with the port; port 0 selects any free one.
    Tcp(Vec<SocketAddr>),
    /// A socket in the file system.
    Unix(PathBuf),
}

/// The reason why the server cannot listen at an address.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The text is not an address.
    #[error("{0:?} is no address: use host:port or unix:/path, an absolute path")]
    Syntax(String),
    /// The resolver knows no address of the host.
    #[error("{address}: the host is not known")]
    Host {
        /// The address as the user wrote it.
        address: String,
        /// The error of the resolver.
        source: io::Error,
    },
    /// Other machines could connect.
    #[error(
        "{0} can be reached from other machines, and anyone there could read and change all images: \
         there is neither encryption nor authentication. Use a loopback address or unix:/path, or \
         say --insecure if the network is trusted"
    )]
    Insecure(SocketAddr),
    /// Another server is listening at the socket.
    #[error("unix:{}: another server is listening there", .0.display())]
    InUse(PathBuf),
    /// The path of the socket has a file of another kind.
    #[error("unix:{}: exists and is not a socket. Move it away, or name another path", .0.display())]
    NotASocket(PathBuf),
    /// The operating system refuses.
    #[error("{address}")]
    Io {
        /// The address as the user wrote it.
        address: String,
        /// The error of the system call.
        source: io::Error,
    },
}

impl std::str::FromStr for Address {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        if let Some(path) = text.strip_prefix("unix:") {
            let is_path = path.starts_with('/');
            return if is_path { Ok(Self::Unix(path.into())) } else { Err(ListenError::Syntax(text.into())) };
        }
        let is_host_and_port = text.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()
        });
        if !is_host_and_port {
            return Err(ListenError::Syntax(text.into()));
        }
        let resolved = text.to_socket_addrs();
        resolved
            .map(|addresses| Self::Tcp(addresses.collect()))
            .map_err(|source| ListenError::Host { address: text.into(), source })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addresses) => addresses.first().map_or(Ok(()), |address| address.fmt(f)),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// A TCP socket.
    Tcp(TcpListener),
    /// A Unix socket, and the file to remove at the end.
    Unix(UnixListener, SocketFile),
}

impl Listener {
    /// Listens at an address. The caller must be within a tokio runtime.
    ///
    /// # Errors
    /// Returns [`ListenError::Insecure`] for an address beyond loopback unless `insecure` is set,
    /// [`ListenError::InUse`], [`ListenError::NotASocket`], or [`ListenError::Io`].
    ///
    /// # Blocking
    /// Connects to an existing Unix socket, to see if a server answers.
    pub fn bind(address: &Address, insecure: bool) -> Result<Self, ListenError> {
        match address {
            Address::Tcp(addresses) => bind_tcp(addresses, insecure),
            Address::Unix(path) => bind_unix(path),
        }
    }

    /// Returns the real address, in the form for clients: `http://127.0.0.1:7070` or `unix:/path`.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub fn url(&self) -> io::Result<String> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(|address| format!("http://{address}")),
            Self::Unix(_, file) => Ok(format!("unix:{}", file.path.display())),
        }
    }
}

fn bind_tcp(addresses: &[SocketAddr], insecure: bool) -> Result<Listener, ListenError> {
    if let Some(open) = addresses.iter().find(|address| !insecure && !address.ip().is_loopback()) {
        return Err(ListenError::Insecure(*open));
    }
    let error = |source| ListenError::Io { address: Address::Tcp(addresses.into()).to_string(), source };
    let listener = StdTcpListener::bind(addresses).map_err(error)?;
    listener.set_nonblocking(true).map_err(error)?;
    // Accepted connections inherit this option.
    SockRef::from(&listener).set_tcp_notsent_lowat(MAX_UNSENT_BYTES).map_err(error)?;
    TcpListener::from_std(listener).map(Listener::Tcp).map_err(error)
}

fn bind_unix(path: &Path) -> Result<Listener, ListenError> {
    let error = |source| ListenError::Io { address: format!("unix:{}", path.display()), source };
    match StdUnixStream::connect(path) {
        Ok(_) => return Err(ListenError::InUse(path.to_owned())),
        Err(_) if !is_socket(path) => {
            if path.symlink_metadata().is_ok() {
                return Err(ListenError::NotASocket(path.to_owned()));
            }
        }
        // The socket's server was killed.
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(error)?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(error)?;
    let metadata = std::fs::metadata(path).map_err(error)?;
    // A socket is made with permissions to execute, which have no meaning.
    let mode = std::fs::Permissions::from_mode(metadata.mode() & 0o666);
    std::fs::set_permissions(path, mode).map_err(error)?;
    let inode = metadata.ino();
    Ok(Listener::Unix(listener, SocketFile { path: path.to_owned(), inode }))
}

fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    path.symlink_metadata().is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// The file of a socket. The drop removes it, unless another server has replaced it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            // On failure a stale socket remains, which the next server replaces.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_host_and_port_or_a_path() {
        assert_eq!("unix:/a".parse::<Address>().unwrap(), Address::Unix("/a".into()));
        assert_eq!("127.0.0.1:0".parse::<Address>().unwrap().to_string(), "127.0.0.1:0");
        assert!(matches!("nohost.invalid:1".parse::<Address>(), Err(ListenError::Host { .. })));
        for bad in ["", ":1", "unix:", "unix:a", "127.0.0.1", "127.0.0.1:x", "http://127.0.0.1:1"] {
            assert!(matches!(bad.parse::<Address>(), Err(ListenError::Syntax(_))), "{bad}");
        }
    }

    #[tokio::test]
    async fn beyond_loopback_only_if_told() {
        let everywhere: Address = "0.0.0.0:0".parse().unwrap();
        assert!(matches!(Listener::bind(&everywhere, false), Err(ListenError::Insecure(_))));
        assert!(Listener::bind(&everywhere, true).is_ok());
        assert!(Listener::bind(&"[::1]:0".parse().unwrap(), false).is_ok());
    }

    #[tokio::test]
    async fn a_tcp_connection_holds_little_that_is_unsent() {
        let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap(), false).unwrap();
        let address = listener.url().unwrap().trim_start_matches("http://").to_owned();
        let Listener::Tcp(listener) = listener else { panic!("an address of TCP") };
        let _client = tokio::net::TcpStream::connect(address).await.unwrap();
        let (connection, _) = listener.accept().await.unwrap();
        assert_eq!(SockRef::from(&connection).tcp_notsent_lowat().unwrap(), MAX_UNSENT_BYTES);
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "stale");
        let address = Address::Unix(path.clone());
        let live = Listener::bind(&address, false).unwrap();
        assert!(matches!(Listener::bind(&address, false), Err(ListenError::InUse(_))));
        drop(live);
        assert!(!path.exists(), "removed at the end");
        std::fs::write(&path, "a file").unwrap();
        assert!(matches!(Listener::bind(&address, false), Err(ListenError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    }
}
