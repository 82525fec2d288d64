//! What a broker says, and what walpost does about it: each row of the table in `src/pulsar/verdict.rs` and more, against
//! a scripted broker (`support/fake_broker.rs`) that says what a real one cannot be made to say.
//!
//! Each test drives the library's publisher as the connector does, and ends with the verdict that the broker holds every
//! event once, the events of a key in order (or that the repetition is the stated one).

#[path = "manners/apart.rs"]
mod apart;
#[path = "manners/closing.rs"]
mod closing;
#[path = "manners/connections.rs"]
mod connections;
#[path = "manners/doubt.rs"]
mod doubt;
#[path = "manners/finding.rs"]
mod finding;
#[path = "manners/idle.rs"]
mod idle;
#[path = "manners/opening.rs"]
mod opening;
#[path = "manners/order.rs"]
mod order;
#[path = "manners/random.rs"]
mod random;
#[path = "manners/refused.rs"]
mod refused;
#[path = "manners/sender.rs"]
mod sender;
#[path = "manners/sending.rs"]
mod sending;
#[path = "manners/shape.rs"]
mod shape;
mod support;
#[path = "manners/truth.rs"]
mod truth;

/// A topic of the tests; the brokers take any.
const TOPIC: &str = "persistent://public/default/manners";
/// Another.
const OTHER: &str = "persistent://public/default/others";
