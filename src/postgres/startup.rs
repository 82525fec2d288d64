//! A session of our own with a server: startup message, login, and messages one by one until streaming begins.
//!
//! Owns the stream and the bytes read from it so far. Input: a connected [`Stream`] and the configuration. Output: a
//! `Session` that is ready for a query. Logins: trust, password, md5, SCRAM-SHA-256 and, over TLS, SCRAM-SHA-256-PLUS
//! ("Start-up" and "SASL Authentication" in the Postgres documentation; the cryptography is `postgres-protocol`'s).

use std::collections::HashMap;
use std::io;

use bytes::{Buf as _, BytesMut};
use fallible_iterator::FallibleIterator as _;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{
    ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256,
};
use postgres_protocol::message::backend::{self, Header, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tracing::debug;

use super::config::{ChannelBindingMode, PostgresConfig};
use super::server_error::ServerError;
use super::session;
use super::stream::Stream;
use crate::{Error, Result};

/// Longest message that is believed before streaming; all there are, are a few hundred bytes. It bounds what a server
/// that has not proved its identity can make us allocate.
const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// A logged-in connection, outside of any command.
pub(super) struct Session {
    stream: Stream,
    buffer: BytesMut,
    parameters: HashMap<String, String>,
    /// What is being done, to complete "cannot …" in errors.
    doing: String,
}

impl Session {
    /// Logs in for logical replication of the configured database. The settings are still those of the role:
    /// [`Session::set_up`] changes that.
    pub(super) async fn open(
        stream: Stream,
        config: &PostgresConfig,
        application_name: &str,
    ) -> Result<Self> {
        let mut session = Self {
            stream,
            buffer: BytesMut::with_capacity(8192),
            parameters: HashMap::new(),
            doing: format!("log in as {} to stream {}", config.user, config.dbname),
        };
        let mut parameters = vec![
            ("user", config.user.as_str()),
            ("database", config.dbname.as_str()),
            ("replication", "database"),
            ("application_name", application_name),
            ("client_encoding", "UTF8"),
        ];
        if let Some(options) = &config.options {
            parameters.push(("options", options));
        }
        let mut message = BytesMut::new();
        session.encoded(frontend::startup_message(parameters, &mut message))?;
        session.write(&message).await?;
        session.log_in(config).await?;
        session.until_ready().await?;
        Ok(session)
    }

    /// Gives the session the settings of [`super::session`].
    pub(super) async fn set_up(&mut self) -> Result<()> {
        self.doing("set up the replication session");
        for statement in session::statements() {
            self.statement(&statement).await?;
        }
        self.take_text_as_it_is().await
    }

    async fn statement(&mut self, sql: &str) -> Result<()> {
        self.query(sql).await?;
        while !matches!(self.read().await?, Message::ReadyForQuery(_)) {}
        Ok(())
    }

    /// A database of the encoding `SQL_ASCII` holds any bytes as text, and refuses to send what is no UTF-8 to a client of
    /// UTF-8. There the client takes bytes as they are, and looks at them itself.
    ///
    /// # Errors
    /// Refused where text would come in another encoding: it would be published as it came.
    async fn take_text_as_it_is(&mut self) -> Result<()> {
        const ANY_BYTES: &str = "SQL_ASCII";
        let is_any_bytes = |encoding: Option<&str>| encoding == Some(ANY_BYTES);
        if is_any_bytes(self.parameter("server_encoding")) {
            self.statement("SET client_encoding TO 'SQL_ASCII'").await?;
            if is_any_bytes(self.parameter("client_encoding")) {
                return Ok(());
            }
        } else if self.parameter("client_encoding") == Some("UTF8") {
            return Ok(());
        }
        Err(Error::refused(format!(
            "cannot {}: the server does not send UTF-8",
            self.doing
        ))
        .hint("connect to Postgres itself; a pooler may change client_encoding"))
    }

    /// A setting that the server reports, such as `server_version`.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// Names what comes next, to complete "cannot …" in errors.
    pub(super) fn doing(&mut self, doing: &str) {
        doing.clone_into(&mut self.doing);
    }

    /// The stream, and what was read from it beyond the last message.
    pub(super) fn into_parts(self) -> (Stream, BytesMut) {
        (self.stream, self.buffer)
    }

    /// Sends a simple query.
    pub(super) async fn query(&mut self, sql: &str) -> Result<()> {
        let mut message = BytesMut::new();
        self.encoded(frontend::query(sql, &mut message))?;
        self.write(&message).await
    }

    /// The next message; notices and settings are taken care of, an `ErrorResponse` becomes an error.
    pub(super) async fn read(&mut self) -> Result<Message> {
        loop {
            let total = self.buffer_message().await?;
            match self.buffer[0] {
                backend::ERROR_RESPONSE_TAG => {
                    let refusal = ServerError::parse(&self.buffer[5..total]);
                    self.buffer.advance(total);
                    return Err(refusal.into_error(&self.doing));
                }
                backend::NOTICE_RESPONSE_TAG => {
                    debug!(notice = %ServerError::parse(&self.buffer[5..total]), "server notice");
                    self.buffer.advance(total);
                }
                _ => match Message::parse(&mut self.buffer) {
                    Ok(Some(Message::ParameterStatus(body))) => {
                        if let (Ok(name), Ok(value)) = (body.name(), body.value()) {
                            self.parameters.insert(name.to_owned(), value.to_owned());
                        }
                    }
                    Ok(Some(message)) => return Ok(message),
                    Ok(None) => return Err(Error::bug("a complete message was not parsed")),
                    Err(error) => return Err(self.unreadable().caused_by(error)),
                },
            }
        }
    }

    /// Waits for the `CopyBothResponse` that starts a stream; `postgres-protocol` does not know this message.
    pub(super) async fn read_copy_both(&mut self) -> Result<()> {
        loop {
            let total = self.buffer_message().await?;
            match self.buffer[0] {
                b'W' => {
                    self.buffer.advance(total);
                    return Ok(());
                }
                backend::NOTICE_RESPONSE_TAG | backend::PARAMETER_STATUS_TAG => {
                    self.buffer.advance(total);
                }
                _ => {
                    self.read().await?;
                    return Err(self.unreadable());
                }
            }
        }
    }

    /// Has the whole next message in the buffer, and says how long it is with its header.
    async fn buffer_message(&mut self) -> Result<usize> {
        loop {
            match Header::parse(&self.buffer) {
                Err(error) => return Err(self.unreadable().caused_by(error)),
                Ok(None) => {}
                Ok(Some(header)) => match usize::try_from(header.len()) {
                    Ok(length) if length <= MAX_MESSAGE_BYTES => {
                        if self.buffer.len() > length {
                            return Ok(length + 1);
                        }
                    }
                    _ => return Err(self.unreadable()),
                },
            }
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) => {
                    return Err(self.lost().caused_by(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the server closed the connection",
                    )));
                }
                Ok(_) => {}
                Err(error) => return Err(self.lost().caused_by(error)),
            }
        }
    }

    async fn write(&mut self, message: &[u8]) -> Result<()> {
        let sent = match self.stream.write_all(message).await {
            Ok(()) => self.stream.flush().await,
            Err(error) => Err(error),
        };
        sent.map_err(|error| self.lost().caused_by(error))
    }

    fn encoded(&self, outcome: io::Result<()>) -> Result<()> {
        outcome.map_err(|error| Error::config(format!("cannot {}", self.doing)).caused_by(error))
    }

    fn lost(&self) -> Error {
        Error::temporary(format!("cannot {}", self.doing))
    }

    fn unreadable(&self) -> Error {
        Error::temporary(format!(
            "cannot {}: the server sent a message that has no place here",
            self.doing
        ))
    }

    async fn log_in(&mut self, config: &PostgresConfig) -> Result<()> {
        let request = self.read().await?;
        if !matches!(request, Message::AuthenticationSasl(_)) {
            self.without_binding(config)?;
        }
        match request {
            Message::AuthenticationOk => return Ok(()),
            Message::AuthenticationCleartextPassword => {
                self.send_password(self.password(config)?).await?;
            }
            Message::AuthenticationMd5Password(body) => {
                let hash = md5_hash(config.user.as_bytes(), self.password(config)?, body.salt());
                self.send_password(hash.as_bytes()).await?;
            }
            Message::AuthenticationSasl(body) => {
                let (mut plain, mut plus) = (false, false);
                let mut mechanisms = body.mechanisms();
                while let Some(mechanism) = mechanisms
                    .next()
                    .map_err(|error| self.unreadable().caused_by(error))?
                {
                    plain |= mechanism == SCRAM_SHA_256;
                    plus |= mechanism == SCRAM_SHA_256_PLUS;
                }
                self.scram(config, plain, plus).await?;
            }
            Message::AuthenticationGss
            | Message::AuthenticationSspi
            | Message::AuthenticationKerberosV5
            | Message::AuthenticationScmCredential => {
                return Err(self.unsupported());
            }
            _ => return Err(self.unreadable()),
        }
        match self.read().await? {
            Message::AuthenticationOk => Ok(()),
            _ => Err(self.unreadable()),
        }
    }

    fn unsupported(&self) -> Error {
        Error::refused(format!(
            "cannot {}: the server asks for a way of login that walpost does not have",
            self.doing
        ))
        .hint("use scram-sha-256, md5, password, cert or trust in pg_hba.conf")
    }

    fn password<'a>(&self, config: &'a PostgresConfig) -> Result<&'a [u8]> {
        config.password.as_deref().ok_or_else(|| {
            Error::refused(format!(
                "cannot {}: the server asks for a password and none is set",
                self.doing
            ))
            .hint("set PGPASSWORD, or a password in WALPOST_POSTGRES_URL")
        })
    }

    fn without_binding(&self, config: &PostgresConfig) -> Result<()> {
        if config.channel_binding != ChannelBindingMode::Require {
            return Ok(());
        }
        Err(Error::refused(format!(
            "cannot {}: channel_binding=require, but this login has none",
            self.doing
        ))
        .hint("use TLS and scram-sha-256 in pg_hba.conf, or channel_binding=prefer"))
    }

    async fn send_password(&mut self, password: &[u8]) -> Result<()> {
        let mut message = BytesMut::new();
        self.encoded(frontend::password_message(password, &mut message))?;
        self.write(&message).await
    }

    /// Chooses mechanism and binding as RFC 5802 §6 wants: to say "y" (I could, you cannot) where the server can would be
    /// taken for an attack, so where we cannot bind we say "n".
    async fn scram(&mut self, config: &PostgresConfig, plain: bool, plus: bool) -> Result<()> {
        let end_point = match config.channel_binding {
            ChannelBindingMode::Disable => None,
            ChannelBindingMode::Prefer | ChannelBindingMode::Require => self.stream.end_point(),
        };
        let (mechanism, binding) = match end_point {
            Some(data) if plus => (
                SCRAM_SHA_256_PLUS,
                ChannelBinding::tls_server_end_point(data.to_vec()),
            ),
            Some(_) if plain => (SCRAM_SHA_256, ChannelBinding::unrequested()),
            None if plain => (SCRAM_SHA_256, ChannelBinding::unsupported()),
            _ => return Err(self.unsupported()),
        };
        if mechanism != SCRAM_SHA_256_PLUS {
            self.without_binding(config)?;
        }
        let failed = |session: &Self, error: io::Error| {
            Error::refused(format!(
                "cannot {}: the server did not prove that it knows the password",
                session.doing
            ))
            .caused_by(error)
        };
        let mut scram = ScramSha256::new(self.password(config)?, binding);
        let mut message = BytesMut::new();
        self.encoded(frontend::sasl_initial_response(
            mechanism,
            scram.message(),
            &mut message,
        ))?;
        self.write(&message).await?;
        let Message::AuthenticationSaslContinue(body) = self.read().await? else {
            return Err(self.unreadable());
        };
        scram
            .update(body.data())
            .map_err(|error| failed(self, error))?;
        message.clear();
        self.encoded(frontend::sasl_response(scram.message(), &mut message))?;
        self.write(&message).await?;
        let Message::AuthenticationSaslFinal(body) = self.read().await? else {
            return Err(self.unreadable());
        };
        scram
            .finish(body.data())
            .map_err(|error| failed(self, error))?;
        debug!(mechanism, "logged in with SCRAM");
        Ok(())
    }

    async fn until_ready(&mut self) -> Result<()> {
        loop {
            match self.read().await? {
                Message::BackendKeyData(_) => {}
                Message::ReadyForQuery(_) => return Ok(()),
                _ => return Err(self.unreadable()),
            }
        }
    }
}
