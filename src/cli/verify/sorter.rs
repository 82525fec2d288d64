//! An external sort: records of bytes in, the same in ascending order out, whatever their number.
//!
//! Input: records, each at most [`MAX_RECORD_BYTES`], compared byte by byte. What fits the budget is sorted in memory; each
//! time it is full, it becomes a *run* in a temporary file, and runs are merged, [`FAN_IN`] of one size at a time, so that
//! neither open files nor buffers grow with the input.
//!
//! Memory: the budget, and while merging one buffer for each run. Disk: the records once, and while runs are merged those
//! again. The files lie in `TMPDIR`, belong to this user alone, and have lost their names before anything is written: they
//! go with the process, however it ends.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// Runs that are merged at a time.
const FAN_IN: usize = 16;
/// Buffer of a file that is written or read.
const BUFFER_BYTES: usize = 64 * 1024;
/// Their length stands in two bytes.
pub(super) const MAX_RECORD_BYTES: usize = u16::MAX as usize;

/// Takes records.
#[derive(Debug)]
pub(super) struct Sorter {
    budget_bytes: usize,
    held: Held,
    runs: Vec<Run>,
}

/// Records in memory: where each begins and ends.
#[derive(Debug, Default)]
struct Held {
    bytes: Vec<u8>,
    spans: Vec<(u32, u32)>,
}

impl Held {
    fn get(&self, index: usize) -> Option<&[u8]> {
        let (start, end) = *self.spans.get(index)?;
        Some(&self.bytes[start as usize..end as usize])
    }

    fn size(&self) -> usize {
        self.bytes.len() + self.spans.len() * size_of::<(u32, u32)>()
    }

    fn sort(&mut self) {
        let Self { bytes, spans } = self;
        spans.sort_unstable_by(|a, b| {
            bytes[a.0 as usize..a.1 as usize].cmp(&bytes[b.0 as usize..b.1 as usize])
        });
    }
}

/// A sorted file.
#[derive(Debug)]
struct Run {
    file: File,
    /// How often its records were merged.
    level: u32,
}

impl Sorter {
    /// With memory of about `budget_bytes`.
    pub(super) fn new(budget_bytes: usize) -> Self {
        Self {
            budget_bytes: budget_bytes.min(u32::MAX as usize / 2),
            held: Held::default(),
            runs: Vec::new(),
        }
    }

    /// Adds a record.
    pub(super) fn push(&mut self, record: &[u8]) -> Result<()> {
        assert!(
            record.len() <= MAX_RECORD_BYTES,
            "a record has two bytes for its length"
        );
        if self.held.size() + record.len() > self.budget_bytes {
            self.spill()?;
        }
        let place = |bytes: usize| u32::try_from(bytes).expect("the budget is below that");
        let start = place(self.held.bytes.len());
        self.held.bytes.extend_from_slice(record);
        let end = place(self.held.bytes.len());
        self.held.spans.push((start, end));
        Ok(())
    }

    fn spill(&mut self) -> Result<()> {
        self.held.sort();
        let mut writer = BufWriter::with_capacity(BUFFER_BYTES, temporary_file()?);
        for index in 0..self.held.spans.len() {
            write(&mut writer, self.held.get(index).unwrap_or_default())?;
        }
        self.runs.push(Run {
            file: written(writer)?,
            level: 0,
        });
        self.held.bytes.clear();
        self.held.spans.clear();
        self.merge_full_levels()
    }

    /// So that a record is written once for each time that its run has grown sixteenfold.
    fn merge_full_levels(&mut self) -> Result<()> {
        while let Some(level) = self.runs.last().map(|run| run.level) {
            let first = self.runs.iter().position(|run| run.level == level);
            let first = first.unwrap_or_default();
            if self.runs.len() - first < FAN_IN {
                break;
            }
            let sources = self.runs.split_off(first);
            let mut merged = Sorted::new(sources, Held::default())?;
            let mut writer = BufWriter::with_capacity(BUFFER_BYTES, temporary_file()?);
            while let Some(record) = merged.next()? {
                write(&mut writer, record)?;
            }
            self.runs.push(Run {
                file: written(writer)?,
                level: level + 1,
            });
        }
        Ok(())
    }

    /// No more comes.
    pub(super) fn finish(mut self) -> Result<Sorted> {
        self.held.sort();
        Sorted::new(self.runs, self.held)
    }
}

