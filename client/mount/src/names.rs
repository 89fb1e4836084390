//! The references of the server, as directories of names and links of tags.

use crate::BY_DIGEST;
use futures_util::future::BoxFuture;
use postcopy::proto::digest::Digest;
use postcopy::proto::reference::Reference;
use postcopy::proto::v1;
use postcopy::{Patience, Remote, RemoteError, ServerAddress};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// Time for which a list of the server's references is used: a walk of the tree takes one list.
const FRESH: Duration = Duration::from_secs(1);
/// A list that takes longer than this is not read anew for a name that it lacks.
const QUICK: Duration = Duration::from_millis(100);
/// Most references of a list, some 100 MiB.
const MAX_REFERENCES: usize = 1 << 20;

/// The references that the mount shows.
#[derive(Debug)]
pub(crate) struct Names {
    address: ServerAddress,
    /// None: all of the server.
    only: Option<Arc<BTreeSet<String>>>,
    /// The last list and its time. Locked while the server lists, so that a burst of look-ups
    /// becomes one list.
    listed: Mutex<Option<Listed>>,
    /// The connection for look-ups. Locked to take or replace it.
    remote: Mutex<Option<Remote>>,
}

/// A list of references, the time of the request for it, and the time that it took.
#[derive(Debug)]
struct Listed {
    asked: Instant,
    took: Duration,
    references: Arc<BTreeSet<String>>,
}

/// The meaning of a name in a directory of names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    /// A directory; its path.
    Directory(String),
    /// A link; its reference.
    Tag(String),
}

impl Names {
    /// `only` are the references to show, `name:tag`; None: all.
    pub(crate) fn new(address: ServerAddress, only: Option<BTreeSet<String>>) -> Self {
        let (listed, remote) = (Mutex::default(), Mutex::default());
        Self { address, only: only.map(Arc::new), listed, remote }
    }

    /// Returns the connection of earlier look-ups, or a new one.
    async fn connection(&self, is_new: bool) -> Result<Remote, RemoteError> {
        let mut remote = self.remote.lock().await;
        match &*remote {
            Some(remote) if !is_new => Ok(remote.clone()),
            _ => Ok(remote.insert(Remote::connect(self.address.clone()).await?).clone()),
        }
    }

    /// Returns the references, `name:tag`, from a list that was requested at `since` or later, or
    /// in the last moments if lists take long.
    async fn list(&self, since: Instant) -> Result<Arc<BTreeSet<String>>, RemoteError> {
        if let Some(only) = &self.only {
            return Ok(Arc::clone(only));
        }
        let mut listed = self.listed.lock().await;
        if let Some(Listed { asked, took, references }) = &*listed
            && (*asked >= since || (*took > QUICK && asked.elapsed() < FRESH))
        {
            return Ok(Arc::clone(references));
        }
        let asked = Instant::now();
        let references = Arc::new(self.read_list().await?);
        *listed = Some(Listed { asked, took: asked.elapsed(), references: Arc::clone(&references) });
        Ok(references)
    }

    async fn read_list(&self) -> Result<BTreeSet<String>, RemoteError> {
        match list_of(&self.connection(false).await?).await {
            // The connection was cut since the last look-up.
            Err(error) if error.is_no_answer() => list_of(&self.connection(true).await?).await,
            other => other,
        }
    }

    /// Returns the children of the directory of `path`, "" or "a/b", in order, each once. A
    /// directory hides a tag of the same name.
    pub(crate) async fn children(&self, path: &str) -> Result<Vec<(String, Named)>, RemoteError> {
        Ok(children(&*self.list(moments_ago()).await?, path))
    }

