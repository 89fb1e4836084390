//! A container of runc.

use super::with_criu;
use postcopy_tests::criu::{compile_statically, status, wait_for_status};
use postcopy_tests::{skip, wait_until};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A container of runc; deleted when this is dropped.
struct Container {
    root: PathBuf,
    criu: PathBuf,
}

impl Container {
    fn runc(&self, args: &[&str]) -> std::process::ExitStatus {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&self.root).arg("--criu").arg(&self.criu).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.runc(&["delete", "--force", "postcopy-test"]);
    }
}

#[test]
fn a_container_of_runc_is_restored() {
    let name = "a_container_of_runc_is_restored";
    with_criu(name, |bench| {
        if Command::new("runc").arg("--version").output().is_err() {
            return skip(name, "there is no runc");
        }
        let path = |name: &str| bench.path(name).to_str().unwrap().to_owned();
        for directory in ["proc", "dev", "sys", "tmp"] {
            fs::create_dir_all(bench.path("bundle/rootfs").join(directory)).unwrap();
        }
        // Nothing else is in the container.
        let program = compile_statically("heap", &bench.path("bundle/rootfs"));
        assert!(program.exists());
        let made = Command::new("runc").arg("spec").current_dir(bench.path("bundle")).status();
        assert!(made.unwrap().success());
        let config = bench.path("bundle/config.json");
        let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = serde_json::json!(["/heap", "32", "/tmp/status", "0"]);
        spec["root"]["readonly"] = false.into();
        let keep = |list: &mut serde_json::Value, without: &[&str]| {
            let is_kept = |item: &serde_json::Value| !without.iter().any(|kind| item["type"] == *kind);
            list.as_array_mut().unwrap().retain(is_kept);
        };
        keep(&mut spec["linux"]["namespaces"], &["network", "cgroup"]);
        keep(&mut spec["mounts"], &["cgroup"]);
        fs::write(&config, spec.to_string()).unwrap();
        let criu = bench.criu.command("usr/sbin/criu");
        let words: Vec<_> =
            [criu.get_program()].into_iter().chain(criu.get_args()).map(|w| w.to_str().unwrap()).collect();
        fs::write(bench.path("criu"), format!("#!/bin/sh\nexec {} \"$@\"\n", words.join(" "))).unwrap();
        fs::set_permissions(bench.path("criu"), PermissionsExt::from_mode(0o755)).unwrap();
        let container = Container { root: bench.path("runc"), criu: bench.path("criu") };
        let status_file = bench.path("bundle/rootfs/tmp/status");
        assert!(container.runc(&["run", "--detach", "--bundle", &path("bundle"), "postcopy-test"]).success());
        wait_for_status(&status_file);
        fs::create_dir(bench.path("work")).unwrap();
        let (images, work) = (path("images"), path("work"));
        let checkpoint = ["checkpoint", "--image-path", &images, "--work-path", &work, "postcopy-test"];
        assert!(
            container.runc(&checkpoint).success(),
            "{}",
            fs::read_to_string(bench.path("work/dump.log")).unwrap()
        );
        bench.push(Path::new(&images), "app");
        let (lazy, _) = bench.pull("app", "lazy");
        let mut daemon = bench.daemon(&lazy, "app", &["-W", &work, "--fill", "nothing"]);
        let lazy = lazy.to_str().unwrap();
        let bundle = path("bundle");
        let restore =
            ["restore", "--lazy-pages", "--image-path", lazy, "--work-path", &work, "--bundle", &bundle];
        let restored = container.runc(&[&restore[..], &["--detach", "postcopy-test"]].concat());
        assert!(restored.success(), "{}", fs::read_to_string(bench.path("work/restore.log")).unwrap());
        daemon.kill_worker();
        wait_for_status(&status_file);
        assert!(container.runc(&["kill", "postcopy-test", "USR1"]).success());
        wait_until("a check of all memory", || status::<3>(&status_file)[2] == 1);
        assert_eq!(status::<2>(&status_file)[1], 0, "pages were wrong");
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
    });
}
