//! The life of a server, from its first connection to its end.

use crate::limits::Limits;
use crate::listen::Listener;
use crate::peers::Fleet;
use crate::service::{ImageServer, PageServer, PeerServer, WorkingSetServer};
use crate::shutdown::Drain;
use crate::store::{Store, chain};
use crate::transport;
use postcopy_proto::v1::image_service_server::ImageServiceServer;
use postcopy_proto::v1::page_service_server::PageServiceServer;
use postcopy_proto::v1::peer_service_server::PeerServiceServer;
use postcopy_proto::v1::working_set_service_server::WorkingSetServiceServer;
use postcopy_proto::{FILE_DESCRIPTOR_SET, MAX_MESSAGE_BYTES};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// Time in which requests in flight must finish.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval between checks for deleted packs, and for recent ones that the chunk index lacks.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(5);

/// The reason why a server ended without a signal.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The descriptors for reflection are damaged, which is a defect of the build.
    #[error("reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves `store` to the clients of `listener`, until `signal`.
///
/// After the signal the server refuses new requests, health becomes NOT_SERVING, the listener is
/// closed, and requests in flight finish within 10 s. For `working_set_share` see
/// [`WorkingSetServer::new`]. With a fleet, the server sends blocks of packs to its other servers.
///
/// # Errors
/// Returns [`ServeError`] if the server ended without a signal.
pub async fn serve(
    store: Arc<Store>,
    listener: Listener,
    limits: Limits,
    working_set_share: f64,
    fleet: Option<Arc<Fleet>>,
    signal: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let drain = Drain::default();
    let health = HealthReporter::new();
    health.set_serving::<PageServiceServer<PageServer>>().await;
    health.set_serving::<ImageServiceServer<ImageServer>>().await;
    health.set_serving::<WorkingSetServiceServer<WorkingSetServer>>().await;
    let routes = routes(store.clone(), working_set_share, fleet.as_deref(), &drain, &health)?;
    let stop = stop(signal, drain.clone(), health);
    let too_late = async {
        drain.begun().await;
        tokio::time::sleep(DRAIN_TIMEOUT).await;
    };
    tokio::select! {
        () = transport::serve(listener, limits, routes, &drain, stop) => {}
        () = maintain(store, fleet) => {}
        () = too_late => tracing::warn!("ending with requests in flight after {DRAIN_TIMEOUT:?}"),
    }
    Ok(())
}

/// Releases the space of deleted packs, keeps the chunk index short, and looks up the servers of the
/// fleet. Does not return.
async fn maintain(store: Arc<Store>, fleet: Option<Arc<Fleet>>) {
    loop {
        if let Some(fleet) = &fleet {
            fleet.refresh().await;
        }
        tokio::time::sleep(MAINTENANCE_INTERVAL).await;
        let store = store.clone();
        // The message of a panic is on stderr; the next turn may succeed.
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || store.maintain()).await {
            tracing::warn!("the chunk index stays as it is: {}", chain(&error));
        }
    }
}

fn routes(
    store: Arc<Store>,
    share: f64,
    fleet: Option<&Fleet>,
    drain: &Drain,
    health: &HealthReporter,
) -> Result<Routes, ServeError> {
    let pages = PageServiceServer::new(PageServer::new(store.clone(), drain.clone()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let images = ImageServiceServer::new(ImageServer::new(store.clone(), drain.clone()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let peers = fleet.map(|fleet| {
        let peers = PeerServer::new(store.clone(), drain.clone(), *fleet.id());
        PeerServiceServer::new(peers).max_encoding_message_size(MAX_MESSAGE_BYTES)
    });
    let working_sets = WorkingSetServiceServer::new(WorkingSetServer::new(store, drain.clone(), share))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let health = tonic_health::server::HealthService::from_health_reporter(health.clone());
    // The descriptors have services of other programs, too.
    let mut names: Vec<_> = health_names()[1..].to_vec();
    names.push(tonic_health::pb::health_server::SERVICE_NAME);
    names.extend(peers.is_some().then_some(PeerServiceServer::<PeerServer>::NAME));
    let reflection = || {
        let descriptors = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        names.iter().fold(descriptors, |descriptors, name| descriptors.with_service_name(*name))
    };
    let routes = match peers {
        Some(peers) => Routes::new(pages).add_service(peers),
        None => Routes::new(pages),
    };
    Ok(routes
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
