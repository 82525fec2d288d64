//! Files are read beside the data's thread.
//!
//! The connector runs on one thread, and a file may be a pipe that nobody writes to, or lie on a network disk that hangs: a read there would
//! stop rows, receipts and status updates. So each file that is read while walpost runs (tokens, certificates, schemas, keys) is read on a thread
//! of the runtime's pool, and waited for with a deadline.
//!
//! Input: a function that reads. Output: what it gives, or a temporary error. A thread that hangs stays until its read ends. [`OF_ONE`] threads at a time
//! read a file, and [`READERS`] read files of a kind: a file that hangs takes no more threads however often it is asked for, files of one kind keep none
//! of another waiting, and there are no more threads than kinds times [`READERS`]. A file that hangs and is then replaced is read again where not all of its threads hang yet. The process's end does not wait for them (`main`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::{Error, Result};

/// How long a file may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Threads for files of one kind. There is one schema file for each topic, and one or two of every other kind.
const READERS: usize = 4;

/// Threads for one file: one, and two more for the file that is put in its place.
const OF_ONE: usize = 3;

/// A kind of file, and which one; `None`: all of them.
type Name = (&'static str, Option<String>);

/// Room for threads, while any is asked for or used.
static ROOM: Mutex<BTreeMap<Name, Arc<Semaphore>>> = Mutex::new(BTreeMap::new());

fn room(name: Name, threads: usize) -> Arc<Semaphore> {
    let mut room = ROOM.lock().expect("nobody panics while holding it");
    room.retain(|_, places| Arc::strong_count(places) > 1);
    let places = room.entry(name);
    Arc::clone(places.or_insert_with(|| Arc::new(Semaphore::new(threads))))
}

/// Reads on another thread, for at most [`PATIENCE`]. `kind` names the kind of file, also in errors. `file` tells files of one kind apart; it is
/// empty where there is only one.
///
/// # Errors
/// Those of `read`; temporary when it takes too long.
pub(crate) async fn read_aside<T: Send + 'static>(
    kind: &'static str,
    file: impl Into<String>,
    read: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let one = room((kind, Some(file.into())), OF_ONE);
    let all = room((kind, None), READERS);
    let reading = async {
        // In this order: who waits for the same file takes no place from others.
        let places = (one.acquire_owned().await, all.acquire_owned().await);
        let reading = spawn_blocking(move || {
            // Kept until the read has ended, however long nobody waits for it.
            let _places = places;
            read()
        });
        let read = reading.await;
        read.map_err(|error| Error::bug(format!("{kind} could not be read")).caused_by(error))?
    };
    timeout(PATIENCE, reading).await.unwrap_or_else(|_| {
        Err(Error::temporary(format!(
            "{kind} cannot be read: there is no end of it after {PATIENCE:?}"
        ))
        .hint("is it a pipe that nobody writes to, or on a disk that hangs?"))
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;
    use std::sync::mpsc;
    use std::thread::JoinHandle;

    use super::*;

    /// Whoever reads it longer than this gets something.
    const RELEASE: Duration = Duration::from_secs(30);

    /// A pipe that nobody writes to.
    pub(crate) struct Pipe {
        pub(crate) path: PathBuf,
        over: mpsc::Sender<()>,
        writer: Option<JoinHandle<()>>,
    }

    impl Pipe {
        pub(crate) fn make(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("walpost-{name}-{}", std::process::id()));
            let _old = std::fs::remove_file(&path);
            let made = std::process::Command::new("mkfifo").arg(&path).status();
            assert!(made.unwrap().success());
            let (over, waiting) = mpsc::channel();
            let end = path.clone();
            let writer = std::thread::spawn(move || {
                let _over = waiting.recv_timeout(RELEASE);
                // Opened for both, so that this waits for nobody. A reader that hangs gets a line and the end.
                let opened = std::fs::OpenOptions::new().read(true).write(true).open(end);
                let _nobody = std::io::Write::write_all(&mut opened.unwrap(), b"late\n");
            });
            Self {
                path,
                over,
                writer: Some(writer),
            }
        }
    }

    impl Drop for Pipe {
        fn drop(&mut self) {
            let _gone = self.over.send(());
            let _panicked = self.writer.take().map(JoinHandle::join);
            let _gone = std::fs::remove_file(&self.path);
        }
    }

    #[tokio::test]
    async fn a_file_without_an_end_is_given_up_and_the_thread_that_waits_goes_on() {
        let pipe = Pipe::make("aside");
        let path = pipe.path.clone();
        let reading = read_aside("a pipe", "", move || {
            std::fs::read(path).map_err(|error| Error::temporary("it is none").caused_by(error))
        });
        let mut turns = 0;
        let turning = async {
            loop {
                tokio::task::yield_now().await;
                turns += 1;
            }
        };
        let read = tokio::select! {
            read = reading => read,
            () = turning => unreachable!(),
        };
        let error = read.unwrap_err();
        assert!(error.is_temporary());
        let said = error.report();
        assert!(said.contains("a pipe cannot be read"), "{said}");
        assert!(turns > 1);
    }

    #[tokio::test]
    async fn files_that_hang_keep_no_other_file_waiting() {
        // GIVEN many who read one file that hangs, and more files of another kind that hang than have threads
        let pipe = Pipe::make("aside-many");
        let mut hanging = tokio::task::JoinSet::new();
        for number in 0..4 * READERS {
            for (kind, file) in [
                ("one file", String::new()),
                ("many files", number.to_string()),
            ] {
                let path = pipe.path.clone();
                hanging.spawn(read_aside(kind, file, move || {
                    let read = std::fs::read(path);
                    read.map_err(|error| Error::temporary("it is none").caused_by(error))
                }));
            }
        }
        // All have asked when they have had their turns.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }

        // THEN another file of the first kind is read, and a file of a third kind
        let well = read_aside("one file", "another", || Ok(1));
        assert_eq!(well.await.unwrap(), 1);
        let well = read_aside("a third kind", "", || Ok(2));
        assert_eq!(well.await.unwrap(), 2);
        // AND those that hang are given up
        while let Some(read) = hanging.join_next().await {
            assert!(read.unwrap().unwrap_err().is_temporary());
        }
    }
}
