use super::*;

#[test]
fn durations_are_a_number_and_a_unit() {
    for (text, expected) in [
        ("0s", Duration::ZERO),
        ("5us", Duration::from_micros(5)),
        ("250ms", Duration::from_millis(250)),
        ("10s", Duration::from_secs(10)),
        ("5m", Duration::from_secs(300)),
        ("2h", Duration::from_secs(7200)),
        ("7d", Duration::from_secs(604_800)),
    ] {
        assert_eq!(duration(text), Ok(expected), "{text}");
        assert_eq!(show_duration(expected), text);
    }
    for text in [
        "",
        "10",
        "s",
        "1.5s",
        "-1s",
        "1 s",
        "1S",
        "10 ",
        "99999999999999999999s",
        "999999999d",
    ] {
        assert!(duration(text).is_err(), "{text:?}");
    }
}

#[test]
fn sizes_are_bytes_or_a_number_and_a_unit() {
    for (text, expected) in [
        ("0", 0),
        ("1000", 1000),
        ("7B", 7),
        ("1KB", 1000),
        ("2MB", 2_000_000),
        ("3GB", 3_000_000_000),
        ("128KiB", 131_072),
        ("64MiB", 67_108_864),
        ("1GiB", 1_073_741_824),
    ] {
        assert_eq!(size(text), Ok(expected), "{text}");
        assert_eq!(size(&show_size(expected)), Ok(expected), "{text}");
    }
    assert_eq!(show_size(67_108_864), "64MiB");
    for text in [
        "",
        "MiB",
        "1.5MiB",
        "-1",
        "1 MiB",
        "1mib",
        "1TB",
        "17179869184GiB",
    ] {
        assert!(size(text).is_err(), "{text:?}");
    }
}

#[test]
fn counts_are_whole_numbers() {
    assert_eq!(count("16"), Ok(16));
    for text in ["", "-1", "1.0", "1k", "0x10", " 1", "18446744073709551616"] {
        assert!(count(text).is_err(), "{text:?}");
    }
}

#[test]
fn slot_names_are_what_postgres_takes() {
    assert_eq!(slot_name("walpost_2"), Ok("walpost_2".to_owned()));
    assert!(slot_name(&"x".repeat(63)).is_ok());
    for text in ["", "Walpost", "wal-post", "wal post", "é", &"x".repeat(64)] {
        assert!(slot_name(text).is_err(), "{text:?}");
    }
}

#[test]
fn producer_names_are_plain_and_not_the_brokers() {
    assert!(producer_name("walpost-orders_1.a").is_ok());
    for text in ["", "a b", "a/b", "é", "pulsar.repl.x", &"x".repeat(129)] {
        assert!(producer_name(text).is_err(), "{text:?}");
    }
}

#[test]
fn lists_split_outside_quotes() {
    assert_eq!(split_list("a.b, c.d"), ["a.b", "c.d"]);
    assert_eq!(split_list(r#"a."x,y",b"#), [r#"a."x,y""#, "b"]);
    assert_eq!(split_list("a,,b"), ["a", "", "b"]);
}

#[test]
fn a_pulsar_url_names_hosts_and_ports() {
    let url = PulsarUrl::parse("pulsar://one:6650,two,[::1]:7000/").unwrap();
    assert_eq!(
        url.hosts,
        [
            ("one".to_owned(), 6650),
            ("two".to_owned(), 6650),
            ("::1".to_owned(), 7000)
        ]
    );
    assert_eq!(url.to_string(), "pulsar://one:6650,two:6650,[::1]:7000");
    assert_eq!(PulsarUrl::parse(&url.to_string()).as_ref(), Ok(&url));
    assert!(!url.tls);
    let url = PulsarUrl::parse("pulsar+ssl://one,two:7").unwrap();
    assert!(url.tls);
    assert_eq!(url.to_string(), "pulsar+ssl://one:6651,two:7");
}

#[test]
fn a_wrong_pulsar_url_says_why() {
    for (text, why) in [
        ("http://h:8080", "begin with pulsar://"),
        ("pulsar+ssl://h:0", "1 to 65535"),
        ("pulsar://", "host is missing"),
        ("pulsar://h:0", "1 to 65535"),
        ("pulsar://h:65536", "1 to 65535"),
        ("pulsar://h:", "1 to 65535"),
        ("pulsar://h:x", "not a number"),
        ("pulsar://a,,b", "host is missing"),
        ("pulsar://user:pw@h:6650", "not a number"),
        ("pulsar://h/path", "no host name has"),
        ("pulsar://[::1", "not closed"),
        ("pulsar://[nope]:1", "IPv6"),
        ("pulsar://[::1]x", "follows"),
    ] {
        let said = PulsarUrl::parse(text).unwrap_err();
        assert!(said.contains(why), "{text}: {said}");
    }
}

#[test]
fn a_secret_is_never_printed() {
    let secret = Secret::new("hunter2");
    assert_eq!(format!("{secret:?}"), "***");
    assert_eq!(
        format!("{:?}", SecretSource::Value(secret.clone())),
        "Value(***)"
    );
    assert_eq!(secret.expose(), "hunter2");
}

#[test]
fn a_missing_token_file_is_temporary_and_named() {
    let error = SecretSource::File("/nowhere/token".into())
        .token()
        .unwrap_err();
    assert!(error.is_temporary());
    assert!(
        error.report().contains("/nowhere/token"),
        "{}",
        error.report()
    );
}
