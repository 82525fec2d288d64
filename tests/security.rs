//! A broker that asks who is there: TLS and every kind of credentials, what is refused and in which words, and that no
//! secret is ever printed, also at trace level.
//!
//! One broker serves all cases, one after the other, because each start takes a dozen seconds. Each case is a function.

#[path = "security/broker.rs"]
mod broker;
#[path = "security/issuer.rs"]
mod issuer;
mod support;

use std::cell::RefCell;
use std::time::Duration;

use broker::{Broker, PASSWORD, forged_token, token};
use issuer::{CLIENT_SECRET, Issuer};
use support::{Command, Database, Proxy, Walpost, consume_as, eventually};

const DEADLINE: Duration = Duration::from_secs(60);
/// Long enough for a whole test.
const LONG: Duration = Duration::from_secs(3600);
/// Long enough for a start, short enough to wait for its end.
const SHORT: Duration = Duration::from_secs(6);

#[tokio::test]
async fn a_secured_broker() {
    let broker = Broker::start();
    for role in ["walpost", "basic-user", "tls-user", issuer::ROLE] {
        broker.may_produce(role).await;
    }
    let case = Case {
        database: Database::create("security").await,
        broker,
        secrets: RefCell::default(),
        said: RefCell::default(),
    };
    case.secret(PASSWORD);
    case.secret(CLIENT_SECRET);
    case.database.init(&["--payload", "text"], &[]).await;

    a_token_over_tls_works(&case).await;
    a_token_file_is_read_again_when_the_broker_asks(&case).await;
    oauth2_tokens_are_fetched_and_renewed(&case).await;
    an_oauth2_server_that_is_away_is_waited_for(&case).await;
    receipts_go_on_while_a_challenge_is_being_answered(&case).await;
    basic_works(&case).await;
    a_client_certificate_works(&case).await;
    wrong_credentials_are_exit_69(&case).await;
    what_tls_finds_wrong_is_exit_69_and_named(&case).await;
    events_of_a_role_that_may_not_produce_are_stored(&case).await;
    the_admin_interface_takes_the_same_credentials(&case).await;
    // The last one: the broker is of no use after it.
    an_expired_certificate_is_exit_69(&case).await;
    case.no_secret_was_printed();
}

/// The broker, and everything that was said and must not have been said.
struct Case {
    broker: Broker,
    database: Database,
    secrets: RefCell<Vec<String>>,
    said: RefCell<Vec<String>>,
}

impl Case {
    /// Remembers a text that must never be printed, and gives it back.
    fn secret(&self, text: &str) -> String {
        self.secrets.borrow_mut().push(text.to_owned());
        text.to_owned()
    }

    fn token(&self, role: &str, life: Duration) -> String {
        self.secret(&token(role, life))
    }

    /// `walpost <args>` for the secured broker, at trace level.
    fn walpost(&self, args: &[&str], settings: &[(&str, &str)]) -> Command {
        let ca = self.broker.file("ca.crt");
        let basic = [
            ("WALPOST_PULSAR_URL", &*self.broker.url),
            ("WALPOST_PULSAR_CA_FILE", &*ca),
            ("WALPOST_LOG", "trace"),
            ("WALPOST_RECONNECT_MAX", "1s"),
        ];
        self.database.walpost(args, &[&basic, settings].concat())
    }

    async fn start(&self, settings: &[(&str, &str)]) -> Walpost {
        let mut walpost = self.walpost(&["run"], settings).spawn();
        walpost.wait_for_line(" streaming", DEADLINE).await;
        walpost
    }

    /// Commits a row and waits for its receipt.
    async fn publish(&self, payload: &str) {
        let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', $1)";
        self.database.rows(insert, &[&payload]).await;
        self.database.wait_all_confirmed(DEADLINE).await;
    }

    async fn stop(&self, walpost: Walpost) {
        let mut walpost = walpost;
        walpost.sigterm();
        assert_eq!(walpost.wait_exit(DEADLINE).await, 0, "{}", walpost.output());
        self.said.borrow_mut().push(walpost.output());
    }

