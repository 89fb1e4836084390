//! The life of a server, from its first connection to its end.

use crate::listen::Listener;
use crate::service::{ImageServer, PageServer, WorkingSetServer};
use crate::shutdown::Drain;
use crate::store::Store;
use crate::written::Counted;
use async_stream::stream;
use futures_util::{Stream, StreamExt};
use postcopy_proto::v1::image_service_server::ImageServiceServer;
use postcopy_proto::v1::page_service_server::PageServiceServer;
use postcopy_proto::v1::working_set_service_server::WorkingSetServiceServer;
use postcopy_proto::{FILE_DESCRIPTOR_SET, MAX_MESSAGE_BYTES};
use std::fmt::Display;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::server::NamedService;
use tonic::transport::server::{Router, TcpIncoming};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// HTTP/2 windows for bytes from clients, of a stream and of a connection: two streams keep a link
/// of 10 Gbit/s and 10 ms busy. An upload that waits for memory fills its stream's window. Uploads
/// beside it on the connection, some of which hold that memory, must still make progress. The
/// clients' windows bound the server's bytes.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;

/// Most bytes of an HTTP/2 frame from a client.
const MAX_FRAME_BYTES: u32 = 1 << 20;

/// The server notices the silent loss of a client after these two times together.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Time in which requests in flight must finish.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval between checks for deleted packs.
const FORGET_INTERVAL: Duration = Duration::from_secs(5);

/// Pause after an error of accept, usually a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The reason why a server ended without a signal.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The descriptors for reflection are damaged, which is a defect of the build.
    #[error("reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The HTTP/2 transport failed.
    #[error("transport")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves `store` to the clients of `listener`, until `signal`.
///
/// After the signal the server refuses new requests, health becomes NOT_SERVING, the listener is
/// closed, and requests in flight finish within 10 s. For `working_set_share` see
/// [`WorkingSetServer::new`].
///
/// # Errors
/// Returns [`ServeError`] if the server ended without a signal.
pub async fn serve(
    store: Arc<Store>,
    listener: Listener,
    working_set_share: f64,
    signal: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let drain = Drain::default();
    let health = HealthReporter::new();
    health.set_serving::<PageServiceServer<PageServer>>().await;
    health.set_serving::<ImageServiceServer<ImageServer>>().await;
    health.set_serving::<WorkingSetServiceServer<WorkingSetServer>>().await;
    let router = router(store.clone(), working_set_share, &drain, &health)?;
    let stop = stop(signal, drain.clone(), health);
    let too_late = async {
        drain.begun().await;
        tokio::time::sleep(DRAIN_TIMEOUT).await;
    };
    let served = async {
        match listener {
            Listener::Tcp(listener) => {
                let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
                router.serve_with_incoming_shutdown(accept(incoming, drain.clone()), stop).await
            }
            Listener::Unix(listener, file) => {
                let incoming = accept(UnixListenerStream::new(listener), drain.clone());
                let served = router.serve_with_incoming_shutdown(incoming, stop).await;
                drop(file);
                served
            }
        }
    };
    tokio::select! {
        served = served => served?,
        () = forget_deleted(store) => {}
        () = too_late => tracing::warn!("ending with requests in flight after {DRAIN_TIMEOUT:?}"),
    }
    Ok(())
}

/// Releases the space of deleted packs. Does not return.
async fn forget_deleted(store: Arc<Store>) {
    loop {
        tokio::time::sleep(FORGET_INTERVAL).await;
        let store = store.clone();
        // The panic's message is on stderr; the next turn may succeed.
        let _ = tokio::task::spawn_blocking(move || store.forget_deleted()).await;
    }
}

fn router(
    store: Arc<Store>,
    share: f64,
    drain: &Drain,
    health: &HealthReporter,
) -> Result<Router, ServeError> {
    let pages = PageServiceServer::new(PageServer::new(store.clone(), drain.clone()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let images = ImageServiceServer::new(ImageServer::new(store.clone(), drain.clone()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let working_sets = WorkingSetServiceServer::new(WorkingSetServer::new(store, drain.clone(), share))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let health = tonic_health::server::HealthService::from_health_reporter(health.clone());
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let mut server = tonic::transport::Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_adaptive_window(Some(false))
        .max_frame_size(MAX_FRAME_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT));
    Ok(server
        .add_service(pages)
        .add_service(images)
        .add_service(working_sets)
        .add_service(tonic_health::pb::health_server::HealthServer::new(health))
        .add_service(reflection().build_v1()?)
        // Python's grpcio-reflection requests the older version.
        .add_service(reflection().build_v1alpha()?))
}

/// Returns the names with a health status: the server as a whole, and each service.
fn health_names() -> [&'static str; 4] {
    [
        "",
        PageServiceServer::<PageServer>::NAME,
        ImageServiceServer::<ImageServer>::NAME,
        WorkingSetServiceServer::<WorkingSetServer>::NAME,
    ]
}

/// Ends the server in order. Returns when connections may be closed.
async fn stop(signal: impl Future<Output = ()>, drain: Drain, mut health: HealthReporter) {
    signal.await;
    tracing::info!("shutting down");
    // The drain begins before health changes, so that no client is served after it read
    // NOT_SERVING.
    drain.begin();
    for name in health_names() {
        health.set_service_status(name, ServingStatus::NotServing).await;
    }
    drain.idle().await;
    // Streams of the health service have no end of their own. They have sent NOT_SERVING, and end
    // with the service that they watch.
    for name in health_names() {
        health.clear_service_status(name).await;
    }
}

/// Returns the accepted connections until `drain` begins. Then it closes the listener, but the
/// stream stays pending: tonic closes all connections at its end, and must first refuse new
/// requests on them.
fn accept<S, C, E>(incoming: S, drain: Drain) -> impl Stream<Item = Result<Counted<C>, E>>
where
    S: Stream<Item = Result<C, E>> + Unpin,
    E: Display,
{
    stream! {
        let mut incoming = incoming;
        let mut begun = pin!(drain.begun());
        loop {
            let connection = tokio::select! {
                Some(connection) = incoming.next() => connection,
                () = begun.as_mut() => break,
            };
            if let Err(error) = &connection {
                tracing::warn!("accepting a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            yield connection.map(Counted::new);
        }
        drop(incoming);
        std::future::pending::<()>().await;
    }
}
