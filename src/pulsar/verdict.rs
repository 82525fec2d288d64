//! What the broker says, and what walpost does about it: the table of manners. Nothing here drops a message, and nothing
//! reorders a key: whatever has no receipt stays with its lane and is sent again from the oldest on.
//!
//! | said | what is done | shown in |
//! |---|---|---|
//! | **to a send** | | |
//! | `NotAllowedError` to a batch of several messages | says nothing of each: they are sent one by one, and batches are smaller from then on | `tests/manners/refused.rs`, `tests/manners/doubt.rs` |
//! | `NotAllowedError` to a single message | it will never be taken, and becomes a straggler; without a table for those: stop with exit code 69, naming its row | `tests/manners/refused.rs` |
//! | `ChecksumError`, `TopicTerminatedError`, `PersistenceError`, `ServiceNotReady`, quota, anything else | not known to be stored: lookup, new producer, all again in order; under another name if something behind it is stored | `tests/manners/sending.rs`, `tests/manners/doubt.rs` |
//! | a receipt for a batch that is not the oldest | the two sides disagree: new producer, under another name if something behind the oldest is stored (behind a refused message: stored) | `tests/manners/sending.rs` |
//! | "stored before", of a batch that cannot be | another name, all again in order | `tests/manners/doubt.rs` |
//! | any of these to all sends of a topic, while other topics get receipts | its events become stragglers after `WALPOST_STRAGGLER_AGE` (after four times as long while none does) | `tests/manners/apart.rs` |
//! | nothing, for `WALPOST_SEND_TIMEOUT` | new connection; where the broker has answered what was sent later, a new producer | `tests/manners` |
//! | **to a lookup, a question for partitions, a producer's creation** | | |
//! | `ServiceNotReady`, `ProducerBusy`, `MetadataError`, `TooManyRequests`, `TopicNotFound`, both quota errors, anything unknown | again, with backoff (a warning each time) | `tests/manners`, `tests/topic_moves.rs` |
//! | `AuthorizationError`, `AuthenticationError`, `TopicTerminatedError`, `IncompatibleSchema`, `ProducerFenced`, `InvalidTopicName`, `UnsupportedVersionError`, `NotAllowedError` | somebody must mend it: the same, as an error with what to do; the topic's events become stragglers, or wait; other topics go on | `tests/manners`, `tests/stragglers.rs` |
//! | a redirect, a proxy, TLS addresses | followed | `tests/manners` |
//! | any refusal, for `WALPOST_STRAGGLER_AGE`, while other topics get receipts, or four times as long | the topic's events become stragglers | `tests/manners/apart.rs` |
//! | "reached max producers limit" | as many lanes as there may be take the events of all; one more is tried now and then | `producer::few`, `tests/manners/apart.rs` |
//! | another number of partitions, or none | see `producer::shape` | `tests/manners/shape.rs`, `tests/partitions.rs` |
//! | "not ready" (`producer_ready = false`) | waits for the second answer | `tests/manners` |
//! | nothing, for 30 s after it was written, to a creation | closes the producer that may be half made, then again | `tests/manners` |
//! | nothing to a lookup or a question for partitions | the next host of the service URL, and a new connection; for `WALPOST_STRAGGLER_AGE`, while other topics get receipts, as a refusal | `tests/manners` |
//! | an answer about a topic | the host stays, unless it gives nothing but such answers as `ServiceNotReady` again and again | `directory` |
//! | `CLOSE_PRODUCER`, in place of the answer to a creation | as when the producer was open | `tests/manners` |
//! | nothing, to the close of a producer | again under the same name, which is refused until that is closed; where nothing that was sent later is answered either, a new connection | `tests/manners/apart.rs` |
//! | **on its own** | | |
//! | `CLOSE_PRODUCER` (unload, bundle split, load shedding) | to the broker it names, else a lookup; all again in order | `tests/manners`, `tests/topic_moves.rs` |
//! | `TOPIC_MIGRATED` | lookup at the cluster that it names | `tests/manners` |
//! | `PING`, `AUTH_CHALLENGE` | answered, the latter with credentials read afresh | `tests/manners`, `tests/security.rs` |
//! | `CONNECTED` with `max_message_size` | the limit of a message and of a batch | `tests/manners`, `tests/unpublishable.rs` |
//! | silence for two keepalive intervals, a half-open connection, bytes that are no frame, the end | new connection, with backoff | `tests/manners` |
//! | **to CONNECT** | | |
//! | `AuthenticationError`, `AuthorizationError` | at the start: exit 69; later: the broker's trouble, told as an error with what to do, and tried again (a token file may be renewed). The same for a certificate that is refused and a token that cannot be had | `tests/security.rs` |
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

