//! `RowNumber`: which of several rows with the same id it is.
//!
//! A row is known by its table, its id and its number: its `seq`, or its `txid` in a table without `seq`; where it has both, by both
//! ([`crate::pulsar::RowKey`]). An id alone is not enough: it may be
//! used again by mistake, and what happens to a row (a mark, a deletion, being skipped in the stream) must never happen to another
//! one that was not published. Two rows with the same id of one transaction in a table without `seq` are not told apart, nor
//! are any with the same id in a table that has neither column.
//!
//! Both the stream and a reader of the table choose the column by its name and type ([`number_column`]), so they agree. A column of
//! another type (a `seq` that is text) has no number, and hides no other column.

use crate::pgoutput::types::{INT2, INT4, INT8, XID8};
use crate::pgoutput::{Column, Relation, Tuple};

/// The column that orders the rows of a table for a scan.
pub const SEQ: &str = "seq";
/// The column of the inserting transaction.
pub const TXID: &str = "txid";

/// See the module's documentation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RowNumber {
    /// Its table has none, or this row's cannot be read: it is no whole number, or nobody kept it.
    #[default]
    Unknown,
    /// The column is NULL: told from rows that have a number, not from others that have none.
    Null,
    /// Of column `seq`.
    Seq(i64),
    /// Of column `txid`.
    Txid(i64),
}

impl RowNumber {
    /// The number of a row whose column of that name has this text.
    pub fn parse(column: &str, text: Option<&str>) -> Self {
        let Some(text) = text else {
            return Self::Null;
        };
        match (column, text.parse().ok()) {
            (SEQ, Some(number)) => Self::Seq(number),
            (TXID, Some(number)) => Self::Txid(number),
            _ => Self::Unknown,
        }
    }
}

/// The name of the column that has the number. `type_of` gives the type of the column of a name, below all domains.
pub fn number_column(type_of: impl Fn(&str) -> Option<u32>) -> Option<&'static str> {
    let has_number = |name: &&str| match type_of(name) {
        Some(INT2 | INT4 | INT8) => true,
        Some(XID8) => *name == TXID,
        _ => false,
    };
    [SEQ, TXID].into_iter().find(has_number)
}

/// The column that has the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NumberColumn {
    index: usize,
    name: &'static str,
}

impl NumberColumn {
    /// Its place among the columns.
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Looks for it among a table's columns.
    pub fn find(relation: &Relation) -> Option<Self> {
        let type_of = |name: &str| {
            let index = relation.position(name)?;
            relation.columns.get(index).map(|column| column.type_oid)
        };
        let name = number_column(type_of)?;
        let index = relation.position(name)?;
        Some(Self { index, name })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Reads a row's number, in text or binary format.
    pub fn read(self, tuple: &Tuple<'_>) -> RowNumber {
        match tuple.columns().nth(self.index) {
            Some(Column::Text(text)) => RowNumber::parse(self.name, std::str::from_utf8(text).ok()),
            Some(Column::Binary(bytes)) => self.binary(bytes),
            Some(Column::Null) => RowNumber::Null,
            _ => RowNumber::Unknown,
        }
    }

    fn binary(self, bytes: &[u8]) -> RowNumber {
        if !matches!(bytes.len(), 2 | 4 | 8) {
            return RowNumber::Unknown;
        }
        // Sign and size extended.
        let is_negative = bytes.first().is_some_and(|first| first & 0x80 != 0);
        let mut whole = [if is_negative { 0xff } else { 0 }; 8];
        whole[8 - bytes.len()..].copy_from_slice(bytes);
        let number = i64::from_be_bytes(whole);
        if self.name == SEQ {
            RowNumber::Seq(number)
        } else {
            RowNumber::Txid(number)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pgoutput::RelationColumn;
    use crate::pgoutput::types::{FIRST_USER_OID, TEXT, UUID};

    fn relation(columns: &[(&str, u32)]) -> Relation {
        let column = |(name, type_oid): &(&str, u32)| RelationColumn {
            flags: 0,
            name: (*name).to_owned(),
            type_oid: *type_oid,
            type_modifier: -1,
        };
        Relation {
            id: 1,
            namespace: "public".to_owned(),
            name: "t".to_owned(),
            replica_identity: b'd',
            columns: columns.iter().map(column).collect(),
        }
    }

    fn tuple(kind: u8, value: &[u8]) -> Vec<u8> {
        let mut data = vec![0, 2, b'n', kind];
        if kind != b'n' {
            data.extend((value.len() as u32).to_be_bytes());
            data.extend(value);
        }
        data
    }

    #[test]
    fn a_number_is_the_same_in_text_and_binary_and_seq_goes_before_txid() {
        const FLOAT8: u32 = 701;
        const NUMERIC: u32 = 1700;
        let of = |column: (&str, u32), kind: u8, value: &[u8]| {
            let column = NumberColumn::find(&relation(&[("id", 25), column])).unwrap();
            column.read(&Tuple::decode(&tuple(kind, value)).unwrap())
        };
        let seven = 7_i64.to_be_bytes();
        for (column, kind, value, expected) in [
            ((SEQ, INT8), b't', &b"7"[..], RowNumber::Seq(7)),
            ((SEQ, INT8), b'b', &seven, RowNumber::Seq(7)),
            ((SEQ, INT4), b'b', &[0, 0, 0, 7], RowNumber::Seq(7)),
            ((SEQ, INT2), b'b', &[255, 255], RowNumber::Seq(-1)),
            ((TXID, XID8), b't', b"7", RowNumber::Txid(7)),
            ((TXID, XID8), b'b', &seven, RowNumber::Txid(7)),
            ((SEQ, INT8), b't', b"7.5", RowNumber::Unknown),
            ((SEQ, INT8), b'n', b"", RowNumber::Null),
        ] {
            assert_eq!(of(column, kind, value), expected, "{column:?} {value:?}");
        }
        let both = relation(&[(TXID, XID8), (SEQ, INT8)]);
        assert_eq!(NumberColumn::find(&both).unwrap().name(), SEQ);
        assert_eq!(NumberColumn::find(&relation(&[("id", 25)])), None);

        // Types of which not each value is a whole number.
        for type_oid in [TEXT, UUID, FLOAT8, NUMERIC, XID8, FIRST_USER_OID] {
            let both = relation(&[(SEQ, type_oid), (TXID, XID8)]);
            let found = NumberColumn::find(&both).map(NumberColumn::name);
            assert_eq!(found, Some(TXID), "{type_oid}");
            assert_eq!(NumberColumn::find(&relation(&[(SEQ, type_oid)])), None);
        }
        assert_eq!(NumberColumn::find(&relation(&[(TXID, TEXT)])), None);
    }
}
