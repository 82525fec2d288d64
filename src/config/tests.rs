use std::collections::HashMap;

use super::*;

/// Loads with these flags and env vars and nothing else.
fn load(flags: &[(&str, &str)], env: &[(&str, &str)]) -> Result<Config> {
    let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    };
    let (flags, mut env) = (map(flags), map(env));
    env.entry("PGUSER".to_owned())
        .or_insert_with(|| "postgres".to_owned());
    Config::load(&|name| flags.get(name).cloned(), &|name| {
        env.get(name).cloned()
    })
}

fn wrong(flags: &[(&str, &str)], env: &[(&str, &str)]) -> String {
    let error = load(flags, env).expect_err("a wrong value was taken");
    assert_eq!(error.exit_code(), 64);
    error.report()
}

#[test]
fn nothing_given_is_the_defaults_of_the_design() {
    let config = load(&[], &[]).unwrap();
    assert_eq!(config.pulsar_url.to_string(), "pulsar://127.0.0.1:6650");
    assert!(matches!(config.pulsar_auth, Auth::None));
    assert_eq!(config.pulsar_tls, TlsFiles::default());
    assert_eq!(config.broker_tls(), None);
    assert_eq!(config.pulsar_admin_url, None);
    assert_eq!(config.pulsar_keepalive_interval, Duration::from_secs(30));
    assert_eq!(config.outbox_tables.len(), 1);
    assert_eq!(config.outbox_tables[0].to_string(), "walpost.outbox");
    assert_eq!(config.slot, "walpost");
    assert_eq!(config.publication, "walpost");
    assert_eq!(config.producer_name, "walpost-walpost");
    assert_eq!(config.lanes, 16);
    assert_eq!(config.batch_max_messages, 1000);
    assert_eq!(config.batch_max_bytes, 128 * 1024);
    assert_eq!(config.batch_linger, Duration::from_millis(1));
    assert_eq!(config.max_in_flight_bytes, 24 * 1024 * 1024);
    assert_eq!(config.max_in_flight_messages, 100_000);
    assert_eq!(config.send_timeout, Duration::from_secs(30));
    assert_eq!(config.reconnect_initial, Duration::from_millis(100));
    assert_eq!(config.reconnect_max, Duration::from_secs(10));
    assert_eq!(config.status_interval, Duration::from_secs(1));
    assert_eq!(config.straggler_age, Duration::from_secs(300));
    assert_eq!(config.straggler_limit, 100_000);
    assert_eq!(config.retry_initial, Duration::from_secs(1));
    assert_eq!(config.retry_max, Duration::from_secs(300));
    assert_eq!(config.retry_max_attempts, 20);
    assert!(config.keep_key_order && !config.dead_block);
    assert_eq!(config.dead_letter_topic, None);
    assert_eq!(config.after_publish, AfterPublish::Keep);
    assert_eq!(config.scan_interval, Duration::from_secs(10));
    assert_eq!(config.retention, None);
    assert_eq!(config.log, "info");
    assert_eq!(config.log_format, LogFormat::Text);
    assert_eq!(config.shutdown_grace, Duration::from_secs(10));
}

#[test]
fn every_row_of_the_table_is_read_exactly_once() {
    let nothing: Lookup<'_> = &|_| None;
    let mut reader = Reader::new(nothing, nothing);
    read(&mut reader, &|name| {
        (name == "PGUSER").then(|| "postgres".to_owned())
    });
    let mut read = std::mem::take(&mut reader.read);
    read.sort_unstable();
    let mut table: Vec<&str> = settings::ALL.iter().map(|setting| setting.env).collect();
    table.sort_unstable();
    assert_eq!(read, table);
}

#[test]
fn a_flag_wins_over_the_env_var() {
    let config = load(&[("lanes", "2")], &[("WALPOST_LANES", "3")]).unwrap();
    assert_eq!(config.lanes, 2);
    assert_eq!(load(&[], &[("WALPOST_LANES", "3")]).unwrap().lanes, 3);
}

#[test]
fn an_empty_env_var_is_not_set_but_an_empty_flag_is_wrong() {
    assert_eq!(load(&[], &[("WALPOST_LANES", "")]).unwrap().lanes, 16);
    let said = wrong(&[("slot", "")], &[]);
    assert!(said.starts_with("--slot=\"\": "), "{said}");
}

