//! `walpost check`: looks at both sides without changing anything, and says what is wrong, how to mend it, and which
//! delivery guarantee holds.
//!
//! A list of small checks; each gives a [`Finding`] or a few, and none needs another's result. `server` looks at Postgres'
//! settings and the role's rights, `tables` at the outbox tables, `catalog` at what else the
//! database says of them, `topics` at the right to publish and the payloads' size.
//! (A producer is opened on each topic, which makes a topic that the broker makes on first use; nothing else is touched.)
//!
//! Input: the settings. Output: a line (or a JSON object) for each finding. Exit code: 0 if nothing failed, 75 if all that
//! failed may pass, else 69.

mod catalog;
mod server;
mod tables;
mod topics;
mod waiting;

use std::io::Write;

use serde_json::json;
use tokio_postgres::Client;

use super::{deduplication, print, shown};
use crate::config::{Config, Mode};
use crate::connector::subscription;
use crate::postgres::{connect_sql, preflight, slot};
use crate::pulsar::{Broker, CaughtUpTopics, Deduplication, probe};
use crate::scanner::{poll, progress};
use crate::{Error, Result};

const REFUSED: u8 = 69;
const TEMPORARY: u8 = 75;
const ENABLE: &str = "walpost init --enable-deduplication";

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ok,
    Warn,
    Fail { temporary: bool },
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail { .. } => "fail",
        }
    }
}

/// What one check found.
#[derive(Debug)]
struct Finding {
    /// A word that stays the same from version to version.
    check: &'static str,
    status: Status,
    text: String,
    /// The command or setting that mends it.
    mend: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, text: impl Into<String>) -> Self {
        Self {
            check,
            status: Status::Ok,
            text: text.into(),
            mend: None,
        }
    }

    fn warn(check: &'static str, text: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            status: Status::Warn,
            mend: Some(mend.into()),
            ..Self::ok(check, text)
        }
    }

    fn fail(check: &'static str, error: &Error) -> Self {
        let (text, mend) = error.told();
        let temporary = error.is_temporary();
        Self {
            status: Status::Fail { temporary },
            mend,
            ..Self::ok(check, text)
        }
    }

    fn line(&self) -> String {
        let (status, check, text) = (self.status.name(), self.check, shown(&self.text));
        let mend = self.mend.as_ref();
        let mend = mend.map(|mend| format!("{:19}-> {mend}\n", ""));
        format!(
            "{status:4}  {check:11}  {text}\n{}",
            mend.unwrap_or_default()
        )
    }
}

/// Runs every check and prints what they found; the exit code tells the worst.
pub async fn run(config: &Config, json: bool, out: &mut dyn Write) -> Result<u8> {
    let mut findings = postgres(config).await;
    findings.extend(pulsar(config).await);
    findings.extend(topics::check(config).await);
    findings.push(guarantee(config).await);
    findings.extend(inactive(config).await);
    let code = exit_code(&findings);
    if json {
        let checks: Vec<_> = findings
            .iter()
            .map(|finding| {
                json!({
                    "check": finding.check,
                    "status": finding.status.name(),
                    "text": finding.text,
                    "mend": finding.mend,
                })
            })
            .collect();
        let object = json!({ "exit_code": code, "checks": checks });
        print(out, &format!("{object:#}\n"))?;
    } else {
        for finding in &findings {
            print(out, &finding.line())?;
        }
    }
    Ok(code)
}

fn exit_code(findings: &[Finding]) -> u8 {
    let failed = findings.iter().filter_map(|finding| match finding.status {
        Status::Fail { temporary: true } => Some(TEMPORARY),
        Status::Fail { temporary: false } => Some(REFUSED),
        Status::Ok | Status::Warn => None,
    });
    // What time cannot heal outweighs what it can.
    failed.min().unwrap_or(0)
}

/// The check that says whether Postgres has what the mode needs.
const POSTGRES: &str = "postgres";

async fn postgres(config: &Config) -> Vec<Finding> {
    let client = match connect_sql(&config.postgres, "walpost check").await {
        Ok(client) => client,
        Err(error) => return vec![Finding::fail(POSTGRES, &error)],
    };
    let mut findings = match config.mode {
        Mode::Stream => streamed(&client, config).await,
        Mode::Poll => polled(&client, config).await,
    };
    findings.extend(tables::check(&client, config).await);
    findings.extend(waiting::check(&client, config).await);
    findings
}

/// `walpost.progress`, read as `run` reads it.
async fn progress_table(client: &Client, slot: &str) -> Option<Finding> {
    const CHECK: &str = "progress";
    let error = progress::read(client, slot).await.err()?;
    if !progress::is_missing(&error) {
        return Some(Finding::fail(CHECK, &error));
    }
    let (why, _) = error.told();
    Some(Finding::warn(
        CHECK,
        format!("no delivered snapshot, no gap scan: {why}"),
        "walpost init makes it; GRANT SELECT, INSERT, UPDATE ON walpost.progress if it is there",
    ))
}

