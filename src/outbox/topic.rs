//! `TopicTemplate`: which topic a row's event goes to.
//!
//! A template is a topic name with columns in braces: `persistent://public/default/outbox.{aggregatetype}`. Its shape is
//! checked once, when it is parsed; the values are checked for each row. A value that cannot stand in a topic name is an
//! error and never becomes a different topic.
//!
//! Tenant and namespace consist of `A-Z a-z 0-9 _ - = : .` (Pulsar's `NamedEntity`). The local name is kept byte for byte, as
//! Pulsar's `TopicName` keeps it. Refused is what is not one topic to all of Pulsar's clients and interfaces:
//!
//! | refused | because |
//! |---|---|
//! | `/` | it separates tenant, namespace and name |
//! | NUL | the admin interface answers 400 to it |
//! | the name `.` or `..` | a URL's path loses it, so the admin interface answers for the namespace or the tenant |
//! | a blank or control character (up to U+0020) at the end | the Java client cuts it off, and reaches the topic without it |
//! | `-partition-<digits>` at the end | one partition of another topic. Of leading zeros the clients differ: to C++ and Go they are a partition. Digits are those of any script, as in Java's `Integer.parseInt` |
//! | `non-persistent://` | the broker drops messages under load, and its receipts say nothing |

use super::columns::Columns;
use super::error::Problem;

const DOMAIN: &str = "persistent://";
const OTHER_DOMAIN: &str = "non-persistent://";
const DEFAULT_NAMESPACE: &str = "persistent://public/default/";
const ALLOWED: &str = "allowed are persistent://tenant/namespace/name, tenant/namespace/name, or a name alone, which means \
    persistent://public/default/name; tenant and namespace of A-Z a-z 0-9 _ - = : . and the name of all but '/', with \
    columns in braces, as in persistent://public/default/outbox.{aggregatetype}";

/// The zeros of all scripts but ASCII whose digits `Integer.parseInt` reads; nine more digits follow each.
const ZEROS: [u32; 36] = [
    0x0660, 0x06f0, 0x07c0, 0x0966, 0x09e6, 0x0a66, 0x0ae6, 0x0b66, 0x0be6, 0x0c66, 0x0ce6, 0x0d66,
    0x0de6, 0x0e50, 0x0ed0, 0x0f20, 0x1040, 0x1090, 0x17e0, 0x1810, 0x1946, 0x19d0, 0x1a80, 0x1a90,
    0x1b50, 0x1bb0, 0x1c40, 0x1c50, 0xa620, 0xa8d0, 0xa900, 0xa9d0, 0xa9f0, 0xaa50, 0xabf0, 0xff10,
];

/// A parsed `WALPOST_TOPIC`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicTemplate {
    parts: Vec<Part>,
    /// Whether the template itself ends in `-partition-<digits>`: then its user means that partition.
    names_partition: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(String),
    Placeholder {
        name: String,
        /// In tenant or namespace, where fewer characters are allowed.
        in_namespace: bool,
    },
}

impl std::fmt::Display for TopicTemplate {
    /// The template in its full form.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for part in &self.parts {
            match part {
                Part::Literal(text) => f.write_str(text)?,
                Part::Placeholder { name, .. } => write!(f, "{{{name}}}")?,
            }
        }
        Ok(())
    }
}

impl TopicTemplate {
    /// Reads a template; the error says what is wrong and what is allowed.
    pub fn parse(template: &str) -> Result<Self, String> {
        let complain = |what: String| format!("{what}; {ALLOWED}");
        let mut parts = split(template).map_err(complain)?;
        // Any value that a row may have keeps the shape, so one stands for all.
        let sample: String = parts
            .iter()
            .map(|part| match part {
                Part::Literal(text) => text,
                Part::Placeholder { .. } => "x",
            })
            .collect();
        let mut full = String::new();
        expand(&sample, &mut full)
            .and_then(|()| check_name(&full))
            .map_err(|problem| complain(format!("the topic template {template:?} {problem}")))?;
        let prefix = &full[..full.len() - sample.len()];
        if !prefix.is_empty() {
            parts.insert(0, Part::Literal(prefix.to_owned()));
        }
        let mut slashes = 0;
        for part in &mut parts {
            match part {
                Part::Literal(text) => slashes += text.matches('/').count(),
                // "persistent:", "", tenant, namespace, name
                Part::Placeholder { in_namespace, .. } => *in_namespace = slashes < 4,
            }
        }
        let names_partition =
            matches!(parts.last(), Some(Part::Literal(text)) if names_partition(text));
        Ok(Self {
            parts,
            names_partition,
        })
    }

