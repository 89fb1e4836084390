//! The example of README.md.

use postcopy::{Options, Session};
use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let server = std::env::var("POSTCOPY_SERVER")?.parse()?;

    // Connects, fetches and checks the image's root, opens a userfaultfd. No page has come yet.
    let session = Session::open(&server, &"demo:v1".parse()?, Options::default())?;

    // The whole file as memory of this process. A page comes when it is touched.
    let memory = session.map("numbers.txt")?;
    println!("the last line begins with {:?}", memory[memory.len() - 8] as char);

    // Bring the rest in the background, and wait for it.
    session.fill()?;
    session.wait_resident(Duration::from_secs(30))?;
    println!("{} pages, {} faults", session.progress().total_pages, session.progress().faults);
    Ok(())
}
