//! Answers of the image service that contradict the image, repeat themselves or come to no end.

use super::WATCHDOG;
use postcopy::ServerAddress;
use postcopy::proto::v1::image_service_server::{ImageService, ImageServiceServer};
use postcopy::proto::v1::{self, ImageSummary, ListImagesResponse};
use postcopy_tests::chaos::within;
use postcopy_tests::cli::{fail, postcopy, run};
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

/// A service that answers ListImages with its pages, one after another, and TagImage with 31 bytes.
#[derive(Debug)]
struct Liar {
    pages: Vec<ListImagesResponse>,
    asked: AtomicU32,
    /// The number of requests that it refuses before it answers.
    refusals: u32,
}

#[tonic::async_trait]
impl ImageService for Liar {
    async fn list_images(
        &self,
        _: Request<v1::ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let asked = self.asked.fetch_add(1, Ordering::SeqCst);
        let Some(page) = asked.checked_sub(self.refusals) else {
            let mut status = Status::resource_exhausted("too many requests");
            status.metadata_mut().insert("grpc-retry-pushback-ms", 100.into());
            return Err(status);
        };
        Ok(Response::new(self.pages[(page as usize).min(self.pages.len() - 1)].clone()))
    }

    async fn tag_image(
        &self,
        _: Request<v1::TagImageRequest>,
    ) -> Result<Response<v1::TagImageResponse>, Status> {
        Ok(Response::new(v1::TagImageResponse { image: vec![7; 31].into() }))
    }

    async fn get_image(
        &self,
        _: Request<v1::GetImageRequest>,
    ) -> Result<Response<v1::GetImageResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn find_missing(
        &self,
        _: Request<v1::FindMissingRequest>,
    ) -> Result<Response<v1::FindMissingResponse>, Status> {
        Ok(Response::new(v1::FindMissingResponse::default()))
    }

    async fn upload_pack(
        &self,
        _: Request<Streaming<v1::UploadPackRequest>>,
    ) -> Result<Response<v1::UploadPackResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn patch_chunks(
        &self,
        _: Request<v1::PatchChunksRequest>,
    ) -> Result<Response<v1::PatchChunksResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn upload_segment(
        &self,
        _: Request<v1::UploadSegmentRequest>,
    ) -> Result<Response<v1::UploadSegmentResponse>, Status> {
        Ok(Response::new(v1::UploadSegmentResponse::default()))
    }

    /// Asks for the only segment of an image again and again.
    async fn commit(
        &self,
        request: Request<Streaming<v1::CommitRequest>>,
    ) -> Result<Response<v1::CommitResponse>, Status> {
        let mut parts = request.into_inner();
        let mut root = Vec::new();
        while let Some(part) = parts.message().await? {
            if let Some(v1::commit_request::Part::RootPart(part)) = part.part {
                root.extend_from_slice(&part);
            }
        }
        let root = postcopy::proto::manifest::Root::parse_any(&root).expect("a root");
        let segment_digests = postcopy::proto::digest::Digest::concat(root.segment_digests());
        let missing = v1::Missing { segment_digests, ..Default::default() };
        let outcome = Some(v1::commit_response::Outcome::Missing(missing));
        Ok(Response::new(v1::CommitResponse { outcome }))
    }

    async fn delete_image(
        &self,
        _: Request<v1::DeleteImageRequest>,
    ) -> Result<Response<v1::DeleteImageResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// Starts the service, which ends with the runtime.
fn start(refusals: u32, pages: Vec<ListImagesResponse>) -> (Runtime, ServerAddress) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let service = ImageServiceServer::new(Liar { pages, asked: AtomicU32::new(0), refusals });
    let server = tonic::transport::Server::builder().add_service(service);
    runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (runtime, address)
}

fn page(references: &[&str], next: &str) -> ListImagesResponse {
    let image = |reference: &&str| ImageSummary {
        reference: (*reference).to_owned(),
        image: vec![7; 32].into(),
        ..Default::default()
    };
    ListImagesResponse { images: references.iter().map(image).collect(), next_page_token: next.to_owned() }
}

#[test]
fn a_list_whose_pages_repeat_or_bring_nothing_ends_with_an_error() {
    within(WATCHDOG, || {
        for (name, pages, said) in [
            ("one page again and again", vec![page(&["a:1"], "a:1")], "do not ascend"),
            (
                "two pages in turn",
                vec![page(&["a:1"], "a"), page(&["b:1"], "b"), page(&["a:1"], "a")],
                "do not ascend",
            ),
            ("empty pages", vec![page(&["a:1"], "a"), page(&[], "b")], "it is empty"),
        ] {
            let (_runtime, address) = start(0, pages);
            let output = postcopy(&address, ["ls"]).output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && stderr.contains(said), "{name}: {stderr}");
            let stdout = String::from_utf8_lossy(&output.stdout);
            assert!(stdout.contains("a:1"), "{name}: a page is printed when it comes: {stdout}");
        }
    });
}

#[test]
fn pages_of_a_list_are_one_array_of_json() {
    let (_runtime, address) = start(0, vec![page(&["a:1", "b:1"], "b"), page(&["c:1"], "")]);
    let listed = run(&address, ["ls"]);
    let references = listed.as_array().unwrap().iter().map(|image| image["reference"].as_str().unwrap());
    assert_eq!(references.collect::<Vec<_>>(), ["a:1", "b:1", "c:1"]);
    let (_runtime, address) = start(0, vec![page(&[], "")]);
    assert_eq!(run(&address, ["ls"]), serde_json::json!([]));
}

#[test]
fn text_of_a_server_does_not_reach_a_terminal_as_it_is() {
    let mut forged = page(&["a:1\x1b[2J\nok:1"], "");
    let damage = "\x1b]0;title\x07".to_owned();
    forged.images.push(ImageSummary { damage, ..page(&["b:1"], "").images.remove(0) });
    let (_runtime, address) = start(0, vec![forged]);
    let output = postcopy(&address, ["ls"]).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(!stdout.contains(['\x1b', '\x07']) && stdout.lines().count() == 3, "{stdout:?}");
}

#[test]
fn an_answer_that_is_no_digest_is_an_error() {
    let mut short = page(&["a:1"], "");
    short.images[0].image.truncate(31);
    let (_runtime, address) = start(0, vec![short]);
    for command in [&["ls"][..], &["tag", "a:1", "b:1"]] {
        let stderr = fail(&address, command);
        assert!(stderr.contains("sent a wrong digest"), "{command:?}: {stderr}");
    }
}

#[test]
fn a_request_that_an_overloaded_server_refuses_is_repeated() {
    let (_runtime, address) = start(5, vec![page(&["a:1"], "")]);
    let started = std::time::Instant::now();
    assert_eq!(run(&address, ["ls"])[0]["reference"], "a:1");
    assert!(started.elapsed().as_millis() >= 500, "it waited as the server wants");
}

#[test]
fn a_server_that_never_has_the_segments_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, "content").unwrap();
    let (_runtime, address) = start(0, Vec::new());
    let stderr = fail(&address, ["push".as_ref(), path.as_os_str(), "app".as_ref()]);
    assert!(stderr.contains("asks for segments again") && stderr.contains(&address.to_string()), "{stderr}");
}
