//! Where results go: raw values as JSON, plots, and tables between the marks of a document.

use anyhow::{Context, Result};
use std::path::PathBuf;

/// A set of results.
pub(crate) struct Report {
    /// Of the files, and of the marks.
    pub(crate) name: String,
    pub(crate) table: String,
    pub(crate) plot: Option<String>,
    pub(crate) raw: serde_json::Value,
}

/// A directory for plots and raw values, and a document for tables.
pub(crate) struct Documents {
    pub(crate) folder: PathBuf,
    pub(crate) document: PathBuf,
}

impl Documents {
    /// Writes a report, in the place of an earlier one of its name.
    pub(crate) fn write(&self, report: &Report) -> Result<()> {
        let Report { name, table, plot, raw } = report;
        std::fs::create_dir_all(&self.folder)?;
        std::fs::write(self.folder.join(format!("{name}.json")), serde_json::to_string(raw)? + "\n")?;
        let mut body = format!("{table}\n[Raw values](bench/{name}.json)\n");
        if let Some(plot) = plot {
            std::fs::write(self.folder.join(format!("{name}.svg")), plot)?;
            body = format!("![{name}](bench/{name}.svg)\n\n{body}");
        }
        let text = std::fs::read_to_string(&self.document).context("the document")?;
        std::fs::write(&self.document, placed(&text, name, &body))?;
        Ok(())
    }
}

/// The text with `body` between the marks of that name, which come last where there are none.
fn placed(text: &str, name: &str, body: &str) -> String {
    let (begin, end) = (format!("<!-- begin {name} -->\n"), format!("<!-- end {name} -->\n"));
    let found = text.split_once(&begin).and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    let (before, after) = found.unwrap_or((text, ""));
    let gap = if found.is_none() { "\n" } else { "" };
    format!("{before}{gap}{begin}{body}{end}{after}")
}

#[cfg(test)]
mod tests {
    use super::placed;

    #[test]
    fn a_body_takes_the_place_of_an_earlier_one() {
        let first = placed("before\n", "a", "one\n");
        let both = placed(&first, "b", "two\n");
        let again = placed(&both, "a", "three\n");
        assert_eq!(first, "before\n\n<!-- begin a -->\none\n<!-- end a -->\n");
        assert_eq!(again, both.replace("one", "three"));
    }
}
