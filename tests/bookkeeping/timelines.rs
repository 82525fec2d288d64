//! The cluster comes back on another timeline, with a slot of the name that may be another one.

use crate::support::{Database, OwnServers, Servers, eventually};
use crate::{DEADLINE, NOTED_SOON, arrived, drop_slot, insert, make_slot_by_hand};

/// Ends recovery of the server's own files on a new timeline, as archive recovery does.
async fn new_timeline(own: &OwnServers, database: &mut Database) {
    let data = own.var("WALPOST_LOCAL_POSTGRES_DATA");
    own.stop_postgres();
    let conf = format!("{data}/postgresql.conf");
    let text = std::fs::read_to_string(&conf).expect("the configuration");
    std::fs::write(&conf, text + "\nrestore_command = 'false'\n").expect("the configuration");
    // Copied from a file that is there, so that the owner is right.
    let copied = std::process::Command::new("cp")
        .args([
            "-a",
            &format!("{data}/PG_VERSION"),
            &format!("{data}/recovery.signal"),
        ])
        .status();
    assert!(copied.is_ok_and(|status| status.success()));
    own.start();
    database.client = database.connect().await;
    eventually(DEADLINE, "recovery to end", async || {
        let rows = database.rows("SELECT pg_is_in_recovery()", &[]).await;
        (!rows[0].get::<_, bool>(0)).then_some(())
    })
    .await;
}

async fn a_slot_of_the_same_name_on_a_new_timeline(major: &str) {
    // GIVEN rows that are known as delivered, and a walpost that was killed
    let own = Servers::own(
        &format!("timeline{major}"),
        &["--postgres", major, "--no-pulsar"],
    );
    let mut database = Database::create_on(&own, "timeline").await;
    database.init(&[], &[]).await;
    let mut walpost = database.start(&[NOTED_SOON]).await;
    insert(&database.client, "delivered").await;
    database.wait_all_sent(DEADLINE).await;
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;

    // WHEN more is committed, the cluster comes back on another timeline, and somebody makes the slot there
    insert(&database.client, "between").await;
    new_timeline(&own, &mut database).await;
    drop_slot(&database).await;
    make_slot_by_hand(&database).await;
    insert(&database.client, "behind").await;

    // THEN the slot is not taken for walpost's own, and each row comes once
    let walpost = database.start(&[NOTED_SOON]).await;
    insert(&database.client, "streamed").await;
    database.wait_all_sent(DEADLINE).await;
    let said = walpost.output();
    walpost.stop().await;
    assert!(said.contains("timeline 1 and is on 2"), "{said}");
    let rows = arrived(&database, &["delivered", "between", "behind", "streamed"]).await;
    assert_eq!(rows.len(), 4, "{rows:?}");

    // AND on this timeline it is known from now on
    let walpost = database.start(&[NOTED_SOON]).await;
    let said = walpost.output();
    walpost.stop().await;
    assert!(!said.contains("WARN"), "{said}");
}

#[tokio::test]
async fn a_slot_of_the_same_name_on_a_new_timeline_is_not_taken_for_ours() {
    a_slot_of_the_same_name_on_a_new_timeline("15").await;
}

#[tokio::test]
async fn on_postgres_14_a_slot_of_the_same_name_on_a_new_timeline_is_not_taken_for_ours() {
    a_slot_of_the_same_name_on_a_new_timeline("14").await;
}

#[tokio::test]
async fn on_postgres_18_a_slot_of_the_same_name_on_a_new_timeline_is_not_taken_for_ours() {
    a_slot_of_the_same_name_on_a_new_timeline("18").await;
}
