//! Every setting of walpost, read and checked before anything else happens.
//!
//! [`settings`] is the one table of names, defaults, ranges and meanings; this module turns it into the typed
//! [`Config`] and does the checks that need more than one value. Input: flags and env vars. Output: a `Config`, or one
//! error that names every wrong value, with exit code 64. Nothing is connected to and no file is written.

mod pulsar;
mod reader;
pub mod settings;
mod values;

use std::net::SocketAddr;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

pub use reader::Lookup;
pub use settings::unknown_env_vars;
pub use values::{AfterPublish, LogFormat, Mode, PulsarUrl, Secret, SecretSource, SlotLost};

use crate::http::HttpUrl;
use crate::outbox::{Columns, TopicTemplate, own_topic_into};
use crate::postgres::{PostgresConfig, TableName};
use crate::pulsar::schema::{SchemaConfig, SchemaKind, check_file_template};
use crate::pulsar::{Auth, Codec, HashingScheme, TlsFiles};
use crate::{Error, Result};
use reader::{Noted, Reader};

/// What walpost was told to do; every value has been checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// The Postgres that is tailed.
    pub postgres: PostgresConfig,
    /// The Pulsar brokers or proxies.
    pub pulsar_url: PulsarUrl,
    /// The admin interface of the same cluster.
    pub pulsar_admin_url: Option<HttpUrl>,
    /// Who walpost is to both.
    pub pulsar_auth: Auth,
    /// The files for TLS to both.
    pub pulsar_tls: TlsFiles,
    /// Silence on a broker connection after which it is asked for a sign of life.
    pub pulsar_keepalive_interval: Duration,
    /// The outbox tables; never empty, no table twice.
    pub outbox_tables: Vec<TableName>,
    /// The outbox columns' names.
    pub columns: Columns,
    /// The logical replication slot.
    pub slot: String,
    /// The publication; any name, so it must be quoted in SQL and in the protocol.
    pub publication: String,
    /// Routing template.
    pub topic: TopicTemplate,
    /// Base of the producer names.
    pub producer_name: String,
    /// Producers per topic.
    pub lanes: usize,
    /// How a key becomes a partition.
    pub hashing: HashingScheme,
    /// How often the partitions of a topic in use are counted.
    pub partition_refresh: Duration,
    /// Time without work after which a producer is closed.
    pub producer_idle: Duration,
    /// How batches are compressed.
    pub compression: Codec,
    /// The schema that is registered for each topic.
    pub schema: Option<SchemaConfig>,
    /// Messages at which a batch is sent.
    pub batch_max_messages: usize,
    /// Bytes at which a batch is sent; not above `max_in_flight_bytes`.
    pub batch_max_bytes: u64,
    /// Age of its first message at which a batch is sent.
    pub batch_linger: Duration,
    /// Bytes without a receipt at which intake pauses.
    pub max_in_flight_bytes: u64,
    /// Messages without a receipt at which intake pauses.
    pub max_in_flight_messages: usize,
    /// Time without a receipt that forces a new broker connection.
    pub send_timeout: Duration,
    /// First pause before connecting again.
    pub reconnect_initial: Duration,
    /// Longest pause before connecting again.
    pub reconnect_max: Duration,
    /// Time between two `StandbyStatusUpdate`s.
    pub status_interval: Duration,
    /// Where rows come from.
    pub mode: Mode,
    /// Time between two notes of what is delivered.
    pub scan_interval: Duration,
    /// `WALPOST_RECONCILE`: rows that the stream left out are looked for.
    pub reconcile: bool,
    /// What a lost slot leads to.
    pub slot_lost: SlotLost,
    /// How long a topic may have trouble that may pass before its events become stragglers; and the age at which a row that
    /// is not marked is published again.
    pub straggler_age: Duration,
    /// Rows of the straggler table at which intake pauses.
    pub straggler_limit: usize,
    /// First pause before a straggler is tried.
    pub retry_initial: Duration,
    /// Longest pause between two attempts.
    pub retry_max: Duration,
    /// Failed attempts after which a straggler is dead.
    pub retry_max_attempts: usize,
    /// Later events of a straggler's topic and key wait behind it.
    pub keep_key_order: bool,
    /// They also wait behind a dead one.
    pub dead_block: bool,
    /// Full name of the topic for copies of dead stragglers.
    pub dead_letter_topic: Option<String>,
    /// What becomes of a row once it is published.
    pub after_publish: AfterPublish,
    /// How long delivered rows are kept; `None` is for ever.
    pub retention: Option<Duration>,
    /// Where status page, metrics and health are served, if anywhere.
    pub http_addr: Option<SocketAddr>,
    /// A tracing filter that has been checked.
    pub log: String,
    /// Form of the log lines.
    pub log_format: LogFormat,
    /// Time for receipts to come in once walpost was told to stop.
    pub shutdown_grace: Duration,
}

