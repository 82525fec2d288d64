//! OAuth 2 client credentials (RFC 6749, 4.4): a token for a client id and its secret.
//!
//! Input: the issuer, the credentials (given, or in Pulsar's key file) and what the token is for. Output: an access token,
//! kept until shortly before it expires. The issuer's metadata (`OpenID` Connect Discovery, 4) says where tokens are had.
//! What a server answers is never repeated in an error, save the few error codes that the RFC defines: it may hold a token.

use std::path::PathBuf;
use std::time::Duration;

use hyper::{Method, StatusCode};
use serde_json::Value;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::debug;

use super::super::tls::TlsFiles;
use crate::aside::read_aside;
use crate::config::{Secret, SecretSource};
use crate::http::{self, HttpUrl, Request};
use crate::{Error, Result};

const PEER: &str = "the OAuth2 server";
/// A token is renewed this long before it expires, or after nine tenths of a short life.
const RENEW_BEFORE: Duration = Duration::from_secs(60);
/// A token is not kept for longer, whatever its life: a clock cannot count to any number of seconds that a server may say.
const KEEP_AT_MOST: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// The error codes of RFC 6749, 5.2.
const ERROR_CODES: [&str; 6] = [
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
];

/// Where client id and secret come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientCredentials {
    /// Given one by one.
    Given {
        /// The client id.
        id: String,
        /// The client's secret.
        secret: SecretSource,
    },
    /// In a file as Pulsar's tools write it: JSON with `client_id`, `client_secret` and, if not configured, `issuer_url`.
    /// Read again for each token.
    KeyFile(PathBuf),
}

/// A source of access tokens.
#[derive(Debug)]
pub struct OAuth2 {
    issuer: Option<HttpUrl>,
    client: ClientCredentials,
    audience: Option<String>,
    scope: Option<String>,
    tls: TlsFiles,
    /// A lock, but not on the data's path: taken when a connection is made, and held while a token is fetched so that many
    /// connections fetch one.
    kept: Mutex<Option<Kept>>,
}

#[derive(Debug)]
struct Kept {
    token: Secret,
    renew_at: Instant,
}

/// What a key file holds.
struct Key {
    id: String,
    secret: Secret,
    issuer: Option<HttpUrl>,
}

impl OAuth2 {
    /// Without an `issuer`, the key file must name it.
    pub fn new(
        issuer: Option<HttpUrl>,
        client: ClientCredentials,
        audience: Option<String>,
        scope: Option<String>,
        tls: TlsFiles,
    ) -> Self {
        Self {
            issuer,
            client,
            audience,
            scope,
            tls,
            kept: Mutex::new(None),
        }
    }

    /// Checks a key file's text, as it is when walpost starts.
    pub fn check_key_file(text: &str, issuer_is_given: bool) -> Result<(), String> {
        let key = parse_key(text)?;
        if key.issuer.is_none() && !issuer_is_given {
            return Err(
                "it has no issuer_url, and WALPOST_PULSAR_OAUTH2_ISSUER_URL is not given"
                    .to_owned(),
            );
        }
        Ok(())
    }

    /// A token other than `stale`, and whether it was fetched just now.
    pub(super) async fn token(&self, stale: Option<&Secret>) -> Result<(Secret, bool)> {
        let mut kept = self.kept.lock().await;
        if let Some(kept) = kept.as_ref()
            && kept.renew_at > Instant::now()
            && stale != Some(&kept.token)
        {
            return Ok((kept.token.clone(), false));
        }
        let (token, life) = self.fetch().await?;
        // Without a life time it may be good for nothing but now.
        let life = life.unwrap_or_default();
        debug!(life_s = life.as_secs(), "token fetched");
        *kept = Some(Kept {
            token: token.clone(),
            renew_at: renew_at(Instant::now(), life),
        });
        Ok((token, true))
    }

    /// Drops the token if it is still the one kept.
    pub(super) async fn forget(&self, token: &Secret) {
        let mut kept = self.kept.lock().await;
        if kept.as_ref().is_some_and(|kept| kept.token == *token) {
            *kept = None;
        }
    }

