//! Reaches a server: addresses in order, socket options, `SSLRequest`, TLS, and the check that it is the wanted one.
//!
//! Input: [`PostgresConfig`]. Output: for [`connect_sql`] a `tokio_postgres` client with its driver task, for the
//! replication connection whatever its login makes of the [`Stream`]. The settings that each session is given are those of
//! [`super::session`]; this is the only place where one is opened.
//!
//! As in libpq: hosts are tried in order, each address of a host in turn; a refused login ends the search; `prefer` and
//! `allow` try the other kind of connection when the first kind is refused. A Unix socket is never encrypted.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio_postgres::SimpleQueryMessage;
use tokio_postgres::config::{ChannelBinding, SslMode as ClientSslMode, SslNegotiation};
use tracing::debug;

use super::answer::ANSWER;
use super::channel_binding::tls_server_end_point;
use super::config::{
    ChannelBindingMode, Host, PostgresConfig, SslMode, TargetSession, socket_path,
};
use super::server_error::{sql_error, sqlstate};
use super::session;
use super::stream::Stream;
use super::tls;
use super::watch::{self, AtWork, Established, Process, Watched};
use crate::aside::read_aside;
use crate::{Error, Result};

/// Connects for ordinary SQL and runs the connection in a task of its own, which ends when the client is dropped. The session
/// has the settings of [`super::session`].
///
/// `application_name` is what `pg_stat_activity` shows, unless the configuration names another.
///
/// # Errors
/// Temporary when no server can be reached now, refused when one says no, config when a TLS file cannot be used.
pub async fn connect_sql(
    config: &PostgresConfig,
    application_name: &str,
) -> Result<tokio_postgres::Client> {
    connect(config, application_name, Settings::Walpost).await
}

/// The same for statements of an application (System A or B): the session has the settings of its role and database. Every
/// name in walpost's own statements must be qualified there.
///
/// # Errors
/// As [`connect_sql`].
pub async fn connect_application(
    config: &PostgresConfig,
    application_name: &str,
) -> Result<tokio_postgres::Client> {
    connect(config, application_name, Settings::Inherited).await
}

/// Whose settings a session has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Settings {
    Walpost,
    Inherited,
}

async fn connect(
    config: &PostgresConfig,
    application_name: &str,
    of: Settings,
) -> Result<tokio_postgres::Client> {
    let mut settings = tokio_postgres::Config::new();
    settings
        .user(&config.user)
        .dbname(&config.dbname)
        .application_name(
            config
                .application_name
                .as_deref()
                .unwrap_or(application_name),
        )
        .channel_binding(match config.channel_binding {
            ChannelBindingMode::Disable => ChannelBinding::Disable,
            ChannelBindingMode::Prefer => ChannelBinding::Prefer,
            ChannelBindingMode::Require => ChannelBinding::Require,
        });
    if let Some(password) = &config.password {
        settings.password(password);
    }
    if let Some(options) = &config.options {
        settings.options(options);
    }
    let login = SqlLogin {
        config,
        settings,
        of,
    };
    first_host(config, &login).await
}

/// What to do with a connected stream, before it is known whether this server will do.
///
/// A trait and not an async closure: only so does the compiler see that the whole may be spawned.
pub(super) trait Login: Sync {
    /// A logged-in connection.
    type Output: Send;

    /// Logs in, checks that the server is the `wanted` one ([`check_target`]), and gives the session its settings.
    fn log_in(
        &self,
        stream: Stream,
        wanted: TargetSession,
    ) -> impl Future<Output = Result<Self::Output>> + Send;
}

struct SqlLogin<'a> {
    config: &'a PostgresConfig,
    settings: tokio_postgres::Config,
    of: Settings,
}

impl Login for SqlLogin<'_> {
    type Output = tokio_postgres::Client;

    async fn log_in(&self, stream: Stream, wanted: TargetSession) -> Result<Self::Output> {
        let config = self.config;
        let mut settings = self.settings.clone();
        if stream.is_encrypted() {
            // "Direct": the handshake is already done, there is nothing to negotiate.
            settings
                .ssl_mode(ClientSslMode::Require)
                .ssl_negotiation(SslNegotiation::Direct);
        } else {
            settings.ssl_mode(ClientSslMode::Disable);
        }
        let (stream, traffic) = Watched::new(stream);
        let (client, connection) =
            settings
                .connect_raw(stream, Established)
                .await
                .map_err(|error| {
                    let doing = format!("log in as {} to {}", config.user, config.dbname);
                    sql_error(&doing, error)
                })?;
        check_target(wanted, |name| connection.parameter(name))?;
        let (tell, told) = tokio::sync::watch::channel(None);
        let config = config.clone();
        let ask = move || at_work(config.clone(), told.borrow().clone());
        tokio::spawn(watch::drive(connection, traffic, ask, ANSWER));
        let settings = if self.of == Settings::Walpost {
            format!("{}; ", session::statements().join("; "))
        } else {
            String::new()
        };
        let statements = format!("{settings}{}", watch::process());
        let set = client.simple_query(&statements).await;
        let answers = set.map_err(|error| sql_error("set up the session", error))?;
        tell.send_replace(process(&answers));
        Ok(client)
    }
}

