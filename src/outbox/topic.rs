//! `TopicTemplate`: which topic a row's event goes to.
//!
//! A template is a topic name with columns in braces: `persistent://public/default/outbox.{aggregatetype}`. Its shape is
//! checked once, when it is parsed; the values are checked for each row. A value that cannot stand in a topic name is an
//! error and never becomes a different topic: `/` would choose another namespace, `-partition-3` at the end one partition
//! of another topic.
//!
//! A piece of a topic name (tenant, namespace, local name) consists of `A-Z a-z 0-9 _ - = : .`, as Pulsar's `NamedEntity`
//! demands of tenants and namespaces. Pulsar lets a local name hold more; tools that put it into a URL or a path do not.

use super::columns::Columns;
use super::error::Problem;

const DOMAINS: [&str; 2] = ["persistent://", "non-persistent://"];
const DEFAULT_NAMESPACE: &str = "persistent://public/default/";
const ALLOWED: &str = "allowed are persistent://tenant/namespace/name, non-persistent://tenant/namespace/name, or a name \
    alone, which means persistent://public/default/name; every piece of A-Z a-z 0-9 _ - = : . and columns in braces, as \
    in persistent://public/default/outbox.{aggregatetype}";

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
    Placeholder(String),
}

impl std::fmt::Display for TopicTemplate {
    /// The template in its full form.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for part in &self.parts {
            match part {
                Part::Literal(text) => f.write_str(text)?,
                Part::Placeholder(name) => write!(f, "{{{name}}}")?,
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
                Part::Placeholder(_) => "x",
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
            Part::Placeholder(name) => Some(name.as_str()),
        })
    }

    /// Domain, and `tenant/namespace`, of every topic that the template gives.
    ///
    /// # Errors
    /// The placeholders in tenant and namespace, when it depends on the row.
    pub fn namespace(&self) -> Result<(&str, String), Vec<&str>> {
        let (mut slashes, mut namespace, mut unknown) = (0, String::new(), Vec::new());
        for part in &self.parts {
            match part {
                // "persistent:", "", tenant, namespace, name
                Part::Placeholder(name) if slashes < 4 => unknown.push(name.as_str()),
                Part::Placeholder(_) => {}
                Part::Literal(text) => {
                    for character in text.chars() {
                        slashes += usize::from(character == '/');
                        if slashes < 4 {
                            namespace.push(character);
                        }
                    }
                }
            }
        }
        if !unknown.is_empty() {
            return Err(unknown);
        }
        // The template was parsed, so it begins with one of them.
        let domain = DOMAINS
            .into_iter()
            .find(|domain| namespace.starts_with(domain));
        let domain = domain.unwrap_or_default();
        Ok((
            domain.trim_end_matches("://"),
            namespace.split_off(domain.len()),
        ))
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
                Part::Placeholder(_) => {
                    let start = out.len();
                    append_value(count, out).map_err(|problem| (count, problem))?;
                    let value = out.get(start..).unwrap_or_default();
                    check_characters(value).map_err(|problem| (count, problem))?;
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
        if count > 0 && !self.names_partition && names_partition(out) {
            return Err((count - 1, Problem::TopicPartition));
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
        parts.push(Part::Placeholder(name.to_owned()));
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
            2 => out.push_str(DOMAINS[0]),
            _ => return Err(Problem::TopicShape),
        }
    }
    out.push_str(name);
    Ok(())
}

/// Checks the shape and the characters of a full name.
fn check_name(name: &str) -> Result<(), Problem> {
    let path = DOMAINS
        .iter()
        .find_map(|domain| name.strip_prefix(domain))
        .ok_or(Problem::TopicShape)?;
    let mut pieces = 0;
    for piece in path.split('/') {
        match check_characters(piece) {
            Err(Problem::TopicEmpty) => return Err(Problem::TopicShape),
            other => other?,
        }
        if is_dots(piece) {
            return Err(Problem::TopicDots);
        }
        pieces += 1;
    }
    if pieces == 3 {
        Ok(())
    } else {
        Err(Problem::TopicShape)
    }
}

fn check_characters(piece: &str) -> Result<(), Problem> {
    if piece.is_empty() {
        return Err(Problem::TopicEmpty);
    }
    let allowed =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'=' | b':' | b'.' | b'_');
    match piece.bytes().position(|byte| !allowed(byte)) {
        None => Ok(()),
        // All bytes before are ASCII, so a character starts here.
        Some(offset) => Err(Problem::TopicCharacter {
            character: piece[offset..].chars().next().unwrap_or_default(),
            offset,
        }),
    }
}

/// Names that a file system or a URL takes for a folder: no metadata store keeps them.
fn is_dots(piece: &str) -> bool {
    piece == "." || piece == ".."
}

/// Whether Pulsar takes the name for one partition of a partitioned topic.
fn names_partition(name: &str) -> bool {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    stem.len() < name.len() && stem.ends_with("-partition-")
}

#[cfg(test)]
#[path = "topic_tests.rs"]
mod tests;
