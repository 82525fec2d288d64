//! Connection parameters by their libpq names: from the URL, else from the `PG*` variable that stands behind each.
//!
//! Input: the URL and a look-up for the environment. Output: [`Given`], which hands out typed values; an error names
//! where the value stands and what is allowed, and shows it only when it cannot be a piece of a password.

use super::url;

/// Every parameter that is understood, with the environment variable that stands behind it.
const PARAMETERS: [(&str, Option<&str>); 16] = [
    ("host", Some("PGHOST")),
    ("port", Some("PGPORT")),
    ("user", Some("PGUSER")),
    ("password", Some("PGPASSWORD")),
    ("dbname", Some("PGDATABASE")),
    ("sslmode", Some("PGSSLMODE")),
    ("sslrootcert", Some("PGSSLROOTCERT")),
    ("sslcert", Some("PGSSLCERT")),
    ("sslkey", Some("PGSSLKEY")),
    ("application_name", Some("PGAPPNAME")),
    ("connect_timeout", Some("PGCONNECT_TIMEOUT")),
    ("target_session_attrs", Some("PGTARGETSESSIONATTRS")),
    ("options", Some("PGOPTIONS")),
    ("channel_binding", Some("PGCHANNELBINDING")),
    ("keepalives_idle", None),
    ("tcp_user_timeout", None),
];

/// A value and the words that name its origin in an error.
struct Value {
    bytes: Vec<u8>,
    origin: String,
}

/// What URL and environment say, by libpq's parameter names.
pub(super) struct Given(Vec<(&'static str, Value)>);

impl Given {
    pub(super) fn collect(
        url: Option<&str>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let mut given = Vec::new();
        let from_url = match url.map(str::trim).filter(|url| !url.is_empty()) {
            Some(url) => url::parse(url).map_err(|why| format!("the Postgres URL: {why}"))?,
            None => Vec::new(),
        };
        for (key, bytes) in from_url {
            let Some((name, _)) = PARAMETERS.iter().find(|(name, _)| *name == key) else {
                let names: Vec<_> = PARAMETERS.iter().map(|(name, _)| *name).collect();
                return Err(format!(
                    "the Postgres URL: parameter {} is not known; known are {}",
                    shown(key.as_bytes()),
                    names.join(", ")
                ));
            };
            let origin = format!("the Postgres URL's {name}");
            given.push((*name, Value { bytes, origin }));
        }
        // A later one counts, as in libpq; an empty one counts as not given.
        given.reverse();
        for (name, variable) in PARAMETERS {
            if let Some((variable, text)) =
                variable.and_then(|variable| Some((variable, env(variable)?)))
            {
                let (bytes, origin) = (text.into_bytes(), variable.to_owned());
                given.push((name, Value { bytes, origin }));
            }
        }
        given.retain(|(_, value)| !value.bytes.is_empty());
        Ok(Self(given))
    }

    fn value(&self, name: &str) -> Option<&Value> {
        let found = self.0.iter().find(|(key, _)| *key == name);
        found.map(|(_, value)| value)
    }

    /// The value as it is: a password need not be UTF-8.
    pub(super) fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        self.value(name).map(|value| value.bytes.clone())
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<String>, String> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        match std::str::from_utf8(&value.bytes) {
            Ok(text) if !text.contains('\0') => Ok(Some(text.to_owned())),
            _ => Err(format!(
                "{} is not UTF-8 text without zero bytes",
                value.origin
            )),
        }
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<u32>, String> {
        let (Some(value), Some(text)) = (self.value(name), self.text(name)?) else {
            return Ok(None);
        };
        match text.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(format!(
                "{} is {}, allowed is a whole number from 0 to {}",
                value.origin,
                shown(text.as_bytes()),
                u32::MAX
            )),
        }
    }

    pub(super) fn one_of<T: Copy>(
        &self,
        name: &str,
        allowed: &[(&str, T)],
    ) -> Result<Option<T>, String> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        let found = allowed
            .iter()
            .find(|(word, _)| word.as_bytes() == value.bytes);
        if let Some((_, meaning)) = found {
            Ok(Some(*meaning))
        } else {
            let words: Vec<_> = allowed.iter().map(|(word, _)| *word).collect();
            Err(format!(
                "{} is {}, allowed are {}",
                value.origin,
                shown(&value.bytes),
                words.join(", ")
            ))
        }
    }
}

/// A value as an error may show it: a word of harmless characters, or nothing, since a password whose `/` or `?` was
/// left unescaped ends up in any part of a URL.
pub(super) fn shown(value: &[u8]) -> String {
    let harmless = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    match std::str::from_utf8(value) {
        Ok(text) if text.len() <= 32 && value.iter().all(harmless) => format!("{text:?}"),
        _ => "something else (not shown)".to_owned(),
    }
}
