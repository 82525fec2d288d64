//! What the broker says, and what walpost does about it: the table of manners. Nothing here drops a message, and nothing
//! reorders a key: whatever has no receipt stays with its lane and is sent again from the oldest on.
//!
//! | said | what is done | shown in |
//! |---|---|---|
//! | **to a send** | | |
//! | `ChecksumError` | damaged on its way: new producer, the same frames again; under another name if there were frames behind it | `tests/manners` |
//! | `NotAllowedError` | this batch will never be taken: its events become stragglers; without a table for those: stop with exit code 69, naming its rows | `tests/manners` |
//! | `TopicTerminatedError`, `PersistenceError`, `ServiceNotReady`, quota, anything else | not known to be stored: lookup, new producer, all again in order | `tests/manners` |
//! | a receipt for a batch that is not the oldest | the two sides disagree: new connection (behind a refused batch: stored) | `tests/manners` |
//! | nothing, for `WALPOST_SEND_TIMEOUT` | new connection | `tests/manners` |
//! | **to a lookup, a question for partitions, a producer's creation** | | |
//! | `ServiceNotReady`, `ProducerBusy`, `MetadataError`, `TooManyRequests`, `TopicNotFound`, both quota errors, anything unknown | again, with backoff (a warning each time) | `tests/manners`, `tests/topic_moves.rs` |
//! | `AuthorizationError`, `AuthenticationError`, `TopicTerminatedError`, `IncompatibleSchema`, `ProducerFenced`, `InvalidTopicName`, `UnsupportedVersionError`, `NotAllowedError` | somebody must mend it: the same, as an error with what to do; the topic's events become stragglers, or wait; other topics go on | `tests/manners`, `tests/stragglers.rs` |
//! | a redirect, a proxy, TLS addresses | followed | `tests/manners` |
//! | "not ready" (`producer_ready = false`) | waits for the second answer | `tests/manners` |
//! | nothing, for 30 s after it was written, to a creation | closes the producer that may be half made, then again | `tests/manners` |
//! | nothing to a lookup or a question for partitions | the next host of the service URL, and a new connection | `tests/manners` |
//! | `CLOSE_PRODUCER`, in place of the answer to a creation | as when the producer was open | `tests/manners` |
//! | **on its own** | | |
//! | `CLOSE_PRODUCER` (unload, bundle split, load shedding) | to the broker it names, else a lookup; all again in order | `tests/manners`, `tests/topic_moves.rs` |
//! | `TOPIC_MIGRATED` | lookup at the cluster that it names | `tests/manners` |
//! | `PING`, `AUTH_CHALLENGE` | answered, the latter with credentials read afresh | `tests/manners`, `tests/security.rs` |
//! | `CONNECTED` with `max_message_size` | the limit of a message and of a batch | `tests/manners`, `tests/unpublishable.rs` |
//! | silence for two keepalive intervals, a half-open connection, bytes that are no frame, the end | new connection, with backoff | `tests/manners` |
//! | **to CONNECT** | | |
//! | `AuthenticationError`, `AuthorizationError` | at the start: exit 69; later: as a topic that must be mended (a token file may be renewed) | `tests/security.rs` |
//!
//! Sources: Pulsar's `PulsarApi.proto` (`ServerError`), and how the Java client's `ProducerImpl` and `ClientCnx` sort them.
//! That client fails a producer for good where somebody must mend something; here the topic is tried again, because a
//! connector cannot hand the failure to anybody else.

use pulsar::message::proto::ServerError;

use super::wire::NextBroker;
use crate::Error;

/// What a refused send leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SendVerdict {
    /// Open the producer again and resend everything unacknowledged, in order.
    Reopen,
    /// No resend will change the answer.
    Refused,
}

pub(super) fn of_send(code: i32) -> SendVerdict {
    match ServerError::try_from(code) {
        Ok(ServerError::NotAllowedError) => SendVerdict::Refused,
        _ => SendVerdict::Reopen,
    }
}

/// A broker's message as it stands in a log: schema errors come with both definitions, over dozens of lines, twice.
pub(super) fn one_line(message: &str) -> String {
    const LONGEST_CHARS: usize = 400;
    let words: Vec<&str> = message.split_whitespace().collect();
    let line = words.join(" ");
    match line.char_indices().nth(LONGEST_CHARS) {
        Some((end, _)) => format!("{} …", &line[..end]),
        None => line,
    }
}

/// The frame arrived with a wrong checksum; those behind it may have been stored.
pub(super) fn is_damage(code: i32) -> bool {
    ServerError::try_from(code) == Ok(ServerError::ChecksumError)
}

/// Marks the refusal of a topic that does not exist.
#[derive(Debug)]
struct Missing(OfTopic);

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Missing {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

/// True for the error of a topic that does not exist.
pub(super) fn is_missing(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(<dyn std::error::Error>::is::<Missing>)
}

/// Whose trouble a failed lookup or creation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The topic's, and somebody must mend it.
    Mend,
    /// The topic's, and it may pass.
    Topic,
    /// The broker's, or that of the way to it: every topic has it.
    Broker,
}

/// Marks a temporary refusal that concerns one topic.
#[derive(Debug)]
pub(super) struct OfTopic(pub String);

impl std::fmt::Display for OfTopic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OfTopic {}

pub(super) fn trouble(error: &Error) -> Trouble {
    if !error.is_temporary() {
        return Trouble::Mend;
    }
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if cause.is::<OfTopic>() {
            return Trouble::Topic;
        }
        source = cause.source();
    }
    Trouble::Broker
}