/// The process of a session, of the last row of these answers.
fn process(answers: &[SimpleQueryMessage]) -> Option<Process> {
    let rows = answers.iter().filter_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let row = rows.last()?;
    Process::new(row.get(0)?, row.get(1)?)
}

/// Asks in a session of its own whether a process of the server is at work.
fn at_work(config: PostgresConfig, process: Option<Process>) -> AtWork {
    Box::pin(async move {
        let process = process?;
        let client = match connect_sql(&config, "walpost watch").await {
            Ok(client) => client,
            // A server that has no room for another session (53) is there, and may be at work.
            Err(error) => return sqlstate(&error)?.starts_with("53").then_some(true),
        };
        let row = client
            .query_one(&watch::is_idle(&process), &[])
            .await
            .ok()?;
        let (is_same_server, is_idle): (bool, bool) = (row.get(0), row.get(1));
        is_same_server.then_some(!is_idle)
    })
}

/// Tries the hosts in order until `login` succeeds with one.
///
/// `target_session_attrs=read-write` prefers a server that takes writes by default. Where there is none, a primary that is only read-only
/// by default will do: a managed service makes it so when its disk is full, and walpost's sessions write all the same.
pub(super) async fn first_host<L: Login>(config: &PostgresConfig, login: &L) -> Result<L::Output> {
    let mut failures = match try_hosts(config, login, config.target).await {
        Tried::Done(outcome) => return outcome,
        Tried::Failed(failures) => failures,
    };
    if failures.iter().any(is_read_only_by_default) {
        failures = match try_hosts(config, login, TargetSession::Primary).await {
            Tried::Done(outcome) => return outcome,
            Tried::Failed(failures) => failures,
        };
    }
    Err(combined(config, failures))
}

/// How a walk over the hosts ended.
enum Tried<T> {
    /// With a session, or with an error that no other host can change.
    Done(Result<T>),
    /// None will do.
    Failed(Vec<Error>),
}

async fn try_hosts<L: Login>(
    config: &PostgresConfig,
    login: &L,
    wanted: TargetSession,
) -> Tried<L::Output> {
    let mut failures: Vec<Error> = Vec::new();
    for host in &config.hosts {
        let addresses = match addresses(host, config.connect_timeout).await {
            Ok(addresses) => addresses,
            Err(error) => {
                failures.push(error);
                continue;
            }
        };
        for address in &addresses {
            match first_encryption(config, host, address, (login, wanted)).await {
                Ok(done) => return Tried::Done(Ok(done)),
                // Another server would hear the same wrong password, and a wrong file stays wrong.
                Err(error) if is_login_refusal(&error) || error.exit_code() == 64 => {
                    return Tried::Done(Err(error));
                }
                Err(error) => {
                    debug!(%host, error = %error.report(), "this server will not do");
                    failures.push(error);
                }
            }
        }
    }
    Tried::Failed(failures)
}

fn is_login_refusal(error: &Error) -> bool {
    sqlstate(error).is_some_and(|code| code.starts_with("28"))
}

fn combined(config: &PostgresConfig, mut failures: Vec<Error>) -> Error {
    if failures.len() == 1
        && let Some(only) = failures.pop()
    {
        return only;
    }
    let all: Vec<String> = failures.iter().map(Error::report).collect();
    let says = format!("cannot use any server of {config}: {}", all.join("; "));
    if failures.iter().all(|error| !error.is_temporary()) && !failures.is_empty() {
        Error::refused(says)
    } else {
        Error::temporary(says)
    }
}

/// One address of a host.
enum Address<'a> {
    Tcp { name: &'a str, address: SocketAddr },
    Unix(std::path::PathBuf),
}

async fn addresses(host: &Host, limit: Option<Duration>) -> Result<Vec<Address<'_>>> {
    let (name, port) = match host {
        Host::Unix(dir, port) => return Ok(vec![Address::Unix(socket_path(dir, *port))]),
        Host::Tcp(name, port) => (name.as_str(), *port),
    };
    let unknown = || Error::temporary(format!("cannot find the address of {name}"));
    let found = within(limit, host, async {
        let found = lookup_host((name, port)).await;
        found.map_err(|error| unknown().caused_by(error))
    })
    .await?;
    let addresses: Vec<_> = found
        .map(|address| Address::Tcp { name, address })
        .collect();
    if addresses.is_empty() {
        return Err(unknown());
    }
    Ok(addresses)
}

