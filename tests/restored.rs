//! Guarantee: a database that was put back to an older state delivers its new events, although the broker deduplicates and
//! the log positions are those of events it has stored before. On a new timeline by itself; on the same one (a disk snapshot)
//! walpost refuses before anything is lost, and says what to do.

mod support;

use std::collections::{HashMap, HashSet};
use std::process::Command;
use std::time::Duration;

use support::{Database, Load, Received, Servers, consume, insert_many, servers};

const DEADLINE: Duration = Duration::from_secs(90);

/// Copies a stopped server's files, owners and all.
fn copy(from: &str, to: &str) {
    let done = Command::new("cp").args(["-a", from, to]).status();
    assert!(
        done.is_ok_and(|status| status.success()),
        "cp -a {from} {to}"
    );
}

/// Runs the connector until all that is committed now is confirmed.
async fn run(database: &Database) {
    let walpost = database.start(&[]).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
}

async fn reconnect(database: &mut Database) {
    database.client = database.connect().await;
}

/// A server whose data was put back: `archive` makes it a restored backup (a new timeline), else a disk snapshot.
async fn put_back(own: &Servers, database: &mut Database, archive: bool) {
    let data = own.var("WALPOST_LOCAL_POSTGRES_DATA");
    own.stop_postgres();
    std::fs::remove_dir_all(data).expect("the newer state");
    copy(&format!("{data}.backup"), data);
    if archive {
        // An archive that has nothing more: recovery ends with the backup's own log, on a new timeline.
        let conf = format!("{data}/postgresql.conf");
        let text = std::fs::read_to_string(&conf).expect("the configuration");
        std::fs::write(&conf, text + "\nrestore_command = 'false'\n").expect("the configuration");
        copy(
            &format!("{data}/PG_VERSION"),
            &format!("{data}/recovery.signal"),
        );
    }
    own.start();
    reconnect(database).await;
    support::eventually(DEADLINE, "recovery to end", async || {
        let rows = database.rows("SELECT pg_is_in_recovery()", &[]).await;
        (!rows[0].get::<_, bool>(0)).then_some(())
    })
    .await;
}

/// The ids in the outbox as it is now, by key and in order.
async fn committed(database: &Database) -> HashMap<String, Vec<String>> {
    let query = "SELECT aggregateid, id::text FROM walpost.outbox ORDER BY seq";
    let mut keys: HashMap<String, Vec<String>> = HashMap::new();
    for row in database.rows(query, &[]).await {
        keys.entry(row.get(0)).or_default().push(row.get(1));
    }
    keys
}

/// Every id that the outbox has now is in the topic, a key's in order of their first arrival; what else is there was committed
/// before. Events from before the copy may come again: its slot need not know that they were confirmed.
fn assert_delivered(committed: &HashMap<String, Vec<String>>, received: &[Received]) {
    let mut seen = HashSet::new();
    let known: HashSet<&String> = committed.values().flatten().collect();
    let mut arrived: HashMap<&str, Vec<&str>> = HashMap::new();
    for message in received {
        let (key, id) = (
            message.key.as_deref().expect("a key"),
            message.property("id"),
        );
        if known.contains(&id.to_owned()) && seen.insert(id) {
            arrived.entry(key).or_default().push(id);
        }
    }
    for (key, ids) in committed {
        assert_eq!(
            arrived.get(key.as_str()),
            Some(&ids.iter().map(String::as_str).collect()),
            "{key}"
        );
    }
}

async fn received(database: &Database, expected: usize) -> Vec<Received> {
    let topic = Load::topic(database);
    consume(&servers().pulsar_url, &topic, expected, DEADLINE).await
}

#[tokio::test]
async fn a_restored_backup_delivers_its_new_events_and_a_disk_snapshot_is_refused_until_it_has_a_new_name()
 {
    // GIVEN events that were delivered, a copy of the database, and more events that were delivered since
    let own = Servers::own("restored", &["--no-pulsar"]);
    let mut database = Database::create_on(&own, "restored").await;
    database.deduplicate(servers()).await;
    Load::prepare(&database).await;
    for key in ["a", "b", "c"] {
        insert_many(&database.client, key, 100).await;
    }
    run(&database).await;
    let data = own.var("WALPOST_LOCAL_POSTGRES_DATA").to_owned();
    own.stop_postgres();
    copy(&data, &format!("{data}.backup"));
    own.start();
    reconnect(&mut database).await;
    for key in ["a", "b", "c"] {
        insert_many(&database.client, key, 5_000).await;
    }
    let before = database.current_wal_lsn().await;
    run(&database).await;

    // WHEN the copy is put back as a restored backup and takes new events, whose log positions are lower
    put_back(&own, &mut database, true).await;
    for key in ["a", "b", "c"] {
        insert_many(&database.client, key, 50).await;
    }
    assert!(
        database.current_wal_lsn().await < before,
        "nothing was put back"
    );
    run(&database).await;

    // THEN they are all there
    let now = committed(&database).await;
    assert_eq!(now["a"].len(), 150);
    let all = received(&database, 300 + 15_000 + 150).await;
    assert_delivered(&now, &all);

    // AND WHEN it is put back as a disk snapshot, on the timeline it had
    put_back(&own, &mut database, false).await;
    insert_many(&database.client, "a", 10).await;
    assert!(
        database.current_wal_lsn().await < before,
        "nothing was put back"
    );

    // THEN walpost refuses, says why, and the slot keeps the events
    let (code, said) = database.walpost(&["run"], &[]).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(
        said.contains("older state") && said.contains("WALPOST_PRODUCER_NAME"),
        "{said}"
    );

    // AND they arrive under a new name
    let settings = [("WALPOST_PRODUCER_NAME", &*format!("{}-2", database.slot))];
    let walpost = database.start(&settings).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let now = committed(&database).await;
    assert_eq!(now["a"].len(), 110);
    assert_delivered(&now, &received(&database, all.len() + 10).await);
}

#[tokio::test]
async fn a_disk_snapshot_that_is_put_back_under_a_running_walpost_is_noticed_and_its_new_events_come()
 {
    // GIVEN a stream, a copy of the database that was taken meanwhile, and events that were delivered since
    let own = Servers::own("put_back", &["--no-pulsar"]);
    let mut database = Database::create_on(&own, "put_back").await;
    Load::prepare(&database).await;
    let mut walpost = database.start(&[]).await;
    insert_many(&database.client, "a", 100).await;
    database.wait_all_confirmed(DEADLINE).await;
    let data = own.var("WALPOST_LOCAL_POSTGRES_DATA").to_owned();
    own.stop_postgres();
    copy(&data, &format!("{data}.backup"));
    own.start();
    reconnect(&mut database).await;
    insert_many(&database.client, "a", 5_000).await;
    database.wait_all_confirmed(DEADLINE).await;

    // WHEN the copy is put back
    put_back(&own, &mut database, false).await;

    // THEN walpost does not wait for the log to reach where it was, and passes nothing over
    assert_eq!(walpost.wait_exit(DEADLINE).await, 69);
    let said = walpost.output();
    assert!(said.contains("put back to an older state"), "{said}");
    insert_many(&database.client, "a", 10).await;
    run(&database).await;
    let now = committed(&database).await;
    assert_eq!(now["a"].len(), 110);
    assert_delivered(&now, &received(&database, 5_000 + 110).await);
}
