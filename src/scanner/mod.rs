//! The scanner: what the table knows and the log cannot tell.
//!
//! | module | is |
//! |---|---|
//! | `progress` | the slot's row in `walpost.progress` |
//! | `rows` | how SQL is asked for a row, so that it is read as the stream's is |
//! | `table`, `cursor` | an outbox table read by SQL, row by row |
//! | `numbering` | rows whose `seq` a scan cannot use, and the statements that mend them |
//! | `gap` | publishes what was committed before the slot, or while there was none; stores what cannot be |
//! | `overlap` | rows that are published from the table and that the slot may bring as well |
//! | `delivered` | notes every few seconds which transactions are delivered, and has it compared |
//! | `keeper`, `handover` | its handle, and what the connector hands over to it |
//! | `moment`, `comparison` | what a note is of; the comparison of all tables for it |
//! | `reconcile` | compares the table with what the stream brought: finds rows that it left out |
//! | `coverage` | which leaf tables the delivered snapshot speaks of, and who may say so; pure |
//! | `streamed`, `missing`, `snapshot` | the counts of the stream, what a comparison found, a snapshot taken apart; pure |
//! | `poll` | the gap scan on a timer, where there is no logical replication; everything below works beside it too |
//! | `name_mark` | the mark that producer names are not to be used again |
//! | `straggler`, `straggler_task`, `straggler_retry`, `straggler_pages`, `straggler_store`, `straggler_fence` | events that cannot be published: what the pipe holds of them, who stores them, how they become messages again, how they are read for that, the SQL, which process may |
//! | `discarded` | stragglers that somebody has discarded, until nothing can bring them again |
//! | `outbox` | what a table has and what the role may do: which modes it can have |
//! | `after_publish` | marks or deletes rows whose receipt has come |
//! | `unseen` | published rows of transactions that nobody can see yet |
//! | `marking` | its statements, and how the row that one fails for is found |
//! | `left_rows`, `left_note` | rows that could not be marked or deleted; what was left undone, noted for `walpost check` |
//! | `unmarked` | finds rows that were never marked, and publishes them again |
//! | `retention` | deletes delivered rows past their time |
//! | `left_places` | its deletions, and the rows and partitions that cannot be removed |
//! | `partitions` | makes the partitions of a table by time ahead |
//! | `modes` | starts these four, and stops them |
//! | `recovery` | what to do about a slot that is lost, gone, or somebody else's |
//! | `slot_maker` | makes a slot, with snapshots before and after |
//! | `cluster` | which cluster answers, and whether what is stored is from it |
//!
//! # Snapshots
//!
//! A Postgres snapshot (`pg_snapshot`) says of every transaction whether it had committed when it was taken. Each row of an
//! outbox names its transaction in `txid`. So one value says of all rows which are delivered, and the difference of two
//! says which rows are a gap: visible in the one, and not in the other.
//!
//! **Delivered.** Take a snapshot, *then* ask where the log's insert position L is. A transaction writes its commit record
//! before it becomes visible to others, so every transaction visible in the snapshot has its commit record before L. Once the
//! confirmed LSN is at L or beyond, all of them have been received and acknowledged: the snapshot is stored as `delivered`.
//! (That holds for asynchronous commits too: what is not flushed yet is inserted.) That the stream brought every row of them is
//! not taken for granted: it is compared with the table first ([`reconcile`]).
//!
//! **The gap.** Whoever makes the slot takes a snapshot before (`scan_before`) and after (`scan_upto`). The slot streams every
//! transaction that commits after its consistent point, which lies between the two. So rows visible in `scan_before` are
//! never streamed, rows not visible in `scan_upto` always are. Rows visible in `scan_upto` and not in `delivered` are the gap:
//! they are published before the stream starts. The few that are visible in `scan_upto` and not in `scan_before` may also be
//! streamed: their ids are remembered, and skipped when the stream brings them. (By id and not by transaction: a row that a
//! transaction inserted and deleted is only in the stream.)
//!
//! **A slot of which nothing is known** (somebody made it before walpost ran, its row was deleted, a standby kept it in step, poll
//! mode came between) gets its snapshots later: `scan_upto` is taken now, and `scan_before` says what is older than the slot's
//! `catalog_xmin`. See [`recovery`].
//!
//! **Stragglers** count as done, in the gap as in the stream, when they are in their table; so `delivered` says of a row that it
//! was published *or stored*. Whoever asks whether a row is sent (the view, the retention, the look for unmarked rows) looks into
//! `walpost.straggler` as well.
//!
//! **Rows from elsewhere.** A row that was copied from another cluster (a dump, logical replication) brings that one's `txid`.
//! One that this cluster has not come to can be told: a statement sees nothing that was committed beyond its own snapshot. A gap
//! scan refuses such rows before it begins, with the statements that give them a `txid` of this cluster, and `walpost check`
//! warns of them. One that this cluster has long passed cannot be told from its own: who copies rows into an outbox whose slot
//! does not stream at that time sets their `txid` to `pg_current_xact_id()`. (Rows that a slot streams arrive in any case.)
//!
//! # Clocks
//!
//! What is delivered, and what is a gap, is said by transaction ids and log positions; no clock is asked. Pauses and deadlines
//! within the process are by its monotonic clock. Where the time of day counts it is the Postgres server's, on both sides of each
//! comparison, so that hosts whose clocks differ do not matter:
//!
//! | what | set back by an hour | set forward |
//! |---|---|---|
//! | a straggler's due time | the attempt is an hour late; `walpost check` says so, `walpost stragglers retry` makes it due now | the attempt is early |
//! | `WALPOST_RETENTION` | rows stay an hour longer | rows go early, but only what is delivered goes |
//! | `WALPOST_STRAGGLER_AGE`, rows never marked | looked for an hour later; what is dated before the mode was turned on (`walpost.after_publish.since`) is not looked for | looked for early, and still only behind the confirmed LSN |
//! | partitions ahead | those of that time are there, or are made within a minute; older ones than the oldest are not: the insert fails | those that are missing are made within a minute |
//!
//! `created_at` is the application's to set: in the future it holds its own row's retention, and the look whether it was marked,
//! until that time, and nothing else. None of these decides whether the stream brings a row.
//!
//! What a table lacks turns off what needs it: without `txid` and `seq` there is no gap scan and no status. A lost slot is then
//! refused ([`recovery`]). (A scan by `created_at` with an overlap would bring most rows, and no number for the overlap would bring all:
//! the application sets that time, and a transaction commits as long after it as it likes.) A scan that does not find a table fails, and
//! delivers nothing: the table may come back with rows that are visible in the snapshot.

pub mod after_publish;
pub(crate) mod cluster;
mod comparison;
pub mod coverage;
pub mod cursor;
pub mod delivered;
pub mod discarded;
pub mod gap;
pub mod handover;
pub mod keeper;
mod left_note;
mod left_places;
mod left_rows;
mod marking;
pub mod missing;
pub mod modes;
mod moment;
pub mod name_mark;
mod numbering;
pub mod outbox;
pub mod overlap;
pub mod partitions;
pub mod poll;
pub mod progress;
pub mod reconcile;
pub mod recovery;
pub mod retention;
pub(crate) mod rows;
pub(crate) mod sequences;
pub mod slot_maker;
pub mod snapshot;
pub mod straggler;
pub mod straggler_fence;
mod straggler_pages;
mod straggler_retry;
pub(crate) mod straggler_store;
mod straggler_task;
mod straggler_walk;
pub mod streamed;
pub mod table;
pub mod unmarked;
mod unseen;
