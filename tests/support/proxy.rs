//! A TCP proxy on loopback between walpost and a server, with faults at hand.
//!
//! It owns a thread with a runtime of its own, so it goes on while a test blocks. The controls are one `watch` value
//! that every pump follows; nothing is buffered beyond the piece in hand, so what is held stays in the sockets and the
//! server or the client feels it.
//!
//! A broker answers a topic's lookup with its own address, and the client's next connection would pass the proxy by. So
//! [`Proxy::before_broker`] puts the proxy's address in place of the broker's in everything that the broker says.
//! [`Proxy::seen_by`] does the same and lets an [`Onlooker`] see what passes.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Bytes moved at a time.
const PIECE_BYTES: usize = 64 * 1024;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Direction {
    /// From the client.
    ToServer,
    /// From the server.
    ToClient,
}

/// Is shown each piece, with its connection's number and the instant at which it was read: once it has been passed on when
/// it goes to the server, so that looking delays nothing, and before when it comes from there.
pub(crate) type Onlooker = Arc<dyn Fn(Direction, u64, Instant, &[u8]) + Send + Sync>;

#[derive(Clone, Copy, Debug, Default)]
struct Controls {
    hold_replies: bool,
    hold_requests: bool,
    refuse: bool,
    /// The answers to a request with this text, and to all behind it on its connection, are held.
    swallow: Option<&'static str>,
    /// Counts [`Proxy::cut`]s: a connection ends when the number is not the one it began with.
    cuts: u64,
    /// Counts [`Proxy::lose_packets`]: nothing passes any more on a connection when the number is not the one it began with.
    losses: u64,
}

#[derive(Default)]
struct Counters {
    to_server_bytes: AtomicU64,
    to_client_bytes: AtomicU64,
    accepted: AtomicU64,
}