/// Marks the end of a creation by CLOSE in place of an answer.
#[derive(Debug)]
struct ClosedAtOpen {
    next_broker: Option<NextBroker>,
    of_topic: OfTopic,
}

impl std::fmt::Display for ClosedAtOpen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.of_topic.fmt(f)
    }
}

impl std::error::Error for ClosedAtOpen {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.of_topic)
    }
}

/// The error for a producer or consumer that the broker closes instead of saying that it is open. The topic moves (an unload,
/// another broker, another cluster); `next_broker` says where to, if the broker does.
pub(super) fn closed_at_open(topic: &str, next_broker: Option<NextBroker>) -> Error {
    let moves = next_broker
        .as_ref()
        .and_then(|next| next.url.as_ref().or(next.url_tls.as_ref()));
    let reason = match moves {
        Some(url) => format!("it has moved to {}", one_line(url)),
        None => "it moves to another broker".to_owned(),
    };
    Error::temporary(format!(
        "the broker closes topic {topic} while it is being opened"
    ))
    .caused_by(ClosedAtOpen {
        next_broker,
        of_topic: OfTopic(reason),
    })
}

/// Where the topic is that this error of an opening is about, if the broker said so.
pub(super) fn next_broker(error: &Error) -> Option<&NextBroker> {
    let source = std::error::Error::source(error)?;
    source.downcast_ref::<ClosedAtOpen>()?.next_broker.as_ref()
}

/// The error for a lookup or creation that the broker refused; temporary where time alone may heal it.
pub(super) fn of_open(topic: &str, code: Option<i32>, message: Option<&str>) -> Error {
    let message = one_line(message.unwrap_or("no reason given"));
    let text = format!("the broker refuses topic {topic}: {message}");
    let code = code.and_then(|code| ServerError::try_from(code).ok());
    match code {
        Some(ServerError::AuthorizationError | ServerError::AuthenticationError) => Error::refused(text).hint(
            "grant walpost's role (of its token, certificate or user) the 'produce' permission on this topic or its namespace",
        ),
        Some(ServerError::TopicTerminatedError) => {
            Error::refused(text).hint("route the events to another topic, or delete and re-create this one")
        }
        Some(ServerError::IncompatibleSchema) => Error::refused(text).hint(
            "change WALPOST_SCHEMA_FILE's definition, or the namespace's schema compatibility strategy, or delete the topic's schema",
        ),
        Some(
            ServerError::ProducerFenced
            | ServerError::InvalidTopicName
            | ServerError::UnsupportedVersionError
            | ServerError::NotAllowedError,
        ) => Error::refused(text),
        Some(
            ServerError::ProducerBlockedQuotaExceededError
            | ServerError::ProducerBlockedQuotaExceededException,
        ) => Error::temporary(text).caused_by(OfTopic(message)),
        Some(ServerError::TopicNotFound) => {
            Error::temporary(text).caused_by(Missing(OfTopic(message))).hint("create the topic, or allow its auto-creation on the namespace")
        }
        Some(ServerError::ProducerBusy) => {
            Error::temporary(text).hint("another walpost with the same WALPOST_PRODUCER_NAME may still be connected")
        }
        _ => Error::temporary(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_time_cannot_heal_is_final() {
        for (error, temporary) in [
            (ServerError::ServiceNotReady, true),
            (ServerError::ProducerBusy, true),
            (ServerError::MetadataError, true),
            (ServerError::TooManyRequests, true),
            (ServerError::TopicNotFound, true),
            (ServerError::ProducerBlockedQuotaExceededError, true),
            (ServerError::ProducerBlockedQuotaExceededException, true),
            (ServerError::AuthorizationError, false),
            (ServerError::TopicTerminatedError, false),
            (ServerError::ProducerFenced, false),
        ] {
            let said = of_open("t", Some(error as i32), Some("why"));
            assert_eq!(said.is_temporary(), temporary, "{error:?}");
            assert!(said.to_string().contains("why"));
            assert_eq!(is_missing(&said), error == ServerError::TopicNotFound);
        }
        assert!(
            of_open("t", Some(9999), None).is_temporary(),
            "an error code from the future is tried again"
        );
    }

    #[test]
    fn a_brokers_message_becomes_one_line_of_bounded_length() {
        assert_eq!(
            one_line("Unable to read\n  {\r\n\t\"a\" : 1\n}\n"),
            "Unable to read { \"a\" : 1 }"
        );
        assert_eq!(one_line(&"ü".repeat(400)), "ü".repeat(400));
        assert_eq!(one_line(&"ü".repeat(401)), "ü".repeat(400) + " …");
        let said = of_open("t", None, Some("one\ntwo"));
        assert!(said.to_string().contains("one two"));
    }

    #[test]
    fn a_send_is_given_up_only_where_a_resend_cannot_help() {
        assert_eq!(
            of_send(ServerError::PersistenceError as i32),
            SendVerdict::Reopen
        );
        assert_eq!(
            of_send(ServerError::ChecksumError as i32),
            SendVerdict::Reopen
        );
        assert_eq!(of_send(9999), SendVerdict::Reopen);
        assert_eq!(
            of_send(ServerError::NotAllowedError as i32),
            SendVerdict::Refused
        );
        assert_eq!(
            of_send(ServerError::TopicTerminatedError as i32),
            SendVerdict::Reopen,
            "the topic is refused when its producer is opened again, and its events wait"
        );
    }
}
