//! Coverage: which leaf tables (a table with rows of its own: the outbox table itself, a partition, a child by inheritance)
//! the delivered snapshot speaks of, as it stands in `walpost.progress.tables`.
//!
//! Pure: no connection, no clock. Input: leaf tables by their OID, as the catalogue lists them. Output: [`Leaves`], and what of a
//! leaf table is still to be published.
//!
//! # The rule
//!
//! A leaf table is covered by the delivered snapshot `D` ([`Coverage::Whole`]) only when each of its rows that are visible in `D` was streamed,
//! published from the table, or stored as a straggler. A row is seen only while its leaf table is attached to an outbox table that is in
//! the settings. So a leaf table becomes covered only by a [`Seen`], and there are two ways to get one:
//!
//! * **Read.** A cursor of a scan. The leaf tables are listed in the transaction that declares it, behind locks that keep them attached
//!   ([`super::reconcile::begin_look`]), so each of them is in the cursor. A scan that goes on behind a stored position reads only the rest: what it
//!   has seen is what each of its cursors had ([`Seen::and`]). So a leaf table that is away when the scan goes on is not covered by it.
//! * **Compared.** A comparison of the table with the stream: the leaf tables are listed before the snapshot `N` that is to be noted is taken, and
//!   again, behind the same locks, with the rows that are compared. A leaf table that is listed both times has no row that was inserted before it
//!   was attached and that `N` does not show: attaching waits for the leaf's writers. Without a comparison (`WALPOST_RECONCILE=off`) a leaf table
//!   becomes covered only while no row of it is open; one that is covered stays so while it belongs to the outbox, because the stream is trusted then.
//!
//! Whenever `D` moves, [`Leaves::moved`] gets what was seen, and every other leaf table keeps what was known of it: it is covered up to the last
//! snapshot that it was covered by, and no further. Its rows beyond that are published once it is seen, whatever was shown or confirmed meanwhile.
//!
//! **Streams without a note.** A stream confirms rows of tables that are not in the settings, or not attached, without publishing them. Its process
//! may end before it notes anything. So [`Leaves::declared`] is stored before the stream begins: what does not belong to the outbox then is
//! no more than covered up to `D`.
//!
//! **Who asks.** `walpost.outbox_status` shows a row as sent, and the retention removes it, only where the coverage of its leaf table shows it
//! in every slot that publishes the outbox table. A slot publishes a table of which a leaf table belongs to its outbox ([`Coverage::Whole`],
//! [`Coverage::UpTo`]). A leaf table that such a slot does not know yet is not covered.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::progress::Snapshot;

/// What of a leaf table's rows is delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// It belongs to the outbox: what the delivered snapshot shows.
    Whole,
    /// It belongs to the outbox: what this snapshot shows; `None`: nothing.
    UpTo(Option<Snapshot>),
    /// It does not belong to the outbox any more: what this snapshot shows.
    Gone(Snapshot),
}

/// Leaf tables whose rows were seen: see the module's documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen(BTreeSet<u32>);

impl Seen {
    /// Of leaf tables that were listed as the module's documentation says.
    pub fn listed(leaves: impl IntoIterator<Item = u32>) -> Self {
        Self(leaves.into_iter().collect())
    }

    /// What both have seen.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self(self.0.intersection(&other.0).copied().collect())
    }

    /// Adds what another table's look has seen.
    pub fn extend(&mut self, other: &Self) {
        self.0.extend(&other.0);
    }

    /// These without those that are to be read.
    #[must_use]
    pub fn without(&self, uncovered: &Uncovered) -> Self {
        let rest = self.iter().filter(|leaf| !uncovered.contains_key(leaf));
        Self(rest.collect())
    }

    /// Whether it is among them.
    pub fn contains(&self, leaf: u32) -> bool {
        self.0.contains(&leaf)
    }

    /// By their OIDs, rising.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.iter().copied()
    }

    /// For `walpost.progress.scan_position`: `[16397, 16401]`.
    pub fn to_json(&self) -> Value {
        json!(self.0)
    }

    /// What [`Self::to_json`] made; `None` for anything else.
    pub fn from_json(value: &Value) -> Option<Self> {
        let oid = |oid: &Value| u32::try_from(oid.as_u64()?).ok();
        Some(Self(
            value.as_array()?.iter().map(oid).collect::<Option<_>>()?,
        ))
    }
}

/// Leaf tables that are to be read, each with the snapshot up to which it is covered; `None`: not at all.
pub type Uncovered = BTreeMap<u32, Option<Snapshot>>;

/// The leaf tables that belong to the outbox or did, by OID.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leaves(BTreeMap<u32, Coverage>);

