//! PageService: sends images' pages to clients.

use crate::service::{Answers, lanes, open, read_file};
use crate::shutdown::Drain;
use crate::store::Store;
use postcopy_proto::v1;
use postcopy_proto::v1::page_service_server::PageService;
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// The service for the pages of a store.
#[derive(Debug)]
pub struct PageServer {
    store: Arc<Store>,
    drain: Drain,
}

impl PageServer {
    /// Makes a service that serves `store` until `drain` begins.
    #[must_use]
    pub fn new(store: Arc<Store>, drain: Drain) -> Self {
        Self { store, drain }
    }
}

#[tonic::async_trait]
impl PageService for PageServer {
    type OpenImageStream = Answers<v1::OpenImageResponse>;
    type FetchChunksStream = Answers<v1::FetchChunksResponse>;
    type StreamChunksStream = Answers<v1::StreamChunksResponse>;
    type ReadFileStream = Answers<v1::ReadFileResponse>;

    async fn open_image(
        &self,
        request: Request<v1::OpenImageRequest>,
    ) -> Result<Response<Self::OpenImageStream>, Status> {
        let in_flight = self.drain.enter()?;
        let parts = open::open_image(self.store.clone(), request.into_inner(), in_flight).await?;
        Ok(Response::new(Box::pin(parts)))
    }

    async fn fetch_chunks(
        &self,
        request: Request<Streaming<v1::FetchChunksRequest>>,
    ) -> Result<Response<Self::FetchChunksStream>, Status> {
        let in_flight = self.drain.enter()?;
        let stream = request.extensions().get().cloned();
        let answers = lanes::fetch_chunks(self.store.clone(), stream, request.into_inner(), in_flight);
        Ok(Response::new(Box::pin(answers)))
    }

    async fn stream_chunks(
        &self,
        request: Request<Streaming<v1::StreamChunksRequest>>,
    ) -> Result<Response<Self::StreamChunksStream>, Status> {
        let in_flight = self.drain.enter()?;
        let answers = lanes::stream_chunks(self.store.clone(), request.into_inner(), in_flight);
        Ok(Response::new(Box::pin(answers)))
    }

    async fn read_file(
        &self,
        request: Request<v1::ReadFileRequest>,
    ) -> Result<Response<Self::ReadFileStream>, Status> {
        let in_flight = self.drain.enter()?;
        let parts = read_file::read_file(self.store.clone(), request.into_inner(), in_flight).await?;
        Ok(Response::new(Box::pin(parts)))
    }
}