/// A running proxy; dropping it ends it and its connections.
pub(crate) struct Proxy {
    addr: SocketAddr,
    controls: Option<watch::Sender<Controls>>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Starts a proxy on a free port before `server` (`host:port`).
    pub(crate) fn start(server: &str) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback can be bound");
        Self::serve(listener, server, None, None)
    }

    /// Starts a proxy before a Pulsar broker at `127.0.0.1:port`, which then seems to live at the proxy's address.
    ///
    /// Both addresses have the same length, so that no frame's size changes.
    pub(crate) fn before_broker(broker: &str) -> Self {
        Self::readdressing(broker, None)
    }

    /// The same, and `onlooker` sees all that passes.
    pub(crate) fn seen_by(broker: &str, onlooker: Onlooker) -> Self {
        Self::readdressing(broker, Some(onlooker))
    }

    fn readdressing(broker: &str, onlooker: Option<Onlooker>) -> Self {
        let listener = bind_as_long_as(broker);
        let addr = listener.local_addr().expect("a bound socket");
        let readdress = Readdress {
            from: broker.to_owned().into_bytes(),
            to: addr.to_string().into_bytes(),
        };
        assert_eq!(readdress.from.len(), readdress.to.len());
        Self::serve(listener, broker, Some(readdress), onlooker)
    }

    fn serve(
        listener: std::net::TcpListener,
        server: &str,
        readdress: Option<Readdress>,
        onlooker: Option<Onlooker>,
    ) -> Self {
        listener.set_nonblocking(true).expect("a plain socket");
        let addr = listener.local_addr().expect("a bound socket");
        let (controls, watched) = watch::channel(Controls::default());
        let counters = Arc::new(Counters::default());
        let (server, counted) = (server.to_owned(), Arc::clone(&counters));
        let thread = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime")
                .block_on(async move {
                    let listener = TcpListener::from_std(listener).expect("a nonblocking socket");
                    accept_all(listener, (server, readdress, onlooker), watched, counted).await;
                });
        });
        Self {
            addr,
            controls: Some(controls),
            counters,
            thread: Some(thread),
        }
    }

    /// `host:port` to connect to instead of the server's.
    pub(crate) fn addr(&self) -> String {
        self.addr.to_string()
    }

    /// The port to connect to.
    pub(crate) fn port(&self) -> u16 {
        self.addr.port()
    }

    /// Stops (or goes on) passing what the server says: receipts and replies are held, not lost.
    pub(crate) fn hold_upstream_replies(&self, hold: bool) {
        self.change(|controls| controls.hold_replies = hold);
    }

    /// Stops (or goes on) passing what the client says.
    pub(crate) fn hold_requests(&self, hold: bool) {
        self.change(|controls| controls.hold_requests = hold);
    }

    /// Holds what the server says on a connection once the client has said `text` there; `None` lets all of it go on. (The text must come in
    /// one piece, as a statement of moderate length does.)
    pub(crate) fn swallow_answer_to(&self, text: Option<&'static str>) {
        self.change(|controls| controls.swallow = text);
    }

    /// Drops every connection there is; what was held is lost. New ones are welcome.
    pub(crate) fn cut(&self) {
        self.change(|controls| controls.cuts += 1);
    }

    /// From now on nothing passes either way on the connections that there are, the end of one side included, as when a firewall has forgotten them;
    /// both sides believe that the other is there. New ones are welcome.
    pub(crate) fn lose_packets(&self) {
        self.change(|controls| controls.losses += 1);
    }

    /// Ends each new connection at once (or no longer does); those that are there go on.
    pub(crate) fn refuse(&self, refuse: bool) {
        self.change(|controls| controls.refuse = refuse);
    }

    /// Bytes passed from clients to the server so far.
    pub(crate) fn to_server_bytes(&self) -> u64 {
        self.counters.to_server_bytes.load(Ordering::Relaxed)
    }

    /// Bytes passed from the server to clients so far.
    pub(crate) fn to_client_bytes(&self) -> u64 {
        self.counters.to_client_bytes.load(Ordering::Relaxed)
    }

    /// Connections that clients have made so far, refused ones included.
    pub(crate) fn accepted(&self) -> u64 {
        self.counters.accepted.load(Ordering::Relaxed)
    }

    fn change(&self, change: impl FnOnce(&mut Controls)) {
        let controls = self.controls.as_ref().expect("only drop takes it");
        controls.send_modify(change);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Without its sender every pump, and then the thread, comes to an end.
        self.controls = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A listener whose address has as many characters as `addr` (`127.0.0.1:port`).
fn bind_as_long_as(addr: &str) -> std::net::TcpListener {
    let fits = |listener: &std::net::TcpListener| {
        let own = listener.local_addr().expect("a bound socket").to_string();
        own.len() == addr.len()
    };
    // The system's choice has five digits nearly always, and so have most brokers' ports here.
    let chosen = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback can be bound");
    if fits(&chosen) {
        return chosen;
    }
    (1024..=u16::MAX)
        .filter_map(|port| std::net::TcpListener::bind(("127.0.0.1", port)).ok())
        .find(fits)
        .unwrap_or_else(|| panic!("no free port makes an address as long as {addr}"))
}

/// The server's address, what stands in its place in what it says, and who looks on.
type Way = (String, Option<Readdress>, Option<Onlooker>);

async fn accept_all(
    listener: TcpListener,
    way: Way,
    mut watched: watch::Receiver<Controls>,
    counters: Arc<Counters>,
) {
    loop {
        let client = tokio::select! {
            biased;
            changed = watched.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => client,
                Err(_) => continue,
            },
        };
        let number = counters.accepted.fetch_add(1, Ordering::Relaxed);
        if watched.borrow().refuse {
            continue;
        }
        tokio::spawn(relay(
            (client, number),
            way.clone(),
            watched.clone(),
            Arc::clone(&counters),
        ));
    }
}

/// One connection, to the end of either side; then both are closed.
async fn relay(
    (client, number): (TcpStream, u64),
    (server, readdress, onlooker): Way,
    watched: watch::Receiver<Controls>,
    counters: Arc<Counters>,
) -> io::Result<()> {
    let upstream = TcpStream::connect(server).await?;
    client.set_nodelay(true)?;
    upstream.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = upstream.into_split();
    let began = *watched.borrow();
    let swallows = AtomicBool::new(false);
    let requests = Pump {
        from: from_client,
        to: to_server,
        watched: watched.clone(),
        held: |controls| controls.hold_requests,
        began,
        swallows: &swallows,
        is_answering: false,
        frames: None,
        count: &counters.to_server_bytes,
        onlooker: onlooker
            .clone()
            .map(|onlooker| (onlooker, Direction::ToServer, number)),
    };
    let replies = Pump {
        from: from_server,
        to: to_client,
        watched,
        held: |controls| controls.hold_replies,
        began,
        swallows: &swallows,
        is_answering: true,
        frames: readdress.map(|readdress| Frames {
            readdress,
            unfinished: Vec::new(),
        }),
        count: &counters.to_client_bytes,
        onlooker: onlooker.map(|onlooker| (onlooker, Direction::ToClient, number)),
    };
    tokio::select! {
        done = requests.run() => done,
        done = replies.run() => done,
    }
}

