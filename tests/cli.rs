//! The command line keeps its word: what is wrong is named, exits 64 and touches nothing; help tells every setting.
//!
//! Runs the binary with an environment of its own. No server is needed.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::process::{Command, Output};

use walpost::config::settings;

/// Runs walpost with these arguments and env vars and no others.
fn walpost<A: AsRef<OsStr>>(args: &[A], env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_walpost"))
        .args(args)
        .env_clear()
        .env("PGUSER", "nobody")
        .envs(env.iter().copied())
        .output()
        .expect("walpost cannot be started")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("output is not UTF-8")
}

/// Without line breaks and indentation, which depend on the width of the terminal.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A wrong value of each kind: variable, value, a piece of what is allowed.
const WRONG: &[(&str, &str, &str)] = &[
    ("WALPOST_OUTBOX_TABLE", "a.b.c.d", "allowed"),
    ("WALPOST_COLUMN_ID", "a\tb", "column name"),
    ("WALPOST_SLOT", "Wal-Post", "a-z, 0-9 and _"),
    ("WALPOST_PUBLICATION", "a\nb", "1 to 63 bytes"),
    ("WALPOST_TOPIC", "persistent://a/b/{c", "allowed"),
    ("WALPOST_PRODUCER_NAME", "two words", "letters"),
    ("WALPOST_LANES", "0", "from 1 to 1024"),
    ("WALPOST_BATCH_MAX_MESSAGES", "1e3", "a whole number"),
    ("WALPOST_BATCH_MAX_BYTES", "128kb", "from 1KiB to 64MiB"),
    ("WALPOST_BATCH_LINGER", "1", "(us, ms, s, m, h, d)"),
    (
        "WALPOST_MAX_IN_FLIGHT_BYTES",
        "100000000000000000000",
        "a size",
    ),
    ("WALPOST_MAX_IN_FLIGHT_MESSAGES", "-5", "a whole number"),
    ("WALPOST_SEND_TIMEOUT", "0s", "from 100ms to 1h"),
    ("WALPOST_RECONNECT_INITIAL", "soon", "a duration"),
    ("WALPOST_RECONNECT_MAX", "2h", "from 1ms to 1h"),
    ("WALPOST_STATUS_INTERVAL", "31s", "from 10ms to 30s"),
    ("WALPOST_PULSAR_URL", "http://h:8080", "pulsar://host:port"),
    ("WALPOST_PULSAR_URL", "ssl://h:6651", "pulsar+ssl://"),
    ("WALPOST_PULSAR_ADMIN_URL", "h:8080", "http://host:port"),
    (
        "WALPOST_PULSAR_KEEPALIVE_INTERVAL",
        "2h",
        "from 100ms to 1h",
    ),
    ("WALPOST_PULSAR_CA_FILE", "/nowhere/ca.pem", "a PEM file"),
    ("WALPOST_PULSAR_BASIC_USER", "a:b", "without a colon"),
    (
        "WALPOST_PULSAR_OAUTH2_ISSUER_URL",
        "ftp://issuer",
        "http://host:port",
    ),
    (
        "WALPOST_PULSAR_OAUTH2_KEY_FILE",
        "/nowhere/key.json",
        "readable file",
    ),
    (
        "WALPOST_PULSAR_TOKEN_FILE",
        "/nowhere/token",
        "readable file",
    ),
    ("WALPOST_HTTP_ADDR", "localhost", "an IP address and a port"),
    ("WALPOST_HTTP_ADDR", "9464", "or none"),
    ("WALPOST_LOG", "walpost=shout", "a tracing filter"),
    ("WALPOST_LOG_FORMAT", "xml", "text or json"),
    ("WALPOST_SHUTDOWN_GRACE", "10 s", "from 0s to 1h"),
];