    async fn fetch(&self) -> Result<(Secret, Option<Duration>)> {
        let client = self.client.clone();
        let kind = "the OAuth2 key or secret file";
        let key = read_aside(kind, "", move || key_of(&client)).await?;
        let issuer = self.issuer.as_ref().or(key.issuer.as_ref());
        let issuer = issuer.ok_or_else(|| {
            Error::temporary("the OAuth2 key file names no issuer_url any more")
                .hint("set WALPOST_PULSAR_OAUTH2_ISSUER_URL")
        })?;
        let endpoint = self.token_endpoint(issuer).await?;
        let mut form = vec![
            ("grant_type", "client_credentials"),
            ("client_id", &key.id),
            ("client_secret", key.secret.expose()),
        ];
        form.extend(
            self.audience
                .as_deref()
                .map(|audience| ("audience", audience)),
        );
        form.extend(self.scope.as_deref().map(|scope| ("scope", scope)));
        let answer = self
            .ask(
                Method::POST,
                &endpoint,
                Some(("application/x-www-form-urlencoded", encode_form(&form))),
            )
            .await?;
        let answer = answer.map_err(|refusal| refused_token(&endpoint, &refusal))?;
        let token = answer["access_token"]
            .as_str()
            .filter(|token| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()));
        let token = token.ok_or_else(|| {
            Error::refused(format!(
                "{PEER} at {endpoint} answers without an access token"
            ))
            .hint("check WALPOST_PULSAR_OAUTH2_ISSUER_URL")
        })?;
        let life = &answer["expires_in"];
        // Some servers send the number as a string.
        let life = life.as_u64().or_else(|| life.as_str()?.parse().ok());
        Ok((Secret::new(token), life.map(Duration::from_secs)))
    }

    /// Reads the issuer's metadata.
    async fn token_endpoint(&self, issuer: &HttpUrl) -> Result<HttpUrl> {
        let metadata = issuer.join("/.well-known/openid-configuration");
        let hint = "check WALPOST_PULSAR_OAUTH2_ISSUER_URL";
        let answer = self.ask(Method::GET, &metadata, None).await?;
        let answer = answer.map_err(|refusal| {
            Error::refused(format!("{PEER} answers {metadata} with {}", refusal.status)).hint(hint)
        })?;
        let endpoint = answer["token_endpoint"].as_str();
        let endpoint = endpoint.and_then(|url| HttpUrl::parse(url).ok());
        // A secret that was meant for https goes nowhere else.
        endpoint
            .filter(|endpoint| endpoint.is_tls() || !issuer.is_tls())
            .ok_or_else(|| {
                Error::refused(format!(
                    "{metadata} names no token_endpoint that can be used"
                ))
                .hint(hint)
            })
    }

    /// Sends a request and reads JSON; `Ok(Err(_))` is a refusal.
    async fn ask(
        &self,
        method: Method,
        url: &HttpUrl,
        body: Option<(&'static str, String)>,
    ) -> Result<Result<Value, Refusal>> {
        let tls = self.tls.clone();
        let tls = read_aside(TlsFiles::WHAT, self.tls.names(), move || {
            tls.config_for_others()
        })
        .await?;
        let response = http::send(Request {
            method,
            url,
            authorization: None,
            body,
            tls: Some(tls),
            peer: PEER,
        })
        .await?;
        let status = response.status;
        // Not kept as an error's cause: serde_json may repeat what it read.
        let json = serde_json::from_slice::<Value>(&response.body);
        if status.is_success() {
            return json.map(Ok).map_err(|_| {
                Error::temporary(format!(
                    "{PEER} answers {url} with something that is no JSON"
                ))
            });
        }
        if status.is_server_error()
            || matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
            )
        {
            return Err(Error::temporary(format!(
                "{PEER} answers {url} with {status}"
            )));
        }
        let code = json.ok().and_then(|json| {
            let said = json["error"].as_str()?;
            ERROR_CODES.into_iter().find(|code| *code == said)
        });
        Ok(Err(Refusal { status, code }))
    }
}

/// The client's id and secret, as they are now.
fn key_of(client: &ClientCredentials) -> Result<Key> {
    match client {
        ClientCredentials::Given { id, secret } => Ok(Key {
            id: id.clone(),
            secret: secret.password()?,
            issuer: None,
        }),
        ClientCredentials::KeyFile(path) => std::fs::read_to_string(path)
            .map_err(|error| format!("it cannot be read: {error}"))
            .and_then(|text| parse_key(&text))
            .map_err(|why| {
                Error::temporary(format!("the OAuth2 key file {}: {why}", path.display()))
            }),
    }
}

/// When a token that is fetched now and lives so long is renewed.
fn renew_at(now: Instant, life: Duration) -> Instant {
    let life = life.min(KEEP_AT_MOST);
    now + life.saturating_sub(RENEW_BEFORE.min(life / 10))
}

