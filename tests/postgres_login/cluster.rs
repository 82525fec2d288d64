//! A private Postgres cluster whose `pg_hba.conf` has a line for every way of login, with TLS by a certificate made for it.
//!
//! Made once per test process, in a folder of its own on a port the system chose, as user `postgres` when root runs the
//! tests; stopped and removed by the guard's drop. Needs Debian's Postgres (any version) and the `openssl` command.

use std::fmt::Write as _;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A running cluster; dropping it stops the server.
pub(crate) struct Cluster {
    folder: PathBuf,
    bin: PathBuf,
    pub(crate) port: u16,
}

/// The password of `scram`, with every character that a URL and `SASLprep` make hard.
pub(crate) const SCRAM_PASSWORD: &str = "pä%ss/@:?#";

impl Cluster {
    pub(crate) fn start() -> Self {
        let bin = newest_bin();
        let folder = std::env::temp_dir().join(format!("walpost-login-{}", std::process::id()));
        fs::create_dir_all(folder.join("tls")).expect("create the cluster's folder");
        let listener = TcpListener::bind("127.0.0.1:0").expect("find a free port");
        let port = listener.local_addr().expect("read the port").port();
        drop(listener);
        let cluster = Self { folder, bin, port };
        cluster.make_certificates();
        if is_root() {
            run(Command::new("chown")
                .args(["-R", "postgres"])
                .arg(&cluster.folder));
        }
        let data = cluster.path("data");
        run(cluster
            .postgres("initdb")
            .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "-D"])
            .arg(&data));
        cluster.configure(&data);
        cluster.control(&["-w", "-l"], "start");
        cluster
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A URL for `user` over TCP; `user` may carry a password.
    pub(crate) fn tcp(&self, user: &str, parameters: &str) -> String {
        format!(
            "postgres://{user}@127.0.0.1:{}/postgres?{parameters}",
            self.port
        )
    }

    /// A URL for the superuser over the Unix socket.
    pub(crate) fn socket(&self) -> String {
        let folder = self.folder.display();
        format!(
            "postgres://postgres@/postgres?host={folder}&port={}",
            self.port
        )
    }

    fn configure(&self, data: &Path) {
        let tls = self.path("tls");
        let (folder, tls, port) = (self.folder.display(), tls.display(), self.port);
        let mut settings = fs::read_to_string(data.join("postgresql.conf")).expect("read settings");
        write!(
            settings,
            "\nport={port}\nlisten_addresses='127.0.0.1'\nunix_socket_directories='{folder}'\nwal_level=logical\n\
             fsync=off\nssl=on\nssl_cert_file='{tls}/server.crt'\nssl_key_file='{tls}/server.key'\n\
             ssl_ca_file='{tls}/ca.crt'\n"
        )
        .expect("write to a String");
        fs::write(data.join("postgresql.conf"), settings).expect("write settings");
        let rules = "local all postgres trust\n\
             host all postgres 127.0.0.1/32 trust\n\
             host all md5 127.0.0.1/32 md5\n\
             host all clear 127.0.0.1/32 password\n\
             host all scram 127.0.0.1/32 scram-sha-256\n\
             host all weak 127.0.0.1/32 scram-sha-256\n\
             hostssl all cert 127.0.0.1/32 cert\n\
             hostssl all onlytls 127.0.0.1/32 trust\n\
             hostnossl all onlyplain 127.0.0.1/32 trust\n";
        fs::write(data.join("pg_hba.conf"), rules).expect("write pg_hba.conf");
    }

    fn make_certificates(&self) {
        let script = r#"
            set -e
            new() { openssl req -newkey rsa:2048 -nodes "$@" 2>/dev/null; }
            new -x509 -days 2 -subj /CN=walpost-test -keyout ca.key -out ca.crt
            new -x509 -days 2 -subj /CN=somebody-else -keyout other.key -out other.crt
            sign() { # name, subject, digest, alternative names
                new -subj "/CN=$2" -keyout $1.key -out $1.csr
                printf 'subjectAltName=%s\nbasicConstraints=CA:FALSE\n' "$4" > $1.ext
                openssl x509 -req -in $1.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -$3 -extfile $1.ext -out $1.crt 2>/dev/null
            }
            sign server db.test sha384 DNS:localhost
            sign client cert sha256 DNS:cert
            chmod 600 *.key
        "#;
        run(Command::new("bash")
            .args(["-c", script])
            .current_dir(self.path("tls")));
    }

    fn postgres(&self, program: &str) -> Command {
        let program = self.bin.join(program);
        if !is_root() {
            return Command::new(program);
        }
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=postgres", "--regid=postgres", "--clear-groups"])
            .arg(program);
        command.current_dir("/");
        command
    }

    fn control(&self, flags: &[&str], action: &str) {
        let mut command = self.postgres("pg_ctl");
        command.args(flags);
        if action == "start" {
            command.arg(self.path("log"));
        }
        run(command.arg("-D").arg(self.path("data")).arg(action));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.control(&["-m", "immediate", "-w"], "stop");
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

fn newest_bin() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql")
        .expect("no Postgres is installed under /usr/lib/postgresql");
    let version = versions
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .max();
    let version = version.expect("no Postgres is installed under /usr/lib/postgresql");
    PathBuf::from(format!("/usr/lib/postgresql/{version}/bin"))
}

fn run(command: &mut Command) {
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(status.success(), "{command:?} failed");
}
