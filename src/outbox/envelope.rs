//! `Envelopes`: events that come as logical messages (`pg_logical_emit_message`) instead of rows.
//!
//! The envelope is a JSON object; its members are those of `sql/10_emit_transient.sql`. It is written out as a row of a table
//! that does not exist, in pgoutput's own `TupleData`, and read by an ordinary [`Extractor`] made for that table: so the route,
//! the checks and the properties are those of a row, not like them. Pure, and paid for by those only who use it.
//!
//! Text is UTF-8 here whatever the database's encoding: Postgres converts rows for its client, but not a message's content.

use serde::de::{Deserializer as _, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::columns::{Columns, Role};
use super::error::{EventError, Problem};
use super::extract::Extractor;
use super::topic::TopicTemplate;
use crate::Result;
use crate::pgoutput::types::{BYTEA, JSON, TEXT, TIMESTAMPTZ};
use crate::pgoutput::{Relation, RelationColumn};

/// The prefix of the messages that are meant for walpost.
pub const PREFIX: &str = "walpost";
/// Stands for the table's OID, which no table has.
pub const ENVELOPE_OID: u32 = 0;
/// Stands for the table's name.
pub const ENVELOPE_TABLE: &str = "walpost.emit_transient";

/// Far more than an envelope has.
const MAX_MEMBERS: usize = 32;
/// Characters of an unknown member's name in an error.
const NAME_SHOWN_CHARS: usize = 40;

/// Reads envelopes for one set of column settings and one topic template.
#[derive(Debug)]
pub struct Envelopes {
    columns: Columns,
    template: TopicTemplate,
    /// Columns behind those of the roles, for what else the template names: the role whose configured column it is.
    more: Vec<(String, Option<Role>)>,
}

/// What the members say.
#[derive(Default)]
struct Members<'a> {
    texts: [Option<String>; Role::ALL.len()],
    payload: Option<Payload<'a>>,
    headers: Option<&'a str>,
}

enum Payload<'a> {
    Borrowed(&'a [u8]),
    Owned(Vec<u8>),
}

impl Envelopes {
    /// For these settings. An optional column that is turned off is so for envelopes too.
    pub fn new(columns: &Columns, template: &TopicTemplate) -> Self {
        let name = |role: Role| {
            let off = columns.name(role).is_empty();
            if off {
                String::new()
            } else {
                role.name().to_owned()
            }
        };
        let mut more: Vec<(String, Option<Role>)> = Vec::new();
        for placeholder in template.placeholders() {
            let is_role = Role::ALL.iter().any(|role| role.name() == placeholder);
            if !is_role && more.iter().all(|(name, _)| name != placeholder) {
                let role = Role::ALL
                    .into_iter()
                    .find(|role| columns.name(*role) == placeholder);
                more.push((placeholder.to_owned(), role));
            }
        }
        Self {
            columns: Columns {
                id: name(Role::Id),
                aggregatetype: name(Role::AggregateType),
                aggregateid: name(Role::AggregateId),
                event_type: name(Role::Type),
                payload: name(Role::Payload),
                topic: name(Role::Topic),
                headers: name(Role::Headers),
                deliver_at: name(Role::DeliverAt),
                created_at: name(Role::CreatedAt),
            },
            template: template.clone(),
            more,
        }
    }

    /// What reads the rows that [`Envelopes::encode`] writes.
    ///
    /// # Errors
    /// As [`Extractor::new`].
    pub fn extractor(&self) -> Result<Extractor> {
        let column = |name: &str, type_oid| RelationColumn {
            flags: 0,
            name: name.to_owned(),
            type_oid,
            type_modifier: -1,
        };
        let of_roles = Role::ALL.into_iter().map(|role| {
            let type_oid = match role {
                Role::Payload => BYTEA,
                Role::Headers => JSON,
                Role::DeliverAt | Role::CreatedAt => TIMESTAMPTZ,
                _ => TEXT,
            };
            column(role.name(), type_oid)
        });
        let more = self.more.iter().map(|(name, _)| column(name, TEXT));
        let (namespace, name) = ENVELOPE_TABLE.split_once('.').unwrap_or_default();
        let relation = Relation {
            id: ENVELOPE_OID,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            replica_identity: b'n',
            columns: of_roles.chain(more).collect(),
        };
        Extractor::new(&relation, &self.columns, &self.template)
    }

