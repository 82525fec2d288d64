//! Who walpost is to the broker and to its admin interface.
//!
//! Input: what was configured, one kind of credentials. Output: the method and data of CONNECT and `AUTH_RESPONSE`, or the
//! value of `Authorization`. Asked afresh for every connection and every challenge, so that a token file that was renewed
//! is used without a restart. Nothing here blocks a connection: fetching a token is awaited beside it.

mod oauth2;

use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

pub use oauth2::{ClientCredentials, OAuth2};

use crate::Result;
use crate::aside::read_aside;
use crate::config::{Secret, SecretSource};

/// One kind of credentials. `Debug` never shows a secret.
#[derive(Clone, Debug, Default)]
pub enum Auth {
    /// Nobody in particular.
    #[default]
    None,
    /// A JSON Web Token, given or in a file.
    Token(SecretSource),
    /// A token from an OAuth 2 server; its clones share one.
    OAuth2(Arc<OAuth2>),
    /// User name and password.
    Basic {
        /// The user; has no colon.
        user: String,
        /// The password.
        password: SecretSource,
    },
    /// The client certificate of the TLS connection, and nothing besides.
    Tls,
}

/// What the broker is told. `Debug` does not show the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Credentials {
    /// `auth_method_name`.
    pub(super) method: Option<&'static str>,
    data: Option<Secret>,
    /// False when they were kept from an earlier connection, so that better ones may be had.
    pub(super) fresh: bool,
}

impl Credentials {
    /// `auth_data`.
    pub(super) fn data(&self) -> Option<Vec<u8>> {
        let data = self.data.as_ref()?;
        Some(data.expose().as_bytes().to_vec())
    }

    fn new(method: &'static str, data: Secret) -> Self {
        Self {
            method: Some(method),
            data: Some(data),
            fresh: true,
        }
    }
}

impl Auth {
    /// The kind, in the words of an operator.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Token(_) => "token",
            Self::OAuth2(_) => "OAuth2",
            Self::Basic { .. } => "basic",
            Self::Tls => "client certificate",
        }
    }

    /// What the operator should look at when the credentials are refused.
    pub(super) fn hint(&self) -> &'static str {
        match self {
            Self::None => {
                "give credentials: WALPOST_PULSAR_TOKEN_FILE, WALPOST_PULSAR_OAUTH2_*, WALPOST_PULSAR_BASIC_*, or WALPOST_PULSAR_CERT_FILE"
            }
            Self::Token(_) => "check WALPOST_PULSAR_TOKEN or WALPOST_PULSAR_TOKEN_FILE",
            Self::OAuth2(_) => {
                "check WALPOST_PULSAR_OAUTH2_AUDIENCE and _SCOPE, and which issuer the broker trusts"
            }
            Self::Basic { .. } => {
                "check WALPOST_PULSAR_BASIC_USER and WALPOST_PULSAR_BASIC_PASSWORD (Pulsar takes no colon in a password)"
            }
            Self::Tls => {
                "check WALPOST_PULSAR_CERT_FILE: the broker takes the role from its subject"
            }
        }
    }

    /// The credentials for a connection. `stale` are those that the broker has had enough of: never given again by a
    /// source that can make new ones.
    ///
    /// # Errors
    /// Temporary when a file or the OAuth 2 server is away; final when that server refuses.
    pub(super) async fn credentials(&self, stale: Option<&Credentials>) -> Result<Credentials> {
        match self {
            Self::None => Ok(Credentials {
                method: None,
                data: None,
                fresh: true,
            }),
            Self::Token(source) => {
                let token = read_secret("the token file", source, SecretSource::token);
                Ok(Credentials::new("token", token.await?))
            }
            Self::OAuth2(oauth2) => {
                let stale = stale.and_then(|credentials| credentials.data.as_ref());
                let (token, fresh) = oauth2.token(stale).await?;
                Ok(Credentials {
                    fresh,
                    ..Credentials::new("token", token)
                })
            }
            Self::Basic { user, password } => {
                let read = SecretSource::password;
                let password = read_secret("the password file", password, read).await?;
                let both = format!("{user}:{}", password.expose());
                Ok(Credentials::new("basic", Secret::new(both)))
            }
            // As Pulsar's own clients: the method's name, and data that says nothing.
            Self::Tls => Ok(Credentials::new("tls", Secret::new(""))),
        }
    }

    /// The broker has refused these: they are not used again if others can be had.
    pub(super) async fn forget(&self, refused: &Credentials) {
        if let (Self::OAuth2(oauth2), Some(token)) = (self, &refused.data) {
            oauth2.forget(token).await;
        }
    }

    /// Method and data for another client of the same broker; `None` without credentials.
    pub async fn method_and_data(&self) -> Result<Option<(String, Vec<u8>)>> {
        let credentials = self.credentials(None).await?;
        let data = credentials.data();
        Ok(credentials.method.map(str::to_owned).zip(data))
    }

    /// The value of an `Authorization` header, if there is one to send.
    pub(super) async fn authorization(&self) -> Result<Option<Secret>> {
        let credentials = self.credentials(None).await?;
        let Some(data) = credentials.data else {
            return Ok(None);
        };
        Ok(match credentials.method {
            Some("token") => Some(Secret::new(format!("Bearer {}", data.expose()))),
            Some("basic") => {
                let encoded = BASE64_STANDARD.encode(data.expose());
                Some(Secret::new(format!("Basic {encoded}")))
            }
            _ => None,
        })
    }
}

/// The secret as it is now; one in a file is read on another thread.
async fn read_secret(
    what: &'static str,
    source: &SecretSource,
    read: fn(&SecretSource) -> Result<Secret>,
) -> Result<Secret> {
    let SecretSource::File(path) = source else {
        return read(source);
    };
    let (file, source) = (path.to_string_lossy().into_owned(), source.clone());
    read_aside(what, file, move || read(&source)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic() -> Auth {
        Auth::Basic {
            user: "walpost".to_owned(),
            password: SecretSource::Value(Secret::new("hunter2")),
        }
    }

    #[tokio::test]
    async fn each_kind_says_what_its_provider_expects() {
        let token = Auth::Token(SecretSource::Value(Secret::new("a.b.c")));
        for (auth, method, data, header) in [
            (Auth::None, None, None, None),
            (token, Some("token"), Some("a.b.c"), Some("Bearer a.b.c")),
            (
                basic(),
                Some("basic"),
                Some("walpost:hunter2"),
                Some("Basic d2FscG9zdDpodW50ZXIy"),
            ),
            (Auth::Tls, Some("tls"), Some(""), None),
        ] {
            let credentials = auth.credentials(None).await.unwrap();
            assert_eq!(credentials.method, method);
            assert_eq!(
                credentials.data(),
                data.map(|data| data.as_bytes().to_vec())
            );
            let authorization = auth.authorization().await.unwrap();
            assert_eq!(authorization.as_ref().map(Secret::expose), header);
        }
    }

    #[tokio::test]
    async fn a_file_without_an_end_holds_up_nobody() {
        let pipe = crate::aside::tests::Pipe::make("token");
        let source = SecretSource::File(pipe.path.clone());
        let basic = Auth::Basic {
            user: "walpost".to_owned(),
            password: source.clone(),
        };
        for auth in [Auth::Token(source), basic] {
            let error = auth.credentials(None).await.unwrap_err();
            assert!(error.is_temporary());
            let said = error.report();
            assert!(said.contains("there is no end of it"), "{said}");
        }
    }

    #[tokio::test]
    async fn debug_shows_no_secret() {
        let shown = format!(
            "{:?} {:?}",
            basic(),
            basic().credentials(None).await.unwrap()
        );
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
