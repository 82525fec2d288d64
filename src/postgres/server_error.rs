//! What a server's refusal means: SQLSTATE to "retry", "stop" and "here is the command that mends it".
//!
//! Input: an `ErrorResponse` of our own connection, or an error of `tokio_postgres`. Output: [`crate::Error`], with a
//! [`ServerError`] as its source, so that [`sqlstate`] still tells the code. The codes are those of "Error
//! Codes", appendix A of the Postgres documentation.
//!
//! A server's message may quote data: for data and constraint errors (classes 22 and 23) what it quotes is left out.

use std::fmt;

use crate::{Error, Lsn};

/// An `ErrorResponse` or `NoticeResponse`, as far as walpost cares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    severity: String,
    code: String,
    message: String,
    detail: Option<String>,
    hint: Option<String>,
    /// What the server was doing.
    context: Option<String>,
    /// The function of the server that refused; the same in every language.
    routine: Option<String>,
}

impl ServerError {
    /// Reads the body of an `ErrorResponse` or `NoticeResponse`: `(field tag, zero-terminated text)…, 0`.
    ///
    /// Never fails: what cannot be read is left empty, for a broken error is an error all the same.
    pub fn parse(body: &[u8]) -> Self {
        let mut error = Self::default();
        for field in body.split(|&byte| byte == 0) {
            let Some((tag, value)) = field.split_first() else {
                break;
            };
            let value = String::from_utf8_lossy(value).into_owned();
            match tag {
                b'S' => error.severity = value,
                b'C' => error.code = value,
                b'M' => error.message = value,
                b'D' => error.detail = Some(value),
                b'H' => error.hint = Some(value),
                b'W' => error.context = Some(value),
                b'R' => error.routine = Some(value),
                _ => {}
            }
        }
        error
    }

    fn from_db(error: &tokio_postgres::error::DbError) -> Self {
        Self {
            severity: error.severity().to_owned(),
            code: error.code().code().to_owned(),
            message: error.message().to_owned(),
            detail: error.detail().map(ToOwned::to_owned),
            hint: error.hint().map(ToOwned::to_owned),
            context: error.where_().map(ToOwned::to_owned),
            routine: error.routine().map(ToOwned::to_owned),
        }
    }

    /// The SQLSTATE, five characters; empty when the server sent none.
    pub fn code(&self) -> &str {
        &self.code
    }

    /// Where in the log a walsender was: its context ends in `associated LSN 0/1537F00`, in every language.
    pub fn position(&self) -> Option<Lsn> {
        let mut words = self.context.as_deref()?.split_whitespace().rev();
        words.find_map(|word| word.parse().ok())
    }

