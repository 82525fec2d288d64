//! The local servers: where they are, and how to stop and start one of them.
//!
//! Each test binary runs `deploy/local/up` and reads the env file that it names: nothing to do when `tests/run` did so first,
//! and all that a plain `cargo test` needs.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Addresses of one Postgres and one Pulsar, and the `deploy/local` folder they live in.
#[derive(Debug)]
pub(crate) struct Servers {
    /// TCP URL of the superuser, database `postgres`, with the password.
    pub(crate) postgres_url: String,
    /// The same over the Unix socket, without a password.
    pub(crate) postgres_socket_url: String,
    /// `host:port` of Postgres, as a [`super::Proxy`] wants it.
    pub(crate) postgres_addr: String,
    /// `pulsar://…`
    pub(crate) pulsar_url: String,
    /// `host:port` of the broker.
    pub(crate) pulsar_addr: String,
    /// `http://…`
    pub(crate) pulsar_admin_url: String,
    /// Every variable of the env file.
    vars: BTreeMap<String, String>,
}

/// The servers shared by all tests. Panics when they cannot be had: no test is skipped in silence. With
/// `WALPOST_TEST_POSTGRES=18` in the environment, Postgres is of that major.
pub(crate) fn servers() -> &'static Servers {
    static SERVERS: OnceLock<Servers> = OnceLock::new();
    // Quick when they are up already, as `tests/run` has seen to.
    SERVERS.get_or_init(|| match std::env::var("WALPOST_TEST_POSTGRES") {
        Ok(major) => Servers::up(&["--postgres", &major]),
        Err(_) => Servers::up(&[]),
    })
}

impl Servers {
    /// Runs `deploy/local/up` with these arguments (for instance `["--postgres", "18"]`) and reads what it wrote.
    pub(crate) fn up(args: &[&str]) -> Self {
        Self::from_vars(env_that_up_names(&run_script("up", args, None)))
    }

    /// Fetches a Pulsar of another version into the shared folder, for [`Servers::own`] to take it from.
    pub(crate) fn fetch_pulsar(version: &str) {
        let dir = servers().var("WALPOST_LOCAL_DIR");
        run_script("up", &["--fetch", "--pulsar", version], Some(dir));
    }

    /// Starts servers that only this test knows, so that it may stop and freeze them; gone again when dropped. `args` as
    /// for [`Servers::up`], for instance `["--no-pulsar"]` or `["--pulsar-conf", "FILE"]`. What the shared ones have unpacked is not unpacked again.
    pub(crate) fn own(name: &str, args: &[&str]) -> OwnServers {
        let shared = servers();
        let prefix = format!("{}-{name}-", shared.var("WALPOST_LOCAL_DIR"));
        wipe_orphans(&prefix);
        let dir = format!("{prefix}{}", std::process::id());
        let dist = Path::new(shared.var("WALPOST_LOCAL_DIR")).join("dist");
        let dist = dist.to_str().expect("up allows no other characters");
        // Made before `up` runs: what a failing `up` leaves behind is wiped too.
        let folder = OwnFolder(dir.clone());
        let said = run_script("up", &[&["--dist", dist], args].concat(), Some(&dir));
        OwnServers {
            servers: Self::from_vars(env_that_up_names(&said)),
            _folder: folder,
        }
    }

    fn from_vars(vars: BTreeMap<String, String>) -> Self {
        let get = |name: &str| vars.get(name).cloned().unwrap_or_default();
        let postgres_port = get("WALPOST_LOCAL_POSTGRES_PORT");
        let pulsar_url = get("WALPOST_PULSAR_URL");
        Self {
            postgres_url: get("WALPOST_POSTGRES_URL"),
            postgres_socket_url: get("WALPOST_LOCAL_POSTGRES_SOCKET_URL"),
            postgres_addr: format!("127.0.0.1:{postgres_port}"),
            pulsar_addr: pulsar_url.trim_start_matches("pulsar://").to_owned(),
            pulsar_url,
            pulsar_admin_url: get("WALPOST_PULSAR_ADMIN_URL"),
            vars,
        }
    }

    /// A variable of the env file, such as `WALPOST_LOCAL_POSTGRES_BIN`.
    pub(crate) fn var(&self, name: &str) -> &str {
        self.vars
            .get(name)
            .unwrap_or_else(|| panic!("deploy/local/up wrote no {name}"))
    }

    /// Stops this broker cleanly; messages stay. Only for a test file that has the servers to itself.
    pub(crate) fn stop_pulsar(&self) {
        self.run_script("down", &["pulsar"]);
    }

    /// Stops this Postgres cleanly; data and slots stay. Only for a test file that has the servers to itself.
    pub(crate) fn stop_postgres(&self) {
        let major = self.var("WALPOST_LOCAL_POSTGRES_MAJOR");
        self.run_script("down", &[&format!("pg{major}")]);
    }

    /// Starts what is stopped, on the ports it had; returns when it answers.
    pub(crate) fn start(&self) {
        let major = self.var("WALPOST_LOCAL_POSTGRES_MAJOR");
        let mut args = vec!["--postgres", major];
        if self.pulsar_url.is_empty() {
            args.push("--no-pulsar");
        }
        let pulsar_home = self.vars.get("WALPOST_LOCAL_PULSAR_HOME").map(Path::new);
        // Where `up` has unpacked what runs here: a Pulsar, or a Postgres that is not the system's.
        let unpacked =
            pulsar_home.or_else(|| Path::new(self.var("WALPOST_LOCAL_POSTGRES_BIN")).parent());
        let dist = unpacked.and_then(Path::parent);
        if let Some(dist) = dist
            .filter(|dist| dist.ends_with("dist"))
            .and_then(Path::to_str)
        {
            args.extend(["--dist", dist]);
        }
        let version = pulsar_home.and_then(|home| home.file_name()?.to_str());
        if let Some(version) = version.and_then(|name| name.strip_prefix("apache-pulsar-")) {
            args.extend(["--pulsar", version]);
        }
        self.run_script("up", &args);
    }