    /// What stands in braces, in order; [`Columns::resolve`] says which columns that means.
    pub fn placeholders(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Literal(_) => None,
            Part::Placeholder { name, .. } => Some(name.as_str()),
        })
    }

    /// `tenant/namespace` of every topic that the template gives.
    ///
    /// # Errors
    /// The placeholders in tenant and namespace, when it depends on the row.
    pub fn namespace(&self) -> Result<String, Vec<&str>> {
        let unknown: Vec<&str> = self
            .parts
            .iter()
            .filter_map(|part| match part {
                Part::Placeholder {
                    name,
                    in_namespace: true,
                } => Some(name.as_str()),
                _ => None,
            })
            .collect();
        if !unknown.is_empty() {
            return Err(unknown);
        }
        // All of it stands in literals, and what comes behind cannot matter.
        let name = self.to_string();
        let path = name.strip_prefix(DOMAIN).unwrap_or(&name);
        let pieces: Vec<&str> = path.splitn(3, '/').take(2).collect();
        Ok(pieces.join("/"))
    }

    /// The table's columns that the template needs, in order, repeated where the template repeats them.
    pub fn columns_used<'a>(&'a self, columns: &'a Columns) -> impl Iterator<Item = &'a str> {
        self.placeholders().map(|name| columns.resolve(name))
    }

    /// Writes a row's topic into `out`, in place of what was there.
    ///
    /// `append_value(n, out)` appends the text for the `n`-th placeholder (from 0).
    ///
    /// # Errors
    /// The number of the placeholder at fault, and what is wrong with its value. `out` is then empty.
    pub fn render_into(
        &self,
        out: &mut String,
        append_value: impl FnMut(usize, &mut String) -> Result<(), Problem>,
    ) -> Result<(), (usize, Problem)> {
        out.clear();
        let result = self.append_parts(out, append_value);
        if result.is_err() {
            out.clear();
        }
        result
    }

    fn append_parts(
        &self,
        out: &mut String,
        mut append_value: impl FnMut(usize, &mut String) -> Result<(), Problem>,
    ) -> Result<(), (usize, Problem)> {
        let mut count = 0;
        // A value of dots alone may make a piece "." or ".." together with the template's own dots.
        let mut dots = None;
        for part in &self.parts {
            match part {
                Part::Literal(text) => out.push_str(text),
                Part::Placeholder { in_namespace, .. } => {
                    let start = out.len();
                    append_value(count, out).map_err(|problem| (count, problem))?;
                    let value = out.get(start..).unwrap_or_default();
                    check_characters(value, *in_namespace).map_err(|problem| (count, problem))?;
                    if value.bytes().all(|byte| byte == b'.') {
                        dots = Some(count);
                    }
                    count += 1;
                }
            }
        }
        if let Some(at) = dots
            && out.split('/').any(is_dots)
        {
            return Err((at, Problem::TopicDots));
        }
        let Some(last) = count.checked_sub(1) else {
            return Ok(());
        };
        if !self.names_partition && names_partition(out) {
            return Err((last, Problem::TopicPartition));
        }
        if ends_blank(out) {
            return Err((last, Problem::TopicBlankEnd));
        }
        Ok(())
    }
}

/// Writes the full name of a row's own topic into `out`, in place of what was there.
///
/// # Errors
/// When `topic` is neither a full nor a short topic name. `out` is then empty.
pub fn own_topic_into(topic: &str, out: &mut String) -> Result<(), Problem> {
    out.clear();
    let result = expand(topic, out)
        .and_then(|()| check_name(out))
        .and_then(|()| {
            if names_partition(out) {
                Err(Problem::TopicPartition)
            } else {
                Ok(())
            }
        });
    if result.is_err() {
        out.clear();
    }
    result
}

