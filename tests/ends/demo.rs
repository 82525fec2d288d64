//! `walpost demo`: both ends at work, killed and started again on the way, and the sums agree.

use std::time::Duration;

use crate::support::{Command, Database};

const DEADLINE: Duration = Duration::from_secs(240);

#[tokio::test]
async fn the_sums_agree_although_connector_system_a_and_system_b_are_killed() {
    // GIVEN a server (the demo makes its own database in it)
    let database = Database::create("demo").await;
    // WHEN the demo runs for a moment and kills each of the three twice
    let args = [
        "demo",
        "--seconds",
        "2",
        "--rate",
        "60",
        "--writers",
        "3",
        "--kills",
        "2",
    ];
    let (code, said) = Command::walpost(args).on(&database).run(DEADLINE).await;
    // THEN it says so, and that nothing was lost, made up or taken twice
    assert_eq!(code, 0, "{said}");
    for victim in ["the connector", "System B", "System A"] {
        let line = format!("killed {victim}, and started it again");
        assert_eq!(said.matches(&line).count(), 2, "{line}: {said}");
    }
    let value = |name: &str| -> u64 {
        // A line of the table, not one of those before it.
        let value = said
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or_else(|| panic!("no number {name:?} in: {said}"))
    };
    assert!(
        value("committed") > 60 && value("rolled back ") > 0,
        "{said}"
    );
    assert_eq!(value("lost"), 0, "{said}");
    assert_eq!(value("rolled back, but received"), 0, "{said}");
    assert_eq!(
        value("received"),
        value("committed") + value("duplicates"),
        "{said}"
    );
    assert!(value("published") > 0, "{said}");
    assert_eq!(value("sum ordered"), value("sum taken"), "{said}");
    assert!(value("sum taken") > value("committed"), "{said}");
    // THEN and nothing is left of it
    let left = "select (select count(*) from pg_database where datname = 'walpost_demo')
                     + (select count(*) from pg_replication_slots where slot_name = 'walpost_demo')";
    assert_eq!(database.rows(left, &[]).await[0].get::<_, i64>(0), 0);
}