/// Whose fault it is that something did not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The topic's, and somebody must mend it.
    Mend,
    /// The topic's, and it may pass.
    Topic,
    /// The broker said it of the topic, and may say the same of all.
    Unclear,
    /// The broker's, or that of the way to it: every topic has it. Somebody may have to mend that too (credentials, certificates).
    Broker,
}

/// Marks what was said about one topic. An error without this mark is about the broker, also when it is final.
#[derive(Debug)]
pub(super) struct OfTopic {
    message: String,
    fault: Fault,
    is_producer_limit: bool,
}

impl std::fmt::Display for OfTopic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for OfTopic {}

impl OfTopic {
    fn new(message: String, fault: Fault) -> Self {
        Self {
            message,
            fault,
            is_producer_limit: false,
        }
    }

    /// What concerns this topic alone.
    pub(super) fn surely(message: String) -> Self {
        Self::new(message, Fault::Topic)
    }

    /// What concerns this topic alone, and does not pass.
    pub(super) fn mend(message: String) -> Self {
        Self::new(message, Fault::Mend)
    }

    /// The mark of an error, if there is one.
    fn on(error: &Error) -> Option<&Self> {
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            if let Some(of_topic) = cause.downcast_ref::<Self>() {
                return Some(of_topic);
            }
            source = cause.source();
        }
        None
    }
}

pub(super) fn fault(error: &Error) -> Fault {
    OfTopic::on(error).map_or(Fault::Broker, |of_topic| of_topic.fault)
}

/// In place of what a broker says that says nothing.
const NO_ANSWER: &str = "no answer";
/// What the broker says when a topic has as many producers as its namespace allows (`AbstractTopic`, `isProducersExceeded`). No code tells it from
/// other reasons.
const MAX_PRODUCERS: &str = "reached max producers limit";
/// What it says of a name that is in use (`AbstractTopic.internalAddProducer`).
const NAME_IN_USE: &str = "is already connected to topic";

/// True for the refusal of one producer more.
pub(super) fn is_producer_limit(error: &Error) -> bool {
    OfTopic::on(error).is_some_and(|of_topic| of_topic.is_producer_limit)
}

/// The error for a send that was refused.
pub(super) fn of_send_error(topic: &str, message: &str) -> Error {
    let message = one_line(message);
    Error::temporary(format!(
        "the broker refuses a send to topic {topic}: {message}"
    ))
    .caused_by(OfTopic::new(message, Fault::Unclear))
}

/// The error for a question about a topic that the broker does not answer.
pub(super) fn no_answer(topic: &str) -> Error {
    Error::temporary(format!(
        "the Pulsar broker does not answer about topic {topic}"
    ))
    .caused_by(OfTopic::new(NO_ANSWER.to_owned(), Fault::Unclear))
}

/// The error for a request that a broker does not answer over a connection that goes on: each is about one topic.
pub(super) fn not_answered() -> Error {
    Error::temporary("the Pulsar broker does not answer a request")
        .caused_by(OfTopic::new(NO_ANSWER.to_owned(), Fault::Unclear))
}

/// True where a broker has not answered at all. It may be the topic's trouble, and another host may answer.
pub(super) fn is_unanswered(error: &Error) -> bool {
    OfTopic::on(error).is_some_and(|of_topic| of_topic.message == NO_ANSWER)
}

/// The error for a producer that is closed although batches wait for their receipts.
pub(super) fn is_closed(topic: &str) -> Error {
    let message = "it closed the producer before it answered".to_owned();
    Error::temporary(format!("the broker closed the producer on topic {topic}"))
        .caused_by(OfTopic::new(message, Fault::Unclear))
}

/// The error for a topic that was there, and is not.
pub(super) fn is_gone(topic: &str) -> Error {
    let message = "the topic does not exist".to_owned();
    Error::temporary(format!("topic {topic} was deleted"))
        .caused_by(Missing(OfTopic::surely(message)))
        .hint("create the topic again")
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
        of_topic: OfTopic::new(reason, Fault::Unclear),
    })
}

/// Where the topic is that this error of an opening is about, if the broker said so.
pub(super) fn next_broker(error: &Error) -> Option<&NextBroker> {
    let source = std::error::Error::source(error)?;
    source.downcast_ref::<ClosedAtOpen>()?.next_broker.as_ref()
}

