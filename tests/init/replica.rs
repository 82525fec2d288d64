//! A cluster as `initdb` leaves it, with `wal_level = replica`: what a new user's Postgres is like.

use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::{eventually, servers, unique};

const STARTED: Duration = Duration::from_secs(60);

/// A running server; gone with its data when dropped.
pub(crate) struct Replica {
    server: Child,
    folder: PathBuf,
    /// Of the superuser.
    pub(crate) url: String,
}

impl Replica {
    pub(crate) async fn start() -> Self {
        let folder = std::env::temp_dir().join(unique("walpost_replica"));
        std::fs::create_dir(&folder).expect("a folder for the cluster");
        if is_root() {
            let owned = Command::new("chown").arg("postgres").arg(&folder).status();
            assert!(owned.expect("chown runs").success());
        }
        let data = folder.join("data");
        let made = postgres("initdb")
            .args(["--no-sync", "-U", "postgres", "-A", "trust", "-D"])
            .arg(&data)
            .output()
            .expect("initdb runs");
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );

        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        drop(listener);
        let server = postgres("postgres")
            .args([
                "-c",
                "listen_addresses=127.0.0.1",
                "-c",
                "fsync=off",
                "-p",
                &port.to_string(),
            ])
            .arg("-k")
            .arg(&folder)
            .arg("-D")
            .arg(&data)
            .stderr(Stdio::null())
            .spawn()
            .expect("postgres runs");
        let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
        let replica = Self {
            server,
            folder,
            url,
        };
        eventually(STARTED, "the cluster to answer", async || {
            let session = tokio_postgres::connect(&replica.url, tokio_postgres::NoTls).await;
            session.is_ok().then_some(())
        })
        .await;
        replica
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        // SIGQUIT: at once, and its children with it, which SIGKILL would leave behind.
        let _ = Command::new("sh")
            .args([
                "-c",
                "kill -s QUIT \"$1\"",
                "sh",
                &self.server.id().to_string(),
            ])
            .status();
        let _ = self.server.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// A program of the same Postgres that the other tests use; never as root, which it refuses.
fn postgres(program: &str) -> Command {
    let program = PathBuf::from(servers().var("WALPOST_LOCAL_POSTGRES_BIN")).join(program);
    let mut command = if is_root() {
        let mut command = Command::new("setpriv");
        command
            .args([
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
                "--",
            ])
            .arg(program);
        command
    } else {
        Command::new(program)
    };
    command
        .current_dir("/")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}