#[test]
fn a_wrong_env_var_names_variable_value_and_what_is_allowed() {
    for (env, value, allowed) in WRONG {
        let output = walpost(&["sql"], &[(env, value)]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{env}={value}: {said}");
        assert!(output.stdout.is_empty(), "{env}={value}");
        assert!(
            said.starts_with(&format!("walpost: error: {env}={value:?}: ")),
            "{said}"
        );
        assert!(said.contains(allowed), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn a_wrong_flag_is_answered_the_same_way() {
    for (env, value, allowed) in WRONG {
        let flag = env
            .trim_start_matches("WALPOST_")
            .to_lowercase()
            .replace('_', "-");
        let output = walpost(&["sql", &format!("--{flag}={value}")], &[]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{flag}={value}: {said}");
        assert!(
            said.starts_with(&format!("walpost: error: --{flag}={value:?}: ")),
            "{said}"
        );
        assert!(said.contains(allowed), "{said}");
    }
}

#[test]
fn every_command_checks_all_settings_and_tells_all_that_is_wrong() {
    for command in ["run", "init", "check", "sql", "demo"] {
        let output = walpost(&[command], &[("WALPOST_LANES", "0"), ("WALPOST_SLOT", "-")]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{command}");
        assert!(
            said.contains("WALPOST_LANES=\"0\"") && said.contains("WALPOST_SLOT=\"-\""),
            "{said}"
        );
        assert!(output.stdout.is_empty(), "{command}");
    }
}

#[test]
fn a_wrong_setting_touches_no_server() {
    // GIVEN something that listens where Postgres and Pulsar are said to be
    let server = TcpListener::bind("127.0.0.1:0").expect("no port to listen on");
    server.set_nonblocking(true).expect("non-blocking mode");
    let port = server.local_addr().expect("address").port();
    let postgres = format!("postgres://u@127.0.0.1:{port}/d");
    let pulsar = format!("pulsar://127.0.0.1:{port}");

    // WHEN one other setting is wrong
    for command in ["run", "init", "check"] {
        let env = [
            ("WALPOST_POSTGRES_URL", postgres.as_str()),
            ("WALPOST_PULSAR_URL", pulsar.as_str()),
            ("WALPOST_LANES", "x"),
        ];
        assert_eq!(walpost(&[command], &env).status.code(), Some(64));
    }

    // THEN nobody has knocked
    let knock = server.accept().map(|_| ()).map_err(|error| error.kind());
    assert_eq!(knock, Err(ErrorKind::WouldBlock));
}

#[test]
fn secrets_are_never_shown() {
    for (env, value) in [
        ("WALPOST_PULSAR_TOKEN", "hunter2 with blanks"),
        ("WALPOST_PULSAR_BASIC_PASSWORD", "hunter2\t"),
        ("WALPOST_PULSAR_OAUTH2_CLIENT_SECRET", "hunter2\t"),
        ("WALPOST_PULSAR_ADMIN_URL", "http://u:hunter2@h:8080"),
        ("WALPOST_POSTGRES_URL", "mysql://u:hunter2@h/d"),
        ("WALPOST_PULSAR_URL", "pulsar://u:hunter2@h:6650"),
    ] {
        let flag = env
            .trim_start_matches("WALPOST_")
            .to_lowercase()
            .replace('_', "-");
        let by_env = walpost(&["sql"], &[(env, value)]);
        let by_flag = walpost(&["sql", &format!("--{flag}={value}")], &[]);
        for (name, output) in [(env, by_env), (&format!("--{flag}"), by_flag)] {
            let said = text(&output.stderr);
            assert_eq!(output.status.code(), Some(64), "{said}");
            assert!(said.contains(name), "{said}");
            assert!(!said.contains("hunter2"), "{said}");
        }
    }
}

#[test]
fn secrets_in_the_environment_are_not_in_the_help() {
    let output = walpost(&["--help"], &[("WALPOST_PULSAR_TOKEN", "hunter2")]);
    assert!(!text(&output.stdout).contains("hunter2"));
}

#[test]
fn help_tells_flag_default_range_meaning_and_env_var_of_every_setting() {
    for args in [
        &["--help"][..],
        &["run", "--help"],
        &["init", "-h"],
        &["check", "-h"],
        &["sql", "-h"],
    ] {
        let output = walpost(args, &[]);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        let help = one_line(&text(&output.stdout));
        for setting in settings::ALL {
            let entry = format!(
                "{} [{}] [default: {}] [env: {}]",
                setting.meaning,
                setting.kind.allowed(),
                setting.default.text(),
                setting.env
            );
            assert!(help.contains(&one_line(&entry)), "{args:?}: {entry}");
            assert!(
                help.contains(&format!("--{} <", setting.flag())),
                "{args:?}"
            );
        }
    }
}

#[test]
fn a_command_line_that_makes_no_sense_exits_64() {
    for args in [
        &[][..],
        &["bogus"],
        &["run", "--bogus"],
        &["run", "--lanes"],
        &["run", "--lanes", "1", "--lanes", "2"],
        &["run", "extra"],
        &["--lanes", "1"],
        &["init", "--payload", "xml"],
        &["run", "--payload", "json"],
        &["run", "--enable-deduplication"],
        &["check", "--json", "yes"],
    ] {
        let output = walpost(args, &[]);
        assert_eq!(output.status.code(), Some(64), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn help_and_version_exit_0() {
    for args in [["--help"], ["-h"], ["--version"], ["-V"]] {
        let output = walpost(&args, &[]);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn a_likely_typing_error_in_an_env_var_is_told_but_not_fatal() {
    let output = walpost(
        &["sql"],
        &[("WALPOST_LANE", "3"), ("WALPOST_LOG_FORMAT", "json")],
    );
    assert_eq!(output.status.code(), Some(0));
    let said = text(&output.stderr);
    assert!(
        said.contains("WALPOST_LANE ") && said.starts_with('{'),
        "{said}"
    );
    let quiet = walpost(&["sql"], &[("WALPOST_LANE", "3"), ("WALPOST_LOG", "error")]);
    assert!(quiet.stderr.is_empty());
}

#[test]
fn sql_prints_the_ddl_for_the_settings_given() {
    let output = walpost(
        &["sql", "--payload", "bytea", "--slot", "orders"],
        &[("WALPOST_PUBLICATION", "it's")],
    );
    assert_eq!(output.status.code(), Some(0));
    let sql = text(&output.stdout);
    assert!(sql.contains("create table if not exists walpost.outbox"));
    assert!(sql.contains("payload       bytea,"));
    assert!(sql.contains("'it''s'") && sql.contains("'orders'"));

    let output = walpost(&["sql", "--outbox-table", "shop.events"], &[]);
    let sql = text(&output.stdout);
    assert!(
        sql.contains("'shop.events'") && !sql.contains("create table if not exists walpost.outbox")
    );
}

#[test]
fn a_server_that_is_away_is_worth_another_try() {
    // GIVEN a port on which nobody listens
    let port = {
        let server = TcpListener::bind("127.0.0.1:0").expect("no port to listen on");
        server.local_addr().expect("address").port()
    };
    let url = format!("postgres://u:hunter2@127.0.0.1:{port}/d");
    let output = walpost(&["init"], &[("WALPOST_POSTGRES_URL", url.as_str())]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{said}");
    assert!(said.starts_with("walpost: error: "), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
}

#[test]
fn the_manual_has_every_setting_and_a_page_for_each_command() {
    // GIVEN no settings at all
    let first = Command::new(env!("CARGO_BIN_EXE_walpost"))
        .arg("man")
        .env_clear()
        .output()
        .expect("walpost cannot be started");
    assert!(first.status.success(), "{first:?}");
    let page = text(&first.stdout);
    assert!(page.contains(".TH walpost 1"), "{page}");
    // Roff, in which a hyphen is escaped. The synopsis can be taken in at a glance.
    assert!(!page.contains("[\\fB\\-\\-lanes\\fR]"), "{page}");
    for setting in settings::ALL {
        let flag = format!("--{}", setting.flag()).replace('-', "\\-");
        assert!(page.contains(&flag), "{} is missing", setting.env);
    }

    let one = walpost(&["man", "stragglers", "discard"], &[]);
    let page = text(&one.stdout);
    assert!(page.contains(".TH walpost-stragglers-discard 1"), "{page}");
    assert!(page.contains("\\-\\-yes"), "{page}");
    assert!(
        !page.contains("\\-\\-lanes"),
        "settings stand in walpost(1)"
    );

    let none = walpost(&["man", "fly"], &[]);
    assert_eq!(none.status.code(), Some(64));
    let said = text(&none.stderr);
    assert!(
        said.contains("\"fly\"") && said.contains("walpost --help"),
        "{said}"
    );
}

#[test]
fn completions_know_commands_and_settings_of_each_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let said = walpost(&["completions", shell], &[]);
        assert!(said.status.success(), "{shell}: {said:?}");
        let script = text(&said.stdout);
        for word in ["stragglers", "verify", "after-publish"] {
            assert!(script.contains(word), "{shell} does not know {word}");
        }
    }
    // Bash can say whether it is one: the word after "walpost rep" is completed.
    let script = text(&walpost(&["completions", "bash"], &[]).stdout);
    let asking = format!(
        "{script}\nCOMP_WORDS=(walpost rep); COMP_CWORD=1; _walpost walpost rep walpost; echo \"${{COMPREPLY[*]}}\""
    );
    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("walpost.bash");
    std::fs::write(&file, asking).expect("a file");
    let bash = Command::new("bash")
        .arg("--norc")
        .arg(&file)
        .output()
        .expect("bash cannot be started");
    assert_eq!(text(&bash.stdout), "replay\n", "{}", text(&bash.stderr));
    let unknown = walpost(&["completions", "dos"], &[]);
    assert_eq!(unknown.status.code(), Some(64));
    assert!(text(&unknown.stderr).contains("fish"));
}
