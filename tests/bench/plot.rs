//! Plots as SVG: bars with their spread, and lines.

use std::fmt::Write;

const WIDTH: f64 = 760.0;
const FONT: &str = "font-family=\"sans-serif\" font-size=\"13\"";
const COLORS: [&str; 6] = ["#1f77b4", "#d95f02", "#2ca02c", "#7570b3", "#e7298a", "#666666"];

/// A bar: its middle, and the quartiles around it.
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) low: f64,
    pub(crate) middle: f64,
    pub(crate) high: f64,
    /// Which bars belong together: the index of a colour.
    pub(crate) group: usize,
}

/// Horizontal bars, in their order, with numbers of that unit.
pub(crate) fn bars(title: &str, unit: &str, bars: &[Bar]) -> String {
    let (left, top, step) = (250.0, 46.0, 30.0);
    let most = bars.iter().map(|bar| bar.high).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let x = |value: f64| left + value / most * (WIDTH - left - 90.0);
    let mut svg = String::new();
    let mut y = top;
    for Bar { name, low, middle, high, group } in bars {
        let (to, color, text) = (x(*middle), COLORS[group % COLORS.len()], y + 16.0);
        let (from, until, line) = (x(*low), x(*high), y + 11.0);
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{text:.1}\" text-anchor=\"end\" {FONT}>{}</text>\n\
             <rect x=\"{left}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"22\" fill=\"{color}\"/>\n\
             <path d=\"M{from:.1} {line:.1}H{until:.1}\" stroke=\"#222\" stroke-width=\"2\"/>\n\
             <text x=\"{:.1}\" y=\"{text:.1}\" {FONT}>{}</text>",
            left - 8.0,
            escaped(name),
            to - left,
            until.max(to) + 6.0,
            number(*middle, unit)
        );
        y += step;
    }
    frame(title, y + 12.0, &svg)
}

/// A line through points, which are in order of x.
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Lines over an axis of powers of two, from zero up.
pub(crate) fn lines(title: &str, below: &str, unit: &str, lines: &[Line]) -> String {
    let (left, top, tall) = (90.0, 50.0, 300.0);
    let points = || lines.iter().flat_map(|line| &line.points);
    let most = points().map(|point| point.1).fold(0.0, f64::max).max(f64::MIN_POSITIVE) * 1.05;
    let first = points().map(|point| point.0).fold(f64::MAX, f64::min).log2();
    let last = points().map(|point| point.0).fold(f64::MIN, f64::max).log2();
    let x = |value: f64| left + (value.log2() - first) / (last - first).max(1.0) * (WIDTH - left - 40.0);
    let y = |value: f64| top + tall * (1.0 - value / most);
    let mut svg = String::new();
    for quarter in 0..=4 {
        let value = most * f64::from(quarter) / 4.0;
        let (at, end) = (y(value), WIDTH - 40.0);
        let _ = writeln!(
            svg,
            "<path d=\"M{left} {at:.1}H{end}\" stroke=\"#ddd\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" {FONT}>{}</text>",
            left - 6.0,
            at + 4.0,
            number(value, unit)
        );
    }
    for (index, Line { name, points }) in lines.iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        let path: Vec<String> = points.iter().map(|(a, b)| format!("{:.1},{:.1}", x(*a), y(*b))).collect();
        let label = top + 16.0 + 18.0 * f64::from(u32::try_from(index).unwrap_or(0));
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>\n\
             <text x=\"{:.1}\" y=\"{label:.1}\" fill=\"{color}\" {FONT}>{}</text>",
            path.join(" "),
            left + 12.0,
            escaped(name)
        );
    }
    for (value, _) in lines.first().map_or(&[][..], |line| &line.points) {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" {FONT}>{value}</text>",
            x(*value),
            top + tall + 20.0
        );
    }
    let middle = (left + WIDTH) / 2.0;
    let _ = writeln!(
        svg,
        "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\" {FONT}>{}</text>",
        top + tall + 42.0,
        escaped(below)
    );
    frame(title, top + tall + 56.0, &svg)
}

fn frame(title: &str, height: f64, inside: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" height=\"{height:.0}\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"12\" y=\"26\" font-family=\"sans-serif\" font-size=\"13\" font-weight=\"bold\">{}</text>\n{inside}</svg>\n",
        escaped(title)
    )
}

fn number(value: f64, unit: &str) -> String {
    let digits = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {unit}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