    /// A start with these settings publishes.
    async fn publishes(&self, payload: &str, settings: &[(&str, &str)]) {
        let walpost = self.start(settings).await;
        self.publish(payload).await;
        self.stop(walpost).await;
    }

    /// Runs to the end: the exit code and the one error line.
    async fn ends(&self, settings: &[(&str, &str)]) -> (i32, String) {
        let (code, said) = self.walpost(&["run"], settings).run(DEADLINE).await;
        let errors: Vec<&str> = said
            .lines()
            .filter(|line| line.starts_with("walpost: error: "))
            .collect();
        let [error] = errors[..] else {
            panic!("not one error line:\n{said}")
        };
        let error = error.to_owned();
        self.said.borrow_mut().push(said);
        (code, error)
    }

    /// A start with these settings is refused for good, in these words.
    async fn is_refused(&self, settings: &[(&str, &str)], words: &[&str]) {
        let (code, error) = self.ends(settings).await;
        assert_eq!(code, 69, "{error}");
        for word in words {
            assert!(error.contains(word), "no {word:?} in: {error}");
        }
    }

    /// Runs another command; exit code and output.
    async fn runs(&self, args: &[&str], settings: &[(&str, &str)]) -> (i32, String) {
        let (code, said) = self.walpost(args, settings).run(DEADLINE).await;
        self.said.borrow_mut().push(said.clone());
        (code, said)
    }

    fn no_secret_was_printed(&self) {
        let said = self.said.borrow();
        let secrets = self.secrets.borrow();
        assert!(said.len() > 15 && secrets.len() > 10);
        // Nothing has a line at trace level today, but the level was on: everything below info is there.
        assert!(said.iter().any(|said| said.contains("DEBUG")));
        for secret in secrets.iter() {
            for said in said.iter() {
                assert!(!said.contains(secret), "{secret:?} was printed:\n{said}");
            }
        }
    }
}

fn count(walpost: &Walpost, text: &str) -> usize {
    walpost.output().matches(text).count()
}

/// Waits until each of so many connections has answered a challenge.
async fn every_connection_is_challenged(walpost: &Walpost, connections: usize) {
    assert!(connections > 0);
    eventually(DEADLINE, "the broker to ask again", async || {
        (count(walpost, "challenge is answered") >= connections).then_some(())
    })
    .await;
}

async fn a_token_over_tls_works(case: &Case) {
    // Enough to fill every buffer on the way, so that frames leave in pieces.
    const ROWS: usize = 20_000;
    let token = case.token("walpost", LONG);
    let walpost = case.start(&[("WALPOST_PULSAR_TOKEN", &token)]).await;
    let insert = format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
         SELECT 'bulk', 'k', 't', n || repeat(' x', 500) FROM generate_series(1, {ROWS}) n"
    );
    case.database.sql(&insert).await;
    case.database.wait_all_confirmed(DEADLINE).await;
    case.stop(walpost).await;

    let (url, token) = (&case.broker.servers.pulsar_url, &case.broker.admin_token);
    let topic = case.database.topic("bulk");
    let received = consume_as(url, Some(token), &topic, ROWS, DEADLINE).await;
    assert_eq!(received.len(), ROWS);
    for (message, n) in received.iter().zip(1..) {
        let begins = format!("{n} x");
        assert!(message.payload.starts_with(begins.as_bytes()), "at {n}");
    }
}

async fn a_token_file_is_read_again_when_the_broker_asks(case: &Case) {
    // GIVEN a connection made with a token that soon expires
    case.broker.write("token", &case.token("walpost", SHORT));
    let file = case.broker.file("token");
    let walpost = case.start(&[("WALPOST_PULSAR_TOKEN_FILE", &file)]).await;
    case.publish("before").await;
    let connections = count(&walpost, "connected to broker");

    // WHEN the file is rotated and the old token has expired
    case.broker.write("token", &case.token("walpost", LONG));
    every_connection_is_challenged(&walpost, connections).await;

    // THEN it goes on, over the same connections
    case.publish("after").await;
    let now = count(&walpost, "connected to broker");
    assert_eq!(now, connections, "{}", walpost.output());
    case.stop(walpost).await;
}

