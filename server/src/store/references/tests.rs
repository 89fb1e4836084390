//! Tests of the pages of references, against the set of the references' texts.

use super::listings::Bounds;
use super::*;
use crate::fixtures::store;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

/// Bounds with which the directories of these tests are large.
const NARROW: Bounds = Bounds { kept_bytes: 150, kept_keys: 4, selected_keys: 3 };
/// Bounds with which every listing is kept.
const WIDE: Bounds = Bounds { kept_bytes: 1 << 20, kept_keys: 1, selected_keys: 3 };

fn create(objects: &Objects, reference: &str) {
    let path = objects.layout.reference(&reference.parse().unwrap());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, "").unwrap();
}

fn delete(objects: &Objects, reference: &str) {
    fs::remove_file(objects.layout.reference(&reference.parse().unwrap())).unwrap();
}

fn text_of(entry: &Listed) -> String {
    match entry {
        Ok(reference) => reference.to_string(),
        Err(no_reference) => no_reference.text.clone(),
    }
}

/// Returns the texts of all pages. Calls `between` after each page.
fn texts(objects: &Objects, listings: &Listings, size: usize, mut between: impl FnMut()) -> Vec<String> {
    let mut texts = Vec::new();
    let mut after: Option<PageToken> = None;
    loop {
        let page = page(objects, listings, after.as_ref(), size).unwrap();
        assert!(page.entries.len() == size || page.next.is_none());
        texts.extend(page.entries.iter().map(text_of));
        let Some(next) = page.next else { return texts };
        // As a client sends it.
        after = Some(next.to_string().parse().unwrap());
        between();
    }
}

/// References whose parts and tags are few and have common beginnings, with every separator.
fn reference() -> impl Strategy<Value = String> {
    let part = prop::sample::select(vec!["a", "a-b", "a.b", "a0", "a_b", "b", "b--c", "0"]);
    let tag = prop::sample::select(vec!["1", "1.0", "1-0", "10", "1_", "A", "_tags", "latest"]);
    (prop::collection::vec(part, 1..4), tag).prop_map(|(parts, tag)| format!("{}:{tag}", parts.join("/")))
}