    /// Finds `name` in the directory of `path`.
    pub(crate) async fn child(&self, path: &str, name: &str) -> Result<Option<Named>, RemoteError> {
        let tag = format!("{path}:{name}");
        let began = Instant::now();
        let mut found = child(&*self.list(moments_ago()).await?, path, name);
        if found.is_none() {
            // It may be younger than the list.
            found = child(&*self.list(began).await?, path, name);
        }
        let Ok(reference @ Reference::Tag(_)) = tag.parse() else { return Ok(found) };
        if found.is_some() || self.only.is_some() {
            return Ok(found);
        }
        match self.resolve(&reference).await {
            Ok(_) => Ok(Some(Named::Tag(tag))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns the image that a reference stands for now.
    pub(crate) async fn resolve(&self, reference: &Reference) -> Result<Digest, RemoteError> {
        match self.connection(false).await?.resolve(reference).await {
            Err(error) if error.is_no_answer() => self.connection(true).await?.resolve(reference).await,
            other => other,
        }
    }
}

/// Returns the time from which on a list is new enough.
fn moments_ago() -> Instant {
    Instant::now().checked_sub(FRESH).unwrap_or_else(Instant::now)
}

async fn list_of(remote: &Remote) -> Result<BTreeSet<String>, RemoteError> {
    let (mut all, mut page_token) = (BTreeSet::new(), String::new());
    loop {
        let request = v1::ListImagesRequest { page_size: 0, page_token };
        let ask = || -> BoxFuture<'_, _> {
            let (mut images, request) = (remote.images(), request.clone());
            Box::pin(async move { images.list_images(request).await })
        };
        let page = remote.ask("listing the images", Patience::Short, ask).await?;
        let before = all.len();
        let valid = page.images.into_iter().filter(|image| is_valid(&image.reference));
        all.extend(valid.map(|image| image.reference));
        page_token = page.next_page_token;
        if page_token.is_empty() || all.len() == before || all.len() > MAX_REFERENCES {
            return Ok(all);
        }
    }
}

fn is_valid(reference: &str) -> bool {
    matches!(reference.parse(), Ok(Reference::Tag(_))) && reference.contains(':')
}

fn below(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!("{path}/") }
}

fn child(references: &BTreeSet<String>, path: &str, name: &str) -> Option<Named> {
    let directory = format!("{}{name}", below(path));
    let has = |beginning: String| {
        references.range(beginning.clone()..).next().is_some_and(|found| found.starts_with(&beginning))
    };
    if has(format!("{directory}/")) || has(format!("{directory}:")) {
        return Some(Named::Directory(directory));
    }
    let tag = format!("{path}:{name}");
    references.contains(&tag).then_some(Named::Tag(tag))
}

fn children(references: &BTreeSet<String>, path: &str) -> Vec<(String, Named)> {
    let mut names = BTreeSet::new();
    // A name of its own, of the images by digest.
    let is_free = |name: &String| !(path.is_empty() && name == BY_DIGEST);
    let prefix = below(path);
    for reference in references.range(prefix.clone()..).take_while(|found| found.starts_with(&prefix)) {
        let rest = &reference[prefix.len()..];
        names.insert(rest.split(['/', ':']).next().unwrap_or_default().to_owned());
    }
    let tags = format!("{path}:");
    let tagged = references.range(tags.clone()..).take_while(|found| found.starts_with(&tags));
    names.extend(tagged.map(|found| found[tags.len()..].to_owned()));
    names
        .into_iter()
        .filter(is_free)
        .filter_map(|name| child(references, path, &name).map(|named| (name, named)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_become_directories_and_links() {
        let references = ["app:latest", "app:v1", "app/web:v1", "app/web/x:y", "other:v1", "apple:z"];
        let references: BTreeSet<String> = references.into_iter().map(ToOwned::to_owned).collect();
        let names = |path: &str| {
            let children = children(&references, path);
            for (name, named) in &children {
                assert_eq!(child(&references, path, name).as_ref(), Some(named));
            }
            children.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(names(""), ["app", "apple", "other"]);
        assert_eq!(names("app"), ["latest", "v1", "web"]);
        assert_eq!(names("app/web"), ["v1", "x"]);
        assert_eq!(child(&references, "app", "web"), Some(Named::Directory("app/web".into())));
        assert_eq!(child(&references, "app/web", "v1"), Some(Named::Tag("app/web:v1".into())));
        assert_eq!(child(&references, "app", "none"), None);
        assert_eq!(child(&references, "", "ap"), None);
    }
}
