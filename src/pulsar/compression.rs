//! Compression of a batch: the whole of its messages, as one block of the codec that Pulsar's clients use under that name.
//!
//! | `WALPOST_COMPRESSION` | on the wire |
//! |---|---|
//! | `lz4` | LZ4 block format, without a size in front |
//! | `zstd` | one Zstandard frame, level 3 |
//! | `snappy` | the raw block, without the framing format |
//! | `zlib` | a zlib stream, level 6 |
//!
//! The size before compression travels in `MessageMetadata.uncompressed_size`. Source: the codecs in Pulsar's
//! `pulsar-common` (`org.apache.pulsar.common.compression`); `tests/compression.rs` reads each back with another client.
//!
//! A batch that a codec cannot make smaller is sent as it is: readers go by each entry's own metadata.

use std::io::{self, Read, Write};

use bytes::{Bytes, BytesMut};
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use pulsar::message::proto::CompressionType;

/// Of zstd's 22 levels; the Java client's default.
const ZSTD_LEVEL: i32 = 3;

/// How batches are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Codec {
    /// They are not.
    #[default]
    None,
    /// Fast, modest.
    Lz4,
    /// Small, and still fast.
    Zstd,
    /// Fast, modest.
    Snappy,
    /// Small and slow.
    Zlib,
}

impl Codec {
    /// Every codec, by the name it has in settings.
    pub const NAMES: [(&'static str, Self); 5] = [
        ("none", Self::None),
        ("lz4", Self::Lz4),
        ("zstd", Self::Zstd),
        ("snappy", Self::Snappy),
        ("zlib", Self::Zlib),
    ];

    /// Reads a name such as `lz4`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let known = Self::NAMES.iter().find(|(name, _)| *name == text);
        known
            .map(|(_, codec)| *codec)
            .ok_or_else(|| "it is none of them".to_owned())
    }

    /// Its number in `MessageMetadata`.
    pub(super) fn wire(self) -> CompressionType {
        match self {
            Self::None => CompressionType::None,
            Self::Lz4 => CompressionType::Lz4,
            Self::Zstd => CompressionType::Zstd,
            Self::Snappy => CompressionType::Snappy,
            Self::Zlib => CompressionType::Zlib,
        }
    }

    pub(super) fn of_wire(number: CompressionType) -> Self {
        match number {
            CompressionType::None => Self::None,
            CompressionType::Lz4 => Self::Lz4,
            CompressionType::Zstd => Self::Zstd,
            CompressionType::Snappy => Self::Snappy,
            CompressionType::Zlib => Self::Zlib,
        }
    }

    /// The compressed form of `payload` behind a gap of `headroom` bytes; `None` where it would not be smaller.
    ///
    /// The codecs want their output in one piece of the largest size it can have, which is then cut: an allocation for
    /// each batch, as the frame itself is one.
    pub(super) fn compress(self, payload: &[u8], headroom: usize) -> Option<BytesMut> {
        let buffer = match self {
            Self::None => return None,
            Self::Lz4 => {
                let mut buffer =
                    vec![0; headroom + lz4_flex::block::get_maximum_output_size(payload.len())];
                let size = lz4_flex::block::compress_into(payload, &mut buffer[headroom..]).ok()?;
                buffer.truncate(headroom + size);
                buffer
            }
            Self::Snappy => {
                let mut buffer = vec![0; headroom + snap::raw::max_compress_len(payload.len())];
                let size = snap::raw::Encoder::new()
                    .compress(payload, &mut buffer[headroom..])
                    .ok()?;
                buffer.truncate(headroom + size);
                buffer
            }
            Self::Zstd => {
                let mut buffer = vec![0; headroom + zstd::zstd_safe::compress_bound(payload.len())];
                let size =
                    zstd::bulk::compress_to_buffer(payload, &mut buffer[headroom..], ZSTD_LEVEL)
                        .ok()?;
                buffer.truncate(headroom + size);
                buffer
            }
            Self::Zlib => {
                let mut encoder =
                    ZlibEncoder::new(vec![0; headroom], flate2::Compression::default());
                encoder.write_all(payload).ok()?;
                encoder.finish().ok()?
            }
        };
        // The copy of what is small anyway frees the piece that was cut for the worst case.
        (buffer.len() < headroom + payload.len()).then(|| BytesMut::from(buffer.as_slice()))
    }

    /// The messages of a compressed payload; `None` when it is not what it says.
    pub(super) fn decompress(self, payload: Bytes, uncompressed_bytes: usize) -> Option<Bytes> {
        let exact = |bytes: io::Result<Vec<u8>>| {
            bytes
                .ok()
                .filter(|bytes| bytes.len() == uncompressed_bytes)
                .map(Bytes::from)
        };
        match self {
            Self::None => Some(payload),
            Self::Lz4 => exact(
                lz4_flex::block::decompress(&payload, uncompressed_bytes).map_err(io::Error::other),
            ),
            Self::Snappy => exact(
                snap::raw::Decoder::new()
                    .decompress_vec(&payload)
                    .map_err(io::Error::other),
            ),
            Self::Zstd => exact(zstd::bulk::decompress(&payload, uncompressed_bytes)),
            Self::Zlib => {
                let mut bytes = Vec::with_capacity(uncompressed_bytes);
                let limit = uncompressed_bytes as u64 + 1;
                let read = ZlibDecoder::new(&payload[..])
                    .take(limit)
                    .read_to_end(&mut bytes);
                exact(read.map(|_| bytes))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Each codec gives back what it was given; what does not get smaller is left alone.
        #[test]
        fn what_is_compressed_comes_back(bytes in prop::collection::vec(any::<u8>(), 0..500), repeat in 1usize..200, gap in 0usize..300) {
            let payload = bytes.repeat(repeat);
            for (name, codec) in Codec::NAMES {
                let Some(compressed) = codec.compress(&payload, gap) else { continue };
                prop_assert!(compressed.len() < gap + payload.len(), "{name}");
                prop_assert!(compressed[..gap].iter().all(|byte| *byte == 0), "{name}");
                let body = compressed.freeze().slice(gap..);
                let back = codec.decompress(body, payload.len());
                prop_assert_eq!(back.as_deref(), Some(&payload[..]), "{}", name);
            }
        }
    }

    #[test]
    fn repetition_gets_much_smaller_with_every_codec_but_none() {
        let payload = b"{\"order\": 4711, \"state\": \"placed\"}".repeat(100);
        for (name, codec) in Codec::NAMES {
            let compressed = codec.compress(&payload, 10);
            match codec {
                Codec::None => assert!(compressed.is_none()),
                _ => assert!(compressed.unwrap().len() * 5 < payload.len(), "{name}"),
            }
        }
        assert!(Codec::Lz4.compress(b"", 10).is_none());
    }
}