impl Leaves {
    /// These are covered, and no other is known.
    pub fn whole(seen: &Seen) -> Self {
        Self(seen.iter().map(|leaf| (leaf, Coverage::Whole)).collect())
    }

    /// Whether the delivered snapshot holds for it.
    pub fn is_whole(&self, leaf: u32) -> bool {
        self.0.get(&leaf) == Some(&Coverage::Whole)
    }

    /// Those that the delivered snapshot holds for.
    pub fn covered(&self) -> Seen {
        let whole = self.0.keys().filter(|leaf| self.is_whole(**leaf));
        Seen::listed(whole.copied())
    }

    /// All that are known.
    pub fn oids(&self) -> Vec<u32> {
        self.0.keys().copied().collect()
    }

    /// Up to which snapshot it is covered, where these were stored with `delivered`.
    pub fn until(&self, leaf: u32, delivered: Option<&Snapshot>) -> Option<Snapshot> {
        match self.0.get(&leaf) {
            Some(Coverage::Whole) => delivered.cloned(),
            Some(Coverage::UpTo(until)) => until.clone(),
            Some(Coverage::Gone(until)) => Some(until.clone()),
            None => None,
        }
    }

    /// Which of these leaf tables are to be read, and from where on.
    pub fn uncovered(&self, leaves: &Seen) -> Uncovered {
        let open = leaves.iter().filter(|leaf| !self.is_whole(*leaf));
        open.map(|leaf| (leaf, self.until(leaf, None))).collect()
    }

    /// These, when `delivered` stays and `attached` belong to the outbox now: one that is new is not covered, one that went is no further
    /// than up to `delivered`. `alive`: those of these that exist at all.
    #[must_use]
    pub fn declared(&self, attached: &Seen, alive: &[u32], delivered: Option<&Snapshot>) -> Self {
        self.next(attached, &self.covered().and(attached), alive, delivered)
    }

    /// These, when the delivered snapshot moves on from `delivered` and `seen` are the leaf tables whose rows were seen up to the new one.
    #[must_use]
    pub fn moved(
        &self,
        attached: &Seen,
        seen: &Seen,
        alive: &[u32],
        delivered: Option<&Snapshot>,
    ) -> Self {
        self.next(attached, seen, alive, delivered)
    }

    fn next(
        &self,
        attached: &Seen,
        whole: &Seen,
        alive: &[u32],
        delivered: Option<&Snapshot>,
    ) -> Self {
        let mut next = Self::whole(whole);
        for leaf in attached.iter().filter(|leaf| !whole.contains(*leaf)) {
            let until = self.until(leaf, delivered);
            next.0.insert(leaf, Coverage::UpTo(until));
        }
        for leaf in self.0.keys().filter(|leaf| alive.contains(leaf)) {
            if !next.0.contains_key(leaf)
                && let Some(until) = self.until(*leaf, delivered)
            {
                next.0.insert(*leaf, Coverage::Gone(until));
            }
        }
        next
    }

    /// For `walpost.progress.tables`: `{"16397": null, "16401": ["10:20:"], "16403": [], "16407": "9:9:"}`, for one that is covered, two that belong to the
    /// outbox and are covered up to a snapshot or not at all, and one that does not belong to it any more.
    pub fn to_json(&self) -> Value {
        let leaf = |(oid, coverage): (&u32, &Coverage)| {
            let coverage = match coverage {
                Coverage::Whole => Value::Null,
                Coverage::UpTo(until) => json!(until.as_slice()),
                Coverage::Gone(until) => json!(until),
            };
            (oid.to_string(), coverage)
        };
        Value::Object(self.0.iter().map(leaf).collect::<Map<_, _>>())
    }

    /// What [`Self::to_json`] made; `None` for anything else.
    pub fn from_json(value: &Value) -> Option<Self> {
        let leaf = |(oid, coverage): (&String, &Value)| {
            let coverage = match coverage {
                Value::Null => Coverage::Whole,
                Value::String(until) => Coverage::Gone(until.clone()),
                Value::Array(until) => match &until[..] {
                    [] => Coverage::UpTo(None),
                    [Value::String(until)] => Coverage::UpTo(Some(until.clone())),
                    _ => return None,
                },
                _ => return None,
            };
            Some((oid.parse().ok()?, coverage))
        };
        let leaves = value.as_object()?.iter().map(leaf);
        Some(Self(leaves.collect::<Option<_>>()?))
    }
}

/// SQL: the slots that publish this table, as rows `(slot)`. `table` is SQL for its `regclass`.
pub(super) fn publishing_slots(table: &str) -> String {
    format!(
        "SELECT h.slot FROM walpost.progress h, jsonb_each(h.tables) l
         WHERE jsonb_typeof(l.value) IN ('null', 'array') AND l.key::oid IN (
             WITH RECURSIVE tree AS (
                 SELECT {table}::oid AS leaf
                 UNION SELECT i.inhrelid FROM pg_inherits i JOIN tree ON i.inhparent = tree.leaf)
             SELECT leaf FROM tree)"
    )
}

