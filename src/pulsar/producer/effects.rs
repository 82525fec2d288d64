//! What goes in and out of the producer besides events: what brokers say ([`Signal`]), and what is to be done ([`Effect`]).
//!
//! Each effect that asks for something names what its answer will be known by, and is answered by one signal. Connections are known by
//! number: who carries out the effects has their sockets.

use bytes::Bytes;

use crate::Result;
use crate::pulsar::wire::NextBroker;

/// Something to do.
#[derive(Debug)]
pub(in crate::pulsar) enum Effect {
    /// Write this frame of a producer. On a connection that has ended it goes nowhere.
    Send {
        connection: u64,
        producer_id: u64,
        frame: Bytes,
    },
    /// Ask how many partitions a topic has; answered by [`Signal::Counted`].
    Count {
        route: usize,
        topic: String,
        /// The number of the question.
        asked: u64,
        /// The broker may make the topic, if it makes topics on first use.
        create: bool,
    },
    /// Find a topic's broker and connect to it; answered by [`Signal::Found`].
    Find {
        topic: usize,
        name: String,
        /// The number of the attempt.
        attempt: u64,
        /// The broker that closed the topic's producers named this one.
        next_broker: Option<NextBroker>,
        /// Which of the connections to that broker.
        shard: u32,
    },
    /// Make a producer; answered by [`Signal::Created`], if it takes hours.
    Create {
        connection: u64,
        topic: String,
        producer_id: u64,
        producer_name: String,
    },
    /// Close a producer, or what may become one; answered by [`Signal::Closed`] when it is no more, or the connection is not.
    Close { connection: u64, producer_id: u64 },
    /// Ask for a sign of life; answered by [`Signal::Alive`].
    Ping { connection: u64 },
    /// Let go of a connection: nothing is on it.
    Release { connection: u64 },
    /// End a connection as if it had broken; a [`Signal::Disconnected`] follows.
    Disconnect { connection: u64, reason: String },
}

/// What a broker said, or what came of an effect.
#[derive(Debug)]
pub(in crate::pulsar) enum Signal {
    /// The batch whose lowest id is `sequence_id` is durable.
    Receipt {
        connection: u64,
        producer_id: u64,
        sequence_id: u64,
        /// The broker's deduplication knew it: nothing was stored now.
        stored_before: bool,
    },
    /// A batch was refused: the one that holds `sequence_id` (see `Batch::holds`).
    SendError {
        connection: u64,
        producer_id: u64,
        sequence_id: u64,
        code: i32,
        message: String,
    },
    /// The broker closed a producer.
    ProducerClosed {
        connection: u64,
        producer_id: u64,
        next_broker: Option<NextBroker>,
    },
    /// The broker reads what it is sent.
    Alive { connection: u64 },
    /// The connection ended; nothing more comes from it.
    Disconnected { connection: u64, reason: String },
    /// How many partitions a topic has; 0 for none.
    Counted {
        route: usize,
        asked: u64,
        answer: Result<u32>,
    },
    /// A topic's broker.
    Found {
        topic: usize,
        attempt: u64,
        answer: Result<Link>,
    },
    /// A producer, or why there is none.
    Created {
        connection: u64,
        producer_id: u64,
        answer: Result<Created>,
    },
    /// A producer is no more.
    Closed { producer_id: u64 },
}

/// A connection to a broker.
#[derive(Clone, Copy, Debug)]
pub(in crate::pulsar) struct Link {
    pub(in crate::pulsar) connection: u64,
    /// The largest entry (metadata and payload) that the broker takes.
    pub(in crate::pulsar) max_message_bytes: usize,
}

/// A producer as the broker confirmed it.
#[derive(Debug)]
pub(in crate::pulsar) struct Created {
    /// Highest sequence id that the broker has *pushed* under this name; `None` when it knows none (or deduplication is off).
    pub(in crate::pulsar) last_sequence_id: Option<u64>,
    /// Names the schema that the producer was opened with.
    pub(in crate::pulsar) schema_version: Option<Bytes>,
}