async fn oauth2_tokens_are_fetched_and_renewed(case: &Case) {
    // GIVEN an issuer whose tokens soon expire
    let issuer = Issuer::start(SHORT);
    let settings = [
        ("WALPOST_PULSAR_OAUTH2_ISSUER_URL", &*issuer.url),
        ("WALPOST_PULSAR_OAUTH2_CLIENT_ID", "the-client"),
        ("WALPOST_PULSAR_OAUTH2_CLIENT_SECRET", CLIENT_SECRET),
        ("WALPOST_PULSAR_OAUTH2_AUDIENCE", "urn:pulsar"),
        ("WALPOST_PULSAR_OAUTH2_SCOPE", "a b"),
    ];
    let walpost = case.start(&settings).await;
    case.publish("first token").await;
    assert_eq!(
        issuer.tokens().len(),
        1,
        "one token serves every connection"
    );
    assert!(
        issuer
            .last_form()
            .ends_with("&audience=urn%3Apulsar&scope=a%20b")
    );

    // WHEN the broker has had enough of it, THEN another is fetched and events go on
    every_connection_is_challenged(&walpost, count(&walpost, "connected to broker")).await;
    case.publish("second token").await;
    assert!(issuer.tokens().len() >= 2);
    case.stop(walpost).await;

    // AND Pulsar's own key file serves as well
    let key = format!(
        r#"{{"type":"client_credentials","client_id":"the-client","client_secret":"{CLIENT_SECRET}","issuer_url":"{}"}}"#,
        issuer.url
    );
    case.broker.write("key.json", &key);
    let file = case.broker.file("key.json");
    case.publishes("key file", &[("WALPOST_PULSAR_OAUTH2_KEY_FILE", &file)])
        .await;

    // BUT a wrong secret is refused, and what the server says of it is not repeated
    let wrong = case.secret("not-the-secret");
    let mut settings = settings;
    settings[2].1 = &wrong;
    let words = ["401", "invalid_client", "WALPOST_PULSAR_OAUTH2_CLIENT_ID"];
    case.is_refused(&settings, &words).await;
    settings[0].1 = "http://127.0.0.1:1/realm";
    let (code, said) = case.runs(&["check"], &settings).await;
    assert_eq!(code, 75, "{said}");
    for token in issuer.tokens() {
        case.secret(&token);
    }
}

async fn an_oauth2_server_that_is_away_is_waited_for(case: &Case) {
    // GIVEN a connector whose OAuth2 server is cut off
    let issuer = Issuer::start(LONG);
    let addr = issuer
        .url
        .trim_start_matches("http://")
        .trim_end_matches("/realm");
    let proxy = Proxy::start(addr);
    proxy.refuse(true);
    // Discovery is asked for through the proxy; the token endpoint it names is the server's own.
    let url = format!("http://{}/realm", proxy.addr());
    let settings = [
        ("WALPOST_PULSAR_OAUTH2_ISSUER_URL", &*url),
        ("WALPOST_PULSAR_OAUTH2_CLIENT_ID", "the-client"),
        ("WALPOST_PULSAR_OAUTH2_CLIENT_SECRET", CLIENT_SECRET),
    ];
    let mut walpost = case.walpost(&["run"], &settings).spawn();
    walpost.wait_for_line("retry_in_ms", DEADLINE).await;
    assert!(walpost.output().contains("the OAuth2 server at "));

    // WHEN it is back, THEN events go on
    proxy.refuse(false);
    walpost.wait_for_line(" streaming", DEADLINE).await;
    case.publish("back").await;
    case.stop(walpost).await;
    for token in issuer.tokens() {
        case.secret(&token);
    }
}

