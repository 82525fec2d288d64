//! `tests/run` itself, without servers: its steps are stubs, and its tests those of a small crate, run by the real cargo.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use crate::support::{Command, unique};

/// The small crate is built.
const DEADLINE: Duration = Duration::from_secs(120);

/// A copy of the script among stubs, each of which notes its call in `calls` and ends with the exit code that stands in a file of its
/// name, if there is one. Gone when dropped.
struct Tree(PathBuf);

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Tree {
    fn new() -> Self {
        let tree = Self(std::env::temp_dir().join(unique("run")));
        let root = env!("CARGO_MANIFEST_DIR");
        for file in ["tests/run", "deploy/local/common.sh"] {
            let text = fs::read_to_string(format!("{root}/{file}")).expect("a script");
            tree.program(file, &text);
        }
        let stub =
            "#!/bin/sh\ncd \"$(dirname \"$0\")/../..\"\necho \"$(basename \"$0\") $*\" >>calls\n";
        let ends = "exit \"$(cat \"code.$(basename \"$0\")\" 2>/dev/null || echo 0)\"\n";
        for step in ["up", "down", "python"] {
            tree.program(&format!("deploy/local/{step}"), &format!("{stub}{ends}"));
        }
        let test = format!("[ \"$1\" != test ] || exec '{}' \"$@\"\n", env!("CARGO"));
        let ends = ends.replace("$(basename \"$0\")", "$1");
        tree.program("stubs/bin/cargo", &format!("{stub}{test}{ends}"));
        tree.file("servers/env", "");
        tree.file(
            "Cargo.toml",
            "[package]\nname = \"small\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[workspace]\n",
        );
        tree.file(
            "Cargo.lock",
            "version = 4\n\n[[package]]\nname = \"small\"\nversion = \"0.1.0\"\n",
        );
        tree.file(
            "src/lib.rs",
            "//! Small.\n#[test]\nfn of_the_library() {}\n",
        );
        tree
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(&path, text).expect("a file");
    }

    fn program(&self, path: &str, text: &str) {
        self.file(path, text);
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(self.0.join(path), mode).expect("our own file");
    }

    /// Exit code, and what was said.
    async fn run(&self, args: &[&str]) -> (i32, String) {
        let path = std::env::var("PATH").expect("a PATH");
        let path = format!("{}:{path}", self.0.join("stubs/bin").display());
        let script = self.0.join("tests/run");
        // In one pipe, so that its lines stay in their order.
        let merged = [
            "-c",
            "exec \"$0\" \"$@\" 2>&1",
            script.to_str().expect("UTF-8"),
        ];
        Command::program("sh", merged.iter().chain(args))
            .env("PATH", path)
            .env("CARGO_TARGET_DIR", self.0.join("target"))
            .env("WALPOST_LOCAL_DIR", self.0.join("servers"))
            .run(DEADLINE)
            .await
    }

    /// The steps so far, each with its arguments.
    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.0.join("calls")).unwrap_or_default();
        calls.lines().map(|line| line.trim().to_owned()).collect()
    }
}

const STEPS: [&str; 5] = [
    "up",
    "python",
    "cargo fmt --check",
    "cargo clippy --all-targets --locked -- -D warnings",
    "cargo test --locked --no-fail-fast",
];

#[tokio::test]
async fn run_takes_every_step_ends_with_0_and_stops_the_servers_unless_told_otherwise() {
    let tree = Tree::new();
    let (code, said) = tree.run(&["--keep"]).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(tree.calls(), STEPS);
    assert!(
        said.contains("all checks passed") && !said.contains("what failed"),
        "{said}"
    );

    let (code, said) = tree.run(&[]).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(tree.calls().last().map(String::as_str), Some("down"));

    let before = tree.calls().len();
    let (code, said) = tree.run(&["--what"]).await;
    assert!(code == 64 && said.contains("--keep"), "{code}: {said}");
    assert_eq!(tree.calls().len(), before);
}

#[tokio::test]
async fn run_goes_on_after_a_failure_lists_all_of_them_at_the_end_and_ends_with_the_first_code() {
    // GIVEN a step that fails, tests of two programs that fail, and a program that dies
    let tree = Tree::new();
    tree.file("code.fmt", "3");
    tree.file(
        "tests/first.rs",
        "#[test]\nfn good() {}\n#[test]\nfn bad() { panic!(\"…\") }\nmod deep { #[test]\nfn worse() { panic!(\"…\") } }\n",
    );
    tree.file(
        "tests/mute.rs",
        "#[test]\nfn dies() { std::process::abort() }\n",
    );
    tree.file("tests/second.rs", "#[test]\nfn good() {}\n");
    tree.file("tests/third.rs", "#[test]\nfn late() { panic!(\"…\") }\n");

    // WHEN it runs: THEN every step is taken
    let (code, said) = tree.run(&[]).await;
    let calls = tree.calls();
    assert_eq!(calls[..5], STEPS, "{said}");
    assert_eq!(calls[5..], ["down"], "{said}");

    // AND the list has each step, program and test that failed, and no other
    let (_, list) = said.split_once("what failed:\n").expect("a list");
    let (list, end) = list.split_once("\n[").expect("the last line");
    let lines: Vec<&str> = list
        .lines()
        .map(|line| line.split(" (target/").next().expect("split gives one"))
        .map(|line| line.split(" (/").next().expect("split gives one"))
        .collect();
    let mut tests = lines[2..].to_vec();
    assert_eq!(lines[0], "  cargo fmt --check (exit code 3)");
    assert_eq!(
        lines[1],
        "  cargo test --locked --no-fail-fast (exit code 101)"
    );
    tests.sort_unstable();
    let mut expected = vec![
        "    tests/first.rs",
        "      bad",
        "      deep::worse",
        "    tests/third.rs",
        "      late",
        "    `--test first`",
        "    `--test mute`",
        "    `--test third`",
    ];
    expected.sort_unstable();
    assert_eq!(tests, expected, "{said}");

    // AND the exit code is that of the first failure
    assert_eq!(code, 3, "{said}");
    assert!(end.contains("FAILED with exit code 3"), "{said}");
}

#[tokio::test]
async fn run_ends_with_the_tests_own_code_where_nothing_else_fails_and_tells_what_does_not_compile()
{
    let tree = Tree::new();
    tree.file("tests/first.rs", "#[test]\nfn good() { nothing() }\n");
    let (code, said) = tree.run(&["--keep"]).await;
    assert_eq!(code, 101, "{said}");
    let (_, list) = said.split_once("what failed:\n").expect("a list");
    assert!(
        list.contains("error: could not compile `small` (test \"first\")"),
        "{said}"
    );
}

#[tokio::test]
async fn run_has_nothing_to_do_without_servers() {
    let tree = Tree::new();
    tree.file("code.up", "7");
    let (code, said) = tree.run(&[]).await;
    assert_eq!(code, 7, "{said}");
    assert_eq!(tree.calls(), ["up", "down"]);
    assert!(said.contains("FAILED with exit code 7"), "{said}");
}
