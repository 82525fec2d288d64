//! A standby that keeps the slot in step (Postgres 17 and later): after the failover the slot goes on, and the table is read
//! from what is known as delivered, because what walpost wrote last may not have reached the standby.

use support::{Database, Servers, consume, eventually, servers};

use crate::{DEADLINE, Standby, support};

async fn insert(client: &tokio_postgres::Client, payload: &str) {
    let sql = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', to_json($1::text))";
    client.execute(sql, &[&payload]).await.expect("a row");
}

#[tokio::test]
async fn a_slot_that_the_standby_kept_in_step_goes_on_and_what_is_not_known_as_delivered_is_read_again()
 {
    // GIVEN a standby that keeps slots in step
    let own = Servers::own("synced", &["--postgres", "18", "--no-pulsar"]);
    let database = Database::create_on(&own, "synced").await;
    database.init(&[], &[]).await;
    database
        .sql("SELECT pg_create_physical_replication_slot('standby')")
        .await;
    let socket = own.var("WALPOST_LOCAL_POSTGRES_SOCKET_DIR");
    let port = own.var("WALPOST_LOCAL_POSTGRES_PORT");
    let settings = format!(
        "primary_slot_name = 'standby'\nhot_standby_feedback = on\n
         primary_conninfo = 'host={socket} port={port} user=postgres dbname=postgres'\n"
    );
    let standby = Standby::build_with(&own, &database, &settings).await;

    // AND a row that the slot has confirmed, there too, and that no note says is delivered, because none can be written
    let seldom = ("WALPOST_SCAN_INTERVAL", "1h");
    let mut walpost = database.start(&[seldom]).await;
    database
        .sql(
            "CREATE FUNCTION refused() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no note''; END';
             CREATE TRIGGER refused BEFORE UPDATE OF delivered ON walpost.progress FOR EACH ROW EXECUTE FUNCTION refused()",
        )
        .await;
    insert(&database.client, "confirmed").await;
    let upto = database.current_wal_lsn().await;
    database.wait_all_confirmed(DEADLINE).await;
    eventually(DEADLINE, "the slot to be in step", async || {
        let client = standby.client().await;
        // Waits for nobody, and fails while it is too early.
        let _early = client.execute("SELECT pg_sync_replication_slots()", &[]).await;
        let sql = "SELECT FROM pg_replication_slots WHERE slot_name = $1 AND synced AND NOT temporary AND confirmed_flush_lsn >= $2::text::pg_lsn";
        let found = client.query(sql, &[&database.slot, &upto.to_string()]).await;
        (!found.ok()?.is_empty()).then_some(())
    })
    .await;

    // WHEN walpost and the primary die, and the standby takes over
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    own.stop_postgres();
    standby.promote().await;
    let url = database.url_through(&format!("127.0.0.1:{}", standby.port));
    let settings = [
        ("WALPOST_POSTGRES_URL", &*url),
        ("WALPOST_SCAN_INTERVAL", "100ms"),
    ];
    let client = standby.client().await;
    client
        .batch_execute("DROP TRIGGER refused ON walpost.progress")
        .await
        .expect("notes are taken again");
    let walpost = database.start(&settings).await;
    insert(&client, "late").await;
    eventually(DEADLINE, "everything to be known as sent", async || {
        let sql = "SELECT count(*) FROM walpost.outbox_status WHERE status <> 'sent'";
        (client.query_one(sql, &[]).await.ok()?.get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    let said = walpost.output();
    walpost.stop().await;

    // THEN the slot is the same, and the row has come from the table
    assert!(said.contains("timeline 1 and is on 2"), "{said}");
    let sql = "SELECT synced FROM pg_replication_slots WHERE slot_name = $1";
    let row = client.query_one(sql, &[&database.slot]).await;
    assert!(row.expect("the slot").get::<_, bool>(0));
    let received = consume(&servers().pulsar_url, &database.topic("t"), 3, DEADLINE).await;
    let payloads: Vec<_> = received
        .iter()
        .map(|message| String::from_utf8_lossy(&message.payload).replace('"', ""))
        .collect();
    assert_eq!(payloads, ["confirmed", "confirmed", "late"]);
}
