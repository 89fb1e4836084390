//! Other users of the machine, and peers that are no machines.

use super::{Snapshot, with_root};
use postcopy_tests::cli::postcopy;
use postcopy_tests::daemon::{Daemon, runtime_root};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// A daemon that is started with umask 0.
fn daemon_with_umask_0(snapshot: &Snapshot, root: &Path, more: &[&str]) -> Daemon {
    let command = postcopy(snapshot.server.address(), snapshot.args(&snapshot.socket(), more));
    let mut shell = Command::new("sh");
    shell.args(["-c", "umask 0; exec \"$@\"", "-"]).arg(command.get_program()).args(command.get_args());
    shell.env("POSTCOPY_SERVER", snapshot.server.address().to_string());
    let daemon = Daemon::spawn_as(root, shell);
    daemon.assert_says("ready: ");
    daemon
}

#[test]
fn another_user_reaches_neither_a_socket_nor_a_trace() {
    with_root("strangers::another_user_reaches_neither_a_socket_nor_a_trace", || {
        let (snapshot, root) = (Snapshot::push(4), runtime_root());
        std::fs::set_permissions(snapshot.folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let traces = snapshot.folder.path().join("traces");
        let daemon = daemon_with_umask_0(&snapshot, root.path(), &["--trace", traces.to_str().unwrap()]);
        let script = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])";
        let mut stranger = Command::new("setpriv");
        stranger.args(["--reuid=65534", "--regid=65534", "--clear-groups", "python3", "-c", script]);
        let output = stranger.arg(snapshot.socket()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("Permission denied"), "{said}");
        assert_eq!(mode(&snapshot.socket()), 0o600);
        let mut vmm = snapshot.vmm(&["small:4"]);
        vmm.assert_right();
        assert_eq!(mode(&traces), 0o700);
        let written = std::fs::read_dir(&traces).unwrap().map(|entry| mode(&entry.unwrap().path()));
        assert_eq!(written.collect::<Vec<_>>(), [0o600]);
        let state = super::files_of(&daemon, "").into_iter().filter(|path| path.is_file());
        assert!(state.map(|path| mode(&path)).all(|mode| mode == 0o600));
    });
}
