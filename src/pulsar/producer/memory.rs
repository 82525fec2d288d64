//! `Memory`: what a publisher's lanes write with, one after the other: scratch, and the buffers that batches are filled in.
//!
//! A batch has its buffer from its first message to its receipt. Then it is given back, and the next batch that begins takes it,
//! of whichever lane: the one given back last goes first, so it is still in the processor's cache, and there are no more of
//! them than batches were without receipt at a time. Left to the allocator, pieces of this size go back to the system and
//! come again as new pages, each of them cleared first: that was 7% of walpost's time in a drain over a Unix socket.
//!
//! Buffers are cut in a few sizes, each twice the one before; what a smaller batch leaves of its own untouched takes no memory.

use bytes::{Bytes, BytesMut};

const MIN_BUFFER_BYTES: usize = 1024;
/// 1 KiB to 1 MiB. What is larger is left to the allocator.
const SIZES: usize = 11;
/// Free buffers are worth keeping up to this; a drain has about as much under way.
const MAX_FREE_BYTES: usize = 4 * 1024 * 1024;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// For a batch's header.
    pub header: Vec<u8>,
    /// For a message's metadata.
    pub metadata: Vec<u8>,
    stacks: [Stack; SIZES],
    free_bytes: usize,
}

/// Free buffers of one size.
#[derive(Debug, Default)]
struct Stack {
    free: Vec<BytesMut>,
    /// The fewest there were since the last [`Memory::trim`].
    least: usize,
}

impl Memory {
    /// An empty buffer with room for `bytes`; it grows beyond them by itself.
    pub(super) fn take(&mut self, bytes: usize) -> BytesMut {
        let size = bytes.next_power_of_two().max(MIN_BUFFER_BYTES);
        let Some(stack) = place(size).and_then(|place| self.stacks.get_mut(place)) else {
            return BytesMut::with_capacity(bytes);
        };
        let taken = stack.free.pop();
        stack.least = stack.least.min(stack.free.len());
        match taken {
            Some(buffer) => {
                self.free_bytes -= size;
                buffer
            }
            None => BytesMut::with_capacity(size),
        }
    }

    /// Takes back a frame that nobody else holds any more; one that somebody does is theirs.
    pub(super) fn give_back(&mut self, frame: Bytes) {
        let Ok(mut buffer) = frame.try_into_mut() else {
            return;
        };
        buffer.clear();
        // The frame began somewhat behind the buffer's start. One that grew in a hurry is between two sizes.
        let mut size = buffer.capacity().next_power_of_two();
        if !buffer.try_reclaim(size) {
            size /= 2;
        }
        if self.free_bytes + size > MAX_FREE_BYTES {
            return;
        }
        if let Some(stack) = place(size).and_then(|place| self.stacks.get_mut(place)) {
            stack.free.push(buffer);
            self.free_bytes += size;
        }
    }

    /// Frees what was not needed since the last call.
    pub(super) fn trim(&mut self) {
        for (place, stack) in self.stacks.iter_mut().enumerate() {
            // The ones at the bottom are those that were never taken.
            self.free_bytes -= stack.least * (MIN_BUFFER_BYTES << place);
            stack.free.drain(..stack.least);
            stack.least = stack.free.len();
        }
    }
}

/// The stack for buffers of `size`, a power of two; `None` for smaller ones, and beyond the last for larger ones.
fn place(size: usize) -> Option<usize> {
    let steps = size.ilog2().checked_sub(MIN_BUFFER_BYTES.ilog2())?;
    usize::try_from(steps).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame in a buffer of this size, behind a gap, as a batch makes it.
    fn frame(memory: &mut Memory, bytes: usize) -> (Bytes, *const u8) {
        let mut buffer = memory.take(bytes);
        assert!(buffer.is_empty() && buffer.capacity() >= bytes);
        let at = buffer.as_ptr();
        buffer.resize(bytes, 1);
        let _gap = buffer.split_to(100);
        (buffer.freeze(), at)
    }

    #[test]
    fn the_buffer_given_back_last_is_the_next_one_of_its_size() {
        let mut memory = Memory::default();
        let (first, first_at) = frame(&mut memory, 5000);
        let (second, second_at) = frame(&mut memory, 5000);
        memory.give_back(first);
        memory.give_back(second);
        assert_eq!(memory.free_bytes, 2 * 8192);
        assert_ne!(frame(&mut memory, 9000).1, second_at);
        let (second, again) = frame(&mut memory, 8192);
        assert_eq!(again, second_at);
        assert_eq!(frame(&mut memory, 4097).1, first_at);
        assert_eq!(memory.free_bytes, 0);
        drop(second);
    }

    #[test]
    fn one_that_grew_is_of_the_largest_size_that_it_has_room_for() {
        for (grown, size) in [(2, 2), (3, 2), (4, 4), (7, 4)].map(|(a, b)| (a << 12, b << 12)) {
            let mut memory = Memory::default();
            let mut buffer = memory.take(10);
            buffer.resize(grown, 1);
            let at = buffer.as_ptr();
            memory.give_back(buffer.freeze());
            assert_eq!(memory.free_bytes, size);
            let again = memory.take(size);
            assert!(again.as_ptr() == at && again.capacity() >= size);
        }
    }

    #[test]
    fn one_that_somebody_still_reads_is_not_written_into() {
        let mut memory = Memory::default();
        let (frame, _) = frame(&mut memory, 5000);
        let reader = frame.clone();
        memory.give_back(frame);
        assert_eq!(memory.free_bytes, 0);
        assert!(reader.iter().all(|byte| *byte == 1));
    }

    #[test]
    fn no_more_is_kept_than_is_worth_it_and_nothing_that_is_too_large_or_too_small() {
        let mut memory = Memory::default();
        let frames: Vec<Bytes> = (0..12).map(|_| frame(&mut memory, 1 << 19).0).collect();
        for frame in frames {
            memory.give_back(frame);
        }
        assert_eq!(memory.free_bytes, MAX_FREE_BYTES);
        let mut memory = Memory::default();
        let (large, _) = frame(&mut memory, (1 << 21) + 1);
        memory.give_back(large);
        memory.give_back(Bytes::copy_from_slice(&[1; 1000]));
        memory.give_back(Bytes::from_static(&[1; 5000]));
        memory.give_back(Bytes::new());
        assert_eq!(memory.free_bytes, 0);
    }

    #[test]
    fn what_was_not_needed_between_two_looks_is_freed() {
        let mut memory = Memory::default();
        let frames: Vec<Bytes> = (0..3).map(|_| frame(&mut memory, 5000).0).collect();
        for frame in frames {
            memory.give_back(frame);
        }
        memory.trim();
        assert_eq!(memory.free_bytes, 3 * 8192);
        let (one, _) = frame(&mut memory, 5000);
        memory.give_back(one);
        memory.trim();
        assert_eq!(memory.free_bytes, 8192);
        memory.trim();
        assert_eq!(memory.free_bytes, 0);
    }
}