/// SQL: whether `walpost.progress` `p` shows row `o` as delivered. (A row of an earlier version knows no leaf tables: then all are covered.)
pub(super) const IS_SHOWN: &str = "
    pg_visible_in_snapshot(o.txid,
        CASE WHEN p.tables IS NULL THEN p.delivered
             ELSE CASE jsonb_typeof(p.tables -> o.tableoid::text)
                  WHEN 'null' THEN p.delivered
                  WHEN 'array' THEN (p.tables -> o.tableoid::text ->> 0)::pg_snapshot
                  WHEN 'string' THEN (p.tables ->> o.tableoid::text)::pg_snapshot END END)";

#[cfg(test)]
mod tests {
    use super::*;

    fn seen<const N: usize>(leaves: [u32; N]) -> Seen {
        Seen::listed(leaves)
    }

    fn snapshot(xid: u64) -> Snapshot {
        format!("{xid}:{xid}:")
    }

    /// 1 and 2 covered, 3 belongs and is covered up to 3, 4 belongs and is not covered, 5 is gone since 5.
    fn stored() -> Leaves {
        let mut leaves = Leaves::whole(&seen([1, 2]));
        leaves.0.insert(3, Coverage::UpTo(Some(snapshot(3))));
        leaves.0.insert(4, Coverage::UpTo(None));
        leaves.0.insert(5, Coverage::Gone(snapshot(5)));
        leaves
    }

    const ALL: [u32; 5] = [1, 2, 3, 4, 5];

    #[test]
    fn only_what_was_seen_is_covered_when_the_delivered_snapshot_moves() {
        let (before, delivered) = (stored(), snapshot(10));
        // 1 and 4 were seen; 2 belongs and was not seen; 3 and 5 do not belong; 6 is new.
        let next = before.moved(&seen([1, 2, 4, 6]), &seen([1, 4]), &ALL, Some(&delivered));
        assert_eq!(next.covered(), seen([1, 4]));
        assert_eq!(next.0[&2], Coverage::UpTo(Some(snapshot(10))));
        assert_eq!(next.0[&3], Coverage::Gone(snapshot(3)));
        assert_eq!(next.0[&5], Coverage::Gone(snapshot(5)));
        assert_eq!(next.0[&6], Coverage::UpTo(None));
    }

    #[test]
    fn what_does_not_belong_when_a_stream_begins_is_covered_no_further() {
        let (before, delivered) = (stored(), snapshot(10));
        let next = before.declared(&seen([1, 5, 6]), &[1, 2, 4, 5], Some(&delivered));
        assert_eq!(next.covered(), seen([1]));
        assert_eq!(next.0[&2], Coverage::Gone(snapshot(10)));
        assert_eq!(next.0[&5], Coverage::UpTo(Some(snapshot(5))));
        assert_eq!(next.0[&6], Coverage::UpTo(None));
        // 3 does not exist any more, and of 4 nothing was covered.
        assert_eq!(next.oids(), [1, 2, 5, 6]);
        // The same settings change nothing.
        let same = next.declared(&seen([1, 5, 6]), &next.oids(), Some(&delivered));
        assert_eq!(same, next);
    }

    #[test]
    fn what_is_not_covered_is_read_from_where_its_coverage_ends() {
        let open = stored().uncovered(&seen([1, 3, 4, 5, 6]));
        let expected = [
            (3, Some(snapshot(3))),
            (4, None),
            (5, Some(snapshot(5))),
            (6, None),
        ];
        assert_eq!(open, Uncovered::from(expected));
    }

    #[test]
    fn a_scan_that_goes_on_has_seen_what_each_of_its_cursors_had() {
        assert_eq!(seen([1, 2, 3]).and(&seen([2, 3, 4])), seen([2, 3]));
    }

    #[test]
    fn leaves_are_read_as_they_were_stored_and_nonsense_is_not() {
        let leaves = stored();
        assert_eq!(Leaves::from_json(&leaves.to_json()), Some(leaves));
        let leaves = seen([1, 2]);
        assert_eq!(Seen::from_json(&leaves.to_json()), Some(leaves));
        for wrong in [
            json!(7),
            json!([[]]),
            json!({"x": null}),
            json!({"1": 7}),
            json!({"1": ["1:1:", "2:2:"]}),
        ] {
            assert_eq!(Leaves::from_json(&wrong), None, "{wrong}");
            assert_eq!(Seen::from_json(&wrong), None, "{wrong}");
        }
    }
}
