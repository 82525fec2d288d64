//! A role that lacks rights is told which, as statements; those statements and no more make init succeed.

use crate::support::Database;
use crate::{init, walpost_at};

/// A login role of this test's own, without any right, and the URL to come in as it.
async fn role(database: &Database) -> (String, String) {
    let role = format!("{}_r", database.name);
    database
        .sql(&format!("create role {role} login password 'p'"))
        .await;
    let (_, server) = database.url.rsplit_once('@').expect("the URL has a user");
    (role.clone(), format!("postgres://{role}:p@{server}"))
}

async fn drop_role(database: &Database, role: &str) {
    database
        .sql(&format!(
            "reassign owned by {role} to postgres; drop owned by {role}; drop role {role}"
        ))
        .await;
}

/// What init tells a superuser to run.
fn cures(said: &str) -> &str {
    let (_, rest) = said
        .split_once("run as a superuser: ")
        .unwrap_or_else(|| panic!("no statements in: {said}"));
    let (cures, _) = rest.split_once(" or apply what").expect("an end");
    cures
}

#[tokio::test]
async fn a_role_without_rights_is_told_exactly_which_it_lacks() {
    // GIVEN a role that may nothing
    let database = Database::create("init").await;
    let (role, url) = role(&database).await;

    // WHEN it runs init THEN all that it lacks is told and nothing was made
    let (code, said) = walpost_at(&url, &database.slot, &["init"]).await;
    assert_eq!(code, 69, "{said}");
    let name = &database.name;
    assert!(
        said.contains(&format!(
            r#"GRANT CREATE ON DATABASE "{name}" TO "{role}";"#
        )),
        "{said}"
    );
    assert!(
        said.contains(&format!(r#"ALTER ROLE "{role}" REPLICATION;"#)),
        "{said}"
    );
    let schema = database
        .rows("select to_regnamespace('walpost') is null", &[])
        .await;
    assert!(schema[0].get::<_, bool>(0));

    // WHEN just that is granted THEN it works
    database.sql(cures(&said)).await;
    let (code, said) = walpost_at(&url, &database.slot, &["init"]).await;
    assert_eq!(code, 0, "{said}");
    drop_role(&database, &role).await;
}

#[tokio::test]
async fn a_role_without_rights_on_what_is_there_is_told_so() {
    // GIVEN schema walpost and a table of others, both the superuser's
    let database = Database::create("init").await;
    let (role, url) = role(&database).await;
    database
        .sql(
            "create schema walpost; create schema shop;
             create table shop.events (id uuid, aggregatetype text, aggregateid text, type text, payload jsonb)",
        )
        .await;
    let args = ["init", "--outbox-table", "walpost.outbox,shop.events"];
    let (code, said) = walpost_at(&url, &database.slot, &args).await;
    assert_eq!(code, 69, "{said}");
    for cure in [
        format!(r#"GRANT USAGE, CREATE ON SCHEMA walpost TO "{role}";"#),
        format!(r#"GRANT USAGE ON SCHEMA "shop" TO "{role}";"#),
        format!(r#"ALTER TABLE shop.events OWNER TO "{role}";"#),
    ] {
        assert!(said.contains(&cure), "{cure} is not in: {said}");
    }

    // WHEN just that is granted THEN it works
    database.sql(cures(&said)).await;
    let (code, said) = walpost_at(&url, &database.slot, &args).await;
    assert_eq!(code, 0, "{said}");
    drop_role(&database, &role).await;
}

#[tokio::test]
async fn a_role_that_does_not_own_the_publication_is_told_so() {
    // GIVEN a finished init by the superuser, and a table of the role's own that is not published yet
    let database = Database::create("init").await;
    let (role, url) = role(&database).await;
    init(&database, &[]).await;
    database
        .sql(&format!(
            "create schema shop authorization {role};
             create table shop.events (id uuid, aggregatetype text, aggregateid text, type text, payload jsonb);
             alter table shop.events owner to {role}"
        ))
        .await;
    let args = ["init", "--outbox-table", "shop.events"];
    let (code, said) = walpost_at(&url, &database.slot, &args).await;
    assert_eq!(code, 69, "{said}");
    let cure = format!(r#"ALTER PUBLICATION "walpost" OWNER TO "{role}";"#);
    assert!(said.contains(&cure), "{said}");

    database.sql(cures(&said)).await;
    let (code, said) = walpost_at(&url, &database.slot, &args).await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("table shop.events was missing: added"),
        "{said}"
    );
    drop_role(&database, &role).await;
}

#[tokio::test]
async fn a_role_that_may_not_make_what_a_newer_version_needs_is_told_so() {
    // GIVEN what an older version made
    let database = Database::create("init").await;
    let (role, url) = role(&database).await;
    init(&database, &[]).await;
    database
        .sql(&format!(
            "drop table walpost.left_undone; grant usage on schema walpost to {role}"
        ))
        .await;
    let (code, said) = walpost_at(&url, &database.slot, &["init"]).await;
    assert_eq!(code, 69, "{said}");
    let cure = format!(r#"GRANT USAGE, CREATE ON SCHEMA walpost TO "{role}";"#);
    assert_eq!(cures(&said), cure, "{said}");

    // WHEN just that is granted THEN it works
    database.sql(cures(&said)).await;
    let (code, said) = walpost_at(&url, &database.slot, &["init"]).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("created table walpost.left_undone"), "{said}");
    drop_role(&database, &role).await;
}

#[tokio::test]
async fn a_role_without_rights_may_ask_when_there_is_nothing_to_make() {
    let database = Database::create("init").await;
    let (role, url) = role(&database).await;
    init(&database, &[]).await;
    database
        .sql(&format!("grant usage on schema walpost to {role}"))
        .await;
    let (code, said) = walpost_at(&url, &database.slot, &["init"]).await;
    assert_eq!(code, 0, "{said}");
    assert!(!said.contains("created"), "{said}");
    drop_role(&database, &role).await;
}
