//! Heat maps of files: the address of a page as the place, its install time as the colour.

use super::output::{bytes, counted, printable};
use postcopy::proto::page::{PAGE_BYTES, to_usize};
use postcopy::proto::v1::PageSpan;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::Range;

/// Cells in one row.
const COLUMNS: usize = 64;
/// Most cells of a file: 16 rows.
const CELLS: usize = 16 * COLUMNS;
/// Most files of a drawing: those with the most pages.
const FILES: usize = 64;
/// Shades from early to late, for a terminal.
const SHADES: [char; 4] = ['█', '▓', '▒', '░'];
const EDGE: usize = 12;
/// Most characters of a name in a drawing.
const NAME: usize = 100;

/// A file's cells: the mean install time of the installed pages in each, from 0 to 1.
#[derive(Debug)]
struct FileMap {
    path: String,
    size_bytes: u64,
    pages: u64,
    cells: Vec<Option<f64>>,
}

impl FileMap {
    /// Returns the size of the file, and its share of installed pages.
    fn amount(&self) -> String {
        let all = counted(pages_of(self.size_bytes), "page", "pages");
        format!("{}, {} of {all}", bytes(self.size_bytes), self.pages)
    }
}

/// A run of a file's pages, with the number of pages that were installed before the run.
type Coming = (u64, Range<u64>);

/// The drawn files, and the count of those that are left out.
#[derive(Debug)]
pub(crate) struct HeatMap {
    files: Vec<FileMap>,
    /// Number of files that are not drawn, and of their installed pages.
    left_out: (usize, u64),
    /// The legend for pages that are in no span.
    others: &'static str,
}

impl HeatMap {
    /// Builds the maps of the files that have pages in `spans`, which are in install order.
    /// `others` is the legend for all other pages.
    pub(crate) fn new(files: &[(String, u64)], spans: &[PageSpan], others: &'static str) -> Self {
        // The spans of each file, each with the number of pages before it.
        let mut coming: BTreeMap<u32, (u64, Vec<Coming>)> = BTreeMap::new();
        let mut before = 0_u64;
        for span in spans {
            let size_bytes = files.get(span.file as usize).map_or(0, |(_, size_bytes)| *size_bytes);
            let first = u64::from(span.first);
            let pages = first..(first + u64::from(span.count)).min(pages_of(size_bytes));
            if !pages.is_empty() {
                let (count, spans) = coming.entry(span.file).or_default();
                *count += pages.end - pages.start;
                spans.push((before, pages));
            }
            before += u64::from(span.count);
        }
        let mut drawn: Vec<_> = coming.iter().map(|(place, (count, _))| (*count, *place)).collect();
        drawn.sort_unstable_by_key(|(count, place)| (Reverse(*count), *place));
        let left_out = drawn.split_off(drawn.len().min(FILES));
        let left_out = (left_out.len(), left_out.iter().map(|(count, _)| count).sum());
        drawn.sort_unstable_by_key(|(_, place)| *place);
        let map = |(count, place): (u64, u32)| {
            let (path, size_bytes) = &files[place as usize];
            let cells = cells(pages_of(*size_bytes), &coming[&place].1, before);
            FileMap { path: printable(path), size_bytes: *size_bytes, pages: count, cells }
        };
        Self { files: drawn.into_iter().map(map).collect(), left_out, others }
    }

    /// Returns the line about files that are not drawn, if there are any.
    fn rest(&self) -> Option<String> {
        let (files, pages) = self.left_out;
        (files > 0).then(|| {
            let files = counted(files as u64, "other file", "other files");
            format!("and {files}, with {} in all", counted(pages, "page", "pages"))
        })
    }

    /// Draws the maps for a terminal: one character for each cell, dense ones for early pages.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for map in &self.files {
            let _ = writeln!(text, "{} ({})", map.path, map.amount());
            for row in map.cells.chunks(COLUMNS) {
                text.push_str("  ");
                text.extend(row.iter().map(|cell| cell.map_or('·', shade)));
                text.push('\n');
            }
        }
        if let Some(rest) = self.rest() {
            let _ = writeln!(text, "{rest}");
        }
        text + &format!("█ first … ░ last, · {}\n", self.others)
    }

    /// Draws the maps as an SVG picture.
    pub(crate) fn svg(&self) -> String {
        let rows = |map: &FileMap| map.cells.len().div_ceil(COLUMNS);
        let height: usize = self.files.iter().map(|map| (rows(map) + 3) * EDGE).sum::<usize>()
            + (2 + 2 * usize::from(self.left_out.0 > 0)) * EDGE;
        let width = (COLUMNS + 2) * EDGE;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"sans-serif\" font-size=\"{EDGE}\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
        );
        let mut y = EDGE;
        for map in &self.files {
            let (x, baseline) = (EDGE, y + EDGE);
            let name = escaped(&shortened(&map.path));
            let _ = writeln!(svg, "<text x=\"{x}\" y=\"{baseline}\">{name} ({})</text>", map.amount());
            y += 2 * EDGE;
            for (index, cell) in map.cells.iter().enumerate() {
                let (x, y) = (EDGE + index % COLUMNS * EDGE, y + index / COLUMNS * EDGE);
                let fill = cell.map_or_else(|| "#eee".to_owned(), colour);
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{0}\" height=\"{0}\" fill=\"{fill}\"/>",
                    EDGE - 1
                );
            }
            y += (rows(map) + 1) * EDGE;
        }
        if let Some(rest) = self.rest() {
            let _ = writeln!(svg, "<text x=\"{EDGE}\" y=\"{}\">{rest}</text>", y + EDGE / 2);
            y += 2 * EDGE;
        }
        let _ = writeln!(
            svg,
            "<text x=\"{EDGE}\" y=\"{}\">dark: first, light: last, grey: {}</text>",
            y + EDGE / 2,
            self.others
        );
        svg + "</svg>\n"
    }
}

