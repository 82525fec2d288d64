use super::*;

type Change<'a> = &'a dyn Fn(&mut Table);

fn good() -> Table {
    Table {
        kind: "r".into(),
        persistence: "p".into(),
        is_published: true,
        ..Table::default()
    }
}

const OPTIONS: Options = Options {
    inserts: true,
    via_root: true,
};

fn judge(options: Option<Options>, change: impl Fn(&mut Table)) -> Result<(), String> {
    let subscription = Subscription {
        publication: "p".into(),
        tables: vec![TableName::new("walpost", "outbox")],
        columns: Vec::new(),
    };
    let mut table = good();
    change(&mut table);
    check(&subscription, options, &[Some(table)]).map_err(|error| {
        assert_eq!(error.exit_code(), 69);
        error.report()
    })
}

#[test]
fn what_keeps_rows_out_of_the_stream_is_refused_with_the_statement_that_mends_it() {
    assert_eq!(judge(Some(OPTIONS), |_| {}), Ok(()));
    assert!(
        judge(None, |_| {})
            .unwrap_err()
            .contains("CREATE PUBLICATION \"p\" FOR TABLE walpost.outbox")
    );
    let options = |inserts, via_root| Some(Options { inserts, via_root });
    let said = judge(options(false, true), |_| {}).unwrap_err();
    assert!(said.contains("SET (publish = 'insert');"), "{said}");
    assert_eq!(judge(options(true, false), |_| {}), Ok(()));
    let said = judge(options(true, false), |t| t.kind = "p".into()).unwrap_err();
    assert!(
        said.contains("SET (publish_via_partition_root = true);"),
        "{said}"
    );
    let member = |persistence: &str, is_partition, is_table| Member {
        name: TableName::new("walpost", "child"),
        persistence: persistence.into(),
        is_partition,
        is_table,
    };
    let cases: [(Change<'_>, &str); 9] = [
        (
            &|t| t.is_published = false,
            "ALTER PUBLICATION \"p\" ADD TABLE walpost.outbox;",
        ),
        (
            &|t| t.is_filtered = true,
            "ALTER PUBLICATION \"p\" DROP TABLE walpost.outbox;",
        ),
        (
            &|t| t.left_out.push("txid".into()),
            "that walpost reads: txid",
        ),
        (
            &|t| t.generated.push("payload".into()),
            "ALTER COLUMN \"payload\" DROP EXPRESSION",
        ),
        (
            &|t| t.persistence = "u".into(),
            "ALTER TABLE walpost.outbox SET LOGGED;",
        ),
        (
            &|t| t.unfit.push(member("u", true, true)),
            "ALTER TABLE walpost.child SET LOGGED;",
        ),
        (
            &|t| t.unfit.push(member("p", true, false)),
            "ALTER TABLE walpost.outbox DETACH PARTITION walpost.child;",
        ),
        (
            &|t| t.unfit.push(member("p", false, true)),
            "ALTER TABLE walpost.child NO INHERIT walpost.outbox;",
        ),
        (
            &|t| {
                t.is_published = false;
                t.ancestors.push(TableName::new("public", "events"));
            },
            "name public.events in WALPOST_OUTBOX_TABLE",
        ),
    ];
    for (change, expected) in cases {
        let said = judge(Some(OPTIONS), change).unwrap_err();
        assert!(said.contains(expected), "no {expected:?} in:\n{said}");
    }
}

#[test]
fn a_missing_table_is_refused() {
    let subscription = Subscription {
        publication: "p".into(),
        tables: vec![TableName::new("walpost", "outbox")],
        columns: Vec::new(),
    };
    let said = check(&subscription, Some(OPTIONS), &[None])
        .unwrap_err()
        .report();
    assert!(said.contains("walpost.outbox does not exist"), "{said}");
}
