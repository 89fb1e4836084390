//! The service for other programs of the mount's user: where the mount is, and pages ahead.

use crate::serve::Server;
use crate::sets::Failed;
use futures_util::Stream;
use postcopy::proto::reference::Reference;
use postcopy::proto::v1;
use postcopy::proto::v1::mount_service_server::{MountService, MountServiceServer};
use postcopy::{RemoteError, ServerAddress};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};

/// The time between two messages that tell the progress.
const TICK: Duration = Duration::from_millis(200);
/// Most requests of a connection at once.
const REQUESTS: usize = 16;

/// The service, for as long as its mount is served.
#[derive(Debug)]
pub(crate) struct Control {
    server: Arc<Server>,
    directory: PathBuf,
    address: ServerAddress,
}

impl Control {
    pub(crate) fn new(server: Arc<Server>, directory: PathBuf, address: ServerAddress) -> Self {
        Self { server, directory, address }
    }

    /// Answers programs that connect to a socket, for as long as the runtime lives.
    pub(crate) async fn serve(self, socket: UnixListener) {
        let socket = socket.set_nonblocking(true).and_then(|()| tokio::net::UnixListener::from_std(socket));
        let connections = match socket {
            Ok(socket) => UnixListenerStream::new(socket),
            Err(error) => return tracing::error!("the control socket: {error}"),
        };
        let service = MountServiceServer::with_interceptor(self, only_own_user);
        let server = tonic::transport::Server::builder().concurrency_limit_per_connection(REQUESTS);
        if let Err(error) = { server }.add_service(service).serve_with_incoming(connections).await {
            tracing::error!("the control socket: {error}");
        }
    }
}

/// Lets the user of this process and root pass.
fn only_own_user(request: Request<()>) -> Result<Request<()>, Status> {
    let peer = request.extensions().get::<UdsConnectInfo>().and_then(|peer| peer.peer_cred);
    let own = rustix::process::geteuid().as_raw();
    match peer {
        Some(peer) if peer.uid() == own || peer.uid() == 0 => Ok(request),
        _ => Err(Status::permission_denied("the mount belongs to another user")),
    }
}

#[tonic::async_trait]
impl MountService for Control {
    async fn get_mount(
        &self,
        _: Request<v1::GetMountRequest>,
    ) -> Result<Response<v1::GetMountResponse>, Status> {
        let directory = self.directory.as_os_str().as_bytes().to_vec().into();
        Ok(Response::new(v1::GetMountResponse { directory, server: self.address.to_string() }))
    }

    type WarmStream = Pin<Box<dyn Stream<Item = Result<v1::WarmResponse, Status>> + Send>>;

    async fn warm(&self, request: Request<v1::WarmRequest>) -> Result<Response<Self::WarmStream>, Status> {
        let v1::WarmRequest { reference, fill } = request.into_inner();
        let reference: Reference =
            reference.parse().map_err(|error| Status::invalid_argument(format!("{error}")))?;
        let server = Arc::clone(&self.server);
        let (to_caller, messages) = mpsc::channel(1);
        tokio::spawn(async move {
            let stored = AtomicU64::new(0);
            let progress = || v1::WarmResponse { pages: stored.load(Ordering::Relaxed) };
            let warmed = async {
                let warmed = server.warm(&reference, fill, &stored).await;
                let _ = to_caller.send(warmed.map(|()| progress()).map_err(|error| status(&error))).await;
            };
            let tell = async {
                // The caller's end is the end of the request.
                while to_caller.send(Ok(progress())).await.is_ok() {
                    tokio::time::sleep(TICK).await;
                }
            };
            tokio::select! {
                () = warmed => {}
                () = tell => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}

fn status(error: &Failed) -> Status {
    let text = error.to_string();
    match error {
        Failed::Remote(error) if error.is_not_found() => Status::not_found(text),
        Failed::Remote(RemoteError::Wrong { .. }) | Failed::Read(_) => Status::data_loss(text),
        Failed::Remote(_) => Status::unavailable(text),
        Failed::Nodes(_) => Status::internal(text),
    }
}
