//! The schema that producers are opened with, so that typed consumers, Pulsar SQL and IO sinks can read the topics.
//!
//! walpost does not look at payloads: what the schema says about them is the application's promise. The broker checks the
//! schema against those it knows of the topic when a producer is opened, and gives it a version; each batch carries that
//! version. Source: `Schema` and `CommandProducer.schema` in `PulsarApi.proto`.

use std::path::Path;

use pulsar::message::proto::Schema;
use pulsar::message::proto::schema::Type;

use super::verdict::{self, OfTopic};
use crate::aside::read_aside;
use crate::{Error, Result};

/// `WALPOST_SCHEMA` and `WALPOST_SCHEMA_FILE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaConfig {
    /// What the payloads are.
    pub kind: SchemaKind,
    /// Where a topic's definition is: a path in which `{topic}`, `{namespace}` and `{tenant}` stand for parts of the topic's
    /// name. Empty for [`SchemaKind::String`], which has none.
    pub file: String,
}

/// What the payloads of a topic are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SchemaKind {
    /// UTF-8 text.
    String,
    /// JSON, described by an Avro record definition.
    Json,
    /// Avro's binary encoding, described by an Avro definition.
    Avro,
    /// Protocol Buffers, described by an Avro definition as the Java client derives it from the message class.
    Protobuf,
}

impl SchemaKind {
    /// Reads a name; `none` is `None`.
    pub fn parse(text: &str) -> Result<Option<Self>, String> {
        match text {
            "none" => Ok(None),
            "string" => Ok(Some(Self::String)),
            "json" => Ok(Some(Self::Json)),
            "avro" => Ok(Some(Self::Avro)),
            "protobuf" => Ok(Some(Self::Protobuf)),
            _ => Err("it is none of them".to_owned()),
        }
    }

    /// Whether it needs a definition.
    pub fn needs_file(self) -> bool {
        self != Self::String
    }
}

/// Checks the braces of a `WALPOST_SCHEMA_FILE`.
pub fn check_file_template(text: &str) -> Result<String, String> {
    let filled = ["{topic}", "{namespace}", "{tenant}"]
        .iter()
        .fold(text.to_owned(), |text, name| text.replace(name, "x"));
    if filled.contains(['{', '}']) {
        return Err("only {topic}, {namespace} and {tenant} are allowed in braces".to_owned());
    }
    Ok(text.to_owned())
}

impl SchemaConfig {
    /// [`of_topic`](Self::of_topic) on another thread.
    ///
    /// # Errors
    /// As there, also when there is no end of the file.
    pub(super) async fn read_for(&self, topic: &str) -> Result<Schema> {
        if !self.kind.needs_file() {
            return self.of_topic(topic);
        }
        let (config, name) = (self.clone(), topic.to_owned());
        let file = self.file_of(topic);
        let read = read_aside("the schema file", file, move || config.of_topic(&name)).await;
        read.map_err(|error| {
            if matches!(verdict::fault(&error), verdict::Fault::Broker) {
                of_topic(format!("the schema file of {topic} cannot be read"), &error)
            } else {
                error
            }
        })
    }

    /// Where the topic's definition is.
    fn file_of(&self, topic: &str) -> String {
        let (tenant, namespace, name) = parts(topic);
        // Values of a topic's name cannot hold a '/', so they cannot lead out of the folder that the template names.
        self.file
            .replace("{tenant}", tenant)
            .replace("{namespace}", namespace)
            .replace("{topic}", name)
    }

