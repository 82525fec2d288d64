//! What a URL and the environment come to, and what wrong ones are told.

use super::*;

fn parse_with(url: Option<&str>, vars: &[(&str, &str)]) -> Result<PostgresConfig, String> {
    PostgresConfig::parse(url, &|name| {
        let found = vars.iter().find(|(key, _)| *key == name);
        found.map(|(_, value)| (*value).to_owned())
    })
}

fn parse(url: &str) -> Result<PostgresConfig, String> {
    parse_with(Some(url), &[])
}

#[test]
fn a_full_url_says_everything() {
    let config = parse(
        "postgres://walpost:p%40ss@h1:1,h2:2/shop?sslmode=verify-full&sslrootcert=/ca.pem&sslcert=/c&sslkey=/k\
         &target_session_attrs=read-write&connect_timeout=3&options=-c%20geqo%3Doff&application_name=me\
         &channel_binding=require&tcp_user_timeout=1500",
    )
    .unwrap();
    assert_eq!(config.hosts[1], Host::Tcp("h2".into(), 2));
    assert_eq!(config.user(), "walpost");
    assert_eq!(config.password.as_deref(), Some(&b"p@ss"[..]));
    assert_eq!(config.dbname(), "shop");
    assert_eq!(config.ssl.mode, SslMode::VerifyFull);
    assert_eq!(config.ssl.root_cert, Some("/ca.pem".into()));
    assert_eq!(config.ssl.client_cert, Some(("/c".into(), "/k".into())));
    assert_eq!(config.target, TargetSession::ReadWrite);
    assert_eq!(config.connect_timeout, Some(Duration::from_secs(3)));
    assert_eq!(config.options.as_deref(), Some("-c geqo=off"));
    assert_eq!(config.application_name.as_deref(), Some("me"));
    assert_eq!(config.channel_binding, ChannelBindingMode::Require);
    assert_eq!(config.tcp_user_timeout, Some(Duration::from_millis(1500)));
    assert_eq!(config.display_url(), "postgres://walpost@h1:1,h2:2/shop");
}

#[test]
fn the_environment_fills_the_gaps_and_the_url_wins() {
    let vars = [
        ("PGHOST", "/run/pg"),
        ("PGPORT", "6000"),
        ("PGUSER", "envuser"),
        ("PGPASSWORD", "envpw"),
        ("PGDATABASE", "envdb"),
        ("PGSSLMODE", "disable"),
        ("PGCONNECT_TIMEOUT", "0"),
    ];
    let config = parse_with(None, &vars).unwrap();
    assert_eq!(config.hosts, [Host::Unix("/run/pg".into(), 6000)]);
    assert_eq!(
        config.display_url(),
        "postgres://envuser@%2Frun%2Fpg:6000/envdb"
    );
    assert_eq!(config.ssl.mode, SslMode::Disable);
    assert_eq!(config.connect_timeout, None);

    let config = parse_with(Some("postgres://u@h:7/d?sslmode=require"), &vars).unwrap();
    assert_eq!(config.display_url(), "postgres://u@h:7/d");
    assert_eq!(config.ssl.mode, SslMode::Require);
    assert_eq!(config.password.as_deref(), Some(&b"envpw"[..]));
}

#[test]
fn what_is_not_said_has_libpqs_defaults() {
    let config = parse("postgres://someone@db").unwrap();
    assert_eq!(config.hosts, [Host::Tcp("db".into(), 5432)]);
    assert_eq!(config.dbname(), "someone");
    assert_eq!(config.ssl.mode, SslMode::Prefer);
    assert_eq!(config.target, TargetSession::Any);
    assert_eq!(config.connect_timeout, Some(Duration::from_secs(10)));
    // A user of this machine, and the socket folder or loopback: both exist everywhere.
    let config = parse_with(None, &[("USER", "fallback")]).unwrap();
    assert!(!config.user().is_empty());
    assert_eq!(config.hosts.len(), 1);
}

#[test]
fn one_port_serves_several_hosts_and_a_query_may_name_them() {
    let config = parse("postgres://u@/d?host=/a,b,::1&port=9").unwrap();
    assert_eq!(
        config.hosts,
        [
            Host::Unix("/a".into(), 9),
            Host::Tcp("b".into(), 9),
            Host::Tcp("::1".into(), 9)
        ]
    );
    assert_eq!(config.hosts[0].to_string(), "/a/.s.PGSQL.9");
    assert_eq!(config.hosts[2].to_string(), "[::1]:9");
}

#[test]
fn an_error_names_the_variable_the_value_and_what_is_allowed() {
    for (url, vars, said) in [
        (
            None,
            &[("PGSSLMODE", "always")][..],
            "PGSSLMODE is \"always\", allowed are disable, allow, prefer, require, verify-ca, verify-full",
        ),
        (
            Some("postgres://u@h/d?target_session_attrs=standby"),
            &[],
            "the Postgres URL's target_session_attrs is \"standby\", allowed are any, read-write, primary",
        ),
        (
            None,
            &[("PGCONNECT_TIMEOUT", "10s")],
            "PGCONNECT_TIMEOUT is \"10s\", allowed is a whole number",
        ),
        (
            None,
            &[("PGPORT", "70000")],
            "the port of host number 1 is \"70000\", allowed is a number from 1 to 65535",
        ),
        (
            Some("postgres://u@h/d?replication=true"),
            &[],
            "parameter \"replication\" is not known",
        ),
        (
            Some("postgres://u@a,b,c/d?port=1,2"),
            &[],
            "2 ports for 3 hosts",
        ),
        (Some("postgres://u@h/d?sslcert=/c"), &[], "without sslkey"),
        (Some("mysql://u@h/d"), &[], "must begin with postgres://"),
    ] {
        let error = parse_with(url, vars).unwrap_err();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn the_password_is_shown_by_nothing() {
    let config = parse("postgres://u:hunter2@h/d").unwrap();
    for text in [
        config.to_string(),
        format!("{config:?}"),
        config.display_url(),
    ] {
        assert!(!text.contains("hunter2"), "{text}");
    }
    for url in [
        "postgres://u:hunter2/x@h/d",
        "postgres://u:hunter2?x=hunter2@h/d",
        "postgres://u:hunter2@x@h/d",
        "postgres://u:5?sslmode=hunter2@h",
        "postgres://u:5?hunter2@h=x",
    ] {
        let error = parse(url).unwrap_err();
        assert!(!error.contains("hunter2"), "{url}: {error}");
    }
}