/// What streaming needs of Postgres.
async fn streamed(client: &Client, config: &Config) -> Vec<Finding> {
    let ready = preflight(client, &config.slot, &subscription(config)).await;
    let server = match ready {
        Ok(_) => Finding::ok(
            POSTGRES,
            format!(
                "{} can be streamed: publication {} has {}",
                config.postgres.display_url(),
                config.publication,
                table_names(config)
            ),
        ),
        Err(error) => Finding::fail(POSTGRES, &error),
    };
    let mut findings = vec![server, slot_state(client, &config.slot).await];
    findings.extend(progress_table(client, &config.slot).await);
    findings.extend(no_comparison(config));
    findings.extend(server::check(client, config).await);
    findings
}

/// What `WALPOST_RECONCILE=off` gives up. (What a table without `txid` cannot have stands in the table's own finding.)
fn no_comparison(config: &Config) -> Option<Finding> {
    if config.reconcile {
        return None;
    }
    let mut text = "off: a row that the stream leaves out (the publication was changed for a while, a partition was attached with rows \
                    in it) is not looked for, is never published, and counts as delivered"
        .to_owned();
    if config.retention.is_some() {
        text.push_str(", and WALPOST_RETENTION deletes it");
    }
    Some(Finding::warn(
        "reconcile",
        text,
        "set WALPOST_RECONCILE to on; rows of the time before: walpost verify finds them",
    ))
}

/// What poll mode needs of it: neither a slot nor logical replication.
async fn polled(client: &Client, config: &Config) -> Vec<Finding> {
    let server = match poll::preflight(client, config).await {
        Ok(()) => Finding::ok(
            POSTGRES,
            format!(
                "{} can be polled: {}",
                config.postgres.display_url(),
                table_names(config)
            ),
        ),
        Err(error) => Finding::fail(POSTGRES, &error),
    };
    let slot = match slot::slot_state(client, &config.slot).await {
        Ok(None) => Finding::ok("slot", "none, and none is needed"),
        Ok(Some(_)) => Finding::warn("slot", poll::SLOT_LEFT, poll::drop_slot(&config.slot)),
        Err(error) => Finding::fail("slot", &error),
    };
    vec![server, server::version(client).await, slot]
}

fn table_names(config: &Config) -> String {
    let tables = config.outbox_tables.iter();
    let tables: Vec<String> = tables.map(ToString::to_string).collect();
    tables.join(", ")
}

async fn slot_state(client: &Client, name: &str) -> Finding {
    const CHECK: &str = "slot";
    let state = match slot::slot_state(client, name).await {
        Ok(Some(state)) => state,
        Ok(None) => {
            let error = Error::refused(format!("slot {name} does not exist")).hint("walpost init");
            return Finding::fail(CHECK, &error);
        }
        Err(error) => return Finding::fail(CHECK, &error),
    };
    if let Some(reason) = state.lost_because() {
        let error = Error::refused(format!("slot {name} is lost: {reason}")).hint(format!(
            "SELECT pg_drop_replication_slot('{name}'); then: walpost init"
        ));
        return Finding::fail(CHECK, &error);
    }
    if let Some(why) = state.unfit_because() {
        let error = Error::refused(format!("slot {name} will not do: {why}"));
        return Finding::fail(CHECK, &error.hint(slot::mend_two_phase(name)));
    }
    let Some(confirmed) = state.confirmed_flush else {
        return Finding::warn(
            CHECK,
            format!("{name} is being made: it waits for transactions that were writing before it"),
            "see the line transactions",
        );
    };
    if state.temporary {
        return Finding::warn(
            CHECK,
            format!(
                "{name} is temporary: it goes with the session that made it, and nobody else can stream it"
            ),
            "end that session, then: walpost init",
        );
    }
    let retained_kib = state.retained_bytes.unwrap_or_default() / 1024;
    let used = match state.active_pid {
        Some(pid) => format!("streamed by process {pid}"),
        None => "streamed by nobody now".to_owned(),
    };
    let text = format!(
        "{name}: {used}, confirmed up to {confirmed}, {retained_kib} KiB of log kept for it"
    );
    if state.wal_status.as_deref() == Some("unreserved") {
        return Finding::warn(
            CHECK,
            format!("{text}; it is about to be lost (max_slot_wal_keep_size)"),
            "start walpost run, or raise max_slot_wal_keep_size",
        );
    }
    Finding::ok(CHECK, text)
}

async fn pulsar(config: &Config) -> Vec<Finding> {
    let broker = probe(
        &config.pulsar_url.hosts,
        config.pulsar_auth.clone(),
        config.broker_tls(),
        config.pulsar_keepalive_interval,
    )
    .await;
    let kind = config.pulsar_auth.kind();
    let mut findings = vec![match broker {
        Ok(Broker {
            address,
            server_version,
            max_message_bytes,
        }) => Finding::ok(
            "broker",
            format!(
                "{server_version} at {address} accepts the connection (credentials: {kind}); a message may have {max_message_bytes} bytes"
            ),
        ),
        Err(error) => Finding::fail("broker", &error),
    }];
    findings.push(encryption(config));
    findings
}

