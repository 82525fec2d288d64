//! The broker's admin interface (REST, v2), as little of it as walpost needs: whether a namespace deduplicates.
//!
//! Input: the URL, and the same credentials and TLS files as for the brokers. Output: typed answers, or an error that says
//! what to do. Paths and meanings: Pulsar's "Admin REST API" and `NamespacesBase.java`.

use std::collections::BTreeMap;

use hyper::{Method, StatusCode};

use super::auth::Auth;
use super::tls::TlsFiles;
use crate::aside::read_aside;
use crate::http::{self, HttpUrl, Request, Response};
use crate::{Error, Result};

/// The broker's setting that a namespace without a policy of its own follows.
const BROKER_DEFAULT: &str = "brokerDeduplicationEnabled";

/// A client of the admin interface; one connection a request.
#[derive(Clone, Debug)]
pub struct Admin {
    url: HttpUrl,
    auth: Auth,
    tls: TlsFiles,
}

/// Whether a namespace deduplicates, and who says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deduplication {
    /// The namespace's own policy.
    Policy(bool),
    /// No policy: the broker's default, if this role may ask for it.
    BrokerDefault(Option<bool>),
    /// This role may not ask.
    Forbidden,
}

impl Admin {
    /// Nothing is connected yet.
    pub fn new(url: HttpUrl, auth: Auth, tls: TlsFiles) -> Self {
        Self { url, auth, tls }
    }

    /// What holds for namespace `tenant/namespace`, unless a topic has a policy of its own.
    pub async fn deduplication(&self, namespace: &str) -> Result<Deduplication> {
        let path = format!("/admin/v2/namespaces/{namespace}/deduplication");
        let response = self.send(Method::GET, &path, None).await?;
        if response.status == StatusCode::FORBIDDEN {
            return Ok(Deduplication::Forbidden);
        }
        let response = self.checked(response, &path, namespace)?;
        // Without a policy: "null", or nothing at all.
        match response.body.trim_ascii() {
            b"true" => Ok(Deduplication::Policy(true)),
            b"false" => Ok(Deduplication::Policy(false)),
            b"" | b"null" => Ok(Deduplication::BrokerDefault(self.broker_default().await)),
            _ => Err(self.odd(&path)),
        }
    }

    /// Turns deduplication on for namespace `tenant/namespace`; does no harm where it is on.
    pub async fn enable_deduplication(&self, namespace: &str) -> Result<()> {
        let path = format!("/admin/v2/namespaces/{namespace}/deduplication");
        let response = self.send(Method::POST, &path, Some("true")).await?;
        self.checked(response, &path, namespace).map(drop)
    }

    /// The broker's own setting; `None` where it cannot be had, which is usual: it takes a superuser.
    async fn broker_default(&self) -> Option<bool> {
        let path = "/admin/v2/brokers/configuration/runtime";
        let response = self.send(Method::GET, path, None).await.ok()?;
        let response = self.checked(response, path, "").ok()?;
        let settings: BTreeMap<String, serde_json::Value> =
            serde_json::from_slice(&response.body).ok()?;
        match settings.get(BROKER_DEFAULT)? {
            serde_json::Value::Bool(on) => Some(*on),
            serde_json::Value::String(text) => text.parse().ok(),
            _ => None,
        }
    }

    async fn send(&self, method: Method, path: &str, body: Option<&str>) -> Result<Response> {
        let url = self.url.join(path);
        let authorization = self.auth.authorization().await?;
        let tls = self.tls.clone();
        let tls = read_aside(TlsFiles::WHAT, move || tls.client_config()).await?;
        http::send(Request {
            method,
            url: &url,
            authorization: authorization.as_ref(),
            body: body.map(|body| ("application/json", body.to_owned())),
            tls: Some(tls),
            peer: "Pulsar's admin interface",
        })
        .await
        .map_err(|error| match error.hint_text() {
            Some(_) => error,
            None => error.hint("check WALPOST_PULSAR_ADMIN_URL"),
        })
    }

    fn checked(&self, response: Response, path: &str, namespace: &str) -> Result<Response> {
        if response.status.is_success() {
            Ok(response)
        } else {
            Err(self.refusal(response.status, path, namespace))
        }
    }

    /// The error for a role that may not ask or change.
    pub fn forbidden(&self) -> Error {
        self.refusal(StatusCode::FORBIDDEN, "the namespace's policies", "")
    }

    /// What an answer other than 2xx means. The body stays out of it: it may repeat what was sent.
    fn refusal(&self, status: StatusCode, path: &str, namespace: &str) -> Error {
        let said = format!("Pulsar's admin interface at {} answers {status}", self.url);
        match status {
            StatusCode::UNAUTHORIZED => Error::refused(format!("{said}: it does not accept the credentials"))
                .hint(self.auth.hint()),
            StatusCode::FORBIDDEN => Error::refused(format!("{said} to {path}: the role may not do that"))
                .hint("let an administrator of the tenant do it, or give these credentials to walpost for this command"),
            StatusCode::NOT_FOUND if !namespace.is_empty() => {
                Error::refused(format!("{said}: namespace {namespace} does not exist"))
                    .hint(format!("pulsar-admin namespaces create {namespace}"))
            }
            StatusCode::TOO_MANY_REQUESTS => Error::temporary(said),
            status if status.is_server_error() => Error::temporary(said),
            status if status.is_redirection() => Error::refused(format!("{said} to {path}: ask another server"))
                .hint("set WALPOST_PULSAR_ADMIN_URL to the cluster that serves the namespace"),
            _ => self.odd(path),
        }
    }

    fn odd(&self, path: &str) -> Error {
        Error::refused(format!(
            "{} does not answer {path} as Pulsar's admin interface does",
            self.url
        ))
        .hint("set WALPOST_PULSAR_ADMIN_URL to the broker's web service (port 8080 or 8443 unless configured)")
    }
}
