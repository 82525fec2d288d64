//! Sessions are walpost's own: what role, database and URL set changes neither what names mean, nor which rows are seen, nor how
//! values are printed, nor how long a statement may take; and what releases an LSN is durable and waits for nobody.
//!
//! Each case runs on the oldest Postgres, the newest and the shared one between them.

mod support;

#[path = "sessions/durable.rs"]
mod durable;
#[path = "sessions/held_up.rs"]
mod held_up;
#[path = "sessions/names.rs"]
mod names;
#[path = "sessions/row_security.rs"]
mod row_security;
#[path = "sessions/settings.rs"]
mod settings;

use std::time::Duration;

use support::{Database, servers};

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A role that is gone, with what it owns, when this is dropped by hand.
async fn drop_role(database: &Database, role: &str) {
    database
        .sql(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
        .await;
}

/// `count` rows of topic `t`, of seven keys.
async fn insert(database: &Database, count: i32) {
    let sql = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
               SELECT 't', 'key-' || n % 7, 'e', n::text::json FROM generate_series(1, $1) n";
    database.rows(sql, &[&count]).await;
}

/// How many messages topic `t` has; waits for at least so many.
async fn received(database: &Database, count: usize) -> usize {
    let topic = database.topic("t");
    support::consume(&servers().pulsar_url, &topic, count, DEADLINE)
        .await
        .len()
}

/// The URL with another user and password.
fn as_user(database: &Database, user: &str) -> String {
    let (_, server) = database.url.rsplit_once('@').expect("the URL has a user");
    format!("postgres://{user}:p@{server}")
}
