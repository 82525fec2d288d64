//! The broker's admin interface: deduplication, partitioned topics, unloading, statistics.

use std::time::Duration;

use super::{Database, eventually};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Far longer than any of these calls takes.
const DEADLINE: Duration = Duration::from_secs(60);

/// Sends one request, for instance `admin(url, "POST", "/admin/v2/namespaces/public/default/deduplication", "true")`, and
/// returns the answer's body. Panics on any status other than 2xx.
pub(crate) async fn admin(admin_url: &str, method: &str, path: &str, body: &str) -> String {
    admin_as(admin_url, None, method, path, body).await
}

/// The same on a broker that asks who is there.
pub(crate) async fn admin_as(
    admin_url: &str,
    token: Option<&str>,
    method: &str,
    path: &str,
    body: &str,
) -> String {
    ask(admin_url, token, method, path, body)
        .await
        .unwrap_or_else(|answer| panic!("{method} {path}: {answer}"))
}

/// The same for what the broker may refuse at first; an error is the whole answer, with a status other than 2xx.
pub(crate) async fn try_admin(
    admin_url: &str,
    method: &str,
    path: &str,
    body: &str,
) -> Result<String, String> {
    ask(admin_url, None, method, path, body).await
}

async fn ask(
    admin_url: &str,
    token: Option<&str>,
    method: &str,
    path: &str,
    body: &str,
) -> Result<String, String> {
    let asking = exchange(admin_url, token, method, path, body);
    let answer = tokio::time::timeout(DEADLINE, asking)
        .await
        .unwrap_or_else(|_| panic!("{method} {path}: no answer within {DEADLINE:?}"))
        .unwrap_or_else(|error| panic!("{method} {path}: {error}"));
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{method} {path}: not HTTP: {answer:?}"));
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status.starts_with('2') {
        Ok(body.to_owned())
    } else {
        Err(answer)
    }
}

impl Database {
    /// Moves this database's topics to a namespace of their own with these policies, each as (path below the namespace, what
    /// to post, a part of what the broker then shows). Before the first topic is made, which looks at them when it is loaded.
    pub(crate) async fn own_namespace(&mut self, admin_url: &str, policies: &[(&str, &str, &str)]) {
        let namespace = format!("/admin/v2/namespaces/public/{}", self.name);
        admin(admin_url, "PUT", &namespace, "{}").await;
        for (path, value, shown) in policies {
            let policy = format!("{namespace}/{path}");
            admin(admin_url, "POST", &policy, value).await;
            // It reaches the brokers a moment after it was accepted.
            eventually(DEADLINE, &policy, async || {
                let said = admin(admin_url, "GET", &policy, "").await;
                said.contains(shown).then_some(())
            })
            .await;
        }
        self.topic_prefix = format!("persistent://public/{}/t", self.name);
    }
}

async fn exchange(
    admin_url: &str,
    token: Option<&str>,
    method: &str,
    path: &str,
    body: &str,
) -> std::io::Result<String> {
    let host = admin_url
        .trim_start_matches("http://")
        .trim_end_matches('/');
    let mut stream = TcpStream::connect(host).await?;
    let authorization = token.map(|token| format!("Authorization: Bearer {token}\r\n"));
    let authorization = authorization.unwrap_or_default();
    // HTTP/1.0: the body ends with the connection, so there is nothing to parse.
    let request = format!(
        "{method} {path} HTTP/1.0\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{authorization}\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
