//! Where and how to reach Postgres: a libpq URL over the `PG*` environment over libpq's defaults.
//!
//! Input: the text of `WALPOST_POSTGRES_URL` and a look-up for the environment. Output: a checked [`PostgresConfig`].
//! Nothing is connected to and no certificate is read here. The password is never shown: not by `Debug`, not by
//! `Display`, not by an error.
//!
//! Parameters and defaults follow "Connection Strings" and "Parameter Key Words" of the libpq documentation, except:
//! `connect_timeout` defaults to 10 s (libpq: for ever), TCP keepalives to 30 s (libpq: the system's 2 hours), and
//! the files under `~/.postgresql` and `~/.pgpass` are not looked at.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::parameters::{Given, shown};
use super::url;

const DEFAULT_PORT: u16 = 5432;
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What is sent and not acknowledged for this long was sent to a host that is gone. The system would wait for a quarter of an hour,
/// and a stream always has a status update on its way, which keeps keepalive probes from being sent.
const VANISHED: Duration = Duration::from_secs(60);
/// Where Debian's server listens; libpq as Debian builds it looks here.
const DEBIAN_SOCKET_DIR: &str = "/var/run/postgresql";

/// How much encryption, as `sslmode` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    /// Never.
    Disable,
    /// Only when the server refuses a plain connection.
    Allow,
    /// When the server has it; libpq's default.
    Prefer,
    /// Always, but whoever answers is believed (unless `sslrootcert` is set: then as `verify-ca`).
    Require,
    /// Always, and the certificate must come from a trusted authority.
    VerifyCa,
    /// Always, and the certificate must also be for this host.
    VerifyFull,
}

/// Which server is wanted, as `target_session_attrs` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetSession {
    /// The first that lets us in.
    Any,
    /// The first that accepts writes: after a failover this is the new primary. One that is read-only only by default comes last.
    ReadWrite,
    /// The first that is not in recovery.
    Primary,
}

/// Whether SCRAM must be tied to the TLS connection, as `channel_binding` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBindingMode {
    /// Not even when the server offers it.
    Disable,
    /// When both sides can.
    Prefer,
    /// Any login without it is refused.
    Require,
}

/// One server to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// A name or address, and a port.
    Tcp(String, u16),
    /// A directory with sockets, and the port that names the socket in it.
    Unix(PathBuf, u16),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(name, port) if name.contains(':') => write!(f, "[{name}]:{port}"),
            Self::Tcp(name, port) => write!(f, "{name}:{port}"),
            Self::Unix(dir, port) => write!(f, "{}", socket_path(dir, *port).display()),
        }
    }
}

/// The socket's file: `<dir>/.s.PGSQL.<port>`.
pub(super) fn socket_path(dir: &Path, port: u16) -> PathBuf {
    dir.join(format!(".s.PGSQL.{port}"))
}

/// TLS settings; files are read at each connect, so that a renewed certificate is picked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SslConfig {
    /// How much encryption.
    pub mode: SslMode,
    /// PEM file with trusted authorities; `None` or `system` means those of the host.
    pub root_cert: Option<PathBuf>,
    /// PEM files of the client certificate chain and of its key.
    pub client_cert: Option<(PathBuf, PathBuf)>,
}

/// Everything that a connection needs.
#[derive(Clone)]
pub struct PostgresConfig {
    pub(super) hosts: Vec<Host>,
    pub(super) user: String,
    pub(super) password: Option<Vec<u8>>,
    pub(super) dbname: String,
    pub(super) ssl: SslConfig,
    pub(super) application_name: Option<String>,
    pub(super) connect_timeout: Option<Duration>,
    pub(super) target: TargetSession,
    pub(super) options: Option<String>,
    pub(super) channel_binding: ChannelBindingMode,
    pub(super) keepalives_idle: Duration,
    pub(super) tcp_user_timeout: Option<Duration>,
}

impl PostgresConfig {
    /// Reads `url`, fills gaps from the environment through `env`, then from the defaults.
    ///
    /// # Errors
    /// A sentence that says which parameter or variable is wrong and what is allowed; never the password.
    pub fn parse(url: Option<&str>, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let given = Given::collect(url, env)?;
        let user = match given.text("user")? {
            Some(user) => user,
            None => system_user(env)
                .ok_or("no user: name one in the URL (postgres://user@host/dbname) or in PGUSER")?,
        };
        Ok(Self {
            hosts: hosts(&given)?,
            password: given.bytes("password"),
            dbname: given.text("dbname")?.unwrap_or_else(|| user.clone()),
            user,
            ssl: ssl(&given)?,
            application_name: given.text("application_name")?,
            connect_timeout: match given.number("connect_timeout")? {
                None => Some(DEFAULT_CONNECT_TIMEOUT),
                // libpq: zero means no limit.
                Some(0) => None,
                Some(seconds) => Some(Duration::from_secs(seconds.into())),
            },
            target: given
                .one_of(
                    "target_session_attrs",
                    &[
                        ("any", TargetSession::Any),
                        ("read-write", TargetSession::ReadWrite),
                        ("primary", TargetSession::Primary),
                    ],
                )?
                .unwrap_or(TargetSession::Any),
            options: given.text("options")?,
            channel_binding: given
                .one_of(
                    "channel_binding",
                    &[
                        ("disable", ChannelBindingMode::Disable),
                        ("prefer", ChannelBindingMode::Prefer),
                        ("require", ChannelBindingMode::Require),
                    ],
                )?
                .unwrap_or(ChannelBindingMode::Prefer),
            keepalives_idle: Duration::from_secs(
                given
                    .number("keepalives_idle")?
                    .filter(|&seconds| seconds > 0)
                    .unwrap_or(30)
                    .into(),
            ),
            tcp_user_timeout: match given.number("tcp_user_timeout")? {
                None => Some(VANISHED),
                Some(0) => None,
                Some(ms) => Some(Duration::from_millis(ms.into())),
            },
        })
    }

