//! The forms a value can take: durations, sizes, names, addresses, secrets. Pure functions from text.
//!
//! Each parser returns the reason in words and never repeats the value: the caller knows whether it may be shown.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Error, Result};

/// Units of time in nanoseconds, the longest first.
const TIME_UNITS: [(&str, u64); 6] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
];

/// Units of size in bytes; those that [`show_size`] uses first, the largest first.
const SIZE_UNITS: [(&str, u64); 8] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("", 1),
];

/// Splits `64MiB` into 64 and `MiB`.
fn number_and_unit(text: &str) -> Result<(u64, &str), String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err("it does not begin with a whole number".to_owned());
    }
    let number = number.parse().map_err(|_| "it is too large".to_owned())?;
    Ok((number, unit))
}

/// Multiplies by the unit's factor.
fn scaled(text: &str, units: &[(&str, u64)]) -> Result<u64, String> {
    let (number, unit) = number_and_unit(text)?;
    let Some((_, factor)) = units.iter().find(|(name, _)| *name == unit) else {
        return Err(if unit.is_empty() {
            "the unit is missing".to_owned()
        } else {
            "the unit is not known".to_owned()
        });
    };
    number
        .checked_mul(*factor)
        .ok_or_else(|| "it is too large".to_owned())
}

/// Reads `250ms`, `10s`, `7d`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    scaled(text, &TIME_UNITS).map(Duration::from_nanos)
}

/// Reads `64MiB`, `128KiB`, `1000`: bytes.
pub(super) fn size(text: &str) -> Result<u64, String> {
    scaled(text, &SIZE_UNITS)
}

/// Reads a whole number.
pub(super) fn count(text: &str) -> Result<u64, String> {
    match number_and_unit(text)? {
        (number, "") => Ok(number),
        _ => Err("it is not a whole number".to_owned()),
    }
}

/// The shortest exact form, in the largest unit that fits.
fn show(number: u64, units: &[(&str, u64)], smallest: &str) -> String {
    units
        .iter()
        .find(|(_, factor)| number != 0 && number.is_multiple_of(*factor))
        .map_or_else(
            || format!("{number}{smallest}"),
            |(name, factor)| format!("{}{name}", number / factor),
        )
}

/// The text that [`duration`] reads back.
pub(super) fn show_duration(value: Duration) -> String {
    match u64::try_from(value.as_nanos()) {
        Ok(0) | Err(_) => format!("{}s", value.as_secs()),
        Ok(nanos) => show(nanos, &TIME_UNITS, "ns"),
    }
}

/// The text that [`size`] reads back.
pub(super) fn show_size(bytes: u64) -> String {
    show(bytes, &SIZE_UNITS, "B")
}

/// A name that Postgres keeps whole: 1 to 63 bytes (`NAMEDATALEN` - 1), printable.
pub(super) fn identifier(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 63 {
        return Err(format!("it has {} bytes", text.len()));
    }
    if text.chars().any(char::is_control) {
        return Err("it has a control character".to_owned());
    }
    Ok(text.to_owned())
}

/// A replication slot's name (`ReplicationSlotValidateName` in Postgres' `slot.c`).
pub(super) fn slot_name(text: &str) -> Result<String, String> {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
    if let Some(wrong) = text.chars().find(|c| !c.is_ascii() || !allowed(*c as u8)) {
        return Err(format!("it has the character {wrong:?}"));
    }
    identifier(text)
}

/// A base for producer names.
///
/// Our own limit: the name is logged, stored with every deduplication snapshot and shown by admin tools. The broker
/// takes names that begin with its `replicatorPrefix` for geo-replication, so those are refused.
pub(super) fn producer_name(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if text.is_empty() || text.len() > 128 {
        return Err(format!("it has {} bytes", text.len()));
    }
    if let Some(wrong) = text.chars().find(|c| !allowed(*c)) {
        return Err(format!("it has the character {wrong:?}"));
    }
    if text.starts_with("pulsar.repl") {
        return Err("the broker keeps names that begin with pulsar.repl to itself".to_owned());
    }
    Ok(text.to_owned())
}

/// Splits at commas that stand outside double quotes, so that `a."b,c"` stays whole.
pub(super) fn split_list(text: &str) -> Vec<&str> {
    let mut quoted = false;
    text.split(move |c| {
        if c == '"' {
            quoted = !quoted;
        }
        c == ',' && !quoted
    })
    .map(str::trim)
    .collect()
}

/// Where the Pulsar brokers are: a parsed `pulsar://host:port[,host:port]` or `pulsar+ssl://…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PulsarUrl {
    /// True for `pulsar+ssl`.
    pub tls: bool,
    /// Host (an IPv6 address without its brackets) and port, in the order given; never empty.
    pub hosts: Vec<(String, u16)>,
}

/// Pulsar's port where a host names none (`brokerServicePort`).
const PULSAR_PORT: u16 = 6650;
/// The same with TLS (`brokerServicePortTls`).
const PULSAR_TLS_PORT: u16 = 6651;

impl PulsarUrl {
    /// Reads the URL; an error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (tls, rest, port) = if let Some(rest) = text.strip_prefix("pulsar+ssl://") {
            (true, rest, PULSAR_TLS_PORT)
        } else if let Some(rest) = text.strip_prefix("pulsar://") {
            (false, rest, PULSAR_PORT)
        } else {
            return Err("it does not begin with pulsar:// or pulsar+ssl://".to_owned());
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let hosts = rest
            .split(',')
            .map(|part| host_and_port(part, port))
            .collect::<Result<_, _>>()?;
        Ok(Self { tls, hosts })
    }
}

