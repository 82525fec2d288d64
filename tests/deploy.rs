//! Guarantee: what `deploy/` and the documents say is so. Names of settings, metrics, commands, alerts and files agree with the
//! program and with each other; alerts fire when they should.
//!
//! What an engine for containers or a cluster would say is not known here: there may be none where tests run.

#[path = "deploy/alerts.rs"]
mod alerts;
#[path = "deploy/documents.rs"]
mod documents;
#[path = "deploy/manifests.rs"]
mod manifests;
mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use support::Python;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file of the repository, by its path from the root.
fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every file below a folder, by its path from the root.
fn files_below(folder: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path: PathBuf = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let path = path.strip_prefix(root()).expect("below the root");
                found.push(path.to_str().expect("UTF-8").to_owned());
            }
        }
    }
    found.sort();
    found
}

/// The documents of a YAML file, as `PyYAML` reads them.
fn yaml(path: &str) -> Vec<Value> {
    const PROGRAM: &str = "import json, sys, yaml; json.dump(list(yaml.safe_load_all(open(sys.argv[1]))), sys.stdout)";
    let mut python = Command::new(Python::path());
    let said = run(python.args(["-B", "-c", PROGRAM]).arg(root().join(path)));
    serde_json::from_slice(&said.stdout).expect("JSON")
}

/// The only document of a YAML file.
fn one_yaml(path: &str) -> Value {
    let mut documents = yaml(path);
    assert_eq!(documents.len(), 1, "{path} has several documents");
    documents.remove(0)
}

/// Runs a program to its good end.
fn run(command: &mut Command) -> Output {
    let said = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        said.status.success(),
        "{command:?} failed:\n{}{}",
        String::from_utf8_lossy(&said.stdout),
        String::from_utf8_lossy(&said.stderr)
    );
    said
}

/// The words of a text that are made of these characters and begin so.
fn words<'a>(text: &'a str, prefix: &str, is_part: impl Fn(char) -> bool) -> Vec<&'a str> {
    let words = text.split(|c| !is_part(c));
    let mut words: Vec<&str> = words.filter(|word| word.starts_with(prefix)).collect();
    words.sort_unstable();
    words.dedup();
    words
}

/// A list of texts.
fn texts(value: &Value) -> Vec<&str> {
    let list = value
        .as_array()
        .unwrap_or_else(|| panic!("{value} is no list"));
    list.iter()
        .map(|text| text.as_str().expect("a text"))
        .collect()
}
