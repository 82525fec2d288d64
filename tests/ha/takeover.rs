//! An instance that has lost Postgres closes its producers, so that its successor can open producers of the same names; and publishes nothing behind it.

use crate::support::{Committed, Database, Load, Proxy, Walpost, consume, eventually, servers};
use crate::*;
use tokio::time::sleep;
use walpost::lease;

/// From the moment when the slot is free to the first receipt of every lane. It takes some ten seconds; without the producers' being closed it
/// takes five minutes.
const TAKEOVER: Duration = Duration::from_secs(25);
pub(crate) const CLOSED: &str = "Postgres is away: the producers are closed";

/// What lies between an instance and the servers.
pub(crate) struct Between {
    pub(crate) postgres: Proxy,
    pub(crate) broker: Proxy,
}

impl Between {
    pub(crate) fn start() -> Self {
        Self {
            postgres: Proxy::start(&servers().postgres_addr),
            broker: Proxy::before_broker(&servers().pulsar_addr),
        }
    }

    /// An instance behind it.
    pub(crate) async fn instance(&self, database: &Database, settings: &[(&str, &str)]) -> Walpost {
        database.let_run().await;
        database
            .walpost(&["run"], &[&SETTINGS[..], settings].concat())
            .env(
                "WALPOST_POSTGRES_URL",
                database.url_through(&self.postgres.addr()),
            )
            .env(
                "WALPOST_PULSAR_URL",
                format!("pulsar://{}", self.broker.addr()),
            )
            .spawn()
    }

    /// The instance hears nothing of Postgres any more, and Postgres ends its sessions.
    async fn silence_postgres(&self, database: &Database) {
        self.postgres.hold_requests(true);
        self.postgres.hold_upstream_replies(true);
        end_sessions(database).await;
    }

    fn cut_postgres(&self) {
        self.postgres.refuse(true);
        self.postgres.cut();
    }

    fn cut_broker(&self) {
        self.broker.refuse(true);
        self.broker.cut();
    }
}

pub(crate) async fn insert(database: &Database, events: usize) {
    let sql = format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
         SELECT 't', 'k' || i % 10, 'e', to_json(i) FROM generate_series(1, {events}) i"
    );
    database.sql(&sql).await;
}

/// All sessions of instances end. (One that waits comes again.)
async fn end_sessions(database: &Database) {
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'walpost%'";
    database.rows(sql, &[]).await;
}

#[derive(Clone, Copy, PartialEq)]
enum Cut {
    Postgres,
    PostgresInSilence,
    /// The broker can be reached again before Postgres can.
    Both,
    /// On the connections that there are nothing passes any more, and neither side hears of it.
    LostPackets,
}

