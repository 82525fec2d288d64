//! A Pulsar broker in this process that can be told to misbehave, for what a real one cannot be made to say.
//!
//! It listens on loopback, speaks the binary protocol, and without a script is a healthy broker: it answers, stores what
//! it is sent in the order of arrival, and sends receipts in that order. A test scripts what differs:
//!
//! * [`FakeBroker::script`]: [`Reaction`]s to the next commands of one kind ([`Asked`]), one each, in order;
//! * [`FakeBroker::script_rest`]: a closure for all commands that no script is left for;
//! * unasked: [`FakeBroker::ping`], [`close_producers`](FakeBroker::close_producers), [`say`](FakeBroker::say),
//!   [`disconnect`](FakeBroker::disconnect), [`stall`](FakeBroker::stall), [`stop`](FakeBroker::stop).
//!
//! Several fake brokers make a cluster ([`FakeBroker::beside`]): what is stored is theirs together, the rest is each one's.
//! As a real broker it drops what is sent to a producer that it has closed, goes on taking what stands behind a frame with a
//! wrong checksum, and fails what stands behind any other refused send until the producer is made anew.
//!
//! What no client may do (a wrong checksum, a send to a producer that never was, sequence ids that fall, …) is noted, and
//! fails the test when the broker is dropped. One lock holds all of a broker's state; nothing awaits under it.

mod commands;
mod state;
mod storage;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use pulsar::message::proto::{BaseCommand, ServerError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::eventually;
pub(crate) use commands::{close_producer, reason, topic_migrated};
use state::{State, kind, lock};
use storage::Storage;
pub(crate) use storage::StoredEvent;

/// A kind of command that a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Asked {
    Connect,
    AuthResponse,
    Partitions,
    Lookup,
    Producer,
    CloseProducer,
    Send,
    Ping,
    Pong,
}

/// Where a lookup is answered to.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) url: String,
    /// Ask there again, instead of: the topic is there.
    pub(crate) redirect: bool,
    pub(crate) authoritative: bool,
    pub(crate) through_service_url: bool,
}

/// What is done about one command.
#[derive(Clone, Debug)]
pub(crate) enum Reaction {
    /// What a healthy broker does.
    Obey,
    /// Refused, in the form that belongs to the command; nothing is stored.
    Fail(ServerError),
    /// The answer to a lookup.
    LookAt(Target),
    /// A producer must wait its turn: "not ready" now, "ready" at [`FakeBroker::release`].
    NotReady,
    /// Obeyed; the answer waits for [`FakeBroker::release`].
    Hold,
    /// Obeyed; the answer never comes.
    Lose,
    /// Neither obeyed nor answered.
    Ignore,
    /// A send is handed to storage, and neither succeeds nor fails before [`FakeBroker::settle`].
    Pend,
    /// The connection ends, and the command was not obeyed.
    Close,
    /// Obeyed, and the connection ends in place of the answer.
    ObeyAndClose,
    /// Obeyed, and the connection ends in the middle of the answer.
    CutShort,
    /// These bytes in place of the answer.
    Say(Vec<u8>),
    /// `AUTH_CHALLENGE` in place of CONNECTED.
    Challenge,
}

/// A running broker; it ends with the test.
pub(crate) struct FakeBroker {
    addr: SocketAddr,
    state: Arc<Mutex<State>>,
    stalled: watch::Sender<bool>,
    accepting: Option<JoinHandle<()>>,
}

impl FakeBroker {
    /// Starts a broker on a free port of loopback.
    pub(crate) async fn start() -> Self {
        Self::with(Arc::default()).await
    }

    /// The same, in a namespace that deduplicates.
    pub(crate) async fn start_deduplicating() -> Self {
        let broker = Self::start().await;
        broker.storage(|storage| storage.deduplicates = true);
        broker
    }

    /// Another broker of the same cluster.
    pub(crate) async fn beside(&self) -> Self {
        let storage = Arc::clone(&self.state().storage);
        Self::with(storage).await
    }

    async fn with(storage: Arc<Mutex<Storage>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("a bound socket");
        let state = State {
            url: format!("pulsar://{addr}"),
            storage,
            ..State::default()
        };
        let mut broker = Self {
            addr,
            state: Arc::new(Mutex::new(state)),
            stalled: watch::Sender::new(false),
            accepting: None,
        };
        broker.listen(listener);
        broker
    }