/// One direction of one connection.
struct Pump<'a> {
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    watched: watch::Receiver<Controls>,
    /// Which of the controls holds this direction.
    held: fn(&Controls) -> bool,
    /// The controls when the connection began.
    began: Controls,
    /// This connection has had the text whose answer is swallowed.
    swallows: &'a AtomicBool,
    /// This is the server's direction.
    is_answering: bool,
    /// Set where a broker's address is replaced.
    frames: Option<Frames>,
    count: &'a AtomicU64,
    onlooker: Option<(Onlooker, Direction, u64)>,
}

impl Pump<'_> {
    async fn run(mut self) -> io::Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            self.while_held().await?;
            // 1. a change of the controls, so that a hold or a cut is never late; 2. bytes. Both are cancel safe.
            let length = tokio::select! {
                biased;
                changed = self.watched.changed() => {
                    changed.map_err(|_| gone())?;
                    continue;
                }
                length = self.from.read(&mut piece) => length?,
            };
            if length == 0 {
                return Ok(());
            }
            let replaced = self
                .frames
                .as_mut()
                .map(|frames| frames.pass(&piece[..length]));
            let passed = replaced.as_deref().unwrap_or(&piece[..length]);
            // A hold that came while these bytes were read holds them too.
            self.while_held().await?;
            let read_at = Instant::now();
            let swallowed = self.watched.borrow().swallow.filter(|_| !self.is_answering);
            if let Some(text) = swallowed
                && passed
                    .windows(text.len())
                    .any(|seen| seen == text.as_bytes())
            {
                self.swallows.store(true, Ordering::Relaxed);
            }
            self.show(Direction::ToClient, read_at, passed);
            tokio::select! {
                biased;
                cut = until_cut(&mut self.watched, self.began.cuts) => return cut,
                written = self.to.write_all(passed) => written?,
            }
            self.show(Direction::ToServer, read_at, passed);
            self.count.fetch_add(passed.len() as u64, Ordering::Relaxed);
        }
    }

    /// Lets the onlooker see a piece that goes this way.
    fn show(&self, way: Direction, read_at: Instant, passed: &[u8]) {
        if let Some((onlooker, direction, number)) = &self.onlooker
            && *direction == way
        {
            onlooker(way, *number, read_at, passed);
        }
    }

    /// Returns when this direction is not held; an error ends the connection.
    async fn while_held(&mut self) -> io::Result<()> {
        let (held, cuts, losses) = (self.held, self.began.cuts, self.began.losses);
        let swallows = |controls: &Controls| {
            self.is_answering && controls.swallow.is_some() && self.swallows.load(Ordering::Relaxed)
        };
        let controls = self
            .watched
            .wait_for(|controls| {
                let is_held = held(controls) || swallows(controls) || controls.losses != losses;
                controls.cuts != cuts || !is_held
            })
            .await
            .map_err(|_| gone())?;
        if controls.cuts == cuts {
            Ok(())
        } else {
            Err(gone())
        }
    }
}

/// One address for another of the same length.
#[derive(Clone, Debug)]
struct Readdress {
    from: Vec<u8>,
    to: Vec<u8>,
}

/// Cuts a broker's bytes into its frames (`[u32 size][…]`), because an address may arrive in two pieces.
struct Frames {
    readdress: Readdress,
    /// The beginning of a frame whose end is yet to come: of no use to the client before.
    unfinished: Vec<u8>,
}

impl Frames {
    /// Takes the next bytes and returns the frames that are complete with them, readdressed.
    fn pass(&mut self, piece: &[u8]) -> Vec<u8> {
        self.unfinished.extend_from_slice(piece);
        let mut end = 0;
        while let Some(size) = self.unfinished[end..].first_chunk::<4>() {
            let next = end + 4 + u32::from_be_bytes(*size) as usize;
            if next > self.unfinished.len() {
                break;
            }
            end = next;
        }
        let rest = self.unfinished.split_off(end);
        let mut frames = std::mem::replace(&mut self.unfinished, rest);
        let Readdress { from, to } = &self.readdress;
        let mut at = 0;
        while let Some(found) = frames[at..]
            .windows(from.len())
            .position(|seen| seen == from)
        {
            at += found;
            frames[at..at + to.len()].copy_from_slice(to);
            at += to.len();
        }
        frames
    }
}

/// Returns, with an error, when the connection is cut.
async fn until_cut(watched: &mut watch::Receiver<Controls>, cuts: u64) -> io::Result<()> {
    let _ = watched.wait_for(|controls| controls.cuts != cuts).await;
    Err(gone())
}

fn gone() -> io::Error {
    io::Error::from(io::ErrorKind::ConnectionAborted)
}