async fn takes_over(cut: Cut) {
    // GIVEN writers at work, an instance that streams, and one that waits
    let mut database = Database::create("takeover").await;
    database.deduplicate(servers()).await;
    Load::prepare(&database).await;
    let between = Between::start();
    let mut first = between.instance(&database, &[]).await;
    first.wait_for_line("streaming", DEADLINE).await;
    let load = Load::start(&database, 4);
    let mut second = instance(&database);
    second
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;
    load.more(50).await;
    database.wait_all_confirmed(DEADLINE).await;

    // WHEN the first one is cut off
    match cut {
        Cut::Postgres => between.cut_postgres(),
        Cut::PostgresInSilence => between.silence_postgres(&database).await,
        Cut::Both => {
            between.cut_postgres();
            between.cut_broker();
            // What writes to a broker now has the producers before the second one.
            between.broker.refuse(false);
        }
        Cut::LostPackets => {
            between.postgres.lose_packets();
            between.broker.lose_packets();
            end_sessions(&database).await;
        }
    }

    // THEN the second one streams, and soon publishes on every lane
    second.wait_for_line("streaming", DEADLINE).await;
    load.more(50).await;
    let now = database.current_wal_lsn().await;
    database.wait_confirmed(&database.slot, now, TAKEOVER).await;

    // AND the first one, back again, waits, and goes on when the second one dies
    between.postgres.refuse(false);
    if cut == Cut::PostgresInSilence {
        first.wait_for_line(CLOSED, DEADLINE).await;
        between.postgres.cut();
        between.postgres.hold_requests(false);
        between.postgres.hold_upstream_replies(false);
    }
    first
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;
    load.more(50).await;
    second.sigkill();
    second.wait_exit(DEADLINE).await;
    load.more(50).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    first.stop().await;

    // AND every row is in the topic once, in order
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn an_instance_that_is_cut_off_from_postgres_closes_its_producers_for_its_successor() {
    takes_over(Cut::Postgres).await;
}

#[tokio::test]
async fn so_does_one_whose_sessions_have_ended_without_its_hearing_of_it() {
    takes_over(Cut::PostgresInSilence).await;
}

/// The broker can be reached before Postgres: what opened its producers again then would keep its successor out.
///
/// And of lost packets: guards that a successor gets its producers although the broker believes that the old ones are there. It asks the old
/// connection, which takes 5 s (`connectionLivenessCheckTimeoutMillis`), and answers only then. The old instance can do nothing about that, with or
/// without a lease.
#[tokio::test]
async fn so_does_one_that_is_cut_off_from_both_sides_and_one_whose_packets_are_lost_keeps_nobody_out()
 {
    tokio::join!(takes_over(Cut::Both), takes_over(Cut::LostPackets));
}

/// An instance that holds the slot and loses the broker keeps its place, however long that takes: nobody can tell from there whether another
/// instance would be better off, and where the broker itself is away they would hand the slot round. Its readiness tells; whoever wants another
/// machine to have the slot stops it.
///
/// Guards that it comes back by itself: from an end that it hears of, and from one of which neither side hears, where the broker still believes
/// that its producers are there.
async fn goes_on_without_the_broker(end: impl Fn(&Between), said: &str) {
    // GIVEN writers at work, an instance that streams, and one that waits
    let mut database = Database::create("takeover").await;
    database.deduplicate(servers()).await;
    Load::prepare(&database).await;
    let between = Between::start();
    let quick = ("WALPOST_PULSAR_KEEPALIVE_INTERVAL", "1s");
    let mut first = between.instance(&database, &[quick]).await;
    first.wait_for_line("streaming", DEADLINE).await;
    let load = Load::start(&database, 4);
    let mut second = instance(&database);
    second
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;
    load.more(50).await;

    // WHEN the first one loses the broker for a while
    end(&between);
    first.wait_for_line(said, DEADLINE).await;
    load.more(200).await;
    between.broker.refuse(false);
    load.more(50).await;
    load.stop();

    // THEN it goes on
    database.wait_all_confirmed(TAKEOVER).await;
    assert!(
        !second.output().contains("streaming"),
        "{}",
        second.output()
    );
    assert!(!first.output().contains(CLOSED), "{}", first.output());
    second.stop().await;
    first.stop().await;
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn an_instance_that_is_cut_off_from_the_broker_alone_keeps_the_slot_and_loses_nothing() {
    let lose_packets = |between: &Between| between.broker.lose_packets();
    tokio::join!(
        goes_on_without_the_broker(Between::cut_broker, "cannot publish yet"),
        goes_on_without_the_broker(lose_packets, "the broker was silent"),
    );
}

/// What ends the names of an instance's producers.
pub(crate) fn routing(producer: &str) -> &str {
    producer.rsplit_once('.').expect("a routing").1
}

#[tokio::test]
async fn an_instance_that_was_stopped_resends_nothing_behind_its_successor_also_where_no_name_protects_that()
 {
    const EVENTS: usize = 300;
    // GIVEN an instance whose events have no receipts
    let database = Database::create("stopped").await;
    database.init(&[], &[]).await;
    let between = Between::start();
    let single = ("WALPOST_BATCH_MAX_MESSAGES", "1");
    let mut first = between.instance(&database, &[single]).await;
    first.wait_for_line("streaming", DEADLINE).await;
    let topic = database.topic("t");
    // The topic accepts something larger than all that comes, so that nothing waits behind the first of its size.
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             VALUES ('t', repeat('x', 200), 'e', '0')",
        )
        .await;
    insert(&database, 10).await;
    database.wait_all_confirmed(DEADLINE).await;
    let sent = between.broker.to_server_bytes();
    between.broker.hold_upstream_replies(true);
    insert(&database, EVENTS).await;
    eventually(DEADLINE, "events to be sent", async || {
        (between.broker.to_server_bytes() > sent + 10_000).then_some(())
    })
    .await;

    // WHEN it is stopped, loses both sides, and an instance with other producer names takes over
    first.signal("STOP");
    between.broker.hold_upstream_replies(false);
    between.broker.cut();
    between.silence_postgres(&database).await;
    let lanes = [&SETTINGS[..], &[("WALPOST_LANES", "3")]].concat();
    let mut second = database.walpost(&["run"], &lanes).spawn();
    second.wait_for_line("streaming", DEADLINE).await;
    insert(&database, 1).await;
    database.wait_all_confirmed(TAKEOVER).await;

    // AND it goes on without Postgres, after a stop that is longer than a proof is good for
    sleep(lease::TERM).await;
    first.signal("CONT");
    first.wait_for_line(CLOSED, DEADLINE).await;
    insert(&database, 1).await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN it has published nothing behind the second one's first event
    second.stop().await;
    let received = consume(&servers().pulsar_url, &topic, EVENTS + 13, DEADLINE).await;
    let names = received.iter().map(|event| routing(&event.producer_name));
    let mut names: Vec<&str> = names.collect();
    assert!(names.len() >= EVENTS + 13, "{}", names.len());
    names.dedup();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[tokio::test]
async fn a_poller_that_hears_nothing_of_postgres_any_more_gives_its_look_to_its_successor() {
    const POLL: (&str, &str) = ("WALPOST_MODE", "poll");
    // GIVEN a poller in the middle of a look, and one that waits
    let database = Database::create("takeover").await;
    database.init(&[], &[POLL]).await;
    let between = Between::start();
    insert(&database, 1).await;
    let slow = ("WALPOST_BATCH_MAX_MESSAGES", "100");
    let mut first = between.instance(&database, &[POLL, slow]).await;
    first.wait_for_line("polling", DEADLINE).await;
    database.wait_all_sent(DEADLINE).await;
    let sent = between.broker.to_server_bytes();
    insert(&database, 30_000).await;
    eventually(DEADLINE, "events to be sent", async || {
        (between.broker.to_server_bytes() > sent + 10_000).then_some(())
    })
    .await;
    let settings = [&SETTINGS[..], &[POLL]].concat();
    let mut second = database.walpost(&["run"], &settings).spawn();
    second
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;

    // WHEN its sessions end without its hearing of it
    between.silence_postgres(&database).await;

    // THEN the other one publishes the look's rows
    second.wait_for_line("polling", DEADLINE).await;
    database.wait_all_sent(TAKEOVER).await;
    second.stop().await;
}