impl Config {
    /// Reads every setting: a flag (by its name without dashes) wins over the env var, that over the default.
    ///
    /// `env` is asked for the `PG*` variables too.
    ///
    /// # Errors
    /// One error for all that is wrong, one line a setting.
    pub fn load(flags: Lookup<'_>, env: Lookup<'_>) -> Result<Self> {
        let mut reader = Reader::new(flags, env);
        let config = read(&mut reader, env);
        let problems = reader.problems();
        match config {
            Some(config) if problems.is_empty() => Ok(config),
            _ if problems.is_empty() => Err(Error::bug("a setting has no value and no default")),
            _ => Err(Error::config(problems.join("\n"))),
        }
    }

    /// The files for TLS to the brokers; `None` when the service URL is without TLS.
    pub fn broker_tls(&self) -> Option<TlsFiles> {
        self.pulsar_url.tls.then(|| self.pulsar_tls.clone())
    }
}

/// One env var of this process, as [`Config::load`] wants it.
pub fn process_env(name: &str) -> Option<String> {
    // A value that is not UTF-8 keeps its wrong bytes as U+FFFD: it then fails its check instead of looking unset.
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// Reads and checks all of it. `None` when something is wrong; the reader knows what.
#[allow(clippy::too_many_lines, reason = "one line for each setting, twice")]
fn read(reader: &mut Reader<'_>, env: Lookup<'_>) -> Option<Config> {
    use settings as s;

    // All values first, with a look at each; only then the first `?`, so that every wrong one has been noted.
    let postgres = postgres(reader, env);
    let pulsar = pulsar::read(reader);
    let outbox_tables = reader.text(&s::OUTBOX_TABLE, tables);
    let columns = columns(reader);
    let slot = reader.text(&s::SLOT, values::slot_name);
    let publication = reader.text(&s::PUBLICATION, values::identifier);
    let topic = reader.text(&s::TOPIC, TopicTemplate::parse);
    let producer_name = reader
        .text(&s::PRODUCER_NAME, values::producer_name)
        .or_else(|| Some(format!("walpost-{}", slot.as_ref()?)));
    let lanes = reader.count(&s::LANES);
    let hashing = reader.text(&s::HASHING_SCHEME, HashingScheme::parse);
    let partition_refresh = reader.duration(&s::PARTITION_REFRESH);
    let producer_idle = reader.duration(&s::PRODUCER_IDLE);
    let compression = reader.text(&s::COMPRESSION, Codec::parse);
    let schema = schema(reader);
    let batch_max_messages = reader.count(&s::BATCH_MAX_MESSAGES);
    let batch_max_bytes = reader.size(&s::BATCH_MAX_BYTES);
    let batch_linger = reader.duration(&s::BATCH_LINGER);
    let max_in_flight_bytes = reader.size(&s::MAX_IN_FLIGHT_BYTES);
    let max_in_flight_messages = reader.count(&s::MAX_IN_FLIGHT_MESSAGES);
    let send_timeout = reader.duration(&s::SEND_TIMEOUT);
    let reconnect_initial = reader.duration(&s::RECONNECT_INITIAL);
    let reconnect_max = reader.duration(&s::RECONNECT_MAX);
    let status_interval = reader.duration(&s::STATUS_INTERVAL);
    let mode = reader.text(&s::MODE, Mode::parse);
    let scan_interval = reader.duration(&s::SCAN_INTERVAL);
    let reconcile = reader.text(&s::RECONCILE, |text| either(text, "on", "off"));
    let slot_lost = reader.text(&s::SLOT_LOST, SlotLost::parse);
    let straggler_age = reader.duration(&s::STRAGGLER_AGE);
    let straggler_limit = reader.count(&s::STRAGGLER_LIMIT);
    let retry_initial = reader.duration(&s::RETRY_INITIAL);
    let retry_max = reader.duration(&s::RETRY_MAX);
    let retry_max_attempts = reader.count(&s::RETRY_MAX_ATTEMPTS);
    let keep_key_order = reader.text(&s::ORDERING, |text| either(text, "key", "none"));
    let dead_block = reader.text(&s::ON_DEAD, |text| either(text, "block", "skip"));
    let dead_letter_topic = reader.text(&s::DEAD_LETTER_TOPIC, full_topic);
    let after_publish = reader.text(&s::AFTER_PUBLISH, AfterPublish::parse);
    let retention = reader.text(&s::RETENTION, values::retention);
    let http_addr = reader.text_or_nothing(&s::HTTP_ADDR, values::http_addr);
    let log = reader.text(&s::LOG, log_filter);
    let log_format = reader.text(&s::LOG_FORMAT, LogFormat::parse);
    let shutdown_grace = reader.duration(&s::SHUTDOWN_GRACE);

    reader.not_above(
        (&s::BATCH_MAX_BYTES, batch_max_bytes),
        (&s::MAX_IN_FLIGHT_BYTES, max_in_flight_bytes),
        values::show_size,
    );
    reader.not_above(
        (&s::BATCH_MAX_MESSAGES, batch_max_messages),
        (&s::MAX_IN_FLIGHT_MESSAGES, max_in_flight_messages),
        |count| count.to_string(),
    );
    reader.not_above(
        (&s::RECONNECT_INITIAL, reconnect_initial),
        (&s::RECONNECT_MAX, reconnect_max),
        values::show_duration,
    );
    reader.not_above(
        (&s::RETRY_INITIAL, retry_initial),
        (&s::RETRY_MAX, retry_max),
        values::show_duration,
    );

    let pulsar = pulsar?;
    Some(Config {
        postgres: postgres?,
        pulsar_url: pulsar.url,
        pulsar_admin_url: pulsar.admin_url,
        pulsar_auth: pulsar.auth,
        pulsar_tls: pulsar.tls,
        pulsar_keepalive_interval: pulsar.keepalive_interval,
        outbox_tables: outbox_tables?,
        columns: columns?,
        slot: slot?,
        publication: publication?,
        topic: topic?,
        producer_name: producer_name?,
        lanes: lanes?,
        hashing: hashing?,
        partition_refresh: partition_refresh?,
        producer_idle: producer_idle?,
        compression: compression?,
        schema: schema.ok()?,
        batch_max_messages: batch_max_messages?,
        batch_max_bytes: batch_max_bytes?,
        batch_linger: batch_linger?,
        max_in_flight_bytes: max_in_flight_bytes?,
        max_in_flight_messages: max_in_flight_messages?,
        send_timeout: send_timeout?,
        reconnect_initial: reconnect_initial?,
        reconnect_max: reconnect_max?,
        status_interval: status_interval?,
        mode: mode?,
        scan_interval: scan_interval?,
        reconcile: reconcile?,
        slot_lost: slot_lost?,
        straggler_age: straggler_age?,
        straggler_limit: straggler_limit?,
        retry_initial: retry_initial?,
        retry_max: retry_max?,
        retry_max_attempts: retry_max_attempts?,
        keep_key_order: keep_key_order?,
        dead_block: dead_block?,
        dead_letter_topic,
        after_publish: after_publish?,
        retention: retention?,
        http_addr: http_addr?,
        log: log?,
        log_format: log_format?,
        shutdown_grace: shutdown_grace?,
    })
}

/// The URL, else the `PG*` variables alone.
fn postgres(reader: &mut Reader<'_>, env: Lookup<'_>) -> Option<PostgresConfig> {
    let url = reader.text_or_file(
        &settings::POSTGRES_URL,
        &settings::POSTGRES_URL_FILE,
        |url| PostgresConfig::parse(Some(url), env),
        |_, url| PostgresConfig::parse(Some(url), env),
    );
    match url {
        Ok(None) => PostgresConfig::parse(None, env)
            .map_err(|why| {
                reader.note(format!(
                    "{} is not given: {why}",
                    settings::POSTGRES_URL.env
                ));
            })
            .ok(),
        Ok(config) => config,
        Err(_) => None,
    }
}

/// The kind and, where it needs one, its file.
fn schema(reader: &mut Reader<'_>) -> Result<Option<SchemaConfig>, Noted> {
    let kind = reader.text(&settings::SCHEMA, SchemaKind::parse);
    let file = reader.text(&settings::SCHEMA_FILE, check_file_template);
    match kind.ok_or(Noted)? {
        None if file.is_none() => Ok(None),
        None => {
            reader.note(format!(
                "{} is given, but {} is none; allowed: json, avro or protobuf with a file",
                settings::SCHEMA_FILE.env,
                settings::SCHEMA.env
            ));
            Err(Noted)
        }
        Some(kind) if kind.needs_file() && file.is_none() => {
            reader.note(format!(
                "{} is not given; allowed: {}",
                settings::SCHEMA_FILE.env,
                settings::SCHEMA_FILE.kind.allowed()
            ));
            Err(Noted)
        }
        Some(kind) => Ok(Some(SchemaConfig {
            kind,
            file: file.unwrap_or_default(),
        })),
    }
}

fn tables(text: &str) -> Result<Vec<TableName>, String> {
    let mut tables = Vec::new();
    for part in values::split_list(text) {
        if part.is_empty() {
            return Err("a table name is missing".to_owned());
        }
        let table = part
            .parse::<TableName>()
            .map_err(|error| error.to_string())?;
        if tables.contains(&table) {
            return Err(format!("{part} stands twice"));
        }
        tables.push(table);
    }
    Ok(tables)
}

fn columns(reader: &mut Reader<'_>) -> Option<Columns> {
    use settings as s;

    let mut name = |setting| reader.text(setting, values::identifier);
    let id = name(&s::COLUMN_ID);
    let aggregatetype = name(&s::COLUMN_AGGREGATETYPE);
    let aggregateid = name(&s::COLUMN_AGGREGATEID);
    let event_type = name(&s::COLUMN_TYPE);
    let payload = name(&s::COLUMN_PAYLOAD);
    let topic = name(&s::COLUMN_TOPIC);
    let headers = name(&s::COLUMN_HEADERS);
    let deliver_at = name(&s::COLUMN_DELIVER_AT);
    let created_at = name(&s::COLUMN_CREATED_AT);
    Some(Columns {
        id: id?,
        aggregatetype: aggregatetype?,
        aggregateid: aggregateid?,
        event_type: event_type?,
        payload: payload?,
        topic: topic?,
        headers: headers?,
        deliver_at: deliver_at?,
        created_at: created_at?,
    })
}

/// True for `yes`, false for `no`.
fn either(text: &str, yes: &str, no: &str) -> Result<bool, String> {
    match text {
        text if text == yes => Ok(true),
        text if text == no => Ok(false),
        _ => Err("it is neither".to_owned()),
    }
}

/// The full name of a topic that has no columns in it.
fn full_topic(text: &str) -> Result<String, String> {
    let mut full = String::new();
    own_topic_into(text, &mut full).map_err(|problem| format!("it {problem}"))?;
    Ok(full)
}

fn log_filter(text: &str) -> Result<String, String> {
    EnvFilter::builder()
        .parse(text)
        .map(|_| text.to_owned())
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests;
