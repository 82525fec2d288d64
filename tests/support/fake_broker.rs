//! Pulsar brokers in this process that can be told to misbehave, for what real ones cannot be made to say.
//!
//! A broker listens on loopback, speaks the binary protocol, and without a script is a healthy broker: it answers, stores what
//! it is sent in the order of arrival, and sends receipts in that order. A test scripts what differs:
//!
//! * [`FakeBroker::script`]: [`Reaction`]s to the next commands of one kind ([`Asked`]), one each, in order;
//! * [`FakeBroker::script_rest`]: a closure for all commands that no script is left for;
//! * [`FakeBroker::set`]: what is set on a topic: limits, rates, who else has it ([`Settings`]);
//! * topics: [`create`](FakeBroker::create), [`create_partitioned`](FakeBroker::create_partitioned),
//!   [`delete`](FakeBroker::delete), [`unload`](FakeBroker::unload), …; by themselves they come into being when a producer
//!   asks for them ([`FakeBroker::auto_create`]);
//! * unasked: [`FakeBroker::ping`], [`close_producers`](FakeBroker::close_producers), [`say`](FakeBroker::say),
//!   [`disconnect`](FakeBroker::disconnect), [`stall`](FakeBroker::stall), [`stop`](FakeBroker::stop).
//!
//! Several fake brokers make a cluster ([`FakeBroker::beside`]): topics are theirs together, scripts and limits each one's.
//! What decides is a state machine ([`model`]) without sockets and clock, written after the real broker's sources; `net` is
//! the sockets and the clock.
//!
//! What no client may do (a wrong checksum, a send to a producer that never was, sequence ids that fall, …) is noted, and
//! fails the test when the broker is dropped.

mod answers;
mod commands;
mod model;
mod net;
mod orders;
mod producers;
mod script;
mod sends;
mod topics;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pulsar::message::proto::BaseCommand;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::eventually;
use answers::Held;
use model::{Broker, Cluster};
use net::Shared;
use script::Script;
use topics::Topics;
pub(crate) use {
    commands::{close_producer, reason, topic_migrated},
    script::{Asked, Reaction, Target},
    topics::{PublishRate, Settings, StoredEvent, partition_name},
};

/// A running broker; it ends with the test.
pub(crate) struct FakeBroker {
    addr: SocketAddr,
    world: Shared,
    /// Its place in the cluster.
    index: usize,
    stalled: watch::Sender<bool>,
    accepting: Option<JoinHandle<()>>,
}

impl FakeBroker {
    /// Starts a broker on a free port of loopback.
    pub(crate) async fn start() -> Self {
        Self::with(Shared::default()).await
    }

    /// The same, in a namespace that deduplicates.
    pub(crate) async fn start_deduplicating() -> Self {
        let broker = Self::start().await;
        broker.topics(|topics| topics.deduplicates = true);
        broker
    }

    /// Another broker of the same cluster.
    pub(crate) async fn beside(&self) -> Self {
        Self::with(Arc::clone(&self.world)).await
    }