async fn within<T>(
    limit: Option<Duration>,
    host: &Host,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let Some(limit) = limit else {
        return work.await;
    };
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        Err(Error::temporary(format!(
            "{host} did not let us in within {limit:?} (connect_timeout)"
        )))
    })
}

/// Whether to ask for TLS on one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    No,
    /// Go on without when the server has none.
    IfThere,
    Yes,
}

async fn first_encryption<L: Login>(
    config: &PostgresConfig,
    host: &Host,
    address: &Address<'_>,
    (login, wanted): (&L, TargetSession),
) -> Result<L::Output> {
    let bound = config.channel_binding == ChannelBindingMode::Require;
    let (first, second) = match (address, config.ssl.mode) {
        (Address::Unix(_), _) | (_, SslMode::Disable) => (Ask::No, None),
        // A login that must be bound to TLS is never tried without.
        (_, SslMode::Allow | SslMode::Prefer) if bound => (Ask::IfThere, None),
        (_, SslMode::Allow) => (Ask::No, Some(Ask::Yes)),
        (_, SslMode::Prefer) => (Ask::IfThere, Some(Ask::No)),
        (_, SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull) => (Ask::Yes, None),
    };
    let attempt = |ask| {
        within(config.connect_timeout, host, async move {
            let stream = open(config, host, address, ask).await?;
            login.log_in(stream, wanted).await
        })
    };
    match (attempt(first).await, second) {
        // 28000: pg_hba.conf has no line for this kind of connection. TLS that fails is no reason for `prefer` to give up.
        (Err(error), Some(second)) if sqlstate(&error) == Some("28000") || is_tls(&error) => {
            debug!(%host, error = %error.report(), ?second, "trying the other kind of connection");
            // When the second fails too, the first says more about the server.
            attempt(second).await.map_err(|other| {
                if sqlstate(&other) == Some("28000") || is_tls(&other) {
                    error
                } else {
                    other
                }
            })
        }
        (outcome, _) => outcome,
    }
}

/// Connects to one address and encrypts the connection if asked to.
async fn open(
    config: &PostgresConfig,
    host: &Host,
    address: &Address<'_>,
    ask: Ask,
) -> Result<Stream> {
    let unreachable =
        |error: io::Error| Error::temporary(format!("cannot connect to {host}")).caused_by(error);
    let (name, mut socket) = match address {
        Address::Unix(path) => {
            let socket = UnixStream::connect(path).await.map_err(unreachable)?;
            return Ok(Stream::Unix(socket));
        }
        Address::Tcp { name, address } => {
            let socket = TcpStream::connect(address).await.map_err(unreachable)?;
            (*name, socket)
        }
    };
    set_options(config, &socket).map_err(unreachable)?;
    if ask == Ask::No {
        return Ok(Stream::Tcp(socket));
    }
    // SSLRequest: length 8, code 80877103; the answer is one byte. Reading just that byte leaves nothing that someone on
    // the way could have put behind it to be taken for encrypted data.
    socket
        .write_all(&[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f])
        .await
        .map_err(unreachable)?;
    match socket.read_u8().await.map_err(unreachable)? {
        b'S' => {}
        b'N' if ask == Ask::IfThere => return Ok(Stream::Tcp(socket)),
        b'N' => {
            return Err(Error::refused(format!("{host} has no TLS"))
                .hint("set ssl = on on the server, or sslmode=prefer"));
        }
        // An error in clear text, from a server that has not proved its identity: not to be shown.
        _ => {
            return Err(Error::temporary(format!(
                "{host} could not answer the request for TLS"
            )));
        }
    }
    let (ssl, host_name) = (config.ssl.clone(), name.to_owned());
    let (kind, files) = (
        "a file of sslrootcert, sslcert or sslkey",
        format!("{ssl:?}"),
    );
    let reading = read_aside(kind, files, move || tls::client_config(&ssl, &host_name));
    let (settings, server_name) = reading.await?;
    let stream = tokio_rustls::TlsConnector::from(settings)
        .connect(server_name, socket)
        .await
        .map_err(|error| handshake_error(host, error))?;
    let certificates = stream.get_ref().1.peer_certificates();
    let end_point = certificates
        .and_then(|chain| chain.first())
        .and_then(|certificate| tls_server_end_point(certificate));
    Ok(Stream::Tls {
        stream: Box::new(stream),
        end_point,
    })
}