fn encryption(config: &Config) -> Finding {
    const CHECK: &str = "encryption";
    if config.pulsar_url.tls {
        return Finding::ok(
            CHECK,
            "TLS; the broker's certificate and host name are checked",
        );
    }
    let (text, kind) = ("no TLS to the broker", config.pulsar_auth.kind());
    if kind == "none" {
        return Finding::ok(CHECK, text);
    }
    Finding::warn(
        CHECK,
        format!("{text}: the credentials ({kind}) can be read on the way"),
        "set WALPOST_PULSAR_URL to pulsar+ssl://…",
    )
}

/// Effectively once takes the broker's deduplication; the rest of it is in walpost.
async fn guarantee(config: &Config) -> Finding {
    const CHECK: &str = "guarantee";
    let namespace = match deduplication::namespace(config) {
        Ok(namespace) => namespace,
        Err(error) => {
            let (why, mend) = error.told();
            return Finding::warn(CHECK, format!("not known: {why}"), mend.unwrap_or_default());
        }
    };
    let Some(admin) = deduplication::admin(config) else {
        return Finding::warn(
            CHECK,
            format!(
                "unknown: whether the broker deduplicates namespace {namespace} cannot be asked; at least once holds in any case"
            ),
            "set WALPOST_PULSAR_ADMIN_URL",
        );
    };
    match admin.deduplication(&namespace).await {
        Ok(Deduplication::Policy(true)) => Finding::ok(
            CHECK,
            format!("effectively once: deduplication is on for namespace {namespace}"),
        ),
        Ok(Deduplication::BrokerDefault(Some(true))) => Finding::ok(
            CHECK,
            format!(
                "effectively once: deduplication is on for namespace {namespace} by the broker's default"
            ),
        ),
        Ok(Deduplication::Policy(false)) => Finding::warn(
            CHECK,
            format!("at least once, because deduplication is off for namespace {namespace}"),
            format!("turn it on with {ENABLE}"),
        ),
        Ok(Deduplication::BrokerDefault(Some(false))) => Finding::warn(
            CHECK,
            format!(
                "at least once, because deduplication is off for namespace {namespace} (the broker's default)"
            ),
            format!("turn it on with {ENABLE}"),
        ),
        Ok(Deduplication::BrokerDefault(None)) => Finding::warn(
            CHECK,
            format!(
                "unknown: namespace {namespace} follows the broker's default, which these credentials may not ask for"
            ),
            format!("turn it on with {ENABLE}"),
        ),
        Ok(Deduplication::Forbidden) => Finding::warn(
            CHECK,
            format!(
                "unknown: these credentials may not ask whether namespace {namespace} deduplicates; at least once holds in any case"
            ),
            format!(
                "an administrator of the tenant can ask: pulsar-admin namespaces get-deduplication {namespace}"
            ),
        ),
        Err(error) => Finding::fail(CHECK, &error),
    }
}

/// A topic that is deleted with its subscriptions while nobody is connected: what is published later has no reader.
async fn inactive(config: &Config) -> Option<Finding> {
    const CHECK: &str = "inactive";
    // What cannot be asked has its line in `guarantee`.
    let admin = deduplication::admin(config)?;
    let namespace = deduplication::namespace(config).ok()?;
    let by = match admin.caught_up_topics(&namespace).await.ok()? {
        CaughtUpTopics::DeletedByPolicy { runs: Some(false) } => {
            "its policy (brokerDeleteInactiveTopicsEnabled is off at this broker, so not at present)"
        }
        CaughtUpTopics::DeletedByPolicy { .. } => "its policy",
        CaughtUpTopics::DeletedByDefault => "the broker's default",
        CaughtUpTopics::Kept | CaughtUpTopics::Unknown => return None,
    };
    Some(Finding::warn(
        CHECK,
        format!(
            "delete_when_subscriptions_caught_up holds for namespace {namespace} by {by}: a topic without producers and connected \
             consumers is deleted with its subscriptions, and walpost closes producers that were idle for WALPOST_PRODUCER_IDLE; \
             a consumer that was away misses what is published after that"
        ),
        format!(
            "pulsar-admin namespaces set-inactive-topic-policies --disable-delete-while-inactive \
             --delete-mode delete_when_no_subscriptions --max-inactive-duration 1d {namespace}"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_tells_the_worst_and_whether_time_can_heal_it() {
        let ok = || Finding::ok("a", "x");
        let away = || Finding::fail("b", &Error::temporary("x"));
        let refused = || Finding::fail("c", &Error::refused("x").hint("do this"));
        assert_eq!(exit_code(&[]), 0);
        assert_eq!(exit_code(&[ok(), Finding::warn("d", "x", "y")]), 0);
        assert_eq!(exit_code(&[ok(), away()]), 75);
        assert_eq!(exit_code(&[away(), refused(), ok()]), 69);
    }

    #[test]
    fn a_line_is_status_check_and_text_and_below_it_what_mends_it() {
        let failed = Finding::fail("broker", &Error::refused("it refuses").hint("do this"));
        assert_eq!(
            failed.line(),
            "fail  broker       it refuses\n                   -> do this\n"
        );
        assert_eq!(
            Finding::ok("slot", "fine").line(),
            "ok    slot         fine\n"
        );
    }
}