    /// Writes the envelope in `content` as a row's `TupleData` into `row`, in place of what was there.
    ///
    /// # Errors
    /// When it is no envelope; the error names the member, and no value but the id.
    pub fn encode(&self, content: &[u8], row: &mut Vec<u8>) -> Result<(), EventError> {
        row.clear();
        let mut members = Members::default();
        if let Err(what) = members.read(content) {
            let id = members.text(Role::Id).unwrap_or("(unreadable)");
            let id = id.chars().take(100).flat_map(char::escape_debug).collect();
            let problem = Problem::Envelope(what);
            return Err(EventError::new(
                ENVELOPE_TABLE.to_owned(),
                id,
                String::new(),
                problem,
            ));
        }
        let count = Role::ALL.len() + self.more.len();
        row.extend(u16::try_from(count).unwrap_or(u16::MAX).to_be_bytes());
        for role in Role::ALL {
            match role {
                Role::Payload => {
                    let payload = members.payload.as_ref().map(|payload| match payload {
                        Payload::Borrowed(bytes) => *bytes,
                        Payload::Owned(bytes) => bytes.as_slice(),
                    });
                    put(row, b'b', payload);
                }
                Role::Headers => put(row, b't', members.headers.map(str::as_bytes)),
                role => put(row, b't', members.text(role).map(str::as_bytes)),
            }
        }
        for (_, role) in &self.more {
            let text = role.and_then(|role| members.text(role));
            put(row, b't', text.map(str::as_bytes));
        }
        Ok(())
    }
}

/// Appends one column of `TupleData`.
fn put(row: &mut Vec<u8>, kind: u8, value: Option<&[u8]>) {
    match value {
        None => row.push(b'n'),
        Some(bytes) => {
            row.push(kind);
            // Postgres' own limit for a message is 1 GB.
            let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            row.extend(length.to_be_bytes());
            row.extend(bytes);
        }
    }
}

impl<'a> Members<'a> {
    fn text(&self, role: Role) -> Option<&str> {
        self.texts[role.index()].as_deref()
    }

    /// Reads all members; the error is a sentence about the envelope.
    fn read(&mut self, content: &'a [u8]) -> Result<(), String> {
        let json = std::str::from_utf8(content).map_err(|_| "is not UTF-8".to_owned())?;
        // serde_json's own messages may quote values.
        let mut deserializer = serde_json::Deserializer::from_str(json);
        let members = deserializer.deserialize_map(Object);
        let members = members.and_then(|members| deserializer.end().map(|()| members));
        let members = members.map_err(|_| "is no JSON object".to_owned())?;
        let mut seen: Vec<&str> = Vec::new();
        for (name, value) in &members {
            if seen.contains(&name.as_str()) {
                return Err(format!("has {} twice", shown(name)));
            }
            seen.push(name);
            self.member(name, value.get())?;
        }
        Ok(())
    }

    fn member(&mut self, name: &str, json: &'a str) -> Result<(), String> {
        match name {
            "payload" => return self.set_payload(Payload::Borrowed(json.as_bytes())),
            _ if json == "null" => {
                // As if it were not there; but it has to be a member that could be.
            }
            "payload_text" => {
                return self.set_payload(Payload::Owned(text(name, json)?.into_bytes()));
            }
            "payload_base64" => {
                let bytes = BASE64.decode(text(name, json)?);
                let bytes = bytes.map_err(|_| format!("has a {name} that is no base64"))?;
                return self.set_payload(Payload::Owned(bytes));
            }
            "headers" => {
                self.headers = Some(json);
                return Ok(());
            }
            _ => {}
        }
        let role = Role::ALL.into_iter().find(|role| role.name() == name);
        let role = match (role, name) {
            (Some(role), _) => role,
            (None, "payload_text" | "payload_base64") => return Ok(()),
            (None, _) => {
                return Err(format!(
                    "has a member that is none of an envelope: {}",
                    shown(name)
                ));
            }
        };
        if json != "null" {
            let mut value = text(name, json)?;
            if value.contains('\0') {
                // A row has none; and it could not be stored as a straggler.
                return Err(format!(
                    "has a {name} with \\u0000, which is no text in Postgres"
                ));
            }
            if matches!(role, Role::DeliverAt | Role::CreatedAt) {
                value = as_postgres_prints(&value);
            }
            self.texts[role.index()] = Some(value);
        }
        Ok(())
    }

    fn set_payload(&mut self, payload: Payload<'a>) -> Result<(), String> {
        if self.payload.replace(payload).is_some() {
            return Err("has more than one payload".to_owned());
        }
        Ok(())
    }
}

fn text(name: &str, json: &str) -> Result<String, String> {
    serde_json::from_str(json).map_err(|_| format!("has a {name} that is no text"))
}

fn shown(name: &str) -> String {
    let name: String = name.chars().take(NAME_SHOWN_CHARS).collect();
    format!("{name:?}")
}

/// ISO 8601 with a `T` and perhaps a `Z`, as Postgres prints it.
fn as_postgres_prints(time: &str) -> String {
    let time = match time.split_once(['T', 't']) {
        Some((date, clock)) => format!("{date} {clock}"),
        None => time.to_owned(),
    };
    match time.strip_suffix(['Z', 'z']) {
        Some(time) => format!("{time}+00"),
        None => time,
    }
}

/// An object's members in their order.
struct Object;

impl<'de> Visitor<'de> for Object {
    type Value = Vec<(String, &'de RawValue)>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if members.len() == MAX_MEMBERS {
                return Err(A::Error::custom("too many members"));
            }
            members.push((name, map.next_value()?));
        }
        Ok(members)
    }
}

#[cfg(test)]
#[path = "envelope_tests.rs"]
mod tests;