    /// The schema for a topic, its definition read afresh.
    ///
    /// # Errors
    /// Temporary, since the file can be put right while walpost runs: it cannot be read, or holds no JSON.
    pub(super) fn of_topic(&self, topic: &str) -> Result<Schema> {
        let (_, _, name) = parts(topic);
        let definition = if self.kind.needs_file() {
            definition(Path::new(&self.file_of(topic))).map_err(|error| {
                error.hint(format!(
                    "put the schema of topic {topic} there, or change WALPOST_SCHEMA_FILE"
                ))
            })?
        } else {
            Vec::new()
        };
        Ok(Schema {
            name: name.to_owned(),
            schema_data: definition,
            r#type: match self.kind {
                SchemaKind::String => Type::String,
                SchemaKind::Json => Type::Json,
                SchemaKind::Avro => Type::Avro,
                SchemaKind::Protobuf => Type::Protobuf,
            } as i32,
            properties: Vec::new(),
        })
    }
}

fn definition(path: &Path) -> Result<Vec<u8>> {
    let what = || format!("the schema file {}", path.display());
    let text = std::fs::read(path)
        .map_err(|error| of_topic(format!("{} cannot be read", what()), &error))?;
    // The broker would refuse it too, in words that do not name the file.
    serde_json::from_slice::<serde::de::IgnoredAny>(&text)
        .map_err(|error| of_topic(format!("{} holds no JSON", what()), &error))?;
    Ok(text)
}

fn of_topic(what: String, why: &dyn std::error::Error) -> Error {
    Error::temporary(what).caused_by(OfTopic::surely(why.to_string()))
}

/// Tenant, namespace and local name of `persistent://tenant/namespace/name[-partition-N]`.
fn parts(topic: &str) -> (&str, &str, &str) {
    let path = topic.split_once("://").map_or(topic, |(_, path)| path);
    let mut parts = path.splitn(3, '/');
    let (tenant, namespace) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
    let name = parts.next().unwrap_or("");
    let base = name
        .rsplit_once("-partition-")
        .filter(|(_, number)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()));
    (tenant, namespace, base.map_or(name, |(base, _)| base))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_definition_without_an_end_is_the_topics_trouble() {
        let pipe = crate::aside::tests::Pipe::make("schema");
        let config = SchemaConfig {
            kind: SchemaKind::Avro,
            file: pipe.path.to_string_lossy().into_owned(),
        };
        let error = config.read_for("persistent://t/n/orders").await;
        let error = error.unwrap_err();
        let said = error.report();
        assert!(said.contains("there is no end of it"), "{said}");
        assert!(matches!(verdict::fault(&error), verdict::Fault::Topic));
    }

    #[test]
    fn the_parts_of_a_topic_name() {
        assert_eq!(
            parts("persistent://t/n/outbox.order"),
            ("t", "n", "outbox.order")
        );
        assert_eq!(parts("persistent://t/n/o-partition-12"), ("t", "n", "o"));
        assert_eq!(
            parts("persistent://t/n/o-partition-x"),
            ("t", "n", "o-partition-x")
        );
    }

    #[test]
    fn a_file_template_names_parts_of_the_topic_only() {
        assert!(check_file_template("schemas/{tenant}/{namespace}/{topic}.avsc").is_ok());
        assert!(check_file_template("schemas/one.avsc").is_ok());
        for wrong in ["{aggregatetype}", "{topic", "topic}", "{}"] {
            assert!(check_file_template(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_missing_or_broken_definition_names_the_file() {
        let config = SchemaConfig {
            kind: SchemaKind::Avro,
            file: "no/such/{topic}.avsc".to_owned(),
        };
        let error = config
            .of_topic("persistent://t/n/orders-partition-3")
            .unwrap_err();
        assert!(error.is_temporary());
        assert!(
            error.report().contains("no/such/orders.avsc"),
            "{}",
            error.report()
        );
        let config = SchemaConfig {
            kind: SchemaKind::Json,
            file: "Cargo.toml".to_owned(),
        };
        let error = config.of_topic("persistent://t/n/orders").unwrap_err();
        assert!(
            error.report().contains("holds no JSON"),
            "{}",
            error.report()
        );
        let config = SchemaConfig {
            kind: SchemaKind::String,
            file: String::new(),
        };
        assert!(
            config
                .of_topic("persistent://t/n/orders")
                .unwrap()
                .schema_data
                .is_empty()
        );
    }
}
