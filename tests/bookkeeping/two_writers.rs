//! `walpost init` and the file `sql/11_slot.sql` beside a running walpost.

use crate::support::{Database, Walpost, eventually, on_each_major};
use crate::{DEADLINE, NOTED_SOON, POLL, PUBLISH, arrived, insert, wait_all_sent};

/// Who makes the slot.
#[derive(Clone, Copy)]
enum Maker {
    Init,
    File,
}

/// Starts making the slot; ends by itself.
fn make_slot(database: &Database, maker: Maker) -> Walpost {
    match maker {
        Maker::Init => database.walpost(&["init"], &[]).spawn(),
        Maker::File => {
            let sql = include_str!("../../sql/11_slot.sql");
            let sql = sql.replace("/*:slot*/ 'walpost'", &format!("'{}'", database.slot));
            let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(&database.slot);
            std::fs::write(&file, sql).expect("a file");
            // As a DBA does who forgets ON_ERROR_STOP.
            let args = ["-X", "-q", "-d", &database.socket_url, "-f"];
            let args = args.iter().map(AsRef::as_ref).chain([file.as_os_str()]);
            crate::support::Command::program("psql", args).spawn()
        }
    }
}

async fn slot_exists(database: &Database, what: &str) -> bool {
    let sql = format!("SELECT FROM pg_replication_slots WHERE slot_name = $1 AND {what}");
    !database.rows(&sql, &[&database.slot]).await.is_empty()
}

/// The interleaving in which a slot's maker that knows nothing of a poller loses a row.
async fn a_slot_is_made_beside_a_poller(major: i32, maker: Maker) {
    // GIVEN a poller, and a transaction that is open with a row
    let database = Database::create_on_major(major, "makers").await;
    database.init(&[], &[POLL]).await;
    database.sql(PUBLISH).await;
    let mut poller = database.walpost(&["run"], &[POLL, NOTED_SOON]).spawn();
    poller.wait_for_line("polling", DEADLINE).await;
    let long = database.connect().await;
    long.batch_execute("BEGIN").await.expect("a transaction");
    insert(&long, "long").await;

    // WHEN somebody makes the slot, and waits for that transaction if the poller does not stop it
    let mut making = make_slot(&database, maker);
    let over = eventually(DEADLINE, "the making to wait, or to end", async || {
        let over = making.try_exit().is_some();
        let waits = slot_exists(&database, "confirmed_flush_lsn IS NULL").await;
        (over || waits).then_some(over)
    })
    .await;
    // AND another row is committed and looked at, and then the first one is committed, and the poller ends without another look
    insert(&database.client, "short").await;
    eventually(DEADLINE, "the poller's look", async || {
        let sql = "SELECT FROM walpost.outbox_status WHERE status = 'sent'";
        (!database.rows(sql, &[]).await.is_empty()).then_some(())
    })
    .await;
    poller.signal("STOP");
    long.batch_execute("COMMIT").await.expect("it commits");
    poller.sigkill();
    making.wait_exit(DEADLINE).await;
    let said = making.output();
    eventually(DEADLINE, "the slot's lock to be free", async || {
        let sql = "SELECT FROM pg_locks JOIN pg_database d ON d.oid = database WHERE locktype = 'advisory' AND datname = current_database()";
        database.rows(sql, &[]).await.is_empty().then_some(())
    })
    .await;

    // THEN once the poller has ended the slot is made, and every row arrives, once
    let mut making = make_slot(&database, maker);
    assert_eq!(making.wait_exit(DEADLINE).await, 0, "{}", making.output());
    assert!(slot_exists(&database, "confirmed_flush_lsn IS NOT NULL").await);
    let walpost = database.start(&[NOTED_SOON]).await;
    insert(&database.client, "last").await;
    wait_all_sent(&database).await;
    walpost.stop().await;
    arrived(&database, &["long", "short", "last"]).await;

    // AND beside the poller it told why it made none
    assert!(over && said.contains("has its lock"), "{said}");
}

async fn two_makers(major: i32) {
    // GIVEN a maker that waits for a transaction
    let database = Database::create_on_major(major, "makers").await;
    database.init(&[], &[POLL]).await;
    let long = database.connect().await;
    long.batch_execute("BEGIN").await.expect("a transaction");
    insert(&long, "long").await;
    let mut first = make_slot(&database, Maker::Init);
    eventually(DEADLINE, "the making to wait", async || {
        slot_exists(&database, "confirmed_flush_lsn IS NULL")
            .await
            .then_some(())
    })
    .await;
    let noted = "SELECT scan_before::text FROM walpost.progress";
    let before: String = database.rows(noted, &[]).await[0].get(0);
    insert(&database.client, "between").await;

    // WHEN a second one comes
    let mut second = make_slot(&database, Maker::File);
    second.wait_exit(DEADLINE).await;

    // THEN it has written nothing, and the first one's slot is good
    assert_eq!(
        database.rows(noted, &[]).await[0].get::<_, String>(0),
        before
    );
    long.batch_execute("COMMIT").await.expect("it commits");
    assert_eq!(first.wait_exit(DEADLINE).await, 0, "{}", first.output());
    let walpost = database.start(&[NOTED_SOON]).await;
    wait_all_sent(&database).await;
    walpost.stop().await;
    arrived(&database, &["long", "between"]).await;
}

on_each_major! {
    init_makes_no_slot_beside_a_running_poller_and_no_row_is_lost: a_slot_is_made_beside_a_poller(Maker::Init);
    the_file_of_sql_makes_no_slot_beside_a_running_poller_and_no_row_is_lost: a_slot_is_made_beside_a_poller(Maker::File);
    two_makers_of_one_slot_make_it_once_and_what_the_first_has_noted_stays: two_makers();
}