    /// The role to log in as.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The database to connect to.
    pub fn dbname(&self) -> &str {
        &self.dbname
    }

    /// The same servers and credentials with another database.
    #[must_use]
    pub fn with_dbname(mut self, dbname: impl Into<String>) -> Self {
        self.dbname = dbname.into();
        self
    }

    /// The servers, in the order in which they are tried.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The settings as a URL without the password: fit for logs.
    pub fn display_url(&self) -> String {
        let mut shown = format!("postgres://{}@", url::encode(&self.user));
        for (index, host) in self.hosts.iter().enumerate() {
            if index > 0 {
                shown.push(',');
            }
            match host {
                Host::Tcp(..) => shown.push_str(&host.to_string()),
                Host::Unix(dir, port) => {
                    shown.push_str(&url::encode(&dir.to_string_lossy()));
                    shown.push(':');
                    shown.push_str(&port.to_string());
                }
            }
        }
        shown.push('/');
        shown.push_str(&url::encode(&self.dbname));
        shown
    }
}

impl fmt::Display for PostgresConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.display_url())
    }
}

impl fmt::Debug for PostgresConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresConfig")
            .field("url", &self.display_url())
            .field("password", &self.password.as_ref().map(|_| "***"))
            .field("ssl", &self.ssl)
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

fn hosts(given: &Given) -> Result<Vec<Host>, String> {
    let names = given.text("host")?.unwrap_or_default();
    let ports = given.text("port")?.unwrap_or_default();
    let names: Vec<&str> = names.split(',').map(str::trim).collect();
    let ports: Vec<&str> = ports.split(',').map(str::trim).collect();
    if ports.len() != 1 && ports.len() != names.len() {
        return Err(format!(
            "{} ports for {} hosts: give one port for all, or one for each",
            ports.len(),
            names.len()
        ));
    }
    let host = |(index, name): (usize, &&str)| {
        let port = match ports[if ports.len() == 1 { 0 } else { index }] {
            "" => DEFAULT_PORT,
            text => match text.parse::<u16>() {
                Ok(port) if port > 0 => port,
                _ => {
                    return Err(format!(
                        "the port of host number {} is {}, allowed is a number from 1 to 65535",
                        index + 1,
                        shown(text.as_bytes())
                    ));
                }
            },
        };
        Ok(match *name {
            "" if Path::new(DEBIAN_SOCKET_DIR).is_dir() => {
                Host::Unix(DEBIAN_SOCKET_DIR.into(), port)
            }
            "" => Host::Tcp("127.0.0.1".into(), port),
            dir if dir.starts_with('/') => Host::Unix(dir.into(), port),
            name => Host::Tcp(name.into(), port),
        })
    };
    names.iter().enumerate().map(host).collect()
}

fn ssl(given: &Given) -> Result<SslConfig, String> {
    let mode = given.one_of(
        "sslmode",
        &[
            ("disable", SslMode::Disable),
            ("allow", SslMode::Allow),
            ("prefer", SslMode::Prefer),
            ("require", SslMode::Require),
            ("verify-ca", SslMode::VerifyCa),
            ("verify-full", SslMode::VerifyFull),
        ],
    )?;
    let root_cert = given.text("sslrootcert")?;
    let client_cert = match (given.text("sslcert")?, given.text("sslkey")?) {
        (Some(cert), Some(key)) => Some((cert.into(), key.into())),
        (None, None) => None,
        (Some(_), None) => {
            return Err("sslcert (PGSSLCERT) is set without sslkey (PGSSLKEY)".into());
        }
        (None, Some(_)) => {
            return Err("sslkey (PGSSLKEY) is set without sslcert (PGSSLCERT)".into());
        }
    };
    Ok(SslConfig {
        mode: mode.unwrap_or(SslMode::Prefer),
        root_cert: root_cert.filter(|path| path != "system").map(Into::into),
        client_cert,
    })
}

/// The name libpq would log in with: that of the process' user, by `/etc/passwd`, else what the environment calls it.
fn system_user(env: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    use std::os::unix::fs::MetadataExt as _;
    let by_id = || {
        let id = std::fs::metadata("/proc/self").ok()?.uid().to_string();
        let users = std::fs::read_to_string("/etc/passwd").ok()?;
        users.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == id).then(|| name.to_owned())
        })
    };
    let by_env = || env("USER").or_else(|| env("LOGNAME"));
    by_id().or_else(by_env).filter(|name| !name.is_empty())
}

#[cfg(test)]
#[path = "config_tests.rs"]
#[allow(clippy::unwrap_used)]
mod tests;
