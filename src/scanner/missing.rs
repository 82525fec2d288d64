//! `Missing`: the part of a gap that a comparison of the table with the stream found, as it stands in
//! `walpost.progress.scan_position` until it is published.
//!
//! Pure: no connection, no clock. [`super::reconcile`] fills it, [`super::gap`] publishes it.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::coverage::Uncovered;

/// Ranges that are kept of one table. Beyond it neighbouring ones are joined: rows between them are published again, none is
/// left out.
const MAX_RANGES: usize = 10_000;

/// Transactions as ranges, rising.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XidRanges(Vec<(u64, u64)>);

impl XidRanges {
    /// Adds the transactions from `first` up to `end`, which itself is not in it. `joins`: nothing between the last range and
    /// this one is known as brought, so the two are one.
    pub fn add(&mut self, first: u64, end: u64, joins: bool) {
        if joins && let Some(last) = self.0.last_mut() {
            last.1 = end;
            return;
        }
        self.0.push((first, end));
        if self.0.len() > MAX_RANGES {
            let pairs = self.0.chunks(2);
            let joined = pairs.filter_map(|pair| Some((pair.first()?.0, pair.last()?.1)));
            self.0 = joined.collect();
        }
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As an `int8multirange` of SQL.
    pub fn to_sql(&self) -> String {
        let ranges: Vec<_> = self
            .0
            .iter()
            .map(|(first, end)| format!("[{first},{end})"))
            .collect();
        format!("{{{}}}", ranges.join(","))
    }

    fn to_json(&self) -> Value {
        self.0
            .iter()
            .map(|(first, end)| json!([first, end]))
            .collect()
    }

    fn from_json(value: &Value) -> Option<Self> {
        let pair = |pair: &Value| Some((pair[0].as_u64()?, pair[1].as_u64()?));
        Some(Self(
            value.as_array()?.iter().map(pair).collect::<Option<_>>()?,
        ))
    }
}

/// What of one table is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MissingRows {
    /// Transactions of which the stream did not bring every row.
    pub txids: XidRanges,
    /// Leaf tables that came with rows in them: those rows that the delivered snapshot shows, and the leaf's own does not.
    pub leaves: Uncovered,
}

/// What is missing, by table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing(pub BTreeMap<String, MissingRows>);

impl Missing {
    /// True when nothing is.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// For `walpost.progress.scan_position`.
    pub fn to_json(&self) -> Value {
        let table = |(table, rows): (&String, &MissingRows)| {
            let rows =
                json!({ "txids": rows.txids.to_json(), "leaves": leaves_to_json(&rows.leaves) });
            (table.clone(), rows)
        };
        Value::Object(self.0.iter().map(table).collect::<Map<_, _>>())
    }

    /// What [`Self::to_json`] made; `None` for anything else.
    pub fn from_json(value: &Value) -> Option<Self> {
        let table = |(table, rows): (&String, &Value)| {
            let rows = MissingRows {
                txids: XidRanges::from_json(&rows["txids"])?,
                leaves: leaves_from_json(&rows["leaves"])?,
            };
            Some((table.clone(), rows))
        };
        let tables = value
            .as_object()?
            .iter()
            .map(table)
            .collect::<Option<_>>()?;
        Some(Self(tables))
    }
}

/// `{"16397": null, "16401": "10:20:"}`.
fn leaves_to_json(leaves: &Uncovered) -> Value {
    let leaf = |(oid, until): (&u32, &Option<String>)| (oid.to_string(), json!(until));
    Value::Object(leaves.iter().map(leaf).collect::<Map<_, _>>())
}

/// What [`leaves_to_json`] made; `None` for anything else.
fn leaves_from_json(value: &Value) -> Option<Uncovered> {
    let leaf = |(oid, until): (&String, &Value)| {
        let until = match until {
            Value::Null => None,
            Value::String(snapshot) => Some(snapshot.clone()),
            _ => return None,
        };
        Some((oid.parse().ok()?, until))
    };
    value.as_object()?.iter().map(leaf).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_where_nothing_between_them_was_brought_and_are_bounded() {
        let mut ranges = XidRanges::default();
        ranges.add(5, 6, false);
        ranges.add(8, 9, true);
        ranges.add(20, 21, false);
        assert_eq!(ranges.to_sql(), "{[5,9),[20,21)}");
        let mut many = XidRanges::default();
        for xid in 0..3 * MAX_RANGES as u64 {
            many.add(10 * xid, 10 * xid + 1, false);
        }
        assert!(many.0.len() <= MAX_RANGES);
        let covered = |xid: u64| {
            many.0
                .iter()
                .any(|(first, end)| (*first..*end).contains(&xid))
        };
        assert!((0..3 * MAX_RANGES as u64).all(|xid| covered(10 * xid)));
    }

    #[test]
    fn what_is_missing_is_read_as_it_was_stored_and_nonsense_is_not() {
        let mut missing = Missing::default();
        let mut rows = MissingRows::default();
        rows.txids.add(5, 6, false);
        rows.leaves = Uncovered::from([(7, None), (9, Some("3:4:".to_owned()))]);
        missing.0.insert("walpost.outbox".to_owned(), rows);
        assert_eq!(Missing::from_json(&missing.to_json()), Some(missing));
        for wrong in [
            json!(7),
            json!({"t": {}}),
            json!({"t": {"txids": [[1]], "leaves": {}}}),
        ] {
            assert_eq!(Missing::from_json(&wrong), None);
        }
    }
}
