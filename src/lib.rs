//! walpost: tails a Postgres outbox through logical replication and publishes every committed row to Apache Pulsar.
//!
//! # The data's path
//!
//! ```text
//!  walsender ─► ReplicationStream ─► pgoutput ─► Extractor ─► lanes (batches) ─► broker connections ─► Pulsar
//!      ▲         owns the socket      decodes     row → event    sequence ids       one task each        │
//!      │                              borrowed    and its topic                                          │ receipts
//!      └── StandbyStatusUpdate ◄── confirmed LSN ◄── AckTracker ◄────────────────────────────────────────┘
//! ```
//!
//! Rows from the log and rows that are read from the table go through the same room ([`outlet`]): there a row becomes an event.
//!
//! One task ([`connector`]) owns the replication socket and everything up to the sealed batch; each broker connection is a
//! task of its own that owns that socket. Between them are channels, no locks. Whoever watches reads the [`meter`] on another
//! thread ([`admin`]). A row is copied once: from the read buffer
//! into its lane's batch, which is also the frame that goes to the broker.
//!
//! # What is guaranteed, and where the argument stands
//!
//! | guarantee | why it holds | the test that tries to break it |
//! |---|---|---|
//! | every committed row reaches Pulsar, whatever dies | only acknowledged transactions are confirmed ([`ack`]); what is not comes again | `tests/crash.rs`, `tests/walsender.rs`, `tests/broker_restart.rs`, `tests/topic_moves.rs` |
//! | a key's messages are in commit order | one key, one lane; a lane resends from the oldest, and sends nothing behind a message that may be refused ([`pulsar`]) | `tests/delivery.rs`, `tests/manners/order.rs`, `tests/key_shared.rs` |
//! | exactly once, where the broker deduplicates | sequence ids are a function of the log and of the routing, both in the producer's name with the epoch of the log; no batch holds old and new, and a "stored before" that cannot be true is not believed ([`pulsar`]) | `tests/effectively_once.rs`, `tests/deduplication.rs`, `tests/epochs.rs`, `tests/restored.rs`, `tests/manners/doubt.rs`, `tests/manners/random.rs` |
//! | an event that was refused before a restart is not taken for stored after it | names in doubt are marked in `walpost.progress`, at once and before an exit, and the next process uses others ([`scanner::name_mark`]) | `tests/bookkeeping/name_mark.rs` |
//! | what the log cannot bring comes from the table | snapshots around the slot's making and of what is delivered ([`scanner`]) | `tests/gap.rs`, `tests/failover.rs`, `tests/poll.rs` |
//! | a row that the table holds and the stream did not bring is published, and counts as delivered only then | the rows of both are counted by `txid` and compared before a snapshot is noted ([`scanner::reconcile`]) | `tests/reconcile.rs` |
//! | a leaf table is covered by what is delivered only if its rows were seen, and what is not covered is neither shown as sent nor removed | one function moves the coverage, and takes what a scan or a comparison has seen (`scanner::coverage`) | `tests/reconcile/coverage.rs` |
//! | a publication or table that would leave rows out ends the stream; once mended, rows of that time are read from the table | the catalogue is read at each start, in each round, and when an unknown relation arrives ([`postgres::published`], [`pipe`]) | `tests/catalog.rs` |
//! | what is noted of delivery holds although others write, and a slot is known by more than a position | compare-and-set under the slot's lock ([`scanner::progress`]); what is not known is read from the table ([`scanner::recovery`]) | `tests/bookkeeping.rs`, `tests/failover.rs` |
//! | a straggler is stored and retried only by the process that has the slot, on the server whose log is streamed | its transaction locks the claim ([`scanner::straggler_fence`]); the log is compared at each connect | `tests/stragglers/fence.rs`, `tests/failover/two_servers.rs` |
//! | a row gives the same message whichever way it takes | one decoder, one resolved type, the same functions of the server print its values (`scanner::rows`) | `tests/decoder.rs` |
//! | rows and snapshots from another cluster or time are refused, never passed over | a `txid` that is still to come can be told ([`scanner`], [`scanner::recovery`]) | `tests/elsewhere.rs` |
//! | no clock decides what is delivered | transaction ids and log positions do; the time of day only delays ([`scanner`]) | `tests/clocks.rs` |
//! | Postgres 14 to 18 do the same | what is newer is used where it is ([`postgres::slot`]) | `tests/majors.rs` for the oldest and the newest |
//! | a row shown as sent is in its topic | the delivered snapshot is stored behind the confirmed LSN ([`scanner`]) | `tests/delivered.rs` |
//! | a row's topic is the one of exactly that name to all of Pulsar's clients, and a stored one, or the row is a straggler | what they do not agree on is refused ([`outbox`]'s `topic.rs`, `sql/09_emit.sql`) | `tests/names.rs`, `tests/ends/emit.rs` |
//! | one instance at a time, another takes over | the slot, and an advisory lock around it ([`scanner::recovery`]); stragglers are stored and retried under the claim of the lock's holder ([`scanner::straggler_fence`]) | `tests/ha.rs`, `tests/stragglers/fence.rs` |
//! | an instance without Postgres publishes, marks and deletes nothing behind its successor's back, and is out of its way within 10 s | the session of the lock is asked, and each write to a broker looks at its answer ([`lease`]); statements name the claim ([`scanner::after_publish`]) | `tests/ha/takeover.rs`, `tests/ha/marks.rs` |
//! | nothing stops the thread that moves data | files are read beside it (`aside`), questions to Postgres have a deadline ([`postgres::answer`]), large tables are counted in pages (`scanner::straggler_walk`) | `tests/walsender/answers.rs`, `tests/stragglers/walk.rs` |
//! | one topic's trouble is not another's | what a topic cannot take is stored and retried ([`scanner::straggler`]), or waits with it ([`pulsar`]); in the stream, in a scan, and in poll mode; a topic that gives receipts, but slowly, holds up the others once the in-flight limits are full | `tests/stragglers.rs`, `tests/stragglers/scan*.rs`, `tests/unpublishable.rs`, `tests/schema.rs`, `tests/manners/opening.rs`, `tests/manners/apart.rs` |
//! | a topic that is deleted or replaced is followed, and what is sent lies where its consumers find it | its partitions are counted before producers are opened, and before anything is sent ([`pulsar`]) | `tests/manners/shape.rs`, `tests/partitions.rs` |
//! | the confirmed LSN passes no unacknowledged event | one function decides it ([`ack`]) | `tests/confirmed_lsn.rs` |
//! | memory is bounded | in-flight limits in messages and bytes pause the intake ([`pulsar`], [`pipe`]); topics without work are forgotten | `tests/memory.rs`, `tests/manners/idle.rs` |
//! | an idle outbox pins no WAL | the keepalive's WAL end counts while nothing is in flight ([`ack`]) | `tests/idle_slot.rs` |
//! | a rolled-back transaction is never published | Postgres sends only committed ones ([`pgoutput`]) | `tests/delivery.rs` |
//! | an event that cannot be published is not lost | it is stored before the LSN, or the scan, passes it, and retried ([`scanner::straggler`]); without that table nothing passes it: walpost stops and names its row ([`outlet`]) | `tests/stragglers.rs`, `tests/stragglers/scan*.rs`, `tests/unpublishable.rs` |
//! | what somebody has discarded stays away, whatever is killed | it is noted with the deletion, and left out until nothing can bring it again ([`scanner::discarded`]) | `tests/stragglers/discard.rs` |
//! | a row whose `seq` a scan cannot use is refused, and what mends it loses no row | every scan looks for such rows first; new numbers lie above all others ([`scanner`]) | `tests/numbering.rs` |
//! | scans read a key's rows in the order of insertion | a sequence that does not count up one by one is refused (`scanner::sequences`) | `tests/existing_tables.rs` |
//! | a row is marked or deleted only behind its receipt, and every such row in the end | ids come from receipts alone; what was lost is found ([`scanner::after_publish`], [`scanner::unmarked`]) | `tests/after_publish.rs`, `tests/poll/modes.rs` |
//! | one row, table or partition that cannot be marked, deleted, dropped or made holds up no other, is told, and is not published again | it is found by halving, left with its reason, and tried again later ([`scanner::after_publish`], [`scanner::retention`], [`upkeep`]) | `tests/isolation/marks.rs`, `tests/isolation/retention.rs` |
//! | one table that cannot be read holds up no other in poll mode or a gap, and none of its rows counts as delivered | it is left with its reason, and the gap stays open ([`scanner::gap`]) | `tests/isolation/scan.rs` |
//! | what happens to a row never happens to another of its id | a row is known by table, id, `seq` and `txid` ([`pulsar::RowKey`]) | `tests/isolation/identity.rs`, `tests/stragglers/numbers_again.rs` |
//! | an event without a table takes the same route, in its transaction's place | its envelope is read as a row ([`outbox::Envelopes`]) and counted as one ([`pipe`]) | `tests/ends/transient.rs` |
//! | a wrong argument fails the business transaction, not the message | `walpost.emit` checks what the route will ask for (`sql/09_emit.sql`) | `tests/ends/emit.rs` |
//! | System B does a message's work once, and takes no two messages for one | its id, and for numbers its topic, is committed with the work, and acknowledged afterwards ([`inbox`]) | `tests/ends/inbox.rs`, `tests/ends/demo.rs` |
//! | each end has the rights it needs and no others | `sql/12_roles.sql` | `tests/roles.rs` |
//! | what is claimed of the topics can be proven | table and topics are compared, id by id and key by key, in bounded memory ([`cli::verify`]) | `tests/verify.rs` |
//! | a replay changes nothing but the topic | dry first, names of its own, the row's message as it was ([`cli::replay`]) | `tests/replay.rs` |
//! | nothing undelivered goes by retention | one condition for rows and partitions, looked at under a lock ([`scanner::retention`]) | `tests/retention.rs`, `tests/poll/modes.rs` |
//! | what role, database, `public` and the URL hold changes neither what names mean, nor which rows are seen, nor what is durable | one list of settings in every session ([`postgres::session`]) | `tests/sessions.rs` |
//! | readiness follows progress, and whoever watches costs the pipe nothing | judged by receipts, on a thread that shares atomics and short lists ([`admin`], [`meter`]) | `tests/http.rs` |
//! | documents, alerts, dashboard and manifests name what there is | each name is looked up in the program, each alert is seen to fire | `tests/deploy.rs` |
//! | no secret is printed, at any log level | secrets are of a type without `Display`, answers of servers are not repeated ([`config`], [`http`]) | `tests/security.rs` |
//!
//! # Reading order
//!
//! 1. [`connector`]: what is opened, the one loop, restarting and stopping; [`feedback`] and [`gulp`], when it writes to and
//!    reads from the walsender.
//! 2. [`pipe`]: one message in, one row out; [`outlet`]: one row in, one event out, and what became of it.
//! 3. [`ack`]: which LSN may be confirmed.
//! 4. [`postgres`], [`pgoutput`]: the replication connection, its messages.
//! 5. [`outbox`]: from a row to an event and its topic.
//! 6. [`pulsar`]: lanes, batches, receipts, brokers.
//! 7. [`scanner`]: what comes from the table, and what happens to rows once they are published.
//! 8. [`inbox`]: the other end, System B.
//! 9. [`meter`], [`admin`]: what people, probes and Prometheus are told.
//! 10. [`config`], [`cli`]: settings and commands. [`lease`], [`retry`], [`http`], `reach`, `aside`, [`error`], [`lsn`]: small things that all use.

// A test that unwraps fails, which is what it is for; its casts are of numbers it chose.
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )
)]

pub mod ack;
pub mod admin;
mod aside;
pub mod cli;
pub mod config;
pub mod connector;
pub mod error;
pub mod feedback;
pub mod gulp;
pub mod http;
pub mod inbox;
pub mod lease;
pub mod logging;
pub mod lsn;
pub mod meter;
pub mod outbox;
pub mod outlet;
pub mod pgoutput;
pub mod pipe;
pub mod postgres;
pub mod pulsar;
mod reach;
pub mod retry;
pub mod scanner;
mod tls;
pub mod upkeep;

pub use error::{Error, Result};
pub use lsn::Lsn;