fn references() -> impl Strategy<Value = BTreeSet<String>> {
    prop::collection::btree_set(reference(), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn pages_of_any_size_are_the_sorted_set(references in references(), size in 1..12_usize) {
        let (_dir, store) = store();
        references.iter().for_each(|reference| create(&store.objects, reference));
        let sorted: Vec<String> = references.into_iter().collect();
        for bounds in [NARROW, WIDE, Bounds::default()] {
            let listings = Listings::new(bounds);
            for _ in 0..2 {
                prop_assert_eq!(&texts(&store.objects, &listings, size, || {}), &sorted);
            }
        }
        let listed: Vec<_> = list(&store.objects).unwrap().iter().map(ToString::to_string).collect();
        prop_assert_eq!(listed, sorted);
    }

    /// Each change is a reference that exists while an even number of pages has been sent, or an odd
    /// one.
    #[test]
    fn changes_between_pages_hide_and_repeat_no_other_reference(
        stay in references(),
        change in references(),
        size in 1..6_usize,
    ) {
        let (_dir, store) = store();
        let objects = &store.objects;
        stay.iter().for_each(|reference| create(objects, reference));
        let change: Vec<_> = change.difference(&stay).collect();
        for bounds in [NARROW, WIDE] {
            let listings = Listings::new(bounds);
            let exist = std::cell::Cell::new(false);
            let toggle = || {
                exist.set(!exist.get());
                let apply = if exist.get() { create } else { delete };
                change.iter().for_each(|reference| apply(objects, reference));
            };
            let shown = texts(objects, &listings, size, toggle);
            prop_assert!(shown.is_sorted_by(|a, b| a < b), "{:?}", shown);
            let shown: BTreeSet<String> = shown.into_iter().collect();
            prop_assert!(shown.is_superset(&stay), "{:?} are missing", stay.difference(&shown));
            prop_assert!(shown.iter().all(|text| stay.contains(text) || change.contains(&text)));
            if exist.get() {
                toggle();
            }
        }
    }

    #[test]
    fn escaped_names_are_of_their_own_and_give_the_name_back(names in prop::array::uniform2(".{0,12}")) {
        let escaped = names.clone().map(|name| {
            let mut text = String::new();
            names::escape(name.as_bytes(), &mut text);
            prop_assert_eq!(names::unescape(&text), name.as_bytes());
            prop_assert!(!text.contains(['/', ':', '@']));
            Ok(text)
        });
        let [a, b] = escaped;
        prop_assert_eq!(a? == b?, names[0] == names[1]);
    }
}

/// A directory's time says nothing shortly after a change, and a walk's listing nothing to another
/// walk.
#[test]
fn a_walk_shows_all_that_existed_when_it_began() {
    let (_dir, store) = store();
    let listings = Listings::new(WIDE);
    for n in 0..300 {
        create(&store.objects, &format!("a:{n:03}"));
        assert_eq!(texts(&store.objects, &listings, 200, || {}).len(), n + 1);
    }
}

#[test]
fn a_walk_does_not_read_a_large_directory_again_for_each_page() {
    let (_dir, store) = store();
    let objects = &store.objects;
    let listings = Listings::new(WIDE);
    (0..10).for_each(|n| create(objects, &format!("a:{n}")));
    let first = page(objects, &listings, None, 4).unwrap();
    create(objects, "a:9a");
    let second = page(objects, &listings, first.next.as_ref(), 100).unwrap();
    assert_eq!(second.entries.len(), 6, "the listing of the first page");
    // A walk that another server began has to see what existed then.
    let next = first.next.unwrap().of_another_walk();
    assert_eq!(page(objects, &listings, Some(&next), 100).unwrap().entries.len(), 7);
}

#[test]
fn entries_that_are_no_references_have_a_place_in_the_order() {
    let (dir, store) = store();
    let objects = &store.objects;
    let top = objects.layout.references();
    ["a:1", "a/b:1", "c:1"].iter().for_each(|reference| create(objects, reference));
    let bad: [(PathBuf, &str); 5] = [
        (top.join("_tags/x"), ":x"),
        (top.join("a/_tags/v 1~"), "a:v%201%7E"),
        (top.join("a/_tags/.swp"), "a:.swp"),
        (top.join("a:b/_tags/1"), "a%3Ab:1"),
        (top.join(std::ffi::OsStr::from_bytes(b"b\xff/_tags/1")), "b%FF:1"),
    ];
    for (path, _) in &bad {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    // These are neither: staged files, other files, links, directories without tags.
    for ignored in ["a/_tags/1#7", "a/file", "x#1"] {
        fs::write(top.join(ignored), "").unwrap();
    }
    fs::create_dir(top.join("no tags")).unwrap();
    fs::create_dir(top.join("d")).unwrap();
    symlink(top.join("a"), top.join("link")).unwrap();
    symlink(top.join("a/_tags"), top.join("d/_tags")).unwrap();
    fs::create_dir(top.join("e")).unwrap();
    fs::write(top.join("e/_tags"), "").unwrap();
    let expected = [":x", "a%3Ab:1", "a/b:1", "a:.swp", "a:1", "a:v%201%7E", "b%FF:1", "c:1"];
    for size in 1..10 {
        for bounds in [NARROW, WIDE] {
            assert_eq!(texts(objects, &Listings::new(bounds), size, || {}), expected);
        }
    }
    for (path, text) in &bad {
        let all = page(objects, &Listings::default(), None, 100).unwrap().entries;
        let error = all.into_iter().find(|entry| text_of(entry) == *text).unwrap().unwrap_err().error;
        let path = path.display().to_string();
        assert!(matches!(&error, StoreError::Damaged { object, .. } if *object == path), "{error}");
        // gc must not take such a store for one without references.
        assert!(matches!(list(objects), Err(StoreError::Damaged { .. })));
    }
    drop(dir);
}

#[test]
fn without_the_directory_of_references_there_is_an_error() {
    let (_dir, store) = store();
    fs::remove_dir(store.objects.layout.references()).unwrap();
    assert!(matches!(list(&store.objects), Err(StoreError::Io { .. })));
}

/// Names may be longer together than a path may be.
#[test]
fn a_directory_that_cannot_be_read_is_an_entry() {
    let (_dir, store) = store();
    let objects = &store.objects;
    ["a:1", "z:1"].iter().for_each(|reference| create(objects, reference));
    let part = "b".repeat(250);
    let mut path = objects.layout.references();
    // Each `..` leads to a shorter path of the directory that is made last.
    let mut dir = rustix::fs::open(&path, rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).unwrap();
    while path.as_os_str().len() <= 4096 {
        rustix::fs::mkdirat(&dir, &part, rustix::fs::Mode::RWXU).unwrap();
        dir = rustix::fs::openat(&dir, &part, rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty())
            .unwrap();
        path.push(&part);
    }
    let listings = Listings::default();
    let all = page(objects, &listings, None, 100).unwrap().entries;
    let [Ok(_), Err(below), Err(tags), .., Ok(_)] = &all[..] else { panic!("{all:?}") };
    assert!(below.text.ends_with('/') && matches!(below.error, StoreError::Io { .. }), "{below:?}");
    assert!(tags.text.ends_with(':'), "{tags:?}");
    let expected: Vec<_> = all.iter().map(text_of).collect();
    assert_eq!(texts(objects, &listings, 1, || {}), expected);
    assert!(matches!(list(objects), Err(StoreError::Io { .. })));
}
