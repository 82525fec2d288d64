//! `Message` and `parse`: one payload in, one message out.
//!
//! ```text
//! 'B' Begin     Int64 final LSN, Int64 commit time, Int32 xid
//! 'C' Commit    Int8 flags (0), Int64 commit LSN, Int64 end LSN, Int64 commit time
//! 'O' Origin    Int64 commit LSN on the origin, String name
//! 'R' Relation  see `Relation`
//! 'Y' Type      Int32 OID, String namespace, String name
//! 'I' Insert    Int32 relation id, 'N' TupleData
//! 'U' Update    Int32 relation id, ['K' TupleData | 'O' TupleData], 'N' TupleData
//! 'D' Delete    Int32 relation id, 'K' TupleData | 'O' TupleData
//! 'T' Truncate  Int32 relations, Int8 options, Int32 relation id …
//! 'M' Message   Int8 flags, Int64 LSN, String prefix, Int32 length, bytes
//! ```

use std::fmt;

use super::reader::{DecodeError, Reader};
use super::relation::Relation;
use super::tuple::Tuple;
use crate::Lsn;

/// One decoded message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A transaction starts; all up to the next Commit belongs to it.
    Begin {
        /// Where its commit record starts: equals the Commit's `commit_lsn`.
        final_lsn: Lsn,
        /// Commit time, microseconds since 2000-01-01 UTC.
        commit_time_us: i64,
        /// Its transaction id, without the epoch.
        xid: u32,
    },
    /// The transaction ends.
    Commit {
        /// Unused by Postgres so far; 0.
        flags: u8,
        /// Where the commit record starts.
        commit_lsn: Lsn,
        /// Where the commit record ends: what is confirmed once the transaction is acknowledged.
        end_lsn: Lsn,
        /// Commit time, microseconds since 2000-01-01 UTC.
        commit_time_us: i64,
    },
    /// The transaction came to this server by replication.
    Origin {
        /// The commit LSN on the origin server.
        commit_lsn: Lsn,
        /// The origin's name.
        name: &'a str,
    },
    /// A table, ahead of its first row and after each change of it.
    Relation(Relation),
    /// A type that is not built in, ahead of the relation that uses it.
    Type {
        /// The type's OID; for a domain the domain's.
        id: u32,
        /// The schema, empty for `pg_catalog`; for a domain the base type's.
        namespace: &'a str,
        /// The name; for a domain the base type's.
        name: &'a str,
    },
    /// A new row.
    Insert {
        /// The table.
        relation_id: u32,
        /// Its values.
        tuple: Tuple<'a>,
    },
    /// A changed row. Checked to the last byte, but an outbox's updates mean nothing to walpost: the values are not kept.
    Update {
        /// The table.
        relation_id: u32,
    },
    /// A deleted row; like [`Message::Update`].
    Delete {
        /// The table.
        relation_id: u32,
    },
    /// Truncated tables.
    Truncate {
        /// The tables.
        relation_ids: Vec<u32>,
        /// Bit 0: CASCADE, bit 1: RESTART IDENTITY.
        options: u8,
    },
    /// Written with `pg_logical_emit_message`.
    Logical(LogicalMessage<'a>),
    /// A message type that protocol 1 does not have (as of Postgres 18): to be counted and skipped.
    Unknown(u8),
}

/// What `pg_logical_emit_message(transactional, prefix, content)` wrote.
///
/// A transactional one comes between Begin and Commit; another comes at once, between any two transactions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LogicalMessage<'a> {
    /// Whether it belongs to the transaction around it.
    pub transactional: bool,
    /// Where the message itself is in the log.
    pub lsn: Lsn,
    /// Whom it is for.
    pub prefix: &'a str,
    /// The content: any bytes.
    pub content: &'a [u8],
}

impl fmt::Debug for LogicalMessage<'_> {
    /// Shows the content's length only: it belongs to the application and must not reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogicalMessage")
            .field("transactional", &self.transactional)
            .field("lsn", &self.lsn)
            .field("prefix", &self.prefix)
            .field("content_bytes", &self.content.len())
            .finish()
    }
}