fn set_options(config: &PostgresConfig, socket: &TcpStream) -> io::Result<()> {
    // Status updates are small and must not wait for more.
    socket.set_nodelay(true)?;
    let socket = SockRef::from(socket);
    // A peer that vanished is noticed after idle + 3 × 10 s instead of the system's two hours.
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(config.keepalives_idle)
            .with_interval(Duration::from_secs(10))
            .with_retries(3),
    )?;
    if config.tcp_user_timeout.is_some() {
        socket.set_tcp_user_timeout(config.tcp_user_timeout)?;
    }
    // SO_RCVBUF is left alone: setting it turns off Linux' own growing of the buffer (up to tcp_rmem's 6 MiB), which
    // reaches further than net.core.rmem_max (208 KiB) allows an unprivileged process to ask for.
    Ok(())
}

fn handshake_error(host: &Host, error: io::Error) -> Error {
    let says = format!("TLS with {host} failed");
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(_)) => Error::refused(says)
            .hint("set sslrootcert (PGSSLROOTCERT) to the server's authority, and check the host's name")
            .caused_by(TlsFailure(error)),
        Some(_) => Error::refused(says).caused_by(TlsFailure(error)),
        None => Error::temporary(says).caused_by(TlsFailure(error)),
    }
}

/// Marks an error as one of the TLS handshake, so that `prefer` can go on without.
#[derive(Debug)]
struct TlsFailure(io::Error);

impl std::fmt::Display for TlsFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for TlsFailure {}

fn is_tls(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(<dyn std::error::Error>::is::<TlsFailure>)
}

/// Refuses a server that is not the wanted one, by the settings that Postgres 14+ reports at login.
pub(super) fn check_target<'a>(
    wanted: TargetSession,
    parameter: impl Fn(&str) -> Option<&'a str>,
) -> Result<()> {
    let is_on = |name| parameter(name) == Some("on");
    if wanted != TargetSession::Any && is_on("in_hot_standby") {
        return Err(Error::temporary(
            "the server is a standby, and target_session_attrs wants another",
        ));
    }
    if wanted == TargetSession::ReadWrite && is_on("default_transaction_read_only") {
        return Err(Error::temporary(
            "the server is read-only by default (default_transaction_read_only), and target_session_attrs wants another",
        )
        .caused_by(ReadOnlyByDefault));
    }
    Ok(())
}

/// Marks an error as one of a primary that takes writes when asked to.
#[derive(Debug)]
struct ReadOnlyByDefault;

impl std::fmt::Display for ReadOnlyByDefault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("default_transaction_read_only is on")
    }
}

impl std::error::Error for ReadOnlyByDefault {}

fn is_read_only_by_default(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(<dyn std::error::Error>::is::<ReadOnlyByDefault>)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::net::TcpListener;

    use super::TargetSession::{Primary, ReadWrite};
    use super::*;

    #[test]
    fn connecting_may_be_spawned() {
        fn is_send<T: Send>(_: &T) {}
        let Ok(config) = PostgresConfig::parse(Some("postgres://u@h/d"), &|_| None) else {
            panic!("a valid URL");
        };
        is_send(&connect_sql(&config, "test"));
        is_send(&crate::postgres::ReplicationConnection::connect(
            &config, "test",
        ));
    }

    /// Notes what was wanted of each attempt; the attempts of these numbers meet a server that is read-only by default.
    struct Attempts {
        read_only: &'static [usize],
        wanted: Mutex<Vec<TargetSession>>,
    }

    impl Login for Attempts {
        type Output = ();

        async fn log_in(&self, _: Stream, wanted: TargetSession) -> Result<()> {
            let number = {
                let mut all = self.wanted.lock().unwrap();
                all.push(wanted);
                all.len()
            };
            let read_only = self.read_only.contains(&number);
            check_target(wanted, |name| {
                (read_only && name == "default_transaction_read_only").then_some("on")
            })
        }
    }

    #[tokio::test]
    async fn a_server_that_takes_writes_is_preferred_to_one_that_is_read_only_by_default() {
        let listeners = [
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
        ];
        let [a, b] = listeners.each_ref().map(|one| one.local_addr().unwrap());
        let url = format!("postgres://u@{a},{b}/d?sslmode=disable&target_session_attrs=read-write");
        let config = PostgresConfig::parse(Some(&url), &|_| None).unwrap();
        let attempts = async |read_only| {
            let login = Attempts {
                read_only,
                wanted: Mutex::default(),
            };
            first_host(&config, &login).await.unwrap();
            login.wanted.into_inner().unwrap()
        };
        assert_eq!(attempts(&[]).await, [ReadWrite]);
        assert_eq!(attempts(&[1]).await, [ReadWrite, ReadWrite]);
        // Both are: the first then, which takes writes when asked to.
        assert_eq!(attempts(&[1, 2, 3]).await, [ReadWrite, ReadWrite, Primary]);
    }
}
