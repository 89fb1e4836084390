//! The end of a session whose process lives on, and of a process whose session does.

use super::{SIGBUS, with_faulter};
use postcopy::Options;
use postcopy_tests::wait_until;
use std::time::Duration;

#[test]
fn the_owner_s_exit_ends_the_session_in_order() {
    with_faulter("the_owner_s_exit_ends_the_session_in_order", |source, mut faulter| {
        let session = source.attach(&faulter, Options::DEFAULT).unwrap();
        faulter.let_go();
        faulter.assert_reads(1, 0, source.pages(3, 1));
        faulter.kill();
        assert!(session.wait_end(Duration::from_secs(30)), "the pager looks for exited owners");
        assert_eq!(session.error(), None, "that is no loss");
    });
}

#[test]
fn a_session_s_end_leaves_right_bytes_or_sigbus_and_never_zeros() {
    with_faulter("a_session_s_end_leaves_right_bytes_or_sigbus_and_never_zeros", |source, mut faulter| {
        let session = source.attach(&faulter, Options::DEFAULT).unwrap();
        faulter.let_go();
        faulter.assert_reads(1, 13, source.pages(16, 16));
        assert!(session.end(Duration::from_secs(30)));
        faulter.assert_reads(1, 13, source.pages(16, 16));
        faulter.main.tell(&format!("read {} 1", faulter.at(1, 29)));
        assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, SIGBUS));
    });
}

/// If memory stayed registered after the end, the next mremap of it would wait for ever, because no
/// pager reads its event.
#[test]
fn a_session_s_end_leaves_no_memory_registered_that_moves_all_the_time() {
    let test = "a_session_s_end_leaves_no_memory_registered_that_moves_all_the_time";
    for round in 0..20 {
        with_faulter(test, move |source, mut faulter| {
            let session = source.attach_known(&faulter, Options::DEFAULT.hold_causers(true));
            faulter.main.does(&format!("shuttle {} 8", faulter.at(0, 16)));
            faulter.assert_reads(1, 13, source.pages(16, 16));
            assert!(session.end(Duration::from_secs(30)), "round {round}");
            // This process has the descriptor still, so the kernel waits for a reader.
            let before: usize = faulter.main.ask("moves").parse().unwrap();
            wait_until("it moves on", || faulter.main.ask("moves").parse::<usize>().unwrap() > before + 200);
            faulter.assert_reads(1, 13, source.pages(16, 16));
        });
    }
}
