//! A [`Router`] remembers, and nothing shows of it.

use proptest::prelude::*;
use proptest::sample::select;

use super::support::{relation, row, template};
use crate::outbox::Columns;
use crate::outbox::router::Router;
use crate::pgoutput::types::{INT4, TEXT};
use crate::pgoutput::{Column, Tuple};

/// Values of a `text` and an `int4` column, few enough to come again. "1234" means another number in binary format.
fn value() -> impl Strategy<Value = Column<'static>> {
    select(vec![
        Column::Null,
        Column::Text(b"1234"),
        Column::Binary(b"1234"),
        Column::Text(b"a"),
        Column::Text(b"a/b"),
        Column::Binary(b"5678"),
        Column::Text(b""),
    ])
}

fn own() -> impl Strategy<Value = Option<&'static str>> {
    let some = select(vec!["t", "public/default/t", "a/b", "", "t-partition-1"]);
    prop::option::weighted(0.4, some)
}

proptest! {
    /// What the rows before were makes no difference to any row.
    #[test]
    fn a_router_that_has_seen_rows_routes_as_a_new_one(
        rows in prop::collection::vec((value(), value(), own()), 1..30),
    ) {
        let table = relation(&[("name", TEXT), ("number", INT4)]);
        let template = template("{name}.{number}.{name}");
        let new = Router::new(&table, &Columns::default(), &template).expect("sound");
        let mut used = new.clone();
        for (name, number, own) in rows {
            let bytes = row(&[name, number]);
            let tuple = Tuple::decode(&bytes).expect("sound");
            let mut new = new.clone();
            let routed = used.route(&tuple, own);
            prop_assert_eq!(&routed, &new.route(&tuple, own));
            if routed.is_ok() {
                prop_assert_eq!(used.topic(own.is_some()), new.topic(own.is_some()));
            }
        }
    }
}
