//! Takes a libpq URL apart: `postgres://user:password@h1:p1,h2:p2/dbname?key=value&…`.
//!
//! Pure text in, parameters by their libpq names out; what they mean is [`super::config`]'s business. `tokio_postgres`
//! has a parser too, but it refuses the `ssl*` files and takes the first `@` anywhere for the end of a password.
//!
//! No message repeats a part of the URL: with a character of the password left unescaped, any part may be the password.

use std::borrow::Cow;

/// Parameters in the order in which the URL gives them; a later one of the same name counts.
pub(super) type Parameters = Vec<(String, Vec<u8>)>;

const ESCAPE: &str = "a special character in the user name or the password must be percent-encoded: / as %2F, @ as %40, : as %3A, ? as %3F, % as %25";

/// Splits `url` into libpq parameters (`host` and `port` as comma-separated lists, as libpq keeps them).
pub(super) fn parse(url: &str) -> Result<Parameters, String> {
    let rest = ["postgres://", "postgresql://"]
        .iter()
        .find_map(|scheme| url.strip_prefix(scheme))
        .ok_or("it must begin with postgres:// or postgresql://")?;
    let (before_query, query) = match rest.split_once('?') {
        Some((before, query)) => (before, Some(query)),
        None => (rest, None),
    };

    let mut parameters = Vec::new();
    let address = match credentials_end(before_query) {
        Some(at) => {
            credentials(&before_query[..at], &mut parameters)?;
            &before_query[at + 1..]
        }
        None => before_query,
    };
    let (hosts, dbname) = match address.split_once('/') {
        Some((hosts, dbname)) => (hosts, Some(dbname)),
        None => (address, None),
    };
    if hosts.contains('@') || dbname.is_some_and(|name| name.contains('@')) {
        return Err(ESCAPE.into());
    }
    host_list(hosts, &mut parameters)?;
    if let Some(dbname) = dbname.filter(|name| !name.is_empty()) {
        parameters.push(("dbname".into(), decode(dbname)?));
    }
    if let Some(query) = query {
        query_parameters(query, &mut parameters)?;
    }
    Ok(parameters)
}

/// Where the `@` after user and password stands: as in libpq, before the first `/`.
fn credentials_end(text: &str) -> Option<usize> {
    text.find(['@', '/'])
        .filter(|&at| text.as_bytes()[at] == b'@')
}

fn credentials(text: &str, parameters: &mut Parameters) -> Result<(), String> {
    let (user, password) = match text.split_once(':') {
        Some((user, password)) => (user, Some(password)),
        None => (text, None),
    };
    if !user.is_empty() {
        parameters.push(("user".into(), decode(user)?));
    }
    if let Some(password) = password.filter(|password| !password.is_empty()) {
        parameters.push(("password".into(), decode(password)?));
    }
    Ok(())
}

fn host_list(text: &str, parameters: &mut Parameters) -> Result<(), String> {
    if text.is_empty() {
        return Ok(());
    }
    let mut hosts = Vec::new();
    let mut ports = Vec::new();
    for (index, entry) in text.split(',').enumerate() {
        let (host, port) = if let Some(bracketed) = entry.strip_prefix('[') {
            let (host, after) = bracketed
                .split_once(']')
                .ok_or("an IPv6 address lacks its closing ]")?;
            let port = match after.strip_prefix(':') {
                Some(port) => port,
                None if after.is_empty() => "",
                None => return Err("only :port may follow the ] of an IPv6 address".into()),
            };
            (host, port)
        } else {
            entry.split_once(':').unwrap_or((entry, ""))
        };
        if !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(format!(
                "the port of host number {} is not a number ({ESCAPE})",
                index + 1
            ));
        }
        if index > 0 {
            hosts.push(b',');
            ports.push(b',');
        }
        hosts.extend_from_slice(&decode(host)?);
        ports.extend_from_slice(port.as_bytes());
    }
    parameters.push(("host".into(), hosts));
    parameters.push(("port".into(), ports));
    Ok(())
}

fn query_parameters(text: &str, parameters: &mut Parameters) -> Result<(), String> {
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair
            .split_once('=')
            .ok_or("a parameter after the ? has no =value")?;
        let key = String::from_utf8(decode(key)?)
            .map_err(|_| "a parameter's name is not UTF-8".to_owned())?;
        parameters.push((key, decode(value)?));
    }
    Ok(())
}

fn decode(text: &str) -> Result<Vec<u8>, String> {
    let broken = || format!("a % is not followed by two hexadecimal digits ({ESCAPE})");
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let mut digit = || {
            let digit = char::from(bytes.next()?).to_digit(16)?;
            u8::try_from(digit).ok()
        };
        let high = digit().ok_or_else(broken)?;
        let low = digit().ok_or_else(broken)?;
        if high == 0 && low == 0 {
            return Err("%00 cannot stand in it".into());
        }
        decoded.push(high << 4 | low);
    }
    Ok(decoded)
}

/// Percent-encodes what would end a part of a URL; for [`super::PostgresConfig::display_url`].
pub(super) fn encode(text: &str) -> Cow<'_, str> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    if text.bytes().all(plain) {
        return Cow::Borrowed(text);
    }
    let mut encoded = String::with_capacity(text.len() + 8);
    for byte in text.bytes() {
        if plain(byte) {
            encoded.push(char::from(byte));
        } else {
            use std::fmt::Write as _;
            // Writing to a String cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    Cow::Owned(encoded)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn shown(url: &str) -> String {
        let parameters = parse(url).unwrap();
        let pairs = parameters
            .iter()
            .map(|(key, value)| format!("{key}={}", String::from_utf8_lossy(value)));
        pairs.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn takes_urls_apart_as_libpq_does() {
        for (url, expected) in [
            ("postgres://", ""),
            ("postgresql:///db", "dbname=db"),
            ("postgres://h", "host=h port="),
            ("postgres://u@h:1/db", "user=u host=h port=1 dbname=db"),
            (
                "postgres://u:p%40s:s@h1:1,h2/db?sslmode=require",
                "user=u password=p@s:s host=h1,h2 port=1, dbname=db sslmode=require",
            ),
            ("postgres://[::1]:5/d", "host=::1 port=5 dbname=d"),
            (
                "postgres:///d?host=/run/pg&user=a@b",
                "dbname=d host=/run/pg user=a@b",
            ),
            ("postgres://%2Frun%2Fpg/d", "host=/run/pg port= dbname=d"),
            ("postgres://h?user=a@b", "host=h port= user=a@b"),
        ] {
            assert_eq!(shown(url), expected, "{url}");
        }
    }

    #[test]
    fn never_repeats_the_url_in_an_error() {
        for url in [
            "secret",
            "postgres://u:sec/ret@h/db",
            "postgres://u:sec?ret@h/db",
            "postgres://u:sec@ret@h/db",
            "postgres://u:sec%ret@h/db",
            "postgres://u:5/ret@h/secret",
            "postgres://h?secret",
            "postgres://[secret",
            "postgres://u:%00@h",
        ] {
            let error = parse(url).unwrap_err();
            for part in ["sec", "ret@"] {
                assert!(!error.contains(part), "{url}: {error}");
            }
        }
    }
}
