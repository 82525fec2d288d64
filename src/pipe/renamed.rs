//! A column that is read, and that the table had under another name when the log's rows were written.
//!
//! Without such a column a row is an event all the same, if the column is an optional one: it would go to the template's topic in place of its
//! own, or without its properties. Nothing would say so. The comparison is with the table as it is now ([`OutboxRelations`]).
//!
//! A column that was added since lacks in the log as well, and that is right: its rows had none. The two are told apart by
//! the places. The log describes the columns in the order of their numbers (`pg_attribute.attnum`), and a number never changes. So a
//! column with the number `n`, in front of which the table now has `k` others, was at a place from `k` to `n - 1` (more than `k` where
//! others were dropped since), if it was there at all. A name at one of these places that the table has no more may be its former name. It
//! may also be that of a column that was dropped since, next to it: then the slot is made anew although it need not be, and no row is lost.

use crate::pgoutput::Relation;
use crate::postgres::SentColumn;

/// The column of `now` that is read and had another name in `then`. Where these are not two descriptions of one table (a partition numbers its
/// columns in its own way) every place counts.
pub(super) fn renamed<'a>(
    then: &Relation,
    now: &'a [SentColumn],
    is_same_table: bool,
) -> Option<&'a str> {
    let is_former = |name: &String| !now.iter().any(|column| column.name == *name);
    now.iter()
        .enumerate()
        .filter(|(_, column)| column.is_read && then.position(&column.name).is_none())
        .find(|(place, column)| {
            let (first, end) = if is_same_table {
                (*place, usize::from(column.number))
            } else {
                (0, then.columns.len())
            };
            let places = then.columns.iter().take(end).skip(first);
            places.into_iter().any(|column| is_former(&column.name))
        })
        .map(|(_, column)| column.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pgoutput::RelationColumn;

    fn then(names: &[&str]) -> Relation {
        let column = |name: &&str| RelationColumn {
            flags: 0,
            name: (*name).to_owned(),
            type_oid: 25,
            type_modifier: -1,
        };
        Relation {
            id: 1,
            namespace: "walpost".to_owned(),
            name: "outbox".to_owned(),
            replica_identity: b'd',
            columns: names.iter().map(column).collect(),
        }
    }

    /// Columns by number; those that are not read begin with `_`.
    fn now(columns: &[(u16, &str)]) -> Vec<SentColumn> {
        let column = |(number, name): &(u16, &str)| SentColumn {
            name: (*name).to_owned(),
            number: *number,
            is_read: !name.starts_with('_'),
        };
        columns.iter().map(column).collect()
    }

    #[test]
    fn a_renamed_column_is_told_from_one_that_was_added() {
        let table = now(&[(1, "id"), (2, "topic"), (3, "_note"), (4, "headers")]);
        for (names, is_same_table, expected) in [
            (&["id", "topic", "_note", "headers"][..], true, None),
            (&["id", "former", "_note", "headers"], true, Some("topic")),
            (&["id", "topic", "_note", "former"], true, Some("headers")),
            // Nobody reads it.
            (&["id", "topic", "former", "headers"], true, None),
            // Added since.
            (&["id", "topic", "_note"], true, None),
            (&["id"], true, None),
            // A partition's order is its own.
            (&["former", "_note", "headers", "id"], false, Some("topic")),
        ] {
            assert_eq!(
                renamed(&then(names), &table, is_same_table),
                expected,
                "{names:?}"
            );
        }
    }

    #[test]
    fn a_column_that_was_dropped_since_is_not_taken_for_one_that_was_added_behind_others() {
        // Number 2 was dropped, `topic` added.
        let table = now(&[(1, "id"), (3, "payload"), (4, "topic")]);
        assert_eq!(
            renamed(&then(&["id", "old", "payload"]), &table, true),
            None
        );
        // Both were there, and `topic` had another name.
        assert_eq!(
            renamed(&then(&["id", "old", "payload", "former"]), &table, true),
            Some("topic")
        );
        // Number 2 was dropped before the log was written.
        assert_eq!(
            renamed(&then(&["id", "payload", "former"]), &table, true),
            Some("topic")
        );
    }
}