    /// True when the text may quote rows or parameters.
    fn quotes_data(&self) -> bool {
        self.code.starts_with("22") || self.code.starts_with("23")
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = if self.quotes_data() {
            // Such a message ends in `: "the value"`.
            self.message.split(": \"").next().unwrap_or_default()
        } else {
            &self.message
        };
        write!(f, "{}: {message} [{}]", self.severity, self.code)?;
        if !self.quotes_data() {
            if let Some(detail) = &self.detail {
                write!(f, ". {detail}")?;
            }
            if let Some(hint) = &self.hint {
                write!(f, " {hint}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for ServerError {}

impl ServerError {
    /// Turns the refusal into an error; `doing` completes "cannot …".
    pub fn into_error(self, doing: &str) -> Error {
        let says = format!("cannot {doing}");
        let (temporary, hint) = meaning(&self);
        let error = if temporary {
            Error::temporary(says)
        } else {
            Error::refused(says)
        };
        let error = match hint {
            Some(hint) => error.hint(hint),
            None => error,
        };
        error.caused_by(self)
    }
}

/// Whether waiting may help, and what the operator should do.
fn meaning(error: &ServerError) -> (bool, Option<&'static str>) {
    let hint = match error.code() {
        "28P01" => Some("check user and password in WALPOST_POSTGRES_URL, PGUSER and PGPASSWORD"),
        "28000" => Some(
            "check the user, and that pg_hba.conf of the server has a line for user, database and address",
        ),
        "3D000" => Some("check the database's name in WALPOST_POSTGRES_URL or PGDATABASE"),
        // `row_security = off`: see the settings of every session.
        "42501" if error.routine.as_deref() == Some("check_enable_rls") => Some(
            "policies of that table hide rows from walpost, and they would count as published; as a superuser: ALTER ROLE <user> BYPASSRLS; \
             or as the table's owner: ALTER TABLE … DISABLE ROW LEVEL SECURITY",
        ),
        "42501" => Some(
            "streaming needs the REPLICATION attribute: ALTER ROLE <user> REPLICATION; other statements need the GRANT that the message names",
        ),
        "53300" => {
            Some("too many connections or walsenders: see max_connections and max_wal_senders")
        }
        "53400" => Some(
            "if all replication slots are in use: raise max_replication_slots and restart Postgres, or drop an unused slot; if it is temp_file_limit, which a scan of the \
             table exceeds: ALTER ROLE <user> SET temp_file_limit = -1, as a superuser",
        ),
        "55006" => {
            Some("another process streams this slot: pg_replication_slots.active_pid says which")
        }
        "42704" => Some(
            "walpost init (a publication must also be older than its slot; if it was made later, start walpost run with WALPOST_SLOT_LOST=recover: it makes the slot anew and publishes the rows in between from tables with txid and seq)",
        ),
        "42P01" | "3F000" => Some("walpost init"),
        "55000" => Some(
            "if the slot is lost (wal_status in pg_replication_slots): start walpost run with WALPOST_SLOT_LOST=recover: it makes the slot anew and publishes the rows in between from tables with txid and seq; to give up \
             those rows, drop it with pg_drop_replication_slot, then: walpost init",
        ),
        "25006" => Some(
            "the server is read-only: name all servers and target_session_attrs=read-write in the URL",
        ),
        _ => None,
    };
    let refused = matches!(
        error.code().get(..2),
        Some("0A" | "22" | "23" | "28" | "2B" | "2F" | "3D" | "3F" | "42" | "44" | "54")
    ) || matches!(error.code(), "55000" | "53400" | "08P01");
    (!refused, hint)
}

/// The SQLSTATE behind an error, when a server sent one.
pub fn sqlstate(error: &Error) -> Option<&str> {
    server_error(error).map(ServerError::code)
}

fn server_error(error: &Error) -> Option<&ServerError> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(server) = error.downcast_ref::<ServerError>() {
            return Some(server);
        }
        if let Some(walpost) = error.downcast_ref::<Error>() {
            return server_error(walpost);
        }
        cause = error.source();
    }
    None
}

/// Where in the log a walsender could not send a change, for a reason that Postgres has no code for: `internal_error`, as of a value whose
/// text form is too long for its memory, or of an output function that is gone. It may pass with time, or never.
pub fn internal_error_at(error: &Error) -> Option<Lsn> {
    let server = server_error(error)?;
    server.position().filter(|_| server.code() == "XX000")
}

/// Whether a walsender could not send a change because it exceeds a limit of the server: `program_limit_exceeded`, as of a row of more than
/// 1 GB. It stays so.
pub fn is_beyond_limits(error: &Error) -> bool {
    server_error(error)
        .is_some_and(|server| server.code() == "54000" && server.position().is_some())
}

/// True when a statement failed because of the rows or the table that it is about, and others may well succeed.
///
/// Everything that the server refuses counts as that: data (22), integrity (23), dependent objects (2B), syntax and access (42),
/// PL/pgSQL (P0), locks (55P03), deadlocks (40), whatever code an application's trigger raises; but not what is wrong with the session or the
/// server: connection (08), a prepared statement that is gone (26), a transaction or server that is read-only (25), login
/// (28), database (3D), resources (53), a server that stops (57, except a statement that was canceled), its disk (58).
pub fn is_about_rows(error: &Error) -> bool {
    match sqlstate(error) {
        Some("57014") => true,
        Some(code) => {
            let class = code.get(..2).unwrap_or_default();
            !matches!(
                class,
                "" | "08" | "25" | "26" | "28" | "3D" | "53" | "57" | "58"
            )
        }
        None => false,
    }
}

/// Whether a server refused to send text because it cannot be converted: `character_not_in_repertoire`,
/// `untranslatable_character`.
pub fn is_unconvertible(error: &Error) -> bool {
    matches!(sqlstate(error), Some("22021" | "22P05"))
}

/// Whether a server refused to send a value because its type, or one that it is made of, has no binary form: `undefined_function` of an
/// array, range or composite of such a type, `feature_not_supported` of a send function that only says so. As text it can be sent.
pub fn is_without_binary_form(error: &Error) -> bool {
    matches!(sqlstate(error), Some("42883" | "0A000"))
}

/// Turns an error of `tokio_postgres` into ours; `doing` completes "cannot …".
///
/// Use it for every statement: it keeps row data out of the message, and knows which refusals pass with time.
#[allow(clippy::needless_pass_by_value)] // Made for map_err.
pub fn sql_error(doing: &str, error: tokio_postgres::Error) -> Error {
    use std::error::Error as _;
    if let Some(server) = error.as_db_error() {
        return ServerError::from_db(server).into_error(doing);
    }
    let io = error
        .source()
        .and_then(|source| source.downcast_ref::<std::io::Error>());
    let says = format!("cannot {doing}: {error}");
    match io {
        Some(io) => {
            Error::temporary(says).caused_by(std::io::Error::new(io.kind(), io.to_string()))
        }
        None if error.is_closed() => Error::temporary(says),
        None => match error.to_string().as_str() {
            // These three are all that a server can cause; the rest is our statement or its types.
            "unexpected message from server" | "error parsing response from server" => {
                Error::temporary(says)
            }
            "authentication error" | "invalid configuration" => {
                let why = error.source().map(ToString::to_string).unwrap_or_default();
                Error::refused(format!("{says}: {why}"))
                    .hint("check user, password and channel_binding in WALPOST_POSTGRES_URL or PG*")
            }
            _ => Error::bug(says),
        },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn response(code: &str, message: &str, detail: &str) -> Vec<u8> {
        format!("SERROR\0VERROR\0C{code}\0M{message}\0D{detail}\0Fx.c\0L1\0\0").into_bytes()
    }

    #[test]
    fn a_walsenders_context_says_where_in_the_log_it_was() {
        let parsed = |context: &str| {
            let body = format!("SERROR\0C22P05\0Mm\0W{context}\0\0");
            ServerError::parse(body.as_bytes()).position()
        };
        let context = "slot \"a/b\", output plugin \"pgoutput\", in the change callback, associated LSN 0/1537F00";
        assert_eq!(parsed(context), Some(Lsn::new(0x0153_7F00)));
        assert_eq!(parsed("something else"), None);
        assert_eq!(ServerError::default().position(), None);
    }

    #[test]
    fn a_change_that_a_walsender_cannot_send_is_told_by_its_place() {
        let error = |code: &str, context: &str| {
            let body = format!("SERROR\0C{code}\0Mm\0W{context}\0\0");
            ServerError::parse(body.as_bytes()).into_error("go on")
        };
        let context = "in the change callback, associated LSN 0/10";
        let at = |code, context| internal_error_at(&error(code, context));
        assert_eq!(at("XX000", context), Some(Lsn::new(16)));
        assert_eq!(at("XX000", ""), None);
        assert_eq!(at("57P01", context), None);
        assert!(is_beyond_limits(&error("54000", context)));
        assert!(!is_beyond_limits(&error("54000", "")));
        assert!(!is_beyond_limits(&error("XX000", context)));
    }

    #[test]
    fn what_rows_cause_is_told_from_what_the_server_has() {
        for (code, expected) in [
            ("22003", true),
            ("23503", true),
            ("2BP01", true),
            ("42501", true),
            ("P0001", true),
            ("APP01", true),
            ("55P03", true),
            ("57014", true),
            ("57P01", false),
            ("53100", false),
            ("08006", false),
            ("25006", false),
            ("", false),
        ] {
            let error = ServerError::parse(&response(code, "m", "d")).into_error("do it");
            assert_eq!(is_about_rows(&error), expected, "{code}");
        }
        assert!(!is_about_rows(&Error::temporary("no server said so")));
    }

    #[test]
    fn each_code_leads_to_its_kind() {
        for (code, temporary, hint) in [
            ("28P01", false, "password"),
            ("28000", false, "pg_hba"),
            ("3D000", false, "database"),
            ("42501", false, "REPLICATION"),
            ("42704", false, "walpost init"),
            ("55000", false, "walpost init"),
            ("53400", false, "max_replication_slots"),
            ("55006", true, "active_pid"),
            ("53300", true, "max_wal_senders"),
            ("25006", true, "read-write"),
            ("57P03", true, ""),
            ("57P01", true, ""),
            ("XX000", true, ""),
            ("", true, ""),
        ] {
            let error = ServerError::parse(&response(code, "m", "d")).into_error("do it");
            assert_eq!(error.is_temporary(), temporary, "{code}");
            assert!(
                error.hint_text().unwrap_or_default().contains(hint),
                "{code}"
            );
            assert_eq!(sqlstate(&error), Some(code));
        }
    }

    #[test]
    fn data_is_not_quoted() {
        let body = response(
            "22P02",
            "invalid input syntax for type uuid: \"secret\"",
            "secret",
        );
        let report = ServerError::parse(&body).into_error("do it").report();
        assert!(
            report.contains("invalid input syntax for type uuid"),
            "{report}"
        );
        assert!(!report.contains("secret"), "{report}");
        let body = response(
            "23505",
            "duplicate key value violates unique constraint \"k\"",
            "Key (id)=(secret)",
        );
        let report = ServerError::parse(&body).into_error("do it").report();
        assert!(report.contains("constraint \"k\""), "{report}");
        assert!(!report.contains("secret"), "{report}");
    }

    #[test]
    fn a_cut_off_response_is_still_an_error() {
        let body = response("28P01", "m", "d");
        for end in 0..body.len() {
            let _ = ServerError::parse(&body[..end])
                .into_error("do it")
                .report();
        }
    }
}
