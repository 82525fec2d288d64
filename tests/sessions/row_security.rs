//! Row-level security that hides rows from walpost is an error and never a table without rows.

use super::support::{Database, eventually, on_each_major};
use super::{DEADLINE, insert};

const SECURITY: &str = "ALTER TABLE walpost.outbox ENABLE ROW LEVEL SECURITY";

/// Rows from before the slot, hidden by a policy.
async fn hidden(major: i32) -> Database {
    let database = Database::create_on_major(major, "security").await;
    database.init(&[], &[]).await;
    let login = format!("{}_run", database.name);
    database
        .sql(&format!(
            "{SECURITY}; CREATE POLICY none ON walpost.outbox USING (false);
             UPDATE walpost.progress SET scan_upto = NULL, scan_position = NULL, scan_before = pg_current_snapshot();
             GRANT SELECT ON ALL TABLES IN SCHEMA walpost TO {login}"
        ))
        .await;
    insert(&database, 5).await;
    database
}

/// GIVEN a policy that hides rows WHEN walpost's commands run with a plain role THEN each is refused with the way out and notes nothing as
/// delivered; and each way out is one.
async fn is_refused_with_the_way_out(major: i32) {
    let database = hidden(major).await;
    let login = format!("{}_run", database.name);
    let url = database.run_url();
    let plain = [("WALPOST_POSTGRES_URL", url.as_str())];
    let poll = [plain[0], ("WALPOST_MODE", "poll")];
    for (command, settings) in [
        (&["run"][..], &plain[..]),
        (&["run"], &poll),
        (&["check"], &plain),
        (&["check"], &poll),
        (&["verify"], &plain),
        (&["replay", "--key", "key-1"], &plain),
    ] {
        let (code, said) = database.walpost(command, settings).run(DEADLINE).await;
        assert_eq!(code, 69, "{command:?}: {said}");
        for part in [
            "row-level security of walpost.outbox",
            &format!("ALTER ROLE \"{login}\" BYPASSRLS"),
            "ALTER TABLE walpost.outbox DISABLE ROW LEVEL SECURITY",
        ] {
            assert!(said.contains(part), "{command:?} without {part}: {said}");
        }
    }
    let delivered = "SELECT count(*) FROM walpost.progress WHERE delivered IS NOT NULL";
    assert_eq!(database.rows(delivered, &[]).await[0].get::<_, i64>(0), 0);

    let check = async || database.walpost(&["check"], &plain).run(DEADLINE).await.0;
    database.sql(&format!("ALTER ROLE {login} BYPASSRLS")).await;
    assert_eq!(check().await, 0);
    database
        .sql(&format!("ALTER ROLE {login} NOBYPASSRLS"))
        .await;
    assert_eq!(check().await, 69);
    database
        .sql("ALTER TABLE walpost.outbox DISABLE ROW LEVEL SECURITY")
        .await;
    assert_eq!(check().await, 0);
    // Not for its own tables either.
    database
        .sql("ALTER TABLE walpost.straggler ENABLE ROW LEVEL SECURITY")
        .await;
    assert_eq!(check().await, 69);
}

#[tokio::test]
async fn a_policy_that_hides_rows_is_refused_with_the_way_out_on_14() {
    is_refused_with_the_way_out(14).await;
}

#[tokio::test]
async fn a_policy_that_hides_rows_is_refused_with_the_way_out_on_15() {
    is_refused_with_the_way_out(15).await;
}

#[tokio::test]
async fn a_policy_that_hides_rows_is_refused_with_the_way_out_on_18() {
    is_refused_with_the_way_out(18).await;
}

/// GIVEN a running walpost WHEN a policy begins to hide rows THEN no row is noted as delivered that was not published.
async fn a_policy_comes_later(major: i32) {
    let database = Database::create_on_major(major, "security").await;
    database.init(&[], &[]).await;
    let poll = [("WALPOST_MODE", "poll"), ("WALPOST_SCAN_INTERVAL", "300ms")];
    let mut walpost = database.walpost(&["run"], &poll).spawn();
    insert(&database, 5).await;
    let delivered = "SELECT count(*) FROM walpost.outbox_status WHERE status = 'sent'";
    let sent = async || database.rows(delivered, &[]).await[0].get::<_, i64>(0);
    eventually(DEADLINE, "the first rows", async || {
        (sent().await == 5).then_some(())
    })
    .await;
    database
        .sql(&format!(
            "BEGIN; {SECURITY}; CREATE POLICY none ON walpost.outbox USING (false);
             INSERT INTO walpost.outbox (aggregatetype, aggregateid, type) VALUES ('t', 'k', 'e'); COMMIT"
        ))
        .await;
    assert_eq!(walpost.wait_exit(DEADLINE).await, 69);
    let said = walpost.output();
    assert!(said.contains("BYPASSRLS"), "{said}");
    assert_eq!(sent().await, 5);
}

on_each_major! {
    a_policy_that_comes_later_makes_the_scan_fail_and_not_end: a_policy_comes_later();
}
