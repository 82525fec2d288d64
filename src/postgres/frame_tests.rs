//! Frames at every truncation, with every wrong length, and cut into random pieces.

use proptest::prelude::*;

use super::*;

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    bytes.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn xlog_data(wal_start: u64, wal_end: u64, sent: i64, payload: &[u8]) -> Vec<u8> {
    let mut body = vec![b'w'];
    body.extend_from_slice(&wal_start.to_be_bytes());
    body.extend_from_slice(&wal_end.to_be_bytes());
    body.extend_from_slice(&sent.to_be_bytes());
    body.extend_from_slice(payload);
    message(b'd', &body)
}

fn keepalive(wal_end: u64, sent: i64, reply: u8) -> Vec<u8> {
    let mut body = vec![b'k'];
    body.extend_from_slice(&wal_end.to_be_bytes());
    body.extend_from_slice(&sent.to_be_bytes());
    body.push(reply);
    message(b'd', &body)
}

#[test]
fn reads_each_message() {
    let xlog = Message::Frame(Frame::XLogData {
        wal_start: Lsn::new(7),
        wal_end: Lsn::new(u64::MAX),
        send_time_us: -1,
        payload: b"payload",
    });
    let alive = Message::Frame(Frame::Keepalive {
        wal_end: Lsn::new(9),
        send_time_us: 5,
        reply_requested: true,
    });
    for (bytes, expected) in [
        (xlog_data(7, u64::MAX, -1, b"payload"), xlog),
        (keepalive(9, 5, 1), alive),
        (message(b'E', b"C57P01\0\0"), Message::Error(b"C57P01\0\0")),
        (message(b'N', b"\0"), Message::Notice(b"\0")),
        (message(b'S', b"a\0b\0"), Message::Parameter),
        (message(b'c', b""), Message::End),
        (message(b'C', b"COPY 0\0"), Message::End),
    ] {
        assert_eq!(parse(&bytes), Ok(Some((expected, bytes.len()))));
        // What follows is not touched.
        let mut more = bytes.clone();
        more.extend_from_slice(b"d\0\0");
        assert_eq!(parse(&more), Ok(Some((expected, bytes.len()))));
        // Every truncation is "not yet".
        for end in 0..bytes.len() {
            assert_eq!(parse(&bytes[..end]), Ok(None), "{end}");
        }
    }
}

#[test]
fn refuses_what_is_no_replication_message() {
    for (bytes, expected) in [
        (b"d\0\0\0\x03".to_vec(), FrameError::Length(3)),
        (b"d\xff\xff\xff\xff".to_vec(), FrameError::Length(u32::MAX)),
        (message(b'W', b""), FrameError::Tag(b'W')),
        (message(b'd', b""), FrameError::Kind(0)),
        (message(b'd', b"x"), FrameError::Kind(b'x')),
        (message(b'd', &[b'w'; 24]), FrameError::Body(b'w')),
        (message(b'd', &[b'k'; 17]), FrameError::Body(b'k')),
        (message(b'd', &[b'k'; 19]), FrameError::Body(b'k')),
    ] {
        assert_eq!(parse(&bytes), Err(expected));
    }
}

#[test]
fn a_status_update_has_the_documented_layout() {
    let status = StandbyStatus {
        write: Lsn::new(3),
        flush: Lsn::new(2),
        apply: Lsn::new(1),
        reply_requested: true,
    };
    let mut bytes = Vec::new();
    status.encode(4, &mut bytes);
    assert_eq!(bytes.len(), STATUS_BYTES);
    assert_eq!(message_bytes(&bytes), Ok(Some(STATUS_BYTES)));
    let mut expected = b"d\0\0\0\x26r".to_vec();
    for number in [3_u64, 2, 1, 4] {
        expected.extend_from_slice(&number.to_be_bytes());
    }
    expected.push(1);
    assert_eq!(bytes, expected);
}

#[test]
fn time_counts_from_2000() {
    assert_eq!(postgres_time_us(UNIX_EPOCH + POSTGRES_EPOCH), 0);
    let later = UNIX_EPOCH + POSTGRES_EPOCH + Duration::from_millis(3);
    assert_eq!(postgres_time_us(later), 3000);
    assert!(postgres_time_us(UNIX_EPOCH) < 0);
}

fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let payload = || proptest::collection::vec(any::<u8>(), 0..300);
    prop_oneof![
        4 => (any::<u64>(), any::<u64>(), any::<i64>(), payload())
            .prop_map(|(start, end, sent, payload)| xlog_data(start, end, sent, &payload)),
        2 => (any::<u64>(), any::<i64>(), any::<u8>())
            .prop_map(|(end, sent, reply)| keepalive(end, sent, reply)),
        1 => payload().prop_map(|body| message(b'N', &body)),
    ]
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _ = parse(&bytes);
        let _ = parse(&message(b'd', &bytes));
    }

    #[test]
    fn a_stream_of_messages_is_read_back(messages in proptest::collection::vec(any_message(), 0..20)) {
        let stream = messages.concat();
        let mut rest = &stream[..];
        for message in &messages {
            let (read, used) = parse(rest).unwrap().unwrap();
            prop_assert_eq!(used, message.len());
            prop_assert_eq!(parse(message).unwrap().unwrap().0, read);
            rest = &rest[used..];
        }
        prop_assert!(rest.is_empty());
    }
}
