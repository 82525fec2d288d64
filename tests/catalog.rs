//! Guarantee: what the catalogue keeps out of the stream is told at once, with the statement that mends it; what it kept out for a time
//! and was mended does not stop the stream for ever; and a row that is changed in place is refused, because it would be no event.
//!
//! Each case runs on the oldest and the newest Postgres besides the shared one, if they have what it needs.

mod support;

#[path = "catalog/past.rs"]
mod past;
#[path = "catalog/publication.rs"]
mod publication;
#[path = "catalog/renamed.rs"]
mod renamed;
#[path = "catalog/stream.rs"]
mod stream;
#[path = "catalog/unfit.rs"]
mod unfit;
#[path = "catalog/updates.rs"]
mod updates;

use std::time::Duration;

use support::{Database, Received, consume, servers};

const DEADLINE: Duration = Duration::from_secs(60);

/// An outbox with payloads of text on a server of that major.
async fn on(major: i32) -> Database {
    initialized_on(major, &["--payload", "text"]).await
}

/// The same in partitions of a day each.
async fn partitioned_on(major: i32) -> Database {
    initialized_on(major, &["--payload", "text", "--partition-by", "day"]).await
}

async fn initialized_on(major: i32, args: &[&str]) -> Database {
    let database = Database::create_on_major(major, "catalog").await;
    database.init(args, &[]).await;
    database
}

/// Inserts one event with this payload.
async fn insert(database: &Database, table: &str, payload: &str) {
    let sql = format!(
        "INSERT INTO {table} (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '{payload}')"
    );
    database.sql(&sql).await;
}

/// The payloads in the topic, in order.
async fn arrived(database: &Database, expected: usize) -> Vec<String> {
    let topic = database.topic("t");
    let received = consume(&servers().pulsar_url, &topic, expected, DEADLINE).await;
    let text = |message: Received| String::from_utf8(message.payload).expect("UTF-8");
    received.into_iter().map(text).collect()
}