/// Gives the records in ascending order.
#[derive(Debug)]
pub(super) struct Sorted {
    sources: Vec<Source>,
    /// The next record of each source that has one.
    heads: BinaryHeap<Reverse<(Vec<u8>, usize)>>,
    /// What was given last.
    given: Vec<u8>,
}

#[derive(Debug)]
enum Source {
    Memory { held: Held, next: usize },
    File(BufReader<File>),
}

impl Source {
    /// Reads the next record into `record`; false at the end.
    fn read(&mut self, record: &mut Vec<u8>) -> Result<bool> {
        record.clear();
        match self {
            Self::Memory { held, next } => {
                let found = held.get(*next);
                *next += 1;
                record.extend_from_slice(found.unwrap_or_default());
                Ok(found.is_some())
            }
            Self::File(reader) => {
                let mut length = [0; 2];
                match reader.read_exact(&mut length) {
                    Ok(()) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                        return Ok(false);
                    }
                    Err(error) => return Err(failed(error)),
                }
                record.resize(usize::from(u16::from_be_bytes(length)), 0);
                reader.read_exact(record).map_err(failed)?;
                Ok(true)
            }
        }
    }
}

impl Sorted {
    fn new(runs: Vec<Run>, held: Held) -> Result<Self> {
        let files = runs
            .into_iter()
            .map(|run| Source::File(BufReader::with_capacity(BUFFER_BYTES, run.file)));
        let memory = Source::Memory { held, next: 0 };
        let mut sorted = Self {
            sources: files.chain([memory]).collect(),
            heads: BinaryHeap::new(),
            given: Vec::new(),
        };
        for source in 0..sorted.sources.len() {
            sorted.refill(source, Vec::new())?;
        }
        Ok(sorted)
    }

    fn refill(&mut self, source: usize, mut record: Vec<u8>) -> Result<()> {
        if self.sources[source].read(&mut record)? {
            self.heads.push(Reverse((record, source)));
        }
        Ok(())
    }

    /// The next record; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<&[u8]>> {
        let Some(Reverse((record, source))) = self.heads.pop() else {
            return Ok(None);
        };
        // The memory of the last one holds the next of this source.
        let spare = std::mem::replace(&mut self.given, record);
        self.refill(source, spare)?;
        Ok(Some(&self.given))
    }
}

fn write(writer: &mut impl Write, record: &[u8]) -> Result<()> {
    let length = u16::try_from(record.len()).expect("checked when it came");
    let written = writer.write_all(&length.to_be_bytes());
    written
        .and_then(|()| writer.write_all(record))
        .map_err(failed)
}

fn written(writer: BufWriter<File>) -> Result<File> {
    let mut file = writer
        .into_inner()
        .map_err(|error| failed(error.into_error()))?;
    file.rewind().map_err(failed)?;
    Ok(file)
}

/// A file without a name.
fn temporary_file() -> Result<File> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("walpost-verify-{}-{number}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let made = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path);
    let file = made.map_err(failed)?;
    fs::remove_file(&path).map_err(failed)?;
    Ok(file)
}

fn failed(error: std::io::Error) -> Error {
    let folder = std::env::temp_dir();
    Error::temporary(format!(
        "cannot sort in temporary files in {}",
        folder.display()
    ))
    .caused_by(error)
    .hint("set TMPDIR to a folder with room for about 200 bytes a row and 200 a message, twice")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sorted(budget_bytes: usize, records: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut sorter = Sorter::new(budget_bytes);
        for record in records {
            sorter.push(record).unwrap();
        }
        let mut records = sorter.finish().unwrap();
        let mut found = Vec::new();
        while let Some(record) = records.next().unwrap() {
            found.push(record.to_vec());
        }
        found
    }

    proptest! {
        /// With any budget, so also with runs of one record each and merges of merges, it is what sorting in memory gives.
        #[test]
        fn records_come_back_in_order_however_small_the_memory(
            mut records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..6), 0..600),
            budget_bytes in 1usize..400,
        ) {
            let found = sorted(budget_bytes, &records);
            records.sort();
            prop_assert_eq!(found, records);
        }
    }

    #[test]
    fn runs_of_one_size_are_merged_so_that_files_stay_few() {
        let mut sorter = Sorter::new(1);
        for number in 0..5_000u32 {
            sorter.push(&number.to_be_bytes()).unwrap();
            assert!(sorter.runs.len() < FAN_IN * 4);
        }
    }
}