    /// Sends the broker a signal by its name, `STOP` and `CONT` above all. Only for servers of a test's own.
    pub(crate) fn signal_pulsar(&self, signal: &str) {
        // The env file's pid is out of date once the broker was restarted.
        let dir = self.var("WALPOST_LOCAL_DIR");
        let pid = std::fs::read_to_string(format!("{dir}/pulsar/pid")).expect("the broker runs");
        send_signal(pid.trim(), signal);
    }

    fn run_script(&self, script: &str, args: &[&str]) {
        run_script(script, args, Some(self.var("WALPOST_LOCAL_DIR")));
    }
}

/// The path of a program that judges what walpost serves: `prometheus`, `promtool` or `chromium`; installed if missing.
pub(crate) fn tool(name: &str) -> String {
    let dir = servers().var("WALPOST_LOCAL_DIR");
    run_script("tool", &[name], Some(dir)).trim().to_owned()
}

/// Servers of one test; see [`Servers::own`].
pub(crate) struct OwnServers {
    servers: Servers,
    _folder: OwnFolder,
}

impl Deref for OwnServers {
    type Target = Servers;

    fn deref(&self) -> &Servers {
        &self.servers
    }
}

/// Stops what runs in the folder, and removes it, when dropped.
struct OwnFolder(String);

impl Drop for OwnFolder {
    fn drop(&mut self) {
        wipe(&self.0);
    }
}

/// Ends what a test run left behind that was itself killed: the folder's name ends with the pid of its maker.
fn wipe_orphans(prefix: &str) {
    let prefix = PathBuf::from(prefix);
    let (Some(parent), Some(name)) = (prefix.parent(), prefix.file_name()) else {
        return;
    };
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let folder = entry.file_name().to_string_lossy().into_owned();
        let maker = folder.strip_prefix(&*name.to_string_lossy());
        let maker = maker.and_then(|pid| pid.parse::<u32>().ok());
        if maker.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            wipe(&entry.path().to_string_lossy());
        }
    }
}

fn wipe(dir: &str) {
    // A stopped process cannot obey; `down` would wait for it.
    if let Ok(pid) = std::fs::read_to_string(format!("{dir}/pulsar/pid")) {
        let _ = try_signal(pid.trim(), "CONT");
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/local/down");
    let done = Command::new(script)
        .arg("--wipe")
        .env("WALPOST_LOCAL_DIR", dir)
        .output();
    // Not a second panic while the test's own one may be on its way.
    if !done.is_ok_and(|output| output.status.success()) {
        eprintln!("could not stop and remove the servers in {dir}");
    }
}

/// Sends a signal by its name; panics when it cannot be sent.
pub(super) fn send_signal(pid: &str, name: &str) {
    let sent = try_signal(pid, name);
    assert!(
        sent.is_ok_and(|sent| sent),
        "cannot send SIG{name} to {pid}"
    );
}

fn try_signal(pid: &str, name: &str) -> std::io::Result<bool> {
    // The shell's own `kill`: without unsafe code, a package or the procps programs.
    let status = Command::new("sh")
        .args(["-c", "kill -s \"$1\" \"$2\"", "sh", name, pid])
        .status()?;
    Ok(status.success())
}

/// Runs `deploy/local/<script>`, on `dir` if one is given, and returns what it printed; blocks until it has ended.
pub(super) fn run_script(script: &str, args: &[&str], dir: Option<&str>) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("deploy/local")
        .join(script);
    let mut command = Command::new(&path);
    command.args(args);
    if let Some(dir) = dir {
        command.env("WALPOST_LOCAL_DIR", dir);
    }
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .output()
        .unwrap_or_else(|error| panic!("cannot run {}: {error}", path.display()));
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    assert!(
        status.success(),
        "deploy/local/{script} {args:?} failed ({status}), so there is nothing to test against:\n{stdout}{}",
        String::from_utf8_lossy(&stderr)
    );
    stdout
}

/// Each major has an env file of its own.
fn env_that_up_names(said: &str) -> BTreeMap<String, String> {
    let mut lines = said.lines().rev();
    let file = lines.find_map(|line| line.split_once("ready: . "));
    let (_, file) = file.unwrap_or_else(|| panic!("deploy/local/up named no env file:\n{said}"));
    read_env(Path::new(file))
}

fn read_env(path: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    text.lines()
        .filter_map(|line| line.strip_prefix("export ").unwrap_or(line).split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// Runs a program as the owner of `folder`, who owns the servers.
pub(crate) fn as_owner(folder: &str, program: &str, args: &[&str]) -> Output {
    let whose = |format: &str| {
        let said = Command::new("stat")
            .args(["-c", format, folder])
            .output()
            .expect("stat");
        String::from_utf8(said.stdout)
            .expect("UTF-8")
            .trim()
            .to_owned()
    };
    let (user, group) = (whose("--reuid=%u"), whose("--regid=%g"));
    let mut command = if whose("%u") == whose_are_we() {
        Command::new(program)
    } else {
        let mut command = Command::new("setpriv");
        command.args([&user, &group, "--clear-groups", program]);
        command
    };
    command
        .current_dir(folder)
        .args(args)
        .output()
        .expect("it can be started")
}

fn whose_are_we() -> String {
    let said = Command::new("id").arg("-u").output().expect("id");
    String::from_utf8(said.stdout)
        .expect("UTF-8")
        .trim()
        .to_owned()
}
