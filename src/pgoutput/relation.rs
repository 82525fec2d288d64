//! `Relation`: what Postgres says of a table before its first row, and the cache of what it said last.
//!
//! Input: `Relation` and `Type` messages. A relation is sent again after every change of its table (DDL, a changed
//! publication), always ahead of the next row of that table, so the cache's newest entry is the one that fits.

use std::collections::HashMap;
use std::fmt;

use super::reader::{DecodeError, Reader};
use super::types;

/// A table as the publication shows it.
///
/// ```text
/// 'R' Int32 relation id, String namespace, String name, Int8 replica identity,
///     Int16 columns, then for each: Int8 flags, String name, Int32 type OID, Int32 type modifier
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// The table's OID; rows refer to it.
    pub id: u32,
    /// The schema; empty for `pg_catalog`.
    pub namespace: String,
    /// The table's name.
    pub name: String,
    /// `relreplident` of `pg_class`: `d`efault, `n`othing, `f`ull, `i`ndex.
    pub replica_identity: u8,
    /// The published columns, in the order of each row's values.
    pub columns: Vec<RelationColumn>,
}

/// A published column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelationColumn {
    /// Bit 0: the column is part of the replica identity.
    pub flags: u8,
    /// The column's name.
    pub name: String,
    /// The type's OID; in a [`RelationCache`] a domain over a type of [`types`] has its base type's OID.
    pub type_oid: u32,
    /// `atttypmod` of `pg_attribute`; -1 for none.
    pub type_modifier: i32,
}

impl Relation {
    pub(super) fn parse(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let id = reader.u32("relation id")?;
        let namespace = reader.shown_string("namespace")?;
        let name = reader.shown_string("relation name")?;
        let replica_identity = reader.u8("replica identity")?;
        let count = reader.count16("column count")?;
        // No capacity from an unchecked count: a lying one must not allocate.
        let mut columns = Vec::new();
        for _ in 0..count {
            columns.push(RelationColumn {
                flags: reader.u8("column flags")?,
                name: reader.shown_string("column name")?,
                type_oid: reader.u32("column type")?,
                type_modifier: reader.i32("column type modifier")?,
            });
        }
        reader.finish("last column")?;
        Ok(Self {
            id,
            namespace,
            name,
            replica_identity,
            columns,
        })
    }

    /// The position of the column called `name`.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }
}

impl fmt::Display for Relation {
    /// `schema.table`, for people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let namespace = match self.namespace.as_str() {
            "" => "pg_catalog",
            other => other,
        };
        write!(f, "{namespace}.{}", self.name)
    }
}

/// The newest [`Relation`] of each table seen since the stream began.
///
/// Its size is bounded by the tables in the publication. It must be dropped with the stream: a new stream sends every
/// relation again.
#[derive(Debug, Default)]
pub struct RelationCache {
    relations: HashMap<u32, Relation>,
    /// Domains by their OID, with the OID of the built-in type below them.
    base_types: HashMap<u32, u32>,
}

impl RelationCache {
    /// An empty cache, for a new stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes note of a `Type` message, which comes ahead of the relation that uses the type.
    ///
    /// For a domain Postgres sends the domain's OID with its base type's name. All types but those in [`types`] are
    /// passed over: their values are read as text.
    pub fn note_type(&mut self, id: u32, namespace: &str, name: &str) {
        let built_in = namespace.is_empty() || namespace == "pg_catalog";
        // As `types::read_as`, from a name.
        match types::oid_of(name).filter(|_| built_in) {
            Some(base) => self.base_types.insert(id, base),
            None => self.base_types.remove(&id),
        };
    }

    /// Stores `relation` in place of what was known of the table; true when that changes anything.
    pub fn insert(&mut self, mut relation: Relation) -> bool {
        for column in &mut relation.columns {
            if let Some(&base) = self.base_types.get(&column.type_oid) {
                column.type_oid = base;
            }
        }
        if self.relations.get(&relation.id) == Some(&relation) {
            return false;
        }
        self.relations.insert(relation.id, relation);
        true
    }

    /// The table with the OID `id`, as it was last described.
    pub fn get(&self, id: u32) -> Option<&Relation> {
        self.relations.get(&id)
    }
}