/// The error for a lookup or creation that the broker refused; temporary where time alone may heal it.
pub(super) fn of_open(topic: &str, code: Option<i32>, message: Option<&str>) -> Error {
    let whole = message.unwrap_or("no reason given");
    // What it means is looked for in all of it, and not in the topic's name.
    let said = whole.replace(topic, "");
    let message = one_line(whole);
    let text = format!("the broker refuses topic {topic}: {message}");
    let code = code.and_then(|code| ServerError::try_from(code).ok());
    let is_name = said.contains(NAME_IN_USE);
    let of_topic = |fault| OfTopic {
        message,
        fault,
        is_producer_limit: said.contains(MAX_PRODUCERS),
    };
    let (error, fault) = match code {
        Some(ServerError::AuthorizationError | ServerError::AuthenticationError) => {
            let hint = "grant walpost's role (of its token, certificate or user) the 'produce' permission on this topic or its namespace";
            (Error::refused(text).hint(hint), Fault::Mend)
        }
        Some(ServerError::TopicTerminatedError) => {
            let hint = "route the events to another topic, or delete and re-create this one";
            (Error::refused(text).hint(hint), Fault::Mend)
        }
        Some(ServerError::IncompatibleSchema) => {
            let hint = "change WALPOST_SCHEMA_FILE's definition, or the namespace's schema compatibility strategy, or delete the topic's schema";
            (Error::refused(text).hint(hint), Fault::Mend)
        }
        Some(
            ServerError::ProducerFenced
            | ServerError::InvalidTopicName
            | ServerError::UnsupportedVersionError
            | ServerError::NotAllowedError,
        ) => (Error::refused(text), Fault::Mend),
        Some(ServerError::TopicNotFound) => {
            return Error::temporary(text)
                .caused_by(Missing(of_topic(Fault::Topic)))
                .hint("create the topic, or allow its auto-creation on the namespace");
        }
        Some(ServerError::ProducerBusy) if is_name => {
            let hint = "another walpost with the same WALPOST_PRODUCER_NAME may still be connected";
            (Error::temporary(text).hint(hint), Fault::Unclear)
        }
        Some(
            ServerError::ProducerBusy
            | ServerError::ProducerBlockedQuotaExceededError
            | ServerError::ProducerBlockedQuotaExceededException,
        ) => (Error::temporary(text), Fault::Topic),
        _ => (Error::temporary(text), Fault::Unclear),
    };
    error.caused_by(of_topic(fault))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOPIC: &str = "persistent://public/default/t";

    #[test]
    fn what_a_broker_says_of_a_topic_is_the_topics_fault() {
        for (code, message, expected) in [
            (ServerError::ServiceNotReady, "loading", Fault::Unclear),
            (
                ServerError::MetadataError,
                "Encryption is required in t",
                Fault::Unclear,
            ),
            (ServerError::UnknownError, "?", Fault::Unclear),
            (ServerError::TopicNotFound, "no", Fault::Topic),
            (
                ServerError::ProducerBusy,
                "Topic 't' reached max producers limit",
                Fault::Topic,
            ),
            (
                ServerError::ProducerBusy,
                "Topic has an existing exclusive producer: n",
                Fault::Topic,
            ),
            (
                ServerError::ProducerBusy,
                "'n' is already connected to topic 't'",
                Fault::Unclear,
            ),
            (ServerError::AuthorizationError, "no", Fault::Mend),
        ] {
            let error = of_open(TOPIC, Some(code as i32), Some(message));
            assert_eq!(fault(&error), expected, "{code:?} {message}");
            assert_eq!(is_producer_limit(&error), message.contains("max producers"));
        }
        for connecting in [
            Error::temporary("the connection ended"),
            Error::refused("the broker refuses the connection"),
            Error::config("no name that a certificate could be for"),
        ] {
            assert_eq!(fault(&connecting), Fault::Broker, "{connecting}");
        }
        assert_eq!(fault(&of_send_error("t", "no")), Fault::Unclear);
        assert_eq!(fault(&is_gone("t")), Fault::Topic);
        assert!(is_missing(&is_gone("t")));
    }

    #[test]
    fn the_producer_limit_is_told_by_the_whole_message_without_the_topics_name() {
        let busy = |topic: &str, message: &str| {
            of_open(topic, Some(ServerError::ProducerBusy as i32), Some(message))
        };
        let long = format!("persistent://public/default/{}", "x".repeat(400));
        let limited = busy(&long, &format!("Topic '{long}' {MAX_PRODUCERS}"));
        assert!(is_producer_limit(&limited));
        let used = busy(&long, &format!("'n' {NAME_IN_USE} '{long}'"));
        assert_eq!(fault(&used), Fault::Unclear);
        let used = busy(
            &long,
            &format!("Producer '{}' {NAME_IN_USE} 't'", "n".repeat(400)),
        );
        assert_eq!(fault(&used), Fault::Unclear);

        let named = format!("persistent://public/default/a {MAX_PRODUCERS} {NAME_IN_USE}");
        let exclusive = busy(
            &named,
            &format!("Topic '{named}' has an exclusive producer"),
        );
        assert!(!is_producer_limit(&exclusive));
        assert_eq!(fault(&exclusive), Fault::Topic);
    }

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