/// Cuts a template into literals and placeholders.
fn split(template: &str) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        let (literal, tail) = rest.split_at(at);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal.to_owned()));
        }
        let Some((name, tail)) = tail
            .strip_prefix('{')
            .and_then(|tail| tail.split_once('}'))
            .filter(|(name, _)| !name.is_empty() && !name.contains('{'))
        else {
            return Err(format!(
                "the topic template {template:?} has a brace without its counterpart, or none between two, at byte {}",
                template.len() - rest.len() + at
            ));
        };
        parts.push(Part::Placeholder {
            name: name.to_owned(),
            in_namespace: false,
        });
        rest = tail;
    }
    if !rest.is_empty() {
        parts.push(Part::Literal(rest.to_owned()));
    }
    Ok(parts)
}

/// Appends the full form of `name`: as Pulsar does, `name` and `tenant/namespace/name` are completed in front.
fn expand(name: &str, out: &mut String) -> Result<(), Problem> {
    if name.is_empty() {
        return Err(Problem::TopicEmpty);
    }
    if !name.contains("://") {
        match name.bytes().filter(|byte| *byte == b'/').count() {
            0 => out.push_str(DEFAULT_NAMESPACE),
            2 => out.push_str(DOMAIN),
            _ => return Err(Problem::TopicShape),
        }
    }
    out.push_str(name);
    Ok(())
}

/// Checks the shape and the characters of a full name.
fn check_name(name: &str) -> Result<(), Problem> {
    if name.starts_with(OTHER_DOMAIN) {
        return Err(Problem::TopicNotPersistent);
    }
    let path = name.strip_prefix(DOMAIN).ok_or(Problem::TopicShape)?;
    let mut pieces = 0;
    for piece in path.split('/') {
        match check_characters(piece, pieces < 2) {
            Err(Problem::TopicEmpty) => return Err(Problem::TopicShape),
            other => other?,
        }
        if is_dots(piece) {
            return Err(Problem::TopicDots);
        }
        pieces += 1;
    }
    if pieces != 3 {
        return Err(Problem::TopicShape);
    }
    if ends_blank(name) {
        return Err(Problem::TopicBlankEnd);
    }
    Ok(())
}

fn check_characters(piece: &str, in_namespace: bool) -> Result<(), Problem> {
    if piece.is_empty() {
        return Err(Problem::TopicEmpty);
    }
    let at = |(offset, character)| {
        if in_namespace && !matches!(character, '/' | '\0') {
            Problem::NamespaceCharacter { character, offset }
        } else {
            Problem::TopicCharacter { character, offset }
        }
    };
    let is_wrong = |character: char| {
        if in_namespace {
            !character.is_ascii_alphanumeric() && !"-=:._".contains(character)
        } else {
            matches!(character, '/' | '\0')
        }
    };
    let wrong = piece.char_indices().find(|(_, c)| is_wrong(*c));
    wrong.map_or(Ok(()), |found| Err(at(found)))
}

/// Names that a URL's path loses, also as the name of the topic of which this is a partition.
fn is_dots(piece: &str) -> bool {
    let name = partition_of(piece).unwrap_or(piece);
    name == "." || name == ".."
}

/// Whether the Java client would cut off the end.
fn ends_blank(name: &str) -> bool {
    name.bytes().last().is_some_and(|byte| byte <= b' ')
}

/// Whether the broker or a client takes the name for one partition of a partitioned topic.
fn names_partition(name: &str) -> bool {
    partition_of(name).is_some()
}

/// The name of the topic of which this one is a partition.
fn partition_of(name: &str) -> Option<&str> {
    let (stem, number) = name.rsplit_once("-partition-")?;
    (!number.is_empty() && number.chars().all(is_digit)).then_some(stem)
}

fn is_digit(character: char) -> bool {
    let code = u32::from(character);
    character.is_ascii_digit() || ZEROS.iter().any(|zero| (*zero..zero + 10).contains(&code))
}

#[cfg(test)]
#[path = "topic_tests.rs"]
mod tests;