    fn listen(&mut self, listener: TcpListener) {
        let (state, stalled) = (Arc::clone(&self.state), self.stalled.subscribe());
        self.accepting = Some(tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (say, says) = mpsc::unbounded_channel();
                let id = lock(&state).accept(say);
                tokio::spawn(serve(Arc::clone(&state), id, stream, says, stalled.clone()));
            }
        }));
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
        let mut state = self.state();
        state.script.entry(asked).or_default().extend(reactions);
    }

    /// Decides about every command that no script is left for.
    pub(crate) fn script_rest(
        &self,
        decide: impl FnMut(Asked, &BaseCommand) -> Reaction + Send + 'static,
    ) {
        self.state().rest = Some(Box::new(decide));
    }

    /// Forgets every script: a healthy broker from now on.
    pub(crate) fn heal(&self) {
        let mut state = self.state();
        state.rest = None;
        state.script.clear();
    }

    /// The `max_message_size` that CONNECTED tells from now on.
    pub(crate) fn limit(&self, max_message_bytes: i32) {
        self.state().max_message_bytes = Some(max_message_bytes);
    }

    /// Every command of this kind that came so far, in order.
    pub(crate) fn seen(&self, asked: Asked) -> Vec<BaseCommand> {
        let state = self.state();
        let of_kind = state
            .seen
            .iter()
            .filter(|command| kind(command) == Some(asked));
        of_kind.cloned().collect()
    }

    /// How many of them.
    pub(crate) fn count(&self, asked: Asked) -> usize {
        let state = self.state();
        let seen = state.seen.iter();
        seen.filter(|command| kind(command) == Some(asked)).count()
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
        self.state().frames.clone()
    }

    /// Forgets what was said to it and what it has stored, so that a bench may send for as long as it likes.
    pub(crate) fn forget(&self) {
        {
            let mut state = self.state();
            state.seen.clear();
            state.frames.clear();
        }
        self.storage(|storage| storage.events.clear());
    }

    /// How many connections were made so far.
    pub(crate) fn connections(&self) -> u64 {
        self.state().accepted
    }

    /// What the cluster has stored, in order.
    pub(crate) fn stored(&self) -> Vec<StoredEvent> {
        self.storage(|storage| storage.events.clone())
    }

    /// Sends the answers that wait, in this order: `order` gets them oldest first.
    pub(crate) fn release(&self, order: impl FnOnce(&mut Vec<(u64, Vec<u8>)>)) {
        let mut state = self.state();
        let mut held = std::mem::take(&mut state.held);
        order(&mut held);
        for (connection, bytes) in held {
            state.say(connection, bytes);
        }
    }

    /// Sends the oldest answer that waits; false when there is none.
    pub(crate) fn release_one(&self) -> bool {
        let mut state = self.state();
        if state.held.is_empty() {
            return false;
        }
        let (connection, bytes) = state.held.remove(0);
        state.say(connection, bytes);
        true
    }

    /// Ends the writes that pend: stored, or failed. A topic whose write failed is fenced: its producers are closed.
    pub(crate) fn settle(&self, written: bool) {
        self.storage(|storage| storage.settle(written));
        if !written {
            self.close_producers(None);
        }
    }

    /// Says these bytes on every connection.
    pub(crate) fn say(&self, bytes: &[u8]) {
        let state = self.state();
        for &connection in state.connections.keys() {
            state.say(connection, bytes.to_vec());
        }
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
        self.say(&commands::receipt(
            producer_id,
            (sequence_id, sequence_id),
            Some(0),
        ));
    }

    /// Closes every producer, naming the broker that has their topics now if one is given.
    pub(crate) fn close_producers(&self, next: Option<&str>) {
        let mut state = self.state();
        for ((connection, producer_id), _) in std::mem::take(&mut state.producers) {
            state.closed.insert((connection, producer_id));
            state.say(connection, commands::close_producer(producer_id, next));
        }
    }

    /// Closes every producer, after saying that its topic has moved to the cluster with this service URL.
    pub(crate) fn migrate(&self, cluster: &str) {
        {
            let state = self.state();
            for &(connection, producer_id) in state.producers.keys() {
                state.say(connection, commands::topic_migrated(producer_id, cluster));
            }
        }
        self.close_producers(None);
    }

    /// Ends every connection.
    pub(crate) fn disconnect(&self) {
        self.state().connections.clear();
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

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn storage<T>(&self, with: impl FnOnce(&mut Storage) -> T) -> T {
        self.state().storage(with)
    }
}

impl Drop for FakeBroker {
    fn drop(&mut self) {
        if let Some(accepting) = self.accepting.take() {
            accepting.abort();
        }
        let mut state = self.state();
        state.connections.clear();
        let faults = std::mem::take(&mut state.faults);
        drop(state);
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

/// One connection, to its end.
async fn serve(
    state: Arc<Mutex<State>>,
    id: u64,
    stream: TcpStream,
    mut says: mpsc::UnboundedReceiver<Vec<u8>>,
    mut stalled: watch::Receiver<bool>,
) {
    let (mut reader, mut writer) = stream.into_split();
    let mut inbox = Vec::new();
    loop {
        let is_stalled = *stalled.borrow_and_update();
        // What is to be said first. All are cancel safe.
        tokio::select! {
            biased;
            said = says.recv(), if !is_stalled => {
                let Some(bytes) = said else { break };
                if writer.write_all(&bytes).await.is_err() {
                    break;
                }
            }
            changed = stalled.changed() => if changed.is_err() { break },
            read = reader.read_buf(&mut inbox), if !is_stalled => {
                if read.unwrap_or(0) == 0 {
                    break;
                }
                while let Some(frame) = take_frame(&mut inbox) {
                    if !lock(&state).frame(id, &frame) {
                        break;
                    }
                }
            }
        }
    }
    lock(&state).gone(id);
}

/// Takes the next whole frame, without its first four bytes.
fn take_frame(inbox: &mut Vec<u8>) -> Option<Vec<u8>> {
    let size = u32::from_be_bytes(*inbox.first_chunk::<4>()?) as usize;
    let rest = inbox.get(4 + size..)?.to_vec();
    let frame = inbox[4..4 + size].to_vec();
    *inbox = rest;
    Some(frame)
}
