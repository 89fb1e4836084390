//! Pages of files by the time at which they come: address across, time as colour.

use super::output::bytes;
use postcopy::proto::page::PAGE_BYTES;
use postcopy::proto::v1::PageSpan;
use std::fmt::Write;

/// Cells across.
const COLUMNS: usize = 64;
/// Cells of a file, at most: 16 rows.
const CELLS: usize = 16 * COLUMNS;
/// From early to late, for a terminal.
const SHADES: [char; 4] = ['█', '▓', '▒', '░'];
const EDGE: usize = 12;

/// A file's cells: how many of the pages in each come, and when, on average: from 0 to 1.
#[derive(Debug)]
struct FileMap {
    path: String,
    size_bytes: u64,
    pages: u64,
    cells: Vec<Option<f64>>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct HeatMap {
    files: Vec<FileMap>,
    /// What the others are.
    others: &'static str,
}

impl HeatMap {
    /// Of the files with pages among `spans`, which are in the order of their coming; what is said of other pages.
    pub(crate) fn new(files: &[(String, u64)], spans: &[PageSpan], others: &'static str) -> Self {
        let all: u64 = spans.iter().map(|span| u64::from(span.count)).sum();
        let mut maps = Vec::new();
        for (place, (path, size_bytes)) in (0_u32..).zip(files) {
            let pages = usize::try_from(size_bytes.div_ceil(PAGE_BYTES as u64)).unwrap_or(usize::MAX);
            let of_cell = pages.div_ceil(CELLS).max(1);
            let mut sums = vec![(0_u64, 0_u64); pages.div_ceil(of_cell)];
            let (mut before, mut count) = (0, 0);
            for span in spans {
                if span.file == place {
                    let end = (span.first as usize + span.count as usize).min(pages);
                    for (time, page) in (before..).zip(span.first as usize..end) {
                        let (times, sum) = &mut sums[page / of_cell];
                        *times += 1;
                        *sum += time;
                        count += 1;
                    }
                }
                before += u64::from(span.count);
            }
            #[expect(clippy::cast_precision_loss, reason = "a colour")]
            let cell = |(times, sum): (u64, u64)| (times > 0).then(|| sum as f64 / times as f64 / all as f64);
            let cells = sums.into_iter().map(cell).collect();
            if count > 0 {
                maps.push(FileMap { path: printable(path), size_bytes: *size_bytes, pages: count, cells });
            }
        }
        Self { files: maps, others }
    }

    /// For a terminal: a character a cell, dense ones come first.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for map in &self.files {
            let _ = writeln!(text, "{} ({}, {} pages)", map.path, bytes(map.size_bytes), map.pages);
            for row in map.cells.chunks(COLUMNS) {
                text.push_str("  ");
                text.extend(row.iter().map(|cell| cell.map_or('·', shade)));
                text.push('\n');
            }
        }
        text + &format!("█ first … ░ last, · {}\n", self.others)
    }

    /// The same as a picture.
    pub(crate) fn svg(&self) -> String {
        let rows = |map: &FileMap| map.cells.len().div_ceil(COLUMNS);
        let height: usize = self.files.iter().map(|map| (rows(map) + 3) * EDGE).sum::<usize>() + 2 * EDGE;
        let width = (COLUMNS + 2) * EDGE;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"sans-serif\" font-size=\"{EDGE}\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
        );
        let mut y = EDGE;
        for map in &self.files {
            let (x, baseline) = (EDGE, y + EDGE);
            let name = escaped(&map.path);
            let size = bytes(map.size_bytes);
            let _ =
                writeln!(svg, "<text x=\"{x}\" y=\"{baseline}\">{name} ({size}, {} pages)</text>", map.pages);
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
        let _ = writeln!(
            svg,
            "<text x=\"{EDGE}\" y=\"{}\">dark: first, light: last, grey: {}</text>",
            y + EDGE / 2,
            self.others
        );
        svg + "</svg>\n"
    }
}

/// Which of so many steps a time is in.
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

/// A name may hold anything: nothing of it is for the terminal to obey, or is no XML.
pub(super) fn printable(name: &str) -> String {
    name.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
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
            assert!(drawn.contains("a\\u{1b}]0;x\\u{7}é (4.00 KiB, 1 pages)"), "{drawn}");
        }
    }

    #[test]
    fn early_pages_are_dense_and_others_are_dots() {
        let files = [("a".to_owned(), 0), ("b<c".to_owned(), 8 * 4096), ("d".to_owned(), 4096)];
        let span = |first, count| PageSpan { file: 1, first, count };
        let map = HeatMap::new(&files, &[span(5, 1), span(0, 2), span(7, 1)], "not");
        assert!(map.text().contains("b<c (32.00 KiB, 4 pages)\n  ▓▒···█·░\n"), "{}", map.text());
        let svg = map.svg();
        assert_eq!(svg.matches("fill=\"#eee\"").count(), 4);
        assert!(svg.contains("b&lt;c") && svg.ends_with("</svg>\n"));
    }
}
