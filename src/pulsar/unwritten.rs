//! Frames that the socket of a connection has not taken yet, and the order in which it gets them.
//!
//! Pure. Commands go before the data of other producers: a topic whose data the broker takes slowly must not hold up the
//! lookups, pings and producers of all others. Two rules limit that:
//!
//! * a frame that is partly written is finished first;
//! * a command about a producer stays behind what is queued of that producer (a `CLOSE_PRODUCER` that overtakes a frame makes the
//!   broker drop it; a `PRODUCER` that overtakes one lets it arrive in the next incarnation).

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes};

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A batch of this producer.
    Data(u64),
    /// A command; with the producer that it is about and the request that it makes, if any.
    Command {
        producer: Option<u64>,
        request: Option<u64>,
    },
}

#[derive(Debug)]
struct Frame {
    bytes: Bytes,
    kind: Kind,
}

impl Frame {
    fn is_about(&self, producer_id: u64) -> bool {
        match self.kind {
            Kind::Data(producer) => producer == producer_id,
            Kind::Command { producer, .. } => producer == Some(producer_id),
        }
    }
}

/// See the module's documentation. Its size is bounded by those who fill it: data is under the publisher's in-flight limits, and
/// there are few commands.
#[derive(Debug, Default)]
pub(super) struct Unwritten {
    /// Partly written.
    begun: Option<Frame>,
    commands: VecDeque<Frame>,
    /// Batches, and the commands that stay behind some of them.
    data: VecDeque<Frame>,
}

/// What a write has done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// Bytes of batches.
    pub data_bytes: usize,
    /// Requests whose frames are written to the end.
    pub requests: Vec<u64>,
}

impl Unwritten {
    /// Queues a batch.
    pub(super) fn push_data(&mut self, producer_id: u64, bytes: Bytes) {
        let kind = Kind::Data(producer_id);
        self.data.push_back(Frame { bytes, kind });
    }

    /// Queues a command: the request that it makes, and the producer that it is about.
    pub(super) fn push_command(
        &mut self,
        bytes: Bytes,
        request: Option<u64>,
        producer: Option<u64>,
    ) {
        let kind = Kind::Command { producer, request };
        let frame = Frame { bytes, kind };
        let last_of_producer =
            producer.and_then(|id| self.data.iter().rposition(|queued| queued.is_about(id)));
        match last_of_producer {
            Some(place) => self.data.insert(place + 1, frame),
            None => self.commands.push_back(frame),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.begun.is_none() && self.commands.is_empty() && self.data.is_empty()
    }

    /// Fills `slices` with what is to be written next; returns how many were filled.
    pub(super) fn fill<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let in_order = (self.begun.iter())
            .chain(&self.commands)
            .chain(&self.data)
            .zip(slices);
        let mut count = 0;
        for (frame, slice) in in_order {
            *slice = IoSlice::new(&frame.bytes);
            count += 1;
        }
        count
    }

    /// Takes what was written out of the queue: so many bytes of the order that `fill` gives.
    pub(super) fn written(&mut self, mut bytes: usize) -> Taken {
        let mut taken = Taken::default();
        while bytes > 0 {
            let next = (self.begun.take())
                .or_else(|| self.commands.pop_front())
                .or_else(|| self.data.pop_front());
            let mut frame = next.expect("no more is written than was queued");
            let of_frame = bytes.min(frame.bytes.len());
            bytes -= of_frame;
            frame.bytes.advance(of_frame);
            if matches!(frame.kind, Kind::Data(_)) {
                taken.data_bytes += of_frame;
            }
            if frame.bytes.has_remaining() {
                self.begun = Some(frame);
            } else if let Kind::Command { request, .. } = frame.kind {
                taken.requests.extend(request);
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the socket would get, a byte at a time.
    fn drain(queue: &mut Unwritten) -> String {
        let mut text = String::new();
        while !queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); 2];
            assert!(queue.fill(&mut slices) > 0);
            text.push(char::from(slices[0][0]));
            queue.written(1);
        }
        text
    }

    fn bytes(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    #[test]
    fn commands_go_before_data() {
        let mut queue = Unwritten::default();
        queue.push_data(1, bytes("aa"));
        queue.push_data(1, bytes("bb"));
        queue.push_command(bytes("x"), None, None);
        queue.push_command(bytes("y"), Some(7), None);
        queue.push_data(1, bytes("cc"));
        assert_eq!(drain(&mut queue), "xyaabbcc");
    }

    #[test]
    fn a_frame_that_is_partly_written_is_finished_first() {
        let mut queue = Unwritten::default();
        queue.push_data(1, bytes("aaa"));
        queue.push_data(1, bytes("bbb"));
        queue.written(1);
        queue.push_command(bytes("xx"), None, None);
        queue.written(2);
        queue.written(1);
        queue.push_command(bytes("y"), None, None);
        assert_eq!(drain(&mut queue), "xybbb");
    }

    #[test]
    fn a_command_about_a_producer_stays_behind_the_data_of_that_producer_only() {
        // GIVEN data of two producers
        let mut queue = Unwritten::default();
        for (producer, text) in [(1, "a"), (2, "b"), (1, "c"), (2, "d")] {
            queue.push_data(producer, bytes(text));
        }
        // WHEN one of them is closed and opened again, and a third is opened
        queue.push_command(bytes("x"), Some(7), Some(1));
        queue.push_command(bytes("y"), Some(8), Some(1));
        queue.push_command(bytes("z"), Some(9), Some(3));
        queue.push_data(1, bytes("e"));
        // THEN nothing of a producer changes places
        assert_eq!(drain(&mut queue), "zabcxyde");
    }

    #[test]
    fn a_command_about_a_producer_waits_for_its_frame_that_is_partly_written() {
        let mut queue = Unwritten::default();
        queue.push_data(1, bytes("aaa"));
        queue.push_data(2, bytes("b"));
        queue.written(1);
        queue.push_command(bytes("x"), None, Some(1));
        assert_eq!(drain(&mut queue), "aaxb");
    }

    #[test]
    fn a_write_tells_its_bytes_of_data_and_its_whole_requests() {
        let mut queue = Unwritten::default();
        queue.push_command(bytes("xx"), Some(7), None);
        queue.push_command(bytes("p"), None, None);
        queue.push_command(bytes("yy"), Some(8), None);
        queue.push_data(1, bytes("aaaa"));
        let taken = |data_bytes, requests: &[u64]| Taken {
            data_bytes,
            requests: requests.to_vec(),
        };
        assert_eq!(queue.written(1), taken(0, &[]));
        assert_eq!(queue.written(3), taken(0, &[7]));
        assert_eq!(queue.written(3), taken(2, &[8]));
        assert_eq!(queue.written(2), taken(2, &[]));
        assert!(queue.is_empty());
    }
}
