//! What a connection writes under its lease, and what it does not.

use pulsar::message::proto::{CommandConnected, CommandSendReceipt, base_command::Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;

/// Frames of 4 MiB: more than sockets hold.
const FRAMES: usize = 16;
const FRAME: &[u8] = b"a frame of a producer";

/// A connection under this lease, the broker's end of it, and the events.
async fn connected(lease: &Lease) -> (Connection, TcpStream, mpsc::Receiver<Event>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint {
        host: "127.0.0.1".to_owned(),
        port: listener.local_addr().unwrap().port(),
        via_proxy_to: None,
    };
    let manner = Manner {
        auth: Auth::None,
        tls: None,
        keepalive_interval: Duration::from_secs(60),
        lease: lease.clone(),
    };
    let (sender, events) = mpsc::channel(8);
    let accepting = async {
        let (mut broker, _) = listener.accept().await.unwrap();
        let size = broker.read_u32().await.unwrap();
        let mut connect = vec![0; size as usize];
        broker.read_exact(&mut connect).await.unwrap();
        let connected = BaseCommand {
            r#type: Type::Connected as i32,
            connected: Some(CommandConnected {
                server_version: "a test".to_owned(),
                ..CommandConnected::default()
            }),
            ..BaseCommand::default()
        };
        broker.write_all(&encode_command(&connected)).await.unwrap();
        broker
    };
    let opening = Connection::open(&endpoint, 7, &manner, sender);
    let (connection, broker) = tokio::join!(opening, accepting);
    (connection.unwrap(), broker, events)
}

/// The broker says something, and the connection's task has taken it: whatever it was to write before, it has written or left.
async fn say(broker: &mut TcpStream, events: &mut mpsc::Receiver<Event>) {
    let receipt = BaseCommand {
        r#type: Type::SendReceipt as i32,
        send_receipt: Some(CommandSendReceipt::default()),
        ..BaseCommand::default()
    };
    broker.write_all(&encode_command(&receipt)).await.unwrap();
    let event = events.recv().await;
    assert!(matches!(event, Some(Event::Receipt { .. })), "{event:?}");
}

#[tokio::test]
async fn a_frame_waits_for_the_lease_while_receipts_are_taken() {
    let lease = Lease::proven();
    let (connection, mut broker, mut events) = connected(&lease).await;
    lease.end();
    connection.send_data(1, Bytes::from_static(FRAME));
    for _ in 0..3 {
        say(&mut broker, &mut events).await;
    }
    let mut byte = [0];
    let unread = broker.try_read(&mut byte);
    assert_eq!(unread.unwrap_err().kind(), io::ErrorKind::WouldBlock);

    lease.renew();
    let mut frame = [0; FRAME.len()];
    broker.read_exact(&mut frame).await.unwrap();
    assert_eq!(frame, FRAME);
}

#[tokio::test]
async fn the_rest_of_a_frame_waits_for_the_lease_as_well() {
    let lease = Lease::proven();
    let (connection, mut broker, mut events) = connected(&lease).await;
    // More than sockets hold: the task waits in the middle of it.
    let large = Bytes::from(vec![1; 4 * 1024 * 1024]);
    for _ in 0..FRAMES {
        connection.send_data(1, large.clone());
    }
    let all = FRAMES * large.len();
    for _ in 0..3 {
        say(&mut broker, &mut events).await;
    }
    lease.end();

    // The broker takes all that comes: it ends with what the kernel held.
    let (mut taken, mut silent_rounds) = (0, 0);
    let mut piece = vec![0; 1024 * 1024];
    while silent_rounds < 3 && taken < all {
        let before = taken;
        while let Ok(bytes) = broker.try_read(&mut piece) {
            taken += bytes;
        }
        say(&mut broker, &mut events).await;
        silent_rounds = if taken == before {
            silent_rounds + 1
        } else {
            0
        };
    }
    assert!(taken < all, "{taken} bytes came");
}

#[tokio::test]
async fn a_connection_that_nobody_holds_any_more_ends_without_writing_what_is_queued() {
    let lease = Lease::proven();
    let (connection, mut broker, mut events) = connected(&lease).await;
    say(&mut broker, &mut events).await;
    for _ in 0..100 {
        connection.send_data(1, Bytes::from_static(FRAME));
    }
    drop(connection);
    let mut taken = Vec::new();
    broker.read_to_end(&mut taken).await.unwrap();
    assert!(taken.is_empty(), "{} bytes came", taken.len());
    // The publisher, if there is one, hears of it.
    let event = events.recv().await;
    assert!(
        matches!(event, Some(Event::Disconnected { connection: 7, .. })),
        "{event:?}"
    );
}

#[test]
fn a_write_that_waits_for_the_socket_looks_at_the_lease_before_it_goes_on() {
    let lease = Lease::proven();
    let mut polls = 0;
    let writing = poll_fn(|_| {
        polls += 1;
        if polls == 1 {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    });
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    {
        let mut held = pin!(held(&lease, writing));
        assert!(held.as_mut().poll(&mut context).is_pending());
        // As of a process that was stopped here.
        lease.end();
        assert_eq!(held.as_mut().poll(&mut context), Poll::Ready(None));
    }
    assert_eq!(polls, 1);
}