async fn receipts_go_on_while_a_challenge_is_being_answered(case: &Case) {
    // GIVEN a connection whose token soon expires, and an OAuth 2 server that has become slow
    let issuer = Issuer::start(SHORT);
    let addr = issuer.url.trim_start_matches("http://");
    let proxy = Proxy::start(addr.trim_end_matches("/realm"));
    let url = format!("http://{}/realm", proxy.addr());
    let walpost = case
        .start(&[
            ("WALPOST_PULSAR_OAUTH2_ISSUER_URL", &*url),
            ("WALPOST_PULSAR_OAUTH2_CLIENT_ID", "the-client"),
            ("WALPOST_PULSAR_OAUTH2_CLIENT_SECRET", CLIENT_SECRET),
            ("WALPOST_STATUS_INTERVAL", "50ms"),
        ])
        .await;
    case.publish("before the challenge").await;
    let connections = count(&walpost, "connected to broker");
    proxy.hold_upstream_replies(true);

    // WHEN the broker asks for a new one, on every connection: the producers are on the last
    eventually(DEADLINE, "every connection's challenge", async || {
        (count(&walpost, "asks for credentials again") >= connections).then_some(())
    })
    .await;

    // THEN events go on, before it is there
    case.publish("during the challenge").await;
    assert_eq!(count(&walpost, "challenge is answered"), 0);
    assert_eq!(issuer.tokens().len(), 1);

    // AND when it is there, the connections stay
    proxy.hold_upstream_replies(false);
    every_connection_is_challenged(&walpost, connections).await;
    case.publish("after the challenge").await;
    let now = count(&walpost, "connected to broker");
    assert_eq!(now, connections, "{}", walpost.output());
    case.stop(walpost).await;
    for token in issuer.tokens() {
        case.secret(&token);
    }
}

async fn basic_works(case: &Case) {
    case.broker.write("password", &format!("{PASSWORD}\n"));
    let file = case.broker.file("password");
    let settings = [
        ("WALPOST_PULSAR_BASIC_USER", "basic-user"),
        ("WALPOST_PULSAR_BASIC_PASSWORD_FILE", &*file),
    ];
    case.publishes("basic", &settings).await;
}

async fn a_client_certificate_works(case: &Case) {
    let (cert, key) = (
        case.broker.file("client.crt"),
        case.broker.file("client.key"),
    );
    let key_text = std::fs::read_to_string(&key).expect("made");
    case.secret(key_text.lines().nth(1).expect("a PEM file has lines"));
    let settings = [
        ("WALPOST_PULSAR_CERT_FILE", &*cert),
        ("WALPOST_PULSAR_KEY_FILE", &*key),
    ];
    case.publishes("certificate", &settings).await;

    // BUT not one of an authority that the broker does not trust
    let (cert, key) = (
        case.broker.file("foreign.crt"),
        case.broker.file("foreign.key"),
    );
    let settings = [
        ("WALPOST_PULSAR_CERT_FILE", &*cert),
        ("WALPOST_PULSAR_KEY_FILE", &*key),
    ];
    case.is_refused(
        &settings,
        &["refuses the TLS connection", "WALPOST_PULSAR_CERT_FILE"],
    )
    .await;
}

async fn wrong_credentials_are_exit_69(case: &Case) {
    let forged = case.secret(&forged_token("walpost"));
    let expired = case.token("walpost", Duration::ZERO);
    for token in [&forged, &expired] {
        case.is_refused(
            &[("WALPOST_PULSAR_TOKEN", token)],
            &["refuses the connection", "WALPOST_PULSAR_TOKEN_FILE"],
        )
        .await;
    }
    let wrong = case.secret("close-sesame");
    case.is_refused(
        &[
            ("WALPOST_PULSAR_BASIC_USER", "basic-user"),
            ("WALPOST_PULSAR_BASIC_PASSWORD", &wrong),
        ],
        &["refuses the connection", "WALPOST_PULSAR_BASIC_PASSWORD"],
    )
    .await;
    case.is_refused(&[], &["refuses the connection", "WALPOST_PULSAR_OAUTH2_*"])
        .await;
}

async fn what_tls_finds_wrong_is_exit_69_and_named(case: &Case) {
    let token = case.token("walpost", LONG);
    let token = ("WALPOST_PULSAR_TOKEN", &*token);
    let other = case.broker.file("other.crt");
    case.is_refused(
        &[token, ("WALPOST_PULSAR_CA_FILE", &other)],
        &["authority that is not trusted", "WALPOST_PULSAR_CA_FILE"],
    )
    .await;
    case.is_refused(
        &[token, ("WALPOST_PULSAR_URL", &case.broker.url_by_name)],
        &["not for the name localhost", "subjectAltName"],
    )
    .await;
}

