//! The stream against a socket pair: any chunking, both kinds of end, huge messages, status updates, cancellation.

use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::*;
use crate::Lsn;

fn on_runtime<T>(work: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(work)
}

fn pair() -> (ReplicationStream, UnixStream) {
    let (ours, server) = UnixStream::pair().unwrap();
    (ReplicationStream::new(Stream::Unix(ours), &[]), server)
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    bytes.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn xlog_data(lsn: u64, payload: &[u8]) -> Vec<u8> {
    let mut body = vec![b'w'];
    for number in [lsn, lsn, 0] {
        body.extend_from_slice(&number.to_be_bytes());
    }
    body.extend_from_slice(payload);
    message(b'd', &body)
}

/// Reads to the end; gives every `XLogData` and the error at the end.
async fn read_all(stream: &mut ReplicationStream) -> (Vec<(u64, Vec<u8>)>, Error) {
    let mut seen = Vec::new();
    loop {
        loop {
            match stream.next_frame() {
                Ok(Some(Frame::XLogData {
                    wal_start, payload, ..
                })) => {
                    seen.push((wal_start.as_u64(), payload.to_vec()));
                }
                Ok(Some(Frame::Keepalive { .. })) => {}
                Ok(None) => break,
                Err(error) => return (seen, error),
            }
        }
        if let Err(error) = stream.fill().await {
            return (seen, error);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_chunking_yields_the_same_frames(
        payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..400), 1..30),
        chunks in proptest::collection::vec(1_usize..700, 1..40),
        read_ahead in 0_usize..100,
    ) {
        let mut bytes = Vec::new();
        for (lsn, payload) in payloads.iter().enumerate() {
            bytes.extend(xlog_data(lsn as u64, payload));
            bytes.extend(message(b'N', b"SNOTICE\0\0"));
        }
        let seen = on_runtime(async {
            let (ours, mut server) = UnixStream::pair().unwrap();
            let read_ahead = read_ahead.min(bytes.len());
            let mut stream = ReplicationStream::new(Stream::Unix(ours), &bytes[..read_ahead]);
            let rest = bytes[read_ahead..].to_vec();
            let writer = async move {
                let mut rest = &rest[..];
                for size in chunks.iter().cycle() {
                    let (chunk, after) = rest.split_at(rest.len().min(*size));
                    server.write_all(chunk).await.unwrap();
                    tokio::task::yield_now().await;
                    rest = after;
                    if rest.is_empty() {
                        return;
                    }
                }
            };
            let ((), (seen, error)) = tokio::join!(writer, read_all(&mut stream));
            assert_eq!(error.to_string(), "the walsender closed the connection");
            seen
        });
        let expected: Vec<_> = payloads.into_iter().enumerate().map(|(lsn, payload)| (lsn as u64, payload)).collect();
        prop_assert_eq!(seen, expected);
    }
}

#[test]
fn an_end_inside_a_message_is_another_error_than_a_clean_one() {
    let bytes = xlog_data(1, b"payload");
    for end in 0..=bytes.len() {
        let (seen, error) = on_runtime(async {
            let (mut stream, mut server) = pair();
            server.write_all(&bytes[..end]).await.unwrap();
            drop(server);
            read_all(&mut stream).await
        });
        let clean = end == 0 || end == bytes.len();
        assert!(error.is_temporary());
        assert_eq!(
            error.to_string().contains("middle of a message"),
            !clean,
            "{end}: {error}"
        );
        assert_eq!(seen.len(), usize::from(end == bytes.len()));
    }
}

#[test]
fn the_servers_reason_is_read_even_when_writing_fails() {
    let (seen, error) = on_runtime(async {
        let (mut stream, mut server) = pair();
        server.write_all(&xlog_data(1, b"x")).await.unwrap();
        let reason = message(b'E', b"SFATAL\0C57P01\0Mterminating connection\0\0");
        server.write_all(&reason).await.unwrap();
        drop(server);
        stream.queue_status(StandbyStatus::default());
        read_all(&mut stream).await
    });
    assert_eq!(seen.len(), 1);
    assert_eq!(crate::postgres::sqlstate(&error), Some("57P01"));
    assert!(error.is_temporary());
}

#[test]
fn bytes_that_are_no_message_end_the_stream() {
    for bytes in [
        message(b'd', b"?"),
        message(b'R', b""),
        b"d\0\0\0\0".to_vec(),
    ] {
        let (_, error) = on_runtime(async {
            let (mut stream, mut server) = pair();
            server.write_all(&bytes).await.unwrap();
            read_all(&mut stream).await
        });
        assert!(
            error.report().contains("no replication message"),
            "{}",
            error.report()
        );
    }
}

#[test]
fn the_buffer_grows_for_a_huge_message_and_shrinks_again() {
    on_runtime(async {
        let (mut stream, mut server) = pair();
        let huge = vec![7; 5 * READ_BUFFER_BYTES];
        let writer = async {
            server.write_all(&xlog_data(1, &huge)).await.unwrap();
            for lsn in 0..200 {
                server.write_all(&xlog_data(lsn, b"small")).await.unwrap();
                tokio::task::yield_now().await;
            }
            server
        };
        let reader = async {
            let (mut largest, mut frames) = (0, 0);
            while frames < 201 {
                stream.fill().await.unwrap();
                largest = largest.max(stream.buffer_bytes());
                while let Some(frame) = stream.next_frame().unwrap() {
                    if let Frame::XLogData { payload, .. } = frame {
                        assert!(payload == b"small" || payload == huge);
                        frames += 1;
                    }
                }
            }
            largest
        };
        let (mut server, largest) = tokio::join!(writer, reader);
        assert!(largest > huge.len());
        for lsn in 0..=u64::from(READS_BEFORE_SHRINKING) {
            server.write_all(&xlog_data(lsn, b"small")).await.unwrap();
            stream.fill().await.unwrap();
            assert!(stream.last_fill_bytes() > 0);
            while stream.next_frame().unwrap().is_some() {}
        }
        assert_eq!(stream.buffer_bytes(), READ_BUFFER_BYTES);
    });
}

#[test]
fn reading_before_taking_is_reported_and_loses_nothing() {
    on_runtime(async {
        let (mut stream, mut server) = pair();
        let one = xlog_data(1, &[0; 1000]);
        let writer = async move {
            for _ in 0..2 * READ_BUFFER_BYTES / one.len() {
                server.write_all(&one).await.unwrap();
            }
        };
        let reader = async {
            let error = loop {
                if let Err(error) = stream.fill().await {
                    break error;
                }
            };
            assert_eq!(error.exit_code(), 70, "{error}");
            while stream.next_frame().unwrap().is_some() {}
            stream.fill().await.unwrap();
            assert!(stream.next_frame().unwrap().is_some());
            while stream.next_frame().unwrap().is_some() {}
            while stream.fill().await.is_ok() {
                while stream.next_frame().unwrap().is_some() {}
            }
        };
        tokio::join!(writer, reader);
    });
}

fn status(flush: u64) -> StandbyStatus {
    StandbyStatus {
        flush: Lsn::new(flush),
        ..StandbyStatus::default()
    }
}

/// The flush positions of the status updates in `bytes`, which must be whole ones.
fn flushed(bytes: &[u8]) -> Vec<u64> {
    assert_eq!(bytes.len() % STATUS_BYTES, 0);
    let updates = bytes.chunks_exact(STATUS_BYTES);
    updates
        .map(|update| {
            assert_eq!(&update[..6], b"d\0\0\0\x26r");
            u64::from_be_bytes(update[14..22].try_into().unwrap())
        })
        .collect()
}

#[test]
fn a_newer_status_replaces_one_that_waits_and_fill_sends_it() {
    on_runtime(async {
        let (mut stream, mut server) = pair();
        assert!(!stream.has_unsent_status());
        for flush in 1..=9 {
            stream.queue_status(status(flush));
        }
        assert!(stream.has_unsent_status());
        // Nothing to read: the fill is dropped unfinished, after it has sent.
        let waited = tokio::time::timeout(Duration::from_millis(20), stream.fill()).await;
        assert!(waited.is_err());
        assert!(!stream.has_unsent_status());
        stream.send_status(status(10)).await.unwrap();
        let mut bytes = [0; 2 * STATUS_BYTES];
        server.read_exact(&mut bytes).await.unwrap();
        assert_eq!(flushed(&bytes), [9, 10]);
    });
}

#[test]
fn a_full_socket_neither_blocks_nor_tears_a_status_apart() {
    on_runtime(async {
        let (mut stream, mut server) = pair();
        // Fill the socket until it takes no more, byte-wise unaligned to the messages.
        let mut flush = 0;
        loop {
            flush += 1;
            stream.queue_status(status(flush));
            let flushed = tokio::time::timeout(Duration::from_millis(5), stream.flush()).await;
            if flushed.is_err() {
                break;
            }
        }
        for _ in 0..1000 {
            flush += 1;
            stream.queue_status(status(flush));
        }
        assert!(stream.output.len() <= 2 * STATUS_BYTES);
        let mut bytes = Vec::new();
        while stream.has_unsent_status() {
            let mut some = vec![0; 4096];
            let count = server.read(&mut some).await.unwrap();
            bytes.extend_from_slice(&some[..count]);
            let _ = tokio::time::timeout(Duration::from_millis(5), stream.flush()).await;
        }
        drop(stream);
        server.read_to_end(&mut bytes).await.unwrap();
        let seen = flushed(&bytes);
        assert!(seen.is_sorted());
        assert_eq!(seen.last(), Some(&flush));
    });
}

#[test]
fn a_half_sent_status_is_completed_before_a_newer_one() {
    let (ours, _server) = on_runtime(async { UnixStream::pair().unwrap() });
    let mut stream = ReplicationStream::new(Stream::Unix(ours), &[]);
    stream.queue_status(status(1));
    stream.sent = 7;
    stream.queue_status(status(2));
    stream.queue_status(status(3));
    assert_eq!(flushed(&stream.output), [1, 3]);
}

#[test]
fn close_sends_what_waits_and_ends_with_the_server() {
    on_runtime(async {
        let (mut stream, mut server) = pair();
        stream.queue_status(status(5));
        let backlog = xlog_data(1, &vec![0; 3 * READ_BUFFER_BYTES]);
        let serve = async move {
            // Busy sending first, as a walsender in the middle of a transaction is.
            server.write_all(&backlog).await.unwrap();
            let mut bytes = [0; STATUS_BYTES + 5];
            server.read_exact(&mut bytes).await.unwrap();
            assert_eq!(flushed(&bytes[..STATUS_BYTES]), [5]);
            assert_eq!(&bytes[STATUS_BYTES..], b"X\0\0\0\x04");
        };
        let (closed, ()) = tokio::join!(stream.close(), serve);
        closed.unwrap();
    });
}

#[test]
fn close_gives_up_on_a_server_that_stays() {
    on_runtime(async {
        let (stream, server) = pair();
        let error = stream
            .close_within(Duration::from_millis(20))
            .await
            .unwrap_err();
        assert!(error.is_temporary());
        drop(server);
    });
}
