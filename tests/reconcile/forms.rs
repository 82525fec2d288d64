//! The comparison where the publication is of all tables, or of all tables of a schema.

use super::*;

/// What the publication is of.
#[derive(Clone, Copy)]
pub(crate) enum Form {
    AllTables,
    /// Of the outbox' schema; since Postgres 15.
    TablesInSchema,
}

impl Form {
    /// Makes the publication that `walpost init` has made anew, in this form.
    pub(crate) fn made_anew(self) -> String {
        format!("DROP PUBLICATION walpost; {}", self.made())
    }

    fn made(self) -> String {
        let of = match self {
            Self::AllTables => "FOR ALL TABLES",
            Self::TablesInSchema => "FOR TABLES IN SCHEMA walpost",
        };
        format!(
            "CREATE PUBLICATION walpost {of} WITH (publish = 'insert', publish_via_partition_root = true);"
        )
    }

    /// What hides rows of it, the outbox' name meanwhile, and what mends that.
    pub(crate) fn ways(self, major: i32) -> Vec<(&'static str, &'static str, String)> {
        let outbox = "walpost.outbox";
        let mut ways = vec![(
            "ALTER PUBLICATION walpost SET (publish = 'update');",
            outbox,
            "ALTER PUBLICATION walpost SET (publish = 'insert');".to_owned(),
        )];
        if let Self::TablesInSchema = self {
            ways.push((
                "ALTER PUBLICATION walpost SET TABLES IN SCHEMA public;",
                outbox,
                "ALTER PUBLICATION walpost SET TABLES IN SCHEMA walpost;".to_owned(),
            ));
            ways.push((
                "ALTER TABLE walpost.outbox SET SCHEMA public;",
                "public.outbox",
                "ALTER TABLE public.outbox SET SCHEMA walpost;".to_owned(),
            ));
        }
        if major >= 18 {
            // (It streams on without a publication.)
            ways.push(("DROP PUBLICATION walpost;", outbox, self.made()));
        }
        ways
    }
}

async fn hidden_rows_come(major: i32, form: Form) {
    // GIVEN a publication of that form, and a stream
    let database = Database::create_on_major(major, "form").await;
    database.init(&[], &[]).await;
    database.sql(&form.made_anew()).await;
    for (hide, outbox, mend) in form.ways(major) {
        let insert = INSERT.replace("walpost.outbox", outbox);
        let walpost = database.start(&[OFTEN]).await;
        database.sql(INSERT).await;
        database.wait_all_sent(DEADLINE).await;
        walpost.stop().await;

        // WHEN it hides rows and is put back, once while nobody streams
        for statements in [hide, &insert, &mend] {
            database.sql(statements).await;
        }
        let mut walpost = database.start(&[OFTEN]).await;
        reconciled(&database, &mut walpost).await;

        // AND once under a running stream (in one transaction, so that nothing but the comparison can tell)
        database
            .sql(&format!("BEGIN; {hide} {insert} {mend} COMMIT"))
            .await;
        database.wait_all_sent(DEADLINE).await;
        database.sql(INSERT).await;
        database.wait_all_sent(DEADLINE).await;
        walpost.stop().await;
    }

    // THEN every row came once
    once_each(&database).await;
}

#[tokio::test]
async fn rows_that_a_publication_of_a_schema_hides_for_a_while_come_once_on_15() {
    hidden_rows_come(15, Form::TablesInSchema).await;
}

#[tokio::test]
async fn rows_that_a_publication_of_a_schema_hides_for_a_while_come_once_on_18() {
    hidden_rows_come(18, Form::TablesInSchema).await;
}

#[tokio::test]
async fn a_partition_that_comes_with_rows_is_published_of_a_publication_of_a_schema_on_15() {
    partition_with_rows(15, Some(Form::TablesInSchema), &[], "streaming").await;
}

#[tokio::test]
async fn a_partition_that_comes_with_rows_is_published_of_a_publication_of_a_schema_on_18() {
    partition_with_rows(18, Some(Form::TablesInSchema), &[], "streaming").await;
}

on_each_major! {
    rows_that_a_publication_of_all_tables_hides_for_a_while_come_once: hidden_rows_come(Form::AllTables);
    a_partition_that_comes_with_rows_is_published_of_a_publication_of_all_tables:
        partition_with_rows(Some(Form::AllTables), &[], "streaming");
}
