//! The clients of object stores.

use super::RETRY_TIME;
use object_store::path::Path as Key;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig};
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// Time in which a connection must be made.
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// Time in which a request must end: 4 of 8 MiB at a time, at 18 Mbit/s.
const REQUEST_TIME: Duration = Duration::from_secs(15);
/// Most repetitions of a failed request. The time ends them before.
const RETRIES: usize = 1000;

/// A client of a URL's bucket.
pub(super) struct Client {
    pub(super) store: Arc<dyn ObjectStore>,
    /// The path in the bucket.
    pub(super) prefix: Key,
    /// True if one request lists objects at any depth.
    pub(super) lists_trees: bool,
}

/// Makes the client of a URL's bucket.
pub(super) fn connect(url: &str) -> Result<Client, String> {
    // Only one caller installs it; the others find it installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let parsed = Url::parse(url).map_err(|e| e.to_string())?;
    let (scheme, path) = ObjectStoreScheme::parse(&parsed).map_err(|e| e.to_string())?;
    let store: object_store::Result<Arc<dyn ObjectStore>> = match &scheme {
        #[cfg(feature = "aws")]
        ObjectStoreScheme::AmazonS3 => {
            let builder = object_store::aws::AmazonS3Builder::from_env().with_url(url);
            let builder = builder.with_client_options(options()).with_retry(retry());
            builder.build().map(|store| Arc::new(store) as _)
        }
        #[cfg(feature = "gcp")]
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder = object_store::gcp::GoogleCloudStorageBuilder::from_env().with_url(url);
            let builder = builder.with_client_options(options()).with_retry(retry());
            builder.build().map(|store| Arc::new(store) as _)
        }
        #[cfg(feature = "azure")]
        ObjectStoreScheme::MicrosoftAzure => {
            let builder = object_store::azure::MicrosoftAzureBuilder::from_env().with_url(url);
            let builder = builder.with_client_options(options()).with_retry(retry());
            builder.build().map(|store| Arc::new(store) as _)
        }
        #[cfg(feature = "http")]
        ObjectStoreScheme::Http => {
            let origin = &parsed[..url::Position::BeforePath];
            let builder = object_store::http::HttpBuilder::new().with_url(origin);
            let options = options().with_allow_http(parsed.scheme() == "http");
            let builder = builder.with_client_options(options).with_retry(retry());
            builder.build().map(|store| Arc::new(store) as _)
        }
        _ => return Err(format!("{}: not a kind of bucket that this build knows", parsed.scheme())),
    };
    let prefix = Key::parse(path).map_err(|e| e.to_string())?;
    // Many WebDAV servers refuse it.
    let lists_trees = !matches!(scheme, ObjectStoreScheme::Http);
    store.map(|store| Client { store, prefix, lists_trees }).map_err(|e| crate::store::chain(&e))
}

/// Returns the options of the HTTP client. Endpoints of plain HTTP must be allowed by the operator.
fn options() -> ClientOptions {
    let options = ClientOptions::default().with_connect_timeout(CONNECT_TIME).with_timeout(REQUEST_TIME);
    let allowed = ["AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP"];
    let allow_http = allowed.iter().any(|name| std::env::var(name).is_ok_and(|value| value == "true"));
    options.with_allow_http(allow_http)
}

fn retry() -> RetryConfig {
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(50),
        max_backoff: Duration::from_secs(2),
        ..BackoffConfig::default()
    };
    RetryConfig { backoff, max_retries: RETRIES, retry_timeout: RETRY_TIME }
}
