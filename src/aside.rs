//! Files are read beside the data's thread.
//!
//! The connector runs on one thread, and a file may be a pipe that nobody writes to, or lie on a network disk that hangs: a read there would
//! stop rows, receipts and status updates. So each file that is read while walpost runs (tokens, certificates, schemas, keys) is read on a thread
//! of the runtime's pool, and waited for with a deadline.
//!
//! Input: a function that reads. Output: what it gives, or a temporary error. A thread that hangs stays until its read ends; [`READERS`] bounds how
//! many there are. The process's end does not wait for them (`main`).

use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::{Error, Result};

/// How long a file may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Threads that read files. Each may hang in a file of its own: token, certificates of two servers, a schema, and some more.
static READERS: Semaphore = Semaphore::const_new(8);

/// Reads on another thread, for at most [`PATIENCE`]. `what` is read.
///
/// # Errors
/// Those of `read`; temporary when it takes too long.
pub(crate) async fn read_aside<T: Send + 'static>(
    what: &'static str,
    read: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let reading = async {
        let place = READERS.acquire().await;
        let reading = spawn_blocking(move || {
            // Kept until the read has ended, however long nobody waits for it.
            let _place = place;
            read()
        });
        let read = reading.await;
        read.map_err(|error| Error::bug(format!("{what} could not be read")).caused_by(error))?
    };
    timeout(PATIENCE, reading).await.unwrap_or_else(|_| {
        Err(Error::temporary(format!(
            "{what} cannot be read: there is no end of it after {PATIENCE:?}"
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
        let reading = read_aside("a pipe", move || {
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
}
