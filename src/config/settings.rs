//! The one table of settings: name, default, kind, meaning.
//!
//! Everything a user can see of a setting comes from here: the env var, the flag of the same name, the lines of
//! `--help`, the default, the range that is checked and the words "allowed: …" of an error. [`super::Config::load`]
//! reads each row exactly once (a test holds it to that).

use std::time::Duration;

/// The first part of every env var of walpost's own.
pub const PREFIX: &str = "WALPOST_";

/// What a value looks like and which values are allowed; one place for the check and for the words.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A number with a unit of time.
    Duration {
        /// Shortest allowed.
        min: Duration,
        /// Longest allowed.
        max: Duration,
    },
    /// A number of bytes, with or without a unit.
    Size {
        /// Smallest allowed, in bytes.
        min: u64,
        /// Largest allowed, in bytes.
        max: u64,
    },
    /// A whole number.
    Count {
        /// Smallest allowed.
        min: u64,
        /// Largest allowed.
        max: u64,
    },
    /// Anything else: the text says what; the parser stands in [`super::Config::load`].
    Text(&'static str),
}

impl Kind {
    /// What is allowed, as it stands in `--help` and after "allowed:" in an error.
    pub fn allowed(&self) -> String {
        use super::values::{show_duration, show_size};
        match self {
            Self::Duration { min, max } => format!(
                "a duration from {} to {} (us, ms, s, m, h, d)",
                show_duration(*min),
                show_duration(*max)
            ),
            Self::Size { min, max } => format!(
                "a size from {} to {} (B, KB, MB, GB, KiB, MiB, GiB)",
                show_size(*min),
                show_size(*max)
            ),
            Self::Count { min, max } => format!("a whole number from {min} to {max}"),
            Self::Text(allowed) => (*allowed).to_owned(),
        }
    }
}

/// What holds when neither the flag nor the env var is given.
#[derive(Clone, Copy, Debug)]
pub enum Fallback {
    /// This text, read as if it had been given.
    Value(&'static str),
    /// Something found out elsewhere; these words describe it.
    Described(&'static str),
}

impl Fallback {
    /// The words for `--help`.
    pub fn text(self) -> &'static str {
        match self {
            Self::Value(text) | Self::Described(text) => text,
        }
    }
}

/// One row of the table.
#[derive(Debug)]
pub struct Setting {
    /// The env var.
    pub env: &'static str,
    /// What holds when it is not given.
    pub default: Fallback,
    /// What its value looks like.
    pub kind: Kind,
    /// What it does, in a sentence without a full stop.
    pub meaning: &'static str,
    /// True when the value must never be shown.
    pub secret: bool,
}

impl Setting {
    /// The flag without its dashes: `WALPOST_BATCH_MAX_BYTES` is `batch-max-bytes`.
    pub fn flag(&self) -> String {
        self.env
            .strip_prefix(PREFIX)
            .unwrap_or(self.env)
            .to_ascii_lowercase()
            .replace('_', "-")
    }

    const fn new(env: &'static str, default: Fallback, kind: Kind, meaning: &'static str) -> Self {
        Self {
            env,
            default,
            kind,
            meaning,
            secret: false,
        }
    }

