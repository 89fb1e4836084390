//! PeerService: sends blocks of packs to other servers of the same bucket.

use crate::peers::ServerId;
use crate::service::digest;
use crate::shutdown::Drain;
use crate::store::Store;
use postcopy_proto::v1;
use postcopy_proto::v1::peer_service_server::PeerService;
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// The service for other servers of a bucket.
#[derive(Debug)]
pub struct PeerServer {
    store: Arc<Store>,
    drain: Drain,
    id: ServerId,
}

impl PeerServer {
    /// Makes a service that serves the packs of `store` until `drain` begins. `id` is the number of
    /// this server.
    #[must_use]
    pub fn new(store: Arc<Store>, drain: Drain, id: ServerId) -> Self {
        Self { store, drain, id }
    }
}

#[tonic::async_trait]
impl PeerService for PeerServer {
    async fn read_block(
        &self,
        request: Request<v1::ReadBlockRequest>,
    ) -> Result<Response<v1::ReadBlockResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        let v1::ReadBlockRequest { pack, block, server } = request.into_inner();
        if server.len() != self.id.len() {
            return Err(Status::invalid_argument(format!("server: {} bytes instead of 16", server.len())));
        }
        if server[..] == self.id {
            return Err(Status::failed_precondition("the asking server is this one"));
        }
        let block = self.store.pack_block(digest("pack", &pack)?, block.into()).await?;
        Ok(Response::new(v1::ReadBlockResponse { pack_bytes: block.pack_bytes, data: block.bytes }))
    }
}
