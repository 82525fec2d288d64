//! The sockets and the clock around the cluster's state machine.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::answers::{Alarm, ConnectionId, Output};
use super::model::Cluster;

/// What the task of a connection is told.
enum Told {
    Say(Vec<u8>),
    /// It is read again.
    Read,
}

/// The machine, and the way to the tasks of its connections. What is dropped from `tasks` is closed, after everything that was
/// said to it before.
#[derive(Default)]
pub(super) struct World {
    pub(super) cluster: Cluster,
    tasks: BTreeMap<ConnectionId, mpsc::UnboundedSender<Told>>,
}

/// One lock holds all of a cluster's state; nothing awaits under it.
pub(super) type Shared = Arc<Mutex<World>>;

/// Gives the machine an input, and does what it asks for then.
pub(super) fn with<T>(world: &Shared, input: impl FnOnce(&mut Cluster) -> T) -> T {
    let mut locked = lock(world);
    let result = input(&mut locked.cluster);
    for output in locked.cluster.take_outputs() {
        match output {
            Output::Say(connection, bytes) => locked.tell(connection, Told::Say(bytes)),
            Output::Read(connection) => locked.tell(connection, Told::Read),
            Output::Close(connection) => drop(locked.tasks.remove(&connection)),
            Output::Alarm(after, alarm) => ring(Arc::downgrade(world), after, alarm),
        }
    }
    result
}

/// Tells the machine that a time has passed, if there is still one then.
fn ring(world: Weak<Mutex<World>>, after: Duration, alarm: Alarm) {
    tokio::spawn(async move {
        tokio::time::sleep(after).await;
        if let Some(world) = world.upgrade() {
            with(&world, |cluster| cluster.alarm(&alarm));
        }
    });
}

fn lock(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().expect("nothing panics under the lock")
}

impl World {
    fn tell(&self, connection: ConnectionId, told: Told) {
        if let Some(task) = self.tasks.get(&connection) {
            let _ended = task.send(told);
        }
    }
}

/// Accepts a broker's connections until the task is aborted.
pub(super) fn listen(
    world: &Shared,
    broker: usize,
    listener: TcpListener,
    stalled: watch::Receiver<bool>,
) -> JoinHandle<()> {
    let world = Arc::clone(world);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (task, told) = mpsc::unbounded_channel();
            let id = {
                let mut locked = lock(&world);
                let id = locked.cluster.accept(broker);
                locked.tasks.insert(id, task);
                id
            };
            tokio::spawn(serve(Arc::clone(&world), id, stream, told, stalled.clone()));
        }
    })
}

/// One connection, to its end.
async fn serve(
    world: Shared,
    id: ConnectionId,
    stream: TcpStream,
    mut told: mpsc::UnboundedReceiver<Told>,
    mut stalled: watch::Receiver<bool>,
) {
    let (mut reader, mut writer) = stream.into_split();
    let mut inbox = Vec::new();
    loop {
        let is_stalled = *stalled.borrow_and_update();
        let is_read = !is_stalled && with(&world, |cluster| cluster.reads(id));
        if is_read && take_frames(&world, id, &mut inbox) {
            // What a throttled connection has sent waits here.
            continue;
        }
        // What is to be said first. All are cancel safe.
        tokio::select! {
            biased;
            said = told.recv(), if !is_stalled => match said {
                Some(Told::Say(bytes)) => {
                    if writer.write_all(&bytes).await.is_err() {
                        break;
                    }
                }
                Some(Told::Read) => {}
                None => break,
            },
            changed = stalled.changed() => if changed.is_err() { break },
            read = reader.read_buf(&mut inbox), if is_read => {
                if read.unwrap_or(0) == 0 {
                    break;
                }
            }
        }
    }
    with(&world, |cluster| cluster.gone(id));
}

/// Hands over the frames that have arrived, one after the other, while the connection is read; true when there was one.
fn take_frames(world: &Shared, id: ConnectionId, inbox: &mut Vec<u8>) -> bool {
    let mut taken = 0;
    while with(world, |cluster| cluster.reads(id)) {
        let Some(size) = size_of_frame(&inbox[taken..]) else {
            break;
        };
        if !with(world, |cluster| cluster.decodes(id, size)) {
            inbox.clear();
            return false;
        }
        let Some(frame) = inbox.get(taken + 4..taken + 4 + size) else {
            break;
        };
        with(world, |cluster| cluster.frame(id, frame));
        taken += 4 + size;
    }
    inbox.drain(..taken);
    taken > 0
}

/// The size of the next frame, without its first four bytes.
fn size_of_frame(inbox: &[u8]) -> Option<usize> {
    let size = inbox.first_chunk::<4>()?;
    usize::try_from(u32::from_be_bytes(*size)).ok()
}