struct Refusal {
    status: StatusCode,
    code: Option<&'static str>,
}

fn refused_token(endpoint: &HttpUrl, refusal: &Refusal) -> Error {
    let code = refusal.code.map(|code| format!(" ({code})"));
    let text = format!(
        "{PEER} at {endpoint} gives no token: {}{}",
        refusal.status,
        code.unwrap_or_default()
    );
    Error::refused(text).hint(
        "check WALPOST_PULSAR_OAUTH2_CLIENT_ID and _CLIENT_SECRET (or _KEY_FILE), _AUDIENCE and _SCOPE",
    )
}

/// Reads a key file's text; an error never repeats any of it.
fn parse_key(text: &str) -> Result<Key, String> {
    let json: Value = serde_json::from_str(text).map_err(|_| "it is no JSON".to_owned())?;
    let field = |name: &str| {
        json[name]
            .as_str()
            .filter(|value| !value.is_empty())
            .ok_or_else(|| format!("it has no {name}"))
    };
    if json["type"]
        .as_str()
        .is_some_and(|kind| kind != "client_credentials")
    {
        return Err("its type is not client_credentials".to_owned());
    }
    let issuer = match json["issuer_url"].as_str() {
        None => None,
        Some(url) => Some(HttpUrl::parse(url).map_err(|why| format!("its issuer_url: {why}"))?),
    };
    Ok(Key {
        id: field("client_id")?.to_owned(),
        secret: Secret::new(field("client_secret")?),
        issuer,
    })
}

/// `application/x-www-form-urlencoded`, with everything encoded that is not surely safe.
fn encode_form(pairs: &[(&str, &str)]) -> String {
    use std::fmt::Write as _;

    let mut form = String::new();
    for (name, value) in pairs {
        if !form.is_empty() {
            form.push('&');
        }
        form.push_str(name);
        form.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_') {
                form.push(char::from(byte));
            } else {
                write!(form, "%{byte:02X}").expect("a String takes everything");
            }
        }
    }
    form
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_what_pulsar_writes() {
        let text = r#"{"type": "client_credentials", "client_id": "c", "client_secret": "hunter2",
                       "client_email": "x@y", "issuer_url": "https://issuer/"}"#;
        let key = parse_key(text).ok().unwrap();
        assert_eq!((key.id.as_str(), key.secret.expose()), ("c", "hunter2"));
        assert_eq!(key.issuer.unwrap().to_string(), "https://issuer:443");
        assert_eq!(OAuth2::check_key_file(text, false), Ok(()));
    }

    #[test]
    fn a_wrong_key_file_says_why_and_nothing_of_what_it_holds() {
        for (text, why) in [
            ("hunter2", "no JSON"),
            (r#"{"client_secret": "hunter2"}"#, "no client_id"),
            (r#"{"client_id": "hunter2"}"#, "no client_secret"),
            (r#"{"type": "hunter2"}"#, "client_credentials"),
            (
                r#"{"client_id": "c", "client_secret": "hunter2", "issuer_url": "hunter2"}"#,
                "issuer_url",
            ),
            (
                r#"{"client_id": "c", "client_secret": "hunter2"}"#,
                "WALPOST_PULSAR_OAUTH2_ISSUER_URL",
            ),
        ] {
            let said = OAuth2::check_key_file(text, false).unwrap_err();
            assert!(
                said.contains(why) && !said.contains("hunter2"),
                "{text}: {said}"
            );
        }
        let no_issuer = r#"{"client_id": "c", "client_secret": "hunter2"}"#;
        assert_eq!(OAuth2::check_key_file(no_issuer, true), Ok(()));
    }

    #[test]
    fn a_token_is_renewed_in_time_however_long_it_lives() {
        let now = Instant::now();
        for (life_s, kept_s) in [
            (0, 0),
            (100, 90),
            (3600, 3540),
            (u64::MAX, 30 * 86_400 - 60),
        ] {
            let kept = renew_at(now, Duration::from_secs(life_s)) - now;
            assert_eq!(kept, Duration::from_secs(kept_s), "{life_s}");
        }
    }

    #[test]
    fn a_form_encodes_what_is_not_plain() {
        let form = encode_form(&[("a", "x y&z=ü"), ("b", "A-1._")]);
        assert_eq!(form, "a=x%20y%26z%3D%C3%BC&b=A-1._");
    }
}
