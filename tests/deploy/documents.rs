//! README, OPERATIONS and the rest: settings, commands and links in them.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use walpost::cli::{self, Stop};
use walpost::config::settings;

use super::{files_below, read, root, run, words};

const OPERATIONS: &str = "deploy/OPERATIONS.md";
const BEGIN: &str = "<!-- settings: cargo test --test deploy -- --ignored   writes this table from the program -->\n";
const END: &str = "<!-- end of settings -->\n";

/// The table of all settings, from the same rows that `--help` is made of.
fn settings_table() -> String {
    let mut table = "| env var | default | allowed | meaning |\n|---|---|---|---|\n".to_owned();
    for setting in settings::ALL {
        let default = match setting.default {
            settings::Fallback::Value(text) => format!("`{text}`"),
            settings::Fallback::Described(text) => escaped(text),
        };
        let (allowed, meaning) = (escaped(&setting.kind.allowed()), escaped(setting.meaning));
        writeln!(
            table,
            "| `{}` | {default} | {allowed} | {meaning} |",
            setting.env
        )
        .expect("a String takes it");
    }
    table
}

/// As Markdown shows it.
fn escaped(text: &str) -> String {
    text.replace('|', "\\|")
        .replace('<', "&lt;")
        .replace('*', "\\*")
}

#[test]
fn operations_lists_every_setting_with_its_default() {
    let page = read(OPERATIONS);
    let (_, rest) = page.split_once(BEGIN).expect("the beginning of the table");
    let (table, _) = rest.split_once(END).expect("the end of the table");
    assert!(
        table == settings_table(),
        "the table of settings is out of date: cargo test --test deploy -- --ignored"
    );
}

#[test]
fn defaults_are_those_that_help_tells() {
    let mut help = Command::new(env!("CARGO_BIN_EXE_walpost"));
    let said = run(help.arg("--help").env_clear());
    let help = String::from_utf8_lossy(&said.stdout);
    // Where lines break depends on the terminal.
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for setting in settings::ALL {
        let told = format!(
            "[default: {}] [env: {}]",
            setting.default.text(),
            setting.env
        );
        assert!(help.contains(&told), "--help does not tell {told}");
    }
}

#[test]
#[ignore = "writes the table of settings into deploy/OPERATIONS.md"]
fn write_the_table_of_settings() {
    let page = read(OPERATIONS);
    let (before, rest) = page.split_once(BEGIN).expect("the beginning of the table");
    let (_, after) = rest.split_once(END).expect("the end of the table");
    let page = format!("{before}{BEGIN}{}{END}{after}", settings_table());
    std::fs::write(root().join(OPERATIONS), page).expect("it can be written");
}

/// Markdown files that people read.
fn pages() -> Vec<String> {
    let mut pages = vec!["README.md".to_owned(), "benches/README.md".to_owned()];
    pages.extend(
        files_below("deploy")
            .into_iter()
            .filter(|path| Path::new(path).extension().is_some_and(|end| end == "md")),
    );
    pages
}

#[test]
fn every_env_var_that_is_named_is_a_setting() {
    let mut paths = files_below("deploy");
    // Their own matter: settings of tests, and of servers for tests.
    paths.retain(|path| !path.starts_with("deploy/local/"));
    paths.push("README.md".to_owned());
    let mut count = 0;
    for path in paths {
        let text = read(&path);
        for name in words(&text, "WALPOST_", |c| {
            c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'
        }) {
            count += 1;
            // "WALPOST_COLUMN_*" stands for several.
            let known = settings::ALL.iter().any(|setting| {
                setting.env == name || (name.ends_with('_') && setting.env.starts_with(name))
            });
            let of_tests = name.starts_with("WALPOST_LOCAL_") || name == "WALPOST_TEST_POSTGRES";
            assert!(
                known || of_tests,
                "{path} names {name}, which is no setting"
            );
        }
    }
    assert!(count > 50, "only {count} names were found");
}

#[test]
fn operations_names_every_command_and_no_other() {
    let page = read(OPERATIONS);
    let commands = cli::command();
    for command in commands.get_subcommands() {
        let name = command.get_name();
        assert!(
            page.contains(&format!("`walpost {name}")),
            "{name} is missing"
        );
    }
    for path in pages() {
        let mut is_example = false;
        for line in read(&path).lines() {
            if line.starts_with("```") {
                is_example = !is_example;
            } else if is_example && line.starts_with("walpost ") {
                let command = line.split(['#', '>']).next().expect("split gives one");
                let parsed = cli::parse(command.split_whitespace().map(OsString::from), &|name| {
                    (name == "PGUSER").then(|| "walpost".to_owned())
                });
                let is_good = matches!(parsed, Ok(_) | Err(Stop::Text(_)));
                assert!(is_good, "{path}: {line}: {parsed:?}");
            } else if !is_example {
                // Every second piece is code.
                for code in line.split('`').skip(1).step_by(2) {
                    let Some(rest) = code.strip_prefix("walpost ") else {
                        continue;
                    };
                    let word = rest.split(' ').next().expect("split gives one");
                    let is_command =
                        word.starts_with("--") || commands.find_subcommand(word).is_some();
                    assert!(is_command, "{path} names walpost {word}");
                }
            }
        }
    }
}

/// The anchor that a heading has.
fn anchor(heading: &str) -> String {
    let kept = heading
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

fn anchors(page: &str) -> BTreeSet<String> {
    let headings = page.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| anchor(line.trim_start_matches('#').trim()))
        .collect()
}

#[test]
fn links_within_the_repository_lead_somewhere() {
    let mut count = 0;
    for path in pages() {
        let page = read(&path);
        let folder = root().join(&path);
        let folder = folder.parent().expect("a file stands in a folder");
        for rest in page.split("](").skip(1) {
            let (link, _) = rest.split_once(')').expect("a link has an end");
            if link.contains("://") {
                continue;
            }
            count += 1;
            let (file, part) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() {
                root().join(&path)
            } else {
                folder.join(file)
            };
            assert!(target.exists(), "{path}: {link} leads nowhere");
            if !part.is_empty() {
                let text = std::fs::read_to_string(&target).expect("a page");
                assert!(
                    anchors(&text).contains(part),
                    "{path}: {link} has no such heading"
                );
            }
        }
    }
    assert!(count > 30, "only {count} links were found");
}