impl fmt::Display for PulsarUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls {
            "pulsar+ssl://"
        } else {
            "pulsar://"
        })?;
        for (index, (host, port)) in self.hosts.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if host.contains(':') {
                write!(f, "{comma}[{host}]:{port}")?;
            } else {
                write!(f, "{comma}{host}:{port}")?;
            }
        }
        Ok(())
    }
}

fn host_and_port(text: &str, default_port: u16) -> Result<(String, u16), String> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, after) = rest
            .split_once(']')
            .ok_or_else(|| "a '[' is not closed".to_owned())?;
        if host.parse::<std::net::Ipv6Addr>().is_err() {
            return Err("what stands in brackets is no IPv6 address".to_owned());
        }
        match after.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if after.is_empty() => (host, None),
            None => return Err("something other than :port follows a ']'".to_owned()),
        }
    } else {
        let (host, port) = text
            .split_once(':')
            .map_or((text, None), |(host, port)| (host, Some(port)));
        let allowed = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_');
        if host.is_empty() {
            return Err("a host is missing".to_owned());
        }
        if !host.chars().all(allowed) {
            return Err("a host has a character that no host name has".to_owned());
        }
        (host, port)
    };
    let port = match port {
        None => default_port,
        Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => match digits.parse() {
            Ok(0) | Err(_) => return Err("a port is not from 1 to 65535".to_owned()),
            Ok(port) => port,
        },
        Some(_) => return Err("a port is not a number".to_owned()),
    };
    Ok((host.to_owned(), port))
}

/// Where to serve HTTP: an IP address and a port (0: any that is free), or nowhere.
pub(super) fn http_addr(text: &str) -> Result<Option<SocketAddr>, String> {
    match text {
        "" | "none" => Ok(None),
        _ => text
            .parse()
            .map(Some)
            .map_err(|_| "it is no IP address with a port".to_owned()),
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// Reads `text` or `json`.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("it is neither".to_owned()),
        }
    }
}

/// Where rows come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The replication slot.
    Stream,
    /// The table, looked at again and again.
    Poll,
}

impl Mode {
    /// Reads `stream` or `poll`.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "stream" => Ok(Self::Stream),
            "poll" => Ok(Self::Poll),
            _ => Err("it is neither".to_owned()),
        }
    }
}

/// What a lost slot leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotLost {
    /// A new one, and the rows in between are published from the table; an error where a table cannot be read for that.
    Recover,
    /// A new one, also where rows in between cannot be read from their table.
    Restart,
    /// An error.
    Fail,
}

impl SlotLost {
    /// Reads `recover`, `restart` or `fail`.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "recover" => Ok(Self::Recover),
            "restart" => Ok(Self::Restart),
            "fail" => Ok(Self::Fail),
            _ => Err("it is none of them".to_owned()),
        }
    }
}

/// What becomes of a row once it is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterPublish {
    /// It stays as it is.
    Keep,
    /// Its `sent_at` is set.
    Mark,
    /// It is deleted.
    Delete,
}

impl AfterPublish {
    /// Reads `keep`, `mark` or `delete`.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "keep" => Ok(Self::Keep),
            "mark" => Ok(Self::Mark),
            "delete" => Ok(Self::Delete),
            _ => Err("it is none of them".to_owned()),
        }
    }

    /// Its name as a setting.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Mark => "mark",
            Self::Delete => "delete",
        }
    }
}

/// Reads how long delivered rows are kept: `none` is for ever.
pub(super) fn retention(text: &str) -> Result<Option<Duration>, String> {
    if text == "none" {
        return Ok(None);
    }
    match duration(text)? {
        Duration::ZERO => Err("it is nothing".to_owned()),
        retention => Ok(Some(retention)),
    }
}

/// A text that is never printed: `Debug` shows `***`, and there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The secret itself, to be put on the wire and nowhere else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A token as it is used in a header or a handshake.
pub(super) fn token(text: &str) -> Result<Secret, String> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("it is empty, or has blanks or characters that are not ASCII".to_owned());
    }
    Ok(Secret::new(text))
}

/// A password or a client's secret.
pub(super) fn password(text: &str) -> Result<Secret, String> {
    words(text).map(Secret::new)
}

/// A text of one line.
pub(super) fn words(text: &str) -> Result<String, String> {
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err("it is empty, or has control characters".to_owned());
    }
    Ok(text.to_owned())
}

/// A user of basic authentication; the first colon ends it (RFC 7617).
pub(super) fn user(text: &str) -> Result<String, String> {
    if text.contains(':') {
        return Err("it has a colon".to_owned());
    }
    words(text)
}

/// Where a secret comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// Given outright.
    Value(Secret),
    /// In a file that may be replaced while walpost runs.
    File(PathBuf),
}

impl SecretSource {
    /// The token as it is now: a file is read again, so a rotated one is picked up.
    ///
    /// # Errors
    /// Temporary: whoever rotates the file may be in the middle of it.
    pub fn token(&self) -> Result<Secret> {
        self.read("token", token)
    }

    /// The same for a password or a client's secret.
    ///
    /// # Errors
    /// Temporary, as for [`token`](Self::token).
    pub fn password(&self) -> Result<Secret> {
        self.read("password", password)
    }

    fn read(&self, what: &str, check: fn(&str) -> Result<Secret, String>) -> Result<Secret> {
        match self {
            Self::Value(secret) => Ok(secret.clone()),
            Self::File(path) => secret_file(path)
                .and_then(|text| check(&text))
                .map_err(|why| {
                    Error::temporary(format!("the {what} file {}: {why}", path.display()))
                }),
        }
    }
}

/// A secret's file without the line end that editors and `echo` leave behind.
pub(super) fn secret_file(path: &Path) -> Result<String, String> {
    let text =
        std::fs::read_to_string(path).map_err(|error| format!("it cannot be read: {error}"))?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

#[cfg(test)]
#[path = "values_tests.rs"]
mod tests;
