//! The broker's admin interface (REST, v2), as little of it as walpost needs: whether a namespace deduplicates, and when its
//! topics are deleted because nobody uses them.
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
/// The broker's settings for topics that nobody uses. The first is also the switch of the task that deletes.
const DELETE_ENABLED: &str = "brokerDeleteInactiveTopicsEnabled";
const DELETE_MODE: &str = "brokerDeleteInactiveTopicsMode";
/// The mode in which a topic goes although it has subscriptions, if they have read everything.
const WHEN_CAUGHT_UP: &str = "delete_when_subscriptions_caught_up";

/// A client of the admin interface; one connection a request.
#[derive(Clone, Debug)]
pub struct Admin {
    url: HttpUrl,
    auth: Auth,
    tls: TlsFiles,
}

/// Whether the topics of a namespace are deleted together with subscriptions that have read everything, once neither a
/// producer nor a consumer is connected (`InactiveTopicPolicies.java`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaughtUpTopics {
    /// They stay.
    Kept,
    /// The namespace's own policy deletes them. False: this broker runs no such task at present.
    DeletedByPolicy {
        /// Whether the broker has the task that deletes; `None` where it cannot be asked.
        runs: Option<bool>,
    },
    /// No policy, and the broker's default deletes them.
    DeletedByDefault,
    /// This role may not ask.
    Unknown,
}

type Settings = BTreeMap<String, serde_json::Value>;

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

    /// What holds for the topics of namespace `tenant/namespace`, unless a topic has a policy of its own.
    pub async fn caught_up_topics(&self, namespace: &str) -> Result<CaughtUpTopics> {
        let path = format!("/admin/v2/namespaces/{namespace}/inactiveTopicPolicies");
        let response = self.send(Method::GET, &path, None).await?;
        if response.status == StatusCode::FORBIDDEN {
            return Ok(CaughtUpTopics::Unknown);
        }
        let response = self.checked(response, &path, namespace)?;
        // Without a policy: "null", or nothing at all.
        let policy = match response.body.trim_ascii() {
            b"" | b"null" => None,
            body => Some(serde_json::from_slice(body).map_err(|_| self.odd(&path))?),
        };
        Ok(caught_up_topics(
            policy.as_ref(),
            self.broker_settings().await.as_ref(),
        ))
    }

    /// The broker's own setting; `None` where it cannot be had.
    async fn broker_default(&self) -> Option<bool> {
        is_on(&self.broker_settings().await?, BROKER_DEFAULT)
    }

    /// All settings of the broker; `None` where they cannot be had, which is usual: it takes a superuser.
    async fn broker_settings(&self) -> Option<Settings> {
        let path = "/admin/v2/brokers/configuration/runtime";
        let response = self.send(Method::GET, path, None).await.ok()?;
        let response = self.checked(response, path, "").ok()?;
        serde_json::from_slice(&response.body).ok()
    }

    async fn send(&self, method: Method, path: &str, body: Option<&str>) -> Result<Response> {
        let url = self.url.join(path);
        let authorization = self.auth.authorization().await?;
        let tls = self.tls.clone();
        let tls = read_aside(TlsFiles::WHAT, self.tls.names(), move || {
            tls.client_config()
        })
        .await?;
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

fn is_on(settings: &Settings, name: &str) -> Option<bool> {
    match settings.get(name)? {
        serde_json::Value::Bool(on) => Some(*on),
        serde_json::Value::String(text) => text.parse().ok(),
        _ => None,
    }
}

/// The namespace's policy comes before the broker's settings.
fn caught_up_topics(policy: Option<&Settings>, broker: Option<&Settings>) -> CaughtUpTopics {
    let is_mode = |settings: &Settings, name| {
        let mode = settings.get(name).and_then(serde_json::Value::as_str);
        mode == Some(WHEN_CAUGHT_UP)
    };
    let runs = broker.and_then(|settings| is_on(settings, DELETE_ENABLED));
    match (policy, broker) {
        (Some(policy), _) => {
            let deletes = is_on(policy, "deleteWhileInactive") == Some(true);
            if deletes && is_mode(policy, "inactiveTopicDeleteMode") {
                CaughtUpTopics::DeletedByPolicy { runs }
            } else {
                CaughtUpTopics::Kept
            }
        }
        (None, Some(broker)) if runs == Some(true) && is_mode(broker, DELETE_MODE) => {
            CaughtUpTopics::DeletedByDefault
        }
        (None, Some(_)) => CaughtUpTopics::Kept,
        (None, None) => CaughtUpTopics::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Settings {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_policy_of_the_namespace_comes_before_the_brokers_default() {
        let policy = |mode: &str, deletes: bool| {
            settings(&format!(
                r#"{{"inactiveTopicDeleteMode": "{mode}", "maxInactiveDurationSeconds": 60, "deleteWhileInactive": {deletes}}}"#
            ))
        };
        let broker = |mode: &str, deletes: bool| {
            settings(&format!(
                r#"{{"brokerDeleteInactiveTopicsMode": "{mode}", "brokerDeleteInactiveTopicsEnabled": "{deletes}"}}"#
            ))
        };
        let other = "delete_when_no_subscriptions";
        let deletes = broker(WHEN_CAUGHT_UP, true);
        let sleeps = broker(WHEN_CAUGHT_UP, false);
        let caught_up = policy(WHEN_CAUGHT_UP, true);
        for (policy, broker, expected) in [
            (None, None, CaughtUpTopics::Unknown),
            (None, Some(&deletes), CaughtUpTopics::DeletedByDefault),
            (None, Some(&sleeps), CaughtUpTopics::Kept),
            (None, Some(&broker(other, true)), CaughtUpTopics::Kept),
            (
                Some(&caught_up),
                None,
                CaughtUpTopics::DeletedByPolicy { runs: None },
            ),
            (
                Some(&caught_up),
                Some(&sleeps),
                CaughtUpTopics::DeletedByPolicy { runs: Some(false) },
            ),
            (
                Some(&policy(WHEN_CAUGHT_UP, false)),
                Some(&deletes),
                CaughtUpTopics::Kept,
            ),
            (
                Some(&policy(other, true)),
                Some(&deletes),
                CaughtUpTopics::Kept,
            ),
        ] {
            assert_eq!(
                caught_up_topics(policy, broker),
                expected,
                "{policy:?} {broker:?}"
            );
        }
    }
}