    async fn with(world: Shared) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("a bound socket");
        let url = format!("pulsar://{addr}");
        let index = net::with(&world, |cluster| cluster.add_broker(url));
        let mut broker = Self {
            addr,
            world,
            index,
            stalled: watch::Sender::new(false),
            accepting: None,
        };
        broker.listen(listener);
        broker
    }

    fn listen(&mut self, listener: TcpListener) {
        let stalled = self.stalled.subscribe();
        let accepting = net::listen(&self.world, self.index, listener, stalled);
        self.accepting = Some(accepting);
    }

    /// `pulsar://host:port`
    pub(crate) fn url(&self) -> String {
        format!("pulsar://{}", self.addr)
    }

    /// Host and port, as the publisher's configuration wants them.
    pub(crate) fn host(&self) -> (String, u16) {
        (self.addr.ip().to_string(), self.addr.port())
    }

    /// Adds reactions for the next commands of this kind, one each.
    pub(crate) fn script(&self, asked: Asked, reactions: impl IntoIterator<Item = Reaction>) {
        self.own_script(|script| script.add(asked, reactions));
    }

    /// Decides about every command that no script is left for.
    pub(crate) fn script_rest(
        &self,
        decide: impl FnMut(Asked, &BaseCommand) -> Reaction + Send + 'static,
    ) {
        self.own_script(|script| script.set_rest(Box::new(decide)));
    }

    /// Forgets every script: a healthy broker from now on. What is set on topics stays.
    pub(crate) fn heal(&self) {
        self.own_script(Script::clear);
    }

    /// The `max_message_size` that CONNECTED tells from now on.
    pub(crate) fn limit(&self, max_message_bytes: i32) {
        self.own(|broker| broker.max_message_bytes = Some(max_message_bytes));
    }

    /// Changes what is set on a topic, or on all partitions of one.
    pub(crate) fn set(&self, topic: &str, change: impl FnOnce(&mut Settings)) {
        self.cluster(|cluster| cluster.set(topic, change));
    }

    /// Whether topics are made when a producer asks for one that does not exist; they are, unless this says otherwise.
    pub(crate) fn auto_create(&self, allowed: bool) {
        self.topics(|topics| topics.auto_creation = allowed);
    }

    /// How many partitions topics have that are made by themselves; 0, at first: they are not partitioned.
    pub(crate) fn auto_partitions(&self, count: u32) {
        self.topics(|topics| topics.auto_partitions = count);
    }

    /// Answers as brokers before PIP-344: a topic that does not exist has 0 partitions.
    pub(crate) fn missing_has_no_partitions(&self) {
        self.topics(|topics| topics.missing_has_no_partitions = true);
    }

    /// Makes a topic without partitions.
    pub(crate) fn create(&self, topic: &str) {
        self.topics(|topics| topics.create(topic));
    }

    /// Makes a partitioned topic, or gives it more partitions.
    pub(crate) fn create_partitioned(&self, topic: &str, partitions: u32) {
        self.topics(|topics| topics.create_partitioned(topic, partitions));
    }

    /// Deletes a topic without partitions by force.
    pub(crate) fn delete(&self, topic: &str) {
        self.cluster(|cluster| cluster.delete(topic));
    }

    /// Deletes the partitions of a topic by force; its metadata is still there.
    pub(crate) fn begin_deletion(&self, topic: &str) {
        self.cluster(|cluster| cluster.begin_deletion(topic));
    }

    /// Deletes the metadata of a partitioned topic.
    pub(crate) fn end_deletion(&self, topic: &str) {
        self.topics(|topics| topics.end_deletion(topic));
    }

    /// Unloads a topic: closes its producers, naming the next broker if one is given; what pends is stored, with receipts that come
    /// late, or given up without a word.
    pub(crate) fn unload(&self, topic: &str, next: Option<&str>, written: bool) {
        self.cluster(|cluster| cluster.unload(topic, next, written));
    }

    /// The names of all topics without partitions and of all partitions.
    pub(crate) fn topic_names(&self) -> Vec<String> {
        self.topics(|topics| topics.names())
    }

    /// Topics that no consumer of the whole finds: partitions without metadata, and plain ones beside partitions.
    pub(crate) fn misshapen(&self) -> Vec<String> {
        self.topics(|topics| topics.misshapen())
    }

    /// What clients did that no client may do; from now on it is forgiven.
    pub(crate) fn forgive(&self) -> Vec<String> {
        self.cluster(|cluster| std::mem::take(&mut cluster.faults))
    }

    /// Every command of this kind that came so far, in order.
    pub(crate) fn seen(&self, asked: Asked) -> Vec<BaseCommand> {
        self.own_script(|script| {
            let seen = script.seen.iter();
            let of_kind = seen.filter(|command| Asked::of(command) == Some(asked));
            of_kind.cloned().collect()
        })
    }

    /// How many of them.
    pub(crate) fn count(&self, asked: Asked) -> usize {
        self.own_script(|script| {
            let seen = script.seen.iter();
            seen.filter(|command| Asked::of(command) == Some(asked))
                .count()
        })
    }

    /// Waits until so many commands of this kind have come.
    pub(crate) async fn wait_for(&self, asked: Asked, count: usize) {
        let what = format!("{count} commands {asked:?}");
        eventually(Duration::from_secs(20), &what, async || {
            (self.count(asked) >= count).then_some(())
        })
        .await;
    }

    /// Every frame with an entry that came so far, byte for byte (without its first four bytes).
    pub(crate) fn frames(&self) -> Vec<Vec<u8>> {
        self.own_script(|script| script.frames.clone())
    }

    /// Forgets what was said to it and what it has stored, so that a bench may send for as long as it likes.
    pub(crate) fn forget(&self) {
        self.own_script(Script::forget);
        self.topics(Topics::forget);
    }

    /// How many connections were made so far.
    pub(crate) fn connections(&self) -> u64 {
        self.own(|broker| broker.accepted)
    }

    /// How many connections to the cluster are open, and how many producers are there.
    pub(crate) fn open(&self) -> (usize, usize) {
        self.cluster(|cluster| {
            let connections = cluster.connections.values();
            let producers = connections.map(|connection| connection.producers.len());
            (cluster.connections.len(), producers.sum())
        })
    }

    /// What the cluster has stored, in order, also in topics that are deleted now.
    pub(crate) fn stored(&self) -> Vec<StoredEvent> {
        self.topics(|topics| topics.stored())
    }

    /// What a consumer of this topic finds, in the order of storing.
    pub(crate) fn readable(&self, topic: &str) -> Vec<StoredEvent> {
        self.topics(|topics| topics.readable(topic))
    }

    /// Sends the answers that wait, in this order: `order` gets them oldest first.
    pub(crate) fn release(&self, order: impl FnOnce(&mut Vec<Held>)) {
        self.cluster(|cluster| {
            cluster.answers.release(order);
            cluster.finish_closes();
        });
    }

    /// Sends the oldest answer that waits; false when there is none.
    pub(crate) fn release_one(&self) -> bool {
        self.cluster(|cluster| {
            let released = cluster.answers.release_one();
            cluster.finish_closes();
            released
        })
    }

    /// Ends the writes that pend: stored, or failed. A topic whose write failed is fenced: its producers are closed.
    pub(crate) fn settle(&self, written: bool) {
        self.cluster(|cluster| cluster.settle(written));
    }

    /// Lets the creations of producers go on that a script has stalled.
    pub(crate) fn resume(&self) {
        self.cluster(Cluster::resume);
    }

    /// Says these bytes on every connection.
    pub(crate) fn say(&self, bytes: &[u8]) {
        self.cluster(|cluster| cluster.say(self.index, bytes));
    }

    /// PING on every connection.
    pub(crate) fn ping(&self) {
        self.say(&commands::ping());
    }

    /// `AUTH_CHALLENGE` on every connection, as when credentials expire.
    pub(crate) fn challenge(&self) {
        self.say(&commands::auth_challenge());
    }

    /// A receipt for one of the batches that a producer of some connection sent, whether it is due or not.
    pub(crate) fn say_receipt(&self, producer_id: u64, sequence_id: u64) {
        let ids = (sequence_id, sequence_id);
        self.say(&commands::receipt(producer_id, ids, Some(0)));
    }

    /// The receipt (-1, -1) for ids that a producer of some connection sent, whether they were stored before or not.
    pub(crate) fn say_duplicate(&self, producer_id: u64, ids: (u64, u64)) {
        self.say(&commands::receipt(producer_id, ids, None));
    }

    /// Closes every producer, after saying that its topic has moved to the cluster with this service URL.
    pub(crate) fn migrate(&self, cluster_url: &str) {
        self.cluster(|cluster| cluster.migrate(self.index, cluster_url));
    }

    /// Closes every producer, naming the broker that has their topics now if one is given. What they have sent is not waited for.
    pub(crate) fn close_producers(&self, next: Option<&str>) {
        self.cluster(|cluster| cluster.close_producers(self.index, next));
    }

    /// Ends every connection.
    pub(crate) fn disconnect(&self) {
        self.cluster(|cluster| cluster.end_connections(self.index));
    }

    /// Reads and says nothing while it is true, and the connections stay: the far side of a half-open one.
    pub(crate) fn stall(&self, stalled: bool) {
        self.stalled.send_replace(stalled);
    }

    /// Ends every connection and refuses new ones.
    pub(crate) async fn stop(&mut self) {
        if let Some(accepting) = self.accepting.take() {
            accepting.abort();
            // The listener is closed when its task has ended.
            let _aborted = accepting.await;
        }
        self.disconnect();
    }

    /// Accepts connections again, on the same port.
    pub(crate) async fn start_again(&mut self) {
        let listener = TcpListener::bind(self.addr)
            .await
            .expect("the port is still free");
        self.listen(listener);
    }

    fn cluster<T>(&self, input: impl FnOnce(&mut Cluster) -> T) -> T {
        net::with(&self.world, input)
    }

    fn own<T>(&self, with: impl FnOnce(&mut Broker) -> T) -> T {
        self.cluster(|cluster| with(&mut cluster.brokers[self.index]))
    }

    fn own_script<T>(&self, with: impl FnOnce(&mut Script) -> T) -> T {
        self.own(|broker| with(&mut broker.script))
    }

    fn topics<T>(&self, with: impl FnOnce(&mut Topics) -> T) -> T {
        self.cluster(|cluster| with(&mut cluster.topics))
    }
}

impl Drop for FakeBroker {
    fn drop(&mut self) {
        if let Some(accepting) = self.accepting.take() {
            accepting.abort();
        }
        self.disconnect();
        let faults = self.forgive();
        // Not a second panic while the test's own one is on its way.
        if std::thread::panicking() {
            eprintln!("what the fake broker saw: {faults:?}");
        } else {
            assert!(
                faults.is_empty(),
                "the client broke the protocol: {faults:?}"
            );
        }
    }
}