    const fn secret(mut self) -> Self {
        self.secret = true;
        self
    }
}

use Fallback::{Described, Value};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

const fn minutes(count: u64) -> Duration {
    Duration::from_secs(count * 60)
}

const COLUMN: Kind = Kind::Text("a column name of 1 to 63 bytes");
const FILE: Kind = Kind::Text("the path of a readable file");
const PEM_FILE: Kind = Kind::Text("the path of a PEM file");
const WORDS: Kind = Kind::Text("a text without control characters");
const HTTP_URL: Kind = Kind::Text("http://host:port or https://host:port, with a path if need be");

/// Declares each row as a constant of its own, which `Config::load` names, and the list of them all.
macro_rules! settings {
    ($($constant:ident = $row:expr;)*) => {
        $(
            #[doc = concat!("The row of `WALPOST_", stringify!($constant), "`.")]
            pub const $constant: Setting = $row;
        )*

        /// Every setting, in the order of `--help`.
        pub const ALL: &[Setting] = &[$($constant),*];
    };
}

settings! {
    POSTGRES_URL = Setting::new(
        "WALPOST_POSTGRES_URL",
        Described("from PGHOST, PGUSER and the other PG* variables"),
        Kind::Text("a libpq URL such as postgres://user@host:5432/database"),
        "the Postgres that is tailed",
    ).secret();
    POSTGRES_URL_FILE = Setting::new(
        "WALPOST_POSTGRES_URL_FILE", Described("none"), FILE,
        "a file that holds the Postgres URL, instead of WALPOST_POSTGRES_URL",
    );
    PULSAR_URL = Setting::new(
        "WALPOST_PULSAR_URL", Value("pulsar://127.0.0.1:6650"),
        Kind::Text("pulsar://host:port[,host:port…], or pulsar+ssl:// for TLS"),
        "the Pulsar brokers or proxies, tried in this order",
    );
    PULSAR_ADMIN_URL = Setting::new(
        "WALPOST_PULSAR_ADMIN_URL", Described("none"), HTTP_URL,
        "the admin interface of the same cluster, for check and init: whether the broker deduplicates",
    );
    PULSAR_KEEPALIVE_INTERVAL = Setting::new(
        "WALPOST_PULSAR_KEEPALIVE_INTERVAL", Value("30s"),
        Kind::Duration { min: ms(100), max: minutes(60) },
        "a broker that is silent this long gets a PING; silent for twice as long, its connection is taken for dead",
    );
    PULSAR_CA_FILE = Setting::new(
        "WALPOST_PULSAR_CA_FILE", Described("the authorities that this host trusts"), PEM_FILE,
        "the authorities that may sign a broker's certificate, for pulsar+ssl and https",
    );
    PULSAR_CERT_FILE = Setting::new(
        "WALPOST_PULSAR_CERT_FILE", Described("none"), PEM_FILE,
        "the client's certificate chain; without other credentials it says who walpost is",
    );
    PULSAR_KEY_FILE = Setting::new(
        "WALPOST_PULSAR_KEY_FILE", Described("none"), PEM_FILE,
        "the private key of that certificate",
    );
    PULSAR_TOKEN = Setting::new(
        "WALPOST_PULSAR_TOKEN", Described("none"), Kind::Text("a token of printable ASCII"),
        "token for Pulsar's token authentication; prefer the file: flags and env vars can be seen by others",
    ).secret();
    PULSAR_TOKEN_FILE = Setting::new(
        "WALPOST_PULSAR_TOKEN_FILE", Described("none"), FILE,
        "a file that holds the token, read again at each connect, instead of WALPOST_PULSAR_TOKEN",
    );
    PULSAR_OAUTH2_ISSUER_URL = Setting::new(
        "WALPOST_PULSAR_OAUTH2_ISSUER_URL", Described("none"), HTTP_URL,
        "OAuth2 client credentials: the issuer, below which /.well-known/openid-configuration is found",
    );
    PULSAR_OAUTH2_CLIENT_ID = Setting::new(
        "WALPOST_PULSAR_OAUTH2_CLIENT_ID", Described("none"), WORDS, "the client id",
    );
    PULSAR_OAUTH2_CLIENT_SECRET = Setting::new(
        "WALPOST_PULSAR_OAUTH2_CLIENT_SECRET", Described("none"), WORDS,
        "the client's secret; prefer the file",
    ).secret();
    PULSAR_OAUTH2_CLIENT_SECRET_FILE = Setting::new(
        "WALPOST_PULSAR_OAUTH2_CLIENT_SECRET_FILE", Described("none"), FILE,
        "a file that holds the client's secret",
    );
    PULSAR_OAUTH2_KEY_FILE = Setting::new(
        "WALPOST_PULSAR_OAUTH2_KEY_FILE", Described("none"), FILE,
        "a key file of Pulsar's tools (JSON with client_id, client_secret, issuer_url), in place of the three",
    );
    PULSAR_OAUTH2_AUDIENCE = Setting::new(
        "WALPOST_PULSAR_OAUTH2_AUDIENCE", Described("none"), WORDS,
        "whom the token is for, if the issuer wants to know",
    );
    PULSAR_OAUTH2_SCOPE = Setting::new(
        "WALPOST_PULSAR_OAUTH2_SCOPE", Described("none"), WORDS,
        "the scope to ask for, if the issuer wants to know",
    );
    PULSAR_BASIC_USER = Setting::new(
        "WALPOST_PULSAR_BASIC_USER", Described("none"), Kind::Text("a name without a colon"),
        "user of Pulsar's basic authentication",
    );
    PULSAR_BASIC_PASSWORD = Setting::new(
        "WALPOST_PULSAR_BASIC_PASSWORD", Described("none"), WORDS,
        "password of that user; prefer the file",
    ).secret();
    PULSAR_BASIC_PASSWORD_FILE = Setting::new(
        "WALPOST_PULSAR_BASIC_PASSWORD_FILE", Described("none"), FILE,
        "a file that holds the password, read again at each connect",
    );
    OUTBOX_TABLE = Setting::new(
        "WALPOST_OUTBOX_TABLE", Value("walpost.outbox"),
        Kind::Text("table names as in SQL, schema.table, separated by commas"),
        "the outbox tables",
    );
    COLUMN_ID = Setting::new(
        "WALPOST_COLUMN_ID", Value("id"), COLUMN, "column of the message id",
    );
    COLUMN_AGGREGATETYPE = Setting::new(
        "WALPOST_COLUMN_AGGREGATETYPE", Value("aggregatetype"), COLUMN,
        "column of the aggregate's type, which routes to a topic",
    );
    COLUMN_AGGREGATEID = Setting::new(
        "WALPOST_COLUMN_AGGREGATEID", Value("aggregateid"), COLUMN,
        "column of the message key: order is kept per key",
    );
    COLUMN_TYPE = Setting::new(
        "WALPOST_COLUMN_TYPE", Value("type"), COLUMN, "column of the event type",
    );
    COLUMN_PAYLOAD = Setting::new(
        "WALPOST_COLUMN_PAYLOAD", Value("payload"), COLUMN, "column of the payload",
    );
    COLUMN_TOPIC = Setting::new(
        "WALPOST_COLUMN_TOPIC", Value("topic"), COLUMN,
        "column of a topic that overrides the template, if the table has it",
    );
    COLUMN_HEADERS = Setting::new(
        "WALPOST_COLUMN_HEADERS", Value("headers"), COLUMN,
        "column of string properties as a JSON object, if the table has it",
    );
    COLUMN_DELIVER_AT = Setting::new(
        "WALPOST_COLUMN_DELIVER_AT", Value("deliver_at"), COLUMN,
        "column of the delivery time of a delayed message, if the table has it",
    );
    COLUMN_CREATED_AT = Setting::new(
        "WALPOST_COLUMN_CREATED_AT", Value("created_at"), COLUMN,
        "column of the event time, if the table has it",
    );
    SLOT = Setting::new(
        "WALPOST_SLOT", Value("walpost"),
        Kind::Text("1 to 63 of the characters a-z, 0-9 and _"),
        "the logical replication slot",
    );
    PUBLICATION = Setting::new(
        "WALPOST_PUBLICATION", Value("walpost"),
        Kind::Text("a name of 1 to 63 bytes without control characters"),
        "the publication",
    );
    TOPIC = Setting::new(
        "WALPOST_TOPIC", Value("persistent://public/default/outbox.{aggregatetype}"),
        Kind::Text("a persistent topic's name with columns in braces"),
        "routing template: the topic of an event without one of its own",
    );
    PRODUCER_NAME = Setting::new(
        "WALPOST_PRODUCER_NAME", Described("walpost-<slot>"),
        Kind::Text("1 to 128 letters, digits, '.', '_' and '-', not beginning with pulsar.repl"),
        "base of the producer names; two connectors must never share it, and another Pulsar cluster needs a new one",
    );
    LANES = Setting::new(
        "WALPOST_LANES", Value("16"), Kind::Count { min: 1, max: 1024 },
        "producers per topic; a key takes the same one, except where the topic allows fewer producers; lanes go at their own pace",
    );
    HASHING_SCHEME = Setting::new(
        "WALPOST_HASHING_SCHEME", Value("java_string_hash"), Kind::Text("java_string_hash or murmur3_32_hash"),
        "how a key becomes a partition; the same as other producers of the topic use",
    );
    PARTITION_REFRESH = Setting::new(
        "WALPOST_PARTITION_REFRESH", Value("60s"), Kind::Duration { min: ms(100), max: minutes(24 * 60) },
        "how often the partitions of a topic in use are counted, to notice when there are more; and how often, at first, one producer more is asked for where a topic allows fewer than there are lanes",
    );
    PRODUCER_IDLE = Setting::new(
        "WALPOST_PRODUCER_IDLE", Value("5m"), Kind::Duration { min: ms(100), max: minutes(24 * 60) },
        "a producer without work for this long is closed; its next event opens it again",
    );
    COMPRESSION = Setting::new(
        "WALPOST_COMPRESSION", Value("none"), Kind::Text("none, lz4, zstd, snappy or zlib"),
        "how batches are compressed",
    );
    SCHEMA = Setting::new(
        "WALPOST_SCHEMA", Value("none"), Kind::Text("none, string, json, avro or protobuf"),
        "what the payloads are: the schema that is registered for each topic",
    );
    SCHEMA_FILE = Setting::new(
        "WALPOST_SCHEMA_FILE", Described("none"),
        Kind::Text("a path, with {topic}, {namespace} and {tenant} for parts of the topic's name"),
        "the schema's definition (Avro JSON); needed for json, avro and protobuf",
    );
    BATCH_MAX_MESSAGES = Setting::new(
        "WALPOST_BATCH_MAX_MESSAGES", Value("1000"), Kind::Count { min: 1, max: 100_000 },
        "a batch is sent when it holds this many messages",
    );
    BATCH_MAX_BYTES = Setting::new(
        "WALPOST_BATCH_MAX_BYTES", Value("128KiB"), Kind::Size { min: KIB, max: 64 * MIB },
        "a batch is sent when it holds this many bytes",
    );
    BATCH_LINGER = Setting::new(
        "WALPOST_BATCH_LINGER", Value("1ms"), Kind::Duration { min: ms(0), max: minutes(1) },
        "a batch that is not full is sent when its first message has waited this long; in a backlog longer, up to 64ms",
    );
    MAX_IN_FLIGHT_BYTES = Setting::new(
        "WALPOST_MAX_IN_FLIGHT_BYTES", Value("24MiB"), Kind::Size { min: KIB, max: 64 * GIB },
        "memory of batches without a receipt at which intake pauses",
    );
    MAX_IN_FLIGHT_MESSAGES = Setting::new(
        "WALPOST_MAX_IN_FLIGHT_MESSAGES", Value("100000"), Kind::Count { min: 1, max: 100_000_000 },
        "messages without a receipt at which intake pauses",
    );
    SEND_TIMEOUT = Setting::new(
        "WALPOST_SEND_TIMEOUT", Value("30s"), Kind::Duration { min: ms(100), max: minutes(60) },
        "no receipt for this long, while one is due: the topic's producer is opened again where the broker answers what was sent later, else the connection ends; nothing is dropped",
    );
    RECONNECT_INITIAL = Setting::new(
        "WALPOST_RECONNECT_INITIAL", Value("100ms"), Kind::Duration { min: ms(1), max: minutes(60) },
        "first pause before connecting again, to Postgres or Pulsar",
    );
    RECONNECT_MAX = Setting::new(
        "WALPOST_RECONNECT_MAX", Value("10s"), Kind::Duration { min: ms(1), max: minutes(60) },
        "longest pause before connecting again",
    );
    STATUS_INTERVAL = Setting::new(
        "WALPOST_STATUS_INTERVAL", Value("1s"), Kind::Duration { min: ms(10), max: ms(30_000) },
        "how often the confirmed LSN is sent to Postgres; keep it below half of wal_sender_timeout",
    );
    AFTER_PUBLISH = Setting::new(
        "WALPOST_AFTER_PUBLISH", Value("keep"), Kind::Text("keep, mark or delete"),
        "what becomes of a row once the broker has acknowledged it: nothing, sent_at is set, or it is deleted",
    );
    RETENTION = Setting::new(
        "WALPOST_RETENTION", Value("none"), Kind::Text("a duration such as 7d, or none to keep them for ever"),
        "delivered rows older than this are deleted; partitions are dropped whole",
    );
    MODE = Setting::new(
        "WALPOST_MODE", Value("stream"), Kind::Text("stream or poll"),
        "stream reads the replication slot; poll reads the table, where there is no logical replication",
    );
    SCAN_INTERVAL = Setting::new(
        "WALPOST_SCAN_INTERVAL", Value("10s"), Kind::Duration { min: ms(100), max: minutes(60) },
        "how often walpost looks whether the publication still sends every row of the tables; how often it notes in walpost.progress \
         what is delivered, while events pass; how often poll mode looks, and rows that were never marked or are past their retention \
         are looked for",
    );
    RECONCILE = Setting::new(
        "WALPOST_RECONCILE", Value("on"), Kind::Text("on or off"),
        "compare each table with what the stream brought, every WALPOST_SCAN_INTERVAL in which something happened, and publish rows that \
         it left out; needs the columns txid and seq",
    );
    SLOT_LOST = Setting::new(
        "WALPOST_SLOT_LOST", Value("recover"), Kind::Text("recover, restart or fail"),
        "what to do when the slot is lost, gone or not the one that walpost left. recover: make it anew and publish the rows in \
         between from the table, or stop with exit code 69 where a table lacks txid or seq; restart: the same, and give up the \
         rows in between of such a table; fail: stop with exit code 69",
    );
    STRAGGLER_AGE = Setting::new(
        "WALPOST_STRAGGLER_AGE", Value("5m"), Kind::Duration { min: ms(100), max: minutes(7 * 24 * 60) },
        "a topic that takes nothing (not found, quota, or any other answer while other topics get receipts; four times as long while none does) makes \
         stragglers of its events after this long; in \
         the modes mark and delete a row older than this that is still not marked, or there, is published again",
    );
    STRAGGLER_LIMIT = Setting::new(
        "WALPOST_STRAGGLER_LIMIT", Value("100000"), Kind::Count { min: 1, max: 100_000_000 },
        "rows of walpost.straggler, dead ones included, at which intake pauses",
    );
    RETRY_INITIAL = Setting::new(
        "WALPOST_RETRY_INITIAL", Value("1s"), Kind::Duration { min: ms(1), max: minutes(24 * 60) },
        "first pause before a straggler is tried",
    );
    RETRY_MAX = Setting::new(
        "WALPOST_RETRY_MAX", Value("5m"), Kind::Duration { min: ms(1), max: minutes(24 * 60) },
        "longest pause between two attempts",
    );
    RETRY_MAX_ATTEMPTS = Setting::new(
        "WALPOST_RETRY_MAX_ATTEMPTS", Value("20"), Kind::Count { min: 1, max: 1_000_000 },
        "failed attempts after which a straggler is dead",
    );
    ORDERING = Setting::new(
        "WALPOST_ORDERING", Value("key"), Kind::Text("key or none"),
        "key: later events of a straggler's topic and key wait behind it; none: they pass it",
    );
    ON_DEAD = Setting::new(
        "WALPOST_ON_DEAD", Value("skip"), Kind::Text("skip or block"),
        "what a dead straggler's successors do: go on, or wait until it is retried or discarded",
    );
    DEAD_LETTER_TOPIC = Setting::new(
        "WALPOST_DEAD_LETTER_TOPIC", Described("none"), Kind::Text("a full topic name, or a name in public/default"),
        "where a copy of each dead straggler goes",
    );
    HTTP_ADDR = Setting::new(
        "WALPOST_HTTP_ADDR", Value("127.0.0.1:9464"),
        Kind::Text("an IP address and a port, such as 127.0.0.1:9464 or [::]:9464, or none"),
        "where run serves its status page, metrics and health, and status asks for them; none or nothing: nowhere",
    );
    LOG = Setting::new(
        "WALPOST_LOG", Value("info"),
        Kind::Text("off, error, warn, info, debug, trace, or a tracing filter such as info,walpost=debug"),
        "what is logged, to stderr",
    );
    LOG_FORMAT = Setting::new(
        "WALPOST_LOG_FORMAT", Value("text"), Kind::Text("text or json"), "form of the log lines",
    );
    SHUTDOWN_GRACE = Setting::new(
        "WALPOST_SHUTDOWN_GRACE", Value("10s"), Kind::Duration { min: ms(0), max: minutes(60) },
        "time for receipts to come in after SIGTERM or SIGINT",
    );
}

/// What `deploy/local/up` writes into its env file for tests and scripts besides settings.
const LOCAL_SERVERS: &str = "WALPOST_LOCAL_";

/// Env vars that begin like ours and mean nothing to this version: a typing error, or a setting of another version.
///
/// Worth a warning, never an error: orchestrators put variables such as `WALPOST_SERVICE_HOST` into every container.
pub fn unknown_env_vars(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut unknown: Vec<String> = names
        .into_iter()
        .filter(|name| name.starts_with(PREFIX) && ALL.iter().all(|known| known.env != name))
        .filter(|name| !name.starts_with(LOCAL_SERVERS))
        .collect();
    unknown.sort_unstable();
    unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_is_the_env_var_without_prefix_in_kebab_case() {
        assert_eq!(BATCH_MAX_BYTES.flag(), "batch-max-bytes");
        assert_eq!(LOG.flag(), "log");
    }

    #[test]
    fn every_row_has_a_name_of_its_own_and_the_prefix() {
        for (index, setting) in ALL.iter().enumerate() {
            assert!(setting.env.starts_with(PREFIX), "{}", setting.env);
            assert!(
                ALL[..index].iter().all(|other| other.env != setting.env),
                "{} stands twice",
                setting.env
            );
        }
    }

    #[test]
    fn only_unknown_names_with_the_prefix_are_reported() {
        let names = [
            "PATH",
            "WALPOST_LANES",
            "WALPOST_LANE",
            "WALPOST_SERVICE_HOST",
            "WALPOST_LOCAL_DIR",
        ];
        assert_eq!(
            unknown_env_vars(names.map(str::to_owned)),
            ["WALPOST_LANE", "WALPOST_SERVICE_HOST"]
        );
    }
}
