//! OIDs of the built-in types that walpost reads by more than their text.
//!
//! Built-in types have fixed OIDs (Postgres' `src/include/catalog/pg_type.dat`). A column of a domain carries the
//! domain's own OID, but Postgres sends a `Type` message ahead of the relation that names the domain's base type, through any
//! number of domains; this is how a domain over `bytea` is recognised as `bytea`. What is read from the table follows the
//! same rule: [`read_as`].

/// `bool`: text `t` or `f`, binary one byte.
pub const BOOL: u32 = 16;
/// `bytea`: text `\x` and hexadecimal digits, binary the bytes.
pub const BYTEA: u32 = 17;
/// `name`: the same in both formats.
pub const NAME: u32 = 19;
/// `bigint`: binary a signed 64-bit number.
pub const INT8: u32 = 20;
/// `smallint`: binary a signed 16-bit number.
pub const INT2: u32 = 21;
/// `integer`: binary a signed 32-bit number.
pub const INT4: u32 = 23;
/// `text`: the same in both formats.
pub const TEXT: u32 = 25;
/// `oid`: binary an unsigned 32-bit number.
pub const OID: u32 = 26;
/// `xid`: binary an unsigned 32-bit number.
pub const XID: u32 = 28;
/// `json`: the same in both formats, and exactly what the application wrote.
pub const JSON: u32 = 114;
/// `character(n)`: the same in both formats.
pub const BPCHAR: u32 = 1042;
/// `character varying`: the same in both formats.
pub const VARCHAR: u32 = 1043;
/// `timestamp without time zone`: binary microseconds since 2000-01-01.
pub const TIMESTAMP: u32 = 1114;
/// `timestamp with time zone`: binary microseconds since 2000-01-01 UTC.
pub const TIMESTAMPTZ: u32 = 1184;
/// `uuid`: binary 16 bytes.
pub const UUID: u32 = 2950;
/// `jsonb`: binary a version byte (1) and the text.
pub const JSONB: u32 = 3802;
/// `xid8`: binary an unsigned 64-bit number.
pub const XID8: u32 = 5069;

/// The first OID that a cluster gives to objects of its users (Postgres' `FirstNormalObjectId`).
pub const FIRST_USER_OID: u32 = 16384;

/// Every type above, by the name that `pg_type` and the `Type` message have for it.
const NAMES: [(&str, u32); 17] = [
    ("bool", BOOL),
    ("bytea", BYTEA),
    ("name", NAME),
    ("int8", INT8),
    ("int2", INT2),
    ("int4", INT4),
    ("text", TEXT),
    ("oid", OID),
    ("xid", XID),
    ("json", JSON),
    ("bpchar", BPCHAR),
    ("varchar", VARCHAR),
    ("timestamp", TIMESTAMP),
    ("timestamptz", TIMESTAMPTZ),
    ("uuid", UUID),
    ("jsonb", JSONB),
    ("xid8", XID8),
];

/// The OID of the built-in type `name`, if it is one of those above.
pub fn oid_of(name: &str) -> Option<u32> {
    NAMES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, oid)| *oid)
}

/// The name of the built-in type `oid`, if it is one of those above.
pub fn name_of(oid: u32) -> Option<&'static str> {
    NAMES
        .iter()
        .find(|(_, known)| *known == oid)
        .map(|(name, _)| *name)
}

/// The type that a column of type `own` is read as: the type `base` below all its domains, if that is one of those above.
pub fn read_as(own: u32, base: u32) -> u32 {
    if name_of(base).is_some() { base } else { own }
}

/// True for types whose value is text in the database's encoding, in both formats.
pub fn is_characters(oid: u32) -> bool {
    matches!(oid, NAME | TEXT | JSON | BPCHAR | VARCHAR | JSONB)
}