/// Decodes one payload.
///
/// # Errors
/// When the payload is empty, or is not exactly one message of the type that its first byte names.
#[inline]
pub fn parse(payload: &[u8]) -> Result<Message<'_>, DecodeError> {
    let Some((&tag, rest)) = payload.split_first() else {
        // An empty reader's first read makes the error.
        return Reader::new(payload, 0, "(any)")
            .u8("message type")
            .map(Message::Unknown);
    };
    let reader = |message| Reader::new(rest, 1, message);
    match tag {
        b'I' => insert(reader("Insert")),
        b'B' => begin(reader("Begin")),
        b'C' => commit(reader("Commit")),
        b'R' => Relation::parse(&mut reader("Relation")).map(Message::Relation),
        b'O' => origin(reader("Origin")),
        b'Y' => type_name(reader("Type")),
        b'U' => update(reader("Update")),
        b'D' => delete(reader("Delete")),
        b'T' => truncate(reader("Truncate")),
        b'M' => logical(reader("Message")),
        unknown => Ok(Message::Unknown(unknown)),
    }
}

#[inline]
fn insert(mut reader: Reader<'_>) -> Result<Message<'_>, DecodeError> {
    let relation_id = reader.u32("relation id")?;
    match reader.u8("tuple kind")? {
        b'N' => {}
        other => return Err(reader.unexpected("tuple kind", other)),
    }
    let tuple = Tuple::parse(&mut reader)?;
    reader.finish("last column")?;
    Ok(Message::Insert { relation_id, tuple })
}

fn begin(mut reader: Reader<'_>) -> Result<Message<'_>, DecodeError> {
    let message = Message::Begin {
        final_lsn: reader.lsn("final LSN")?,
        commit_time_us: reader.i64("commit time")?,
        xid: reader.u32("xid")?,
    };
    reader.finish("xid")?;
    Ok(message)
}

fn commit(mut reader: Reader<'_>) -> Result<Message<'_>, DecodeError> {
    let message = Message::Commit {
        flags: reader.u8("flags")?,
        commit_lsn: reader.lsn("commit LSN")?,
        end_lsn: reader.lsn("end LSN")?,
        commit_time_us: reader.i64("commit time")?,
    };
    reader.finish("commit time")?;
    Ok(message)
}

fn origin(mut reader: Reader<'_>) -> Result<Message<'_>, DecodeError> {
    let message = Message::Origin {
        commit_lsn: reader.lsn("commit LSN")?,
        name: reader.string("origin name")?,
    };
    reader.finish("origin name")?;
    Ok(message)
}

fn type_name(mut reader: Reader<'_>) -> Result<Message<'_>, DecodeError> {
    let message = Message::Type {
        id: reader.u32("type OID")?,
        namespace: reader.string("namespace")?,
        name: reader.string("type name")?,
    };
    reader.finish("type name")?;
    Ok(message)
}

fn update(mut reader: Reader<'_>) -> Result<Message<'_>, DecodeError> {
    let relation_id = reader.u32("relation id")?;
    let mut kind = reader.u8("tuple kind")?;
    if matches!(kind, b'K' | b'O') {
        Tuple::parse(&mut reader)?;
        kind = reader.u8("tuple kind")?;
    }
    if kind != b'N' {
        return Err(reader.unexpected("tuple kind", kind));
    }
    Tuple::parse(&mut reader)?;
    reader.finish("last column")?;
    Ok(Message::Update { relation_id })
}

fn delete(mut reader: Reader<'_>) -> Result<Message<'_>, DecodeError> {
    let relation_id = reader.u32("relation id")?;
    match reader.u8("tuple kind")? {
        b'K' | b'O' => {}
        other => return Err(reader.unexpected("tuple kind", other)),
    }
    Tuple::parse(&mut reader)?;
    reader.finish("last column")?;
    Ok(Message::Delete { relation_id })
}

fn truncate(mut reader: Reader<'_>) -> Result<Message<'_>, DecodeError> {
    let count = reader.count32("relation count")?;
    let options = reader.u8("options")?;
    // The bytes are there before the list is made: a lying count allocates nothing.
    let ids = reader.bytes("relation ids", count.saturating_mul(size_of::<u32>()))?;
    reader.finish("relation ids")?;
    let (ids, _) = ids.as_chunks::<4>();
    Ok(Message::Truncate {
        relation_ids: ids.iter().map(|id| u32::from_be_bytes(*id)).collect(),
        options,
    })
}

fn logical(mut reader: Reader<'_>) -> Result<Message<'_>, DecodeError> {
    let flags = reader.u8("flags")?;
    let lsn = reader.lsn("LSN")?;
    let prefix = reader.string("prefix")?;
    let length = reader.count32("content length")?;
    let content = reader.bytes("content", length)?;
    reader.finish("content")?;
    Ok(Message::Logical(LogicalMessage {
        transactional: flags & 1 != 0,
        lsn,
        prefix,
        content,
    }))
}