async fn events_of_a_role_that_may_not_produce_are_stored(case: &Case) {
    let token = case.token("stranger", LONG);
    let mut walpost = case.start(&[("WALPOST_PULSAR_TOKEN", &token)]).await;
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', 'x')";
    case.database.sql(insert).await;
    let line = walpost.wait_for_line("the topic is refused", DEADLINE);
    let line = line.await;
    assert!(
        line.contains("'produce'") && line.contains(&case.database.topic("t")),
        "{line}"
    );
    case.database.wait_all_confirmed(DEADLINE).await;
    case.stop(walpost).await;

    // AND they go out for a role that may
    let token = case.token("walpost", LONG);
    let walpost = case.start(&[("WALPOST_PULSAR_TOKEN", &token)]).await;
    eventually(DEADLINE, "the straggler to go", async || {
        let query = "SELECT FROM walpost.straggler";
        let rows = case.database.rows(query, &[]).await;
        rows.is_empty().then_some(())
    })
    .await;
    case.publish("after the stranger").await;
    case.stop(walpost).await;
}

async fn the_admin_interface_takes_the_same_credentials(case: &Case) {
    let admin_url = ("WALPOST_PULSAR_ADMIN_URL", &*case.broker.admin_url);
    let token = case.token("walpost", LONG);
    let producer = [admin_url, ("WALPOST_PULSAR_TOKEN", &*token)];

    // A role that only produces may not ask, which is no failure; it may not change it either.
    let (code, said) = case.runs(&["check"], &producer).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("ok    encryption   TLS"), "{said}");
    assert!(said.contains("these credentials may not ask"), "{said}");
    let (code, said) = case
        .runs(&["init", "--enable-deduplication"], &producer)
        .await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("403"), "{said}");

    // One that is not known is told apart.
    let forged = case.secret(&forged_token("admin"));
    let (code, said) = case
        .runs(
            &["init", "--enable-deduplication"],
            &[admin_url, ("WALPOST_PULSAR_TOKEN", &forged)],
        )
        .await;
    assert_eq!(code, 69, "{said}");
    assert!(
        said.contains("401") && said.contains("WALPOST_PULSAR_TOKEN"),
        "{said}"
    );

    // An administrator may.
    let token = case.token("admin", LONG);
    let administrator = [admin_url, ("WALPOST_PULSAR_TOKEN", &*token)];
    let (code, said) = case
        .runs(&["init", "--enable-deduplication"], &administrator)
        .await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("enabled deduplication of namespace public/default"),
        "{said}"
    );
    let policy = "/admin/v2/namespaces/public/default/deduplication";
    assert_eq!(case.broker.admin("GET", policy, "").await.trim(), "true");
    eventually(DEADLINE, "check to say effectively once", async || {
        let (code, said) = case.runs(&["check"], &administrator).await;
        (code == 0 && said.contains("effectively once")).then_some(())
    })
    .await;

    // The certificate of its web server is checked like the broker's.
    let other = case.broker.file("other.crt");
    let settings = [&administrator[..], &[("WALPOST_PULSAR_CA_FILE", &*other)]].concat();
    let (code, said) = case
        .runs(&["init", "--enable-deduplication"], &settings)
        .await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("authority that is not trusted"), "{said}");
}

async fn an_expired_certificate_is_exit_69(case: &Case) {
    let token = case.token("walpost", LONG);
    let settings = [("WALPOST_PULSAR_TOKEN", &*token)];
    case.broker.let_the_certificate_expire();
    eventually(
        DEADLINE,
        "the broker to show the new certificate",
        async || {
            let (code, _) = case.runs(&["check"], &settings).await;
            (code == 69).then_some(())
        },
    )
    .await;
    case.is_refused(
        &settings,
        &["has expired", "renew the server's certificate"],
    )
    .await;
}