#[test]
fn a_wrong_value_names_variable_value_and_what_is_allowed() {
    for (env, value, allowed) in [
        ("WALPOST_LANES", "0", "from 1 to 1024"),
        ("WALPOST_LANES", "1025", "from 1 to 1024"),
        ("WALPOST_LANES", "many", "a whole number"),
        ("WALPOST_BATCH_MAX_BYTES", "128kb", "KiB"),
        ("WALPOST_BATCH_MAX_BYTES", "1B", "from 1KiB to 64MiB"),
        ("WALPOST_BATCH_LINGER", "1", "a duration"),
        ("WALPOST_BATCH_LINGER", "2m", "from 0s to 1m"),
        ("WALPOST_SLOT", "My-Slot", "a-z, 0-9 and _"),
        ("WALPOST_PRODUCER_NAME", "a b", "letters"),
        ("WALPOST_PUBLICATION", "a\nb", "control characters"),
        ("WALPOST_PULSAR_URL", "ssl://h:6651", "pulsar://host:port"),
        ("WALPOST_PULSAR_ADMIN_URL", "h:8080", "http://host:port"),
        ("WALPOST_PULSAR_CA_FILE", "/nowhere/ca.pem", "a PEM file"),
        ("WALPOST_PULSAR_BASIC_USER", "a:b", "without a colon"),
        ("WALPOST_OUTBOX_TABLE", "a.b,,c.d", "separated by commas"),
        ("WALPOST_OUTBOX_TABLE", "a.b,a.b", "separated by commas"),
        ("WALPOST_AFTER_PUBLISH", "drop", "keep, mark or delete"),
        ("WALPOST_RETENTION", "7", "a duration such as 7d"),
        ("WALPOST_RETENTION", "0s", "none to keep them for ever"),
        ("WALPOST_STRAGGLER_AGE", "1ms", "from 100ms to 7d"),
        ("WALPOST_LOG", "loud=very=so", "a tracing filter"),
        ("WALPOST_LOG_FORMAT", "xml", "text or json"),
    ] {
        let said = wrong(&[], &[(env, value)]);
        assert!(said.starts_with(&format!("{env}={value:?}: ")), "{said}");
        assert!(
            said.contains("; allowed: ") && said.contains(allowed),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn a_wrong_flag_is_named_as_a_flag() {
    let said = wrong(
        &[("batch-max-bytes", "x")],
        &[("WALPOST_BATCH_MAX_BYTES", "1KiB")],
    );
    assert!(said.starts_with("--batch-max-bytes=\"x\": "), "{said}");
}

#[test]
fn all_wrong_values_are_told_at_once() {
    let said = wrong(
        &[("lanes", "0")],
        &[("WALPOST_SLOT", "-"), ("WALPOST_BATCH_LINGER", "soon")],
    );
    let names: Vec<&str> = said
        .lines()
        .filter_map(|line| line.split('=').next())
        .collect();
    assert_eq!(names, ["WALPOST_SLOT", "--lanes", "WALPOST_BATCH_LINGER"]);
}

#[test]
fn values_that_contradict_each_other_are_refused() {
    for (env, names) in [
        (
            [
                ("WALPOST_BATCH_MAX_BYTES", "2MiB"),
                ("WALPOST_MAX_IN_FLIGHT_BYTES", "1MiB"),
            ],
            [
                "WALPOST_BATCH_MAX_BYTES=2MiB",
                "WALPOST_MAX_IN_FLIGHT_BYTES=1MiB",
            ],
        ),
        (
            [
                ("WALPOST_BATCH_MAX_MESSAGES", "9"),
                ("WALPOST_MAX_IN_FLIGHT_MESSAGES", "8"),
            ],
            [
                "WALPOST_BATCH_MAX_MESSAGES=9",
                "WALPOST_MAX_IN_FLIGHT_MESSAGES=8",
            ],
        ),
        (
            [
                ("WALPOST_RECONNECT_INITIAL", "2s"),
                ("WALPOST_RECONNECT_MAX", "1s"),
            ],
            ["WALPOST_RECONNECT_INITIAL=2s", "WALPOST_RECONNECT_MAX=1s"],
        ),
    ] {
        let said = wrong(&[], &env);
        assert!(names.iter().all(|name| said.contains(name)), "{said}");
    }
}

#[test]
fn a_secret_is_in_no_error_and_in_no_debug_output() {
    let said = wrong(&[], &[("WALPOST_PULSAR_TOKEN", "hunter 2")]);
    assert!(
        said.starts_with("WALPOST_PULSAR_TOKEN (value not shown): "),
        "{said}"
    );
    assert!(!said.contains("hunter"), "{said}");

    let said = wrong(&[], &[("WALPOST_POSTGRES_URL", "nonsense://u:hunter2@h/d")]);
    assert!(!said.contains("hunter2"), "{said}");
    let said = wrong(&[], &[("WALPOST_PULSAR_URL", "pulsar://u:hunter2@h:1")]);
    assert!(!said.contains("hunter2"), "{said}");

    let config = load(&[], &[("WALPOST_PULSAR_TOKEN", "hunter2")]).unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
}

#[test]
fn a_secret_may_stand_in_a_file() {
    let path = std::env::temp_dir().join(format!("walpost-config-{}", std::process::id()));
    std::fs::write(&path, "hunter2\n").unwrap();
    let name = path.to_str().unwrap();

    let config = load(&[], &[("WALPOST_PULSAR_TOKEN_FILE", name)]).unwrap();
    let Auth::Token(token) = config.pulsar_auth else {
        panic!("no token")
    };
    assert_eq!(token, SecretSource::File(path.clone()));
    assert_eq!(token.token().unwrap().expose(), "hunter2");

    let said = wrong(
        &[],
        &[
            ("WALPOST_PULSAR_TOKEN", "x"),
            ("WALPOST_PULSAR_TOKEN_FILE", name),
        ],
    );
    assert!(said.contains("both are given"), "{said}");

    let flag_wins = load(
        &[("pulsar-token", "x")],
        &[("WALPOST_PULSAR_TOKEN_FILE", name)],
    );
    let Auth::Token(token) = flag_wins.unwrap().pulsar_auth else {
        panic!("no token")
    };
    assert_eq!(token, SecretSource::Value(Secret::new("x")));

    std::fs::remove_file(&path).unwrap();
    let said = wrong(&[], &[("WALPOST_PULSAR_TOKEN_FILE", name)]);
    assert!(
        said.contains(name) && said.contains("cannot be read"),
        "{said}"
    );
}

#[test]
fn the_producer_name_follows_the_slot_unless_given() {
    let config = load(&[("slot", "orders")], &[]).unwrap();
    assert_eq!(config.producer_name, "walpost-orders");
    let config = load(&[("slot", "orders"), ("producer-name", "p")], &[]).unwrap();
    assert_eq!(config.producer_name, "p");
}

/// Sound settings of each kind of credentials.
const TOKEN: &[(&str, &str)] = &[("WALPOST_PULSAR_TOKEN", "hunter2")];
const BASIC: &[(&str, &str)] = &[
    ("WALPOST_PULSAR_BASIC_USER", "u"),
    ("WALPOST_PULSAR_BASIC_PASSWORD", "hunter2"),
];
const OAUTH2: &[(&str, &str)] = &[
    ("WALPOST_PULSAR_OAUTH2_ISSUER_URL", "https://issuer"),
    ("WALPOST_PULSAR_OAUTH2_CLIENT_ID", "c"),
    ("WALPOST_PULSAR_OAUTH2_CLIENT_SECRET", "hunter2"),
];

#[test]
fn one_kind_of_credentials_is_taken_and_two_are_refused_by_name() {
    for (kind, env) in [("token", TOKEN), ("basic", BASIC), ("OAuth2", OAUTH2)] {
        let config = load(&[], env).unwrap();
        assert_eq!(config.pulsar_auth.kind(), kind);
        assert!(!format!("{config:?}").contains("hunter2"));
    }
    for (one, other) in [(TOKEN, BASIC), (TOKEN, OAUTH2), (OAUTH2, BASIC)] {
        let said = wrong(&[], &[one, other].concat());
        assert!(said.contains("two kinds of credentials"), "{said}");
        assert!(
            said.contains(one[0].0) && said.contains(other[0].0),
            "{said}"
        );
        assert!(!said.contains("hunter2"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn half_of_what_belongs_together_is_refused() {
    for (env, says) in [
        (&BASIC[..1], "WALPOST_PULSAR_BASIC_PASSWORD"),
        (&BASIC[1..], "WALPOST_PULSAR_BASIC_USER"),
        (&OAUTH2[..1], "WALPOST_PULSAR_OAUTH2_CLIENT_ID"),
        (&OAUTH2[..2], "WALPOST_PULSAR_OAUTH2_CLIENT_SECRET"),
        (&OAUTH2[1..], "WALPOST_PULSAR_OAUTH2_ISSUER_URL"),
        (
            &[("WALPOST_PULSAR_OAUTH2_SCOPE", "s")],
            "WALPOST_PULSAR_OAUTH2_CLIENT_ID",
        ),
    ] {
        let said = wrong(&[], env);
        assert!(said.contains(says), "{said}");
        assert!(!said.contains("hunter2"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn what_becomes_of_stragglers_can_be_chosen() {
    let config = load(
        &[("ordering", "none"), ("on-dead", "block")],
        &[("WALPOST_DEAD_LETTER_TOPIC", "dead")],
    )
    .unwrap();
    assert!(!config.keep_key_order && config.dead_block);
    let dead = config.dead_letter_topic.as_deref();
    assert_eq!(dead, Some("persistent://public/default/dead"));
    let said = wrong(
        &[("ordering", "topic"), ("dead-letter-topic", "a/b")],
        &[("WALPOST_ON_DEAD", "stop")],
    );
    for part in ["--ordering", "WALPOST_ON_DEAD", "--dead-letter-topic"] {
        assert!(said.contains(part), "{said}");
    }
}
