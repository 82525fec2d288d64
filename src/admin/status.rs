//! `/status` and `/history`: everything a person or a script wants to know, as JSON.
//!
//! Names carry their unit; what is not known is `null`. Fields may be added in later versions, none changes its meaning.

use std::time::Duration;

use serde_json::{Value, json};

use super::Context;
use super::health;
use super::observer::{Observed, Stragglers};
use super::sampler::{SAMPLE_EVERY, View, unix_ms};
use crate::config::{AfterPublish, Mode};
use crate::meter::{MAX_TOPICS, Side, Troubles};
use crate::upkeep::to_json;

/// Entries of each kind of work that are shown; `walpost.left_undone` has more.
const LEFT_LISTED: usize = 20;

/// The whole state.
pub(super) fn status(context: &Context, seen: Option<&Observed>, view: &View) -> Value {
    let meter = &context.meter;
    let phase = meter.phase();
    let counters = meter.counters();
    let (messages, bytes) = meter.in_flight();
    let slot = seen.and_then(|seen| seen.slot.as_ref());
    let stuck = health::stuck(meter.since_beat());
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "now_ms": unix_ms(std::time::SystemTime::now()),
        "uptime_seconds": seconds(meter.uptime()),
        "mode": match context.mode { Mode::Stream => "stream", Mode::Poll => "poll" },
        "role": phase.role(),
        "phase": phase.name(),
        "ready": view.readiness.ready,
        "reason": view.readiness.reason,
        "alive": stuck.is_none(),
        "postgres": {
            "observed_seconds_ago": seen.and_then(|seen| seen.at).map(|at| seconds(at.elapsed())),
            "log_end_lsn": seen.map(|seen| seen.log_end.to_string()),
        },
        "slot": {
            "name": context.slot,
            "exists": seen.map(|_| slot.is_some()),
            "active": slot.map(|slot| slot.active),
            "confirmed_lsn": slot.and_then(|slot| slot.confirmed_flush).map(|lsn| lsn.to_string()),
            "restart_lsn": slot.and_then(|slot| slot.restart_lsn).map(|lsn| lsn.to_string()),
            "wal_status": slot.and_then(|slot| slot.wal_status.clone()),
            "lost_because": slot.and_then(|slot| slot.lost_because()),
            "retained_bytes": slot.and_then(|slot| slot.retained_bytes),
            "failover": slot.map(|slot| slot.failover),
        },
        "lag": { "bytes": seen.and_then(Observed::lag_bytes), "seconds": view.lag_seconds },
        "confirmed_lsn": meter.confirmed().to_string(),
        "received_lsn": meter.received().to_string(),
        "in_flight": { "messages": messages, "bytes": bytes },
        "counters": {
            "published": meter.all_published(),
            "received": counters.events,
            "acknowledged": counters.acknowledged,
            "transactions": counters.transactions,
            "skipped": counters.skipped,
            "refused": counters.refused,
            "stragglers_stored": counters.stragglers,
            "reconciled": meter.all_reconciled(),
            "duplicates_suppressed": meter.duplicates_suppressed(),
            "reconnects_postgres": meter.times_lost(Side::Postgres),
            "reconnects_pulsar": meter.times_lost(Side::Pulsar),
        },
        "topics": topics(context),
        "topics_limit": MAX_TOPICS,
        "topics_in_trouble": troubles(&meter.troubles()),
        "stragglers": seen.and_then(|seen| seen.stragglers.as_ref()).map(stragglers),
        "after_publish": after_publish(context),
        "left": to_json(&meter.upkeep().all(), LEFT_LISTED),
        "scan": meter.scan().map(|scan| json!({
            "table": context.tables.get(scan.table),
            "published": scan.published,
            "position_seq": scan.position,
        })),
        "warnings": warnings(view),
    })
}

/// Rows on their way to their mark; null in the mode keep.
fn after_publish(context: &Context) -> Value {
    let marks = context.meter.upkeep().marks();
    match context.after_publish {
        AfterPublish::Keep => Value::Null,
        mode => json!({
            "mode": mode.name(), "waiting": marks.waiting, "is_full": marks.is_full, "done": marks.done,
        }),
    }
}

fn topics(context: &Context) -> Value {
    let topics = context.meter.topics().map(|topic| {
        json!({
            "topic": topic.name,
            "published": topic.published,
            // Before its first receipt there is no last one.
            "last_receipt_seconds_ago": (topic.published > 0).then(|| seconds(topic.quiet_for)),
        })
    });
    topics.collect()
}

/// The longest in trouble first.
fn troubles(found: &Troubles) -> Value {
    let listed = found.listed.iter().map(|one| {
        json!({
            "topic": one.topic, "age_seconds": seconds(one.since.elapsed()), "reason": one.reason,
            // Otherwise they become stragglers.
            "events_wait": one.is_waiting,
        })
    });
    json!({ "count": found.count, "listed": listed.collect::<Value>() })
}

fn stragglers(found: &Stragglers) -> Value {
    let oldest = found.listed.iter().map(|one| {
        json!({
            "number": one.number, "outbox": one.outbox, "id": one.id, "topic": one.topic, "key": one.key,
            "state": one.state, "reason": one.reason, "attempts": one.attempts, "age_seconds": one.age_seconds.round(),
        })
    });
    json!({
        "retrying": found.retrying, "parked": found.parked, "dead": found.dead,
        "oldest": oldest.collect::<Value>(),
    })
}

fn warnings(view: &View) -> Value {
    let warnings = view.warnings.iter().map(|warning| {
        json!({
            "at_ms": unix_ms(warning.at),
            "level": if warning.is_error { "error" } else { "warning" },
            "text": warning.text,
        })
    });
    warnings.collect()
}

/// The last fifteen minutes, column by column, which is a third of the size of row by row.
pub(super) fn history(view: &View) -> Value {
    let samples = &view.history;
    let column =
        |get: &dyn Fn(&super::sampler::Sample) -> Value| samples.iter().map(get).collect::<Value>();
    json!({
        "interval_seconds": SAMPLE_EVERY,
        "at_ms": column(&|sample| sample.at_ms.into()),
        "published": column(&|sample| sample.published.into()),
        "in_flight": column(&|sample| sample.in_flight.into()),
        "lag_bytes": column(&|sample| sample.lag_bytes.into()),
        "lag_seconds": column(&|sample| sample.lag_seconds.map(tenths).into()),
    })
}

fn seconds(duration: Duration) -> f64 {
    tenths(duration.as_secs_f64())
}

fn tenths(seconds: f64) -> f64 {
    (seconds * 10.0).round() / 10.0
}
