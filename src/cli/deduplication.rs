//! Deduplication of the namespace that the topics are in: what `init --enable-deduplication` does and `check` asks.
//!
//! Input: the settings. Output: the namespace, its state on the broker, and one line about what was done.

use std::io::Write;

use super::print;
use crate::config::{Config, settings};
use crate::pulsar::{Admin, Deduplication};
use crate::{Error, Result};

/// A namespace that is to deduplicate, and what it does now.
pub(super) struct Wanted {
    admin: Admin,
    namespace: String,
    state: Deduplication,
}

impl Wanted {
    /// Finds namespace and state; changes nothing.
    ///
    /// # Errors
    /// Configuration (exit 64) when there is no admin interface, or when rows decide on the namespace; else what the admin
    /// interface says.
    pub(super) async fn look(config: &Config) -> Result<Self> {
        let admin = admin(config).ok_or_else(|| {
            Error::config(
                "--enable-deduplication needs WALPOST_PULSAR_ADMIN_URL, which is not given",
            )
            .hint(format!(
                "set {} to the broker's web service, such as http://broker:8080",
                settings::PULSAR_ADMIN_URL.env
            ))
        })?;
        let namespace = namespace(config)?;
        let state = admin.deduplication(&namespace).await?;
        if state == Deduplication::Forbidden {
            return Err(admin.forbidden());
        }
        Ok(Self {
            admin,
            namespace,
            state,
        })
    }

    /// Turns it on unless it is on, and says which.
    pub(super) async fn enable(&self, out: &mut dyn Write) -> Result<()> {
        let namespace = &self.namespace;
        let line = match self.state {
            Deduplication::Policy(true) => {
                format!("exists deduplication of namespace {namespace}")
            }
            // Also where the broker's default says so: that may change, and is another one's to change.
            Deduplication::Policy(false)
            | Deduplication::BrokerDefault(_)
            | Deduplication::Forbidden => {
                self.admin.enable_deduplication(namespace).await?;
                format!("enabled deduplication of namespace {namespace}")
            }
        };
        print(out, &format!("{line}\n"))
    }
}

/// A client of the admin interface, if its URL was given.
pub(super) fn admin(config: &Config) -> Option<Admin> {
    let url = config.pulsar_admin_url.clone()?;
    Some(Admin::new(
        url,
        config.pulsar_auth.clone(),
        config.pulsar_tls.clone(),
    ))
}

/// `tenant/namespace` of all topics of the template.
///
/// # Errors
/// Configuration, when there is no such namespace.
pub(super) fn namespace(config: &Config) -> Result<String> {
    let setting = settings::TOPIC.env;
    match config.topic.namespace() {
        Ok(namespace) => Ok(namespace),
        Err(columns) => {
            let columns: Vec<String> = columns.iter().map(|name| format!("{{{name}}}")).collect();
            Err(Error::config(format!(
                "{setting} has {} in its tenant or namespace, so each row decides where it goes, and the namespaces cannot be known",
                columns.join(" and ")
            ))
            .hint("for each of them: pulsar-admin namespaces set-deduplication --enable tenant/namespace"))
        }
    }
}