/// Returns the number of pages of a file.
fn pages_of(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(PAGE_BYTES as u64)
}

/// Returns a file's cells: the mean install time of the pages in each, as a share of `all` pages.
/// `spans` are the file's own, each with the number of pages before it.
fn cells(pages: u64, spans: &[Coming], all: u64) -> Vec<Option<f64>> {
    let of_cell = pages.div_ceil(CELLS as u64).max(1);
    let mut sums = vec![(0_u64, 0.0); to_usize(pages.div_ceil(of_cell))];
    #[expect(clippy::cast_precision_loss, reason = "a colour")]
    let real = |n: u64| n as f64;
    for (before, span) in spans {
        let mut next = span.start;
        while next < span.end {
            let cell = next / of_cell;
            let count = ((cell + 1) * of_cell).min(span.end) - next;
            let (times, sum) = &mut sums[to_usize(cell)];
            *times += count;
            *sum += real(count) * (real(before + (next - span.start)) + real(count - 1) / 2.0);
            next += count;
        }
    }
    sums.into_iter().map(|(times, sum)| (times > 0).then(|| sum / real(times) / real(all))).collect()
}

/// Returns the step, of `steps`, that a time is in.
fn step(time: f64, steps: usize) -> usize {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0 to 1"
    )]
    let step = (time * steps as f64) as usize;
    step.min(steps - 1)
}

fn shade(time: f64) -> char {
    SHADES[step(time, SHADES.len())]
}

fn colour(time: f64) -> String {
    // From dark blue to yellow.
    let mix = |from: u32, to: u32| {
        let step = u32::try_from(step(time, 256)).expect("less than 256");
        (from * (255 - step) + to * step) / 255
    };
    format!("#{:02x}{:02x}{:02x}", mix(0x1b, 0xf9), mix(0x2a, 0xc8), mix(0x6b, 0x2d))
}

/// Returns the end of a name that is too long for a drawing.
pub(super) fn shortened(name: &str) -> String {
    match name.char_indices().rev().nth(NAME) {
        Some((at, c)) => format!("…{}", &name[at + c.len_utf8()..]),
        None => name.to_owned(),
    }
}

pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strange_names_are_shown_and_spans_beyond_a_file_are_not() {
        let files = [("a\u{1b}]0;x\u{7}é".to_owned(), 4096)];
        let map = HeatMap::new(&files, &[PageSpan { file: 0, first: 0, count: u32::MAX }], "not");
        for drawn in [map.text(), map.svg()] {
            assert!(drawn.contains("a\\u{1b}]0;x\\u{7}é (4.00 KiB, 1 of 1 page)"), "{drawn}");
        }
    }

    #[test]
    fn files_with_few_pages_are_left_out_and_long_names_are_cut() {
        let long = format!("{}é", "b/".repeat(100));
        let count = u32::try_from(FILES).unwrap() + 3;
        let files: Vec<_> = (0..count).map(|n| (format!("{long}{n}"), u64::from(n + 1) * 4096)).collect();
        let spans: Vec<_> = (0..count).map(|n| PageSpan { file: n, first: 0, count: n + 1 }).collect();
        let map = HeatMap::new(&files, &spans, "not");
        for drawn in [map.text(), map.svg()] {
            assert_eq!(drawn.matches(" KiB, ").count(), FILES);
            assert!(drawn.contains("and 3 other files, with 6 pages in all"), "{drawn}");
        }
        assert!(map.text().contains(&format!("{long}9 (")) && !map.text().contains(&format!("{long}2 (")));
        assert!(map.svg().contains(&format!(">…{}9 (", &long[long.len() - 2 - 98..])), "{}", map.svg());
    }

    #[test]
    fn early_pages_are_dense_and_others_are_dots() {
        let files = [("a".to_owned(), 0), ("b<c".to_owned(), 8 * 4096), ("d".to_owned(), 4096)];
        let span = |first, count| PageSpan { file: 1, first, count };
        let map = HeatMap::new(&files, &[span(5, 1), span(0, 2), span(7, 1)], "not");
        assert!(map.text().contains("b<c (32.00 KiB, 4 of 8 pages)\n  ▓▒···█·░\n"), "{}", map.text());
        let svg = map.svg();
        assert_eq!(svg.matches("fill=\"#eee\"").count(), 4);
        assert!(svg.contains("b&lt;c") && svg.ends_with("</svg>\n"));
    }
}
