//! TLS to brokers and to their admin interface: whom to trust, and the client's own certificate.
//!
//! Input: [`TlsFiles`], the paths that were configured. Output: a rustls configuration, made anew from the files for each
//! connection. Chain, dates and host name are always checked; there is no way to switch that off.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ClientConfig;

use crate::{Error, Result, tls};

/// The PEM files for TLS; all of them may be rotated while walpost runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Authorities to trust; those of the host when there is none.
    pub ca: Option<PathBuf>,
    /// The client's certificate (its chain, leaf first) and its key.
    pub client: Option<(PathBuf, PathBuf)>,
}

impl TlsFiles {
    /// What these are, should one of them have no end.
    pub(super) const WHAT: &str =
        "a file of WALPOST_PULSAR_CA_FILE, WALPOST_PULSAR_CERT_FILE or WALPOST_PULSAR_KEY_FILE";

    /// Which files these are.
    pub(super) fn names(&self) -> String {
        format!("{self:?}")
    }

    /// A configuration from the files as they are now.
    ///
    /// # Errors
    /// Temporary: whoever rotates the files may be in the middle of it.
    pub(super) fn client_config(&self) -> Result<Arc<ClientConfig>> {
        let mut roots = rustls::RootCertStore::empty();
        match &self.ca {
            None => {
                roots = tls::authorities_of_the_host();
                if roots.is_empty() {
                    return Err(
                        Error::refused("this host has no trusted certificate authorities").hint(
                            "set WALPOST_PULSAR_CA_FILE to a PEM file with the broker's authority",
                        ),
                    );
                }
            }
            Some(path) => tls::read_certificates(path)
                .and_then(|certificates| tls::trust(&mut roots, &certificates))
                .map_err(|why| unusable("WALPOST_PULSAR_CA_FILE", path, &why))?,
        }
        let identity = self.client.as_ref().map(identity).transpose()?;
        let config = tls::strict_config(roots, identity).map_err(|error| {
            Error::temporary("the client certificate and its key do not fit together")
                .caused_by(error)
                .hint("check WALPOST_PULSAR_CERT_FILE and WALPOST_PULSAR_KEY_FILE")
        })?;
        Ok(Arc::new(config))
    }

    /// A configuration for a server outside of Pulsar, such as an OAuth 2 issuer: trusts the host's authorities besides
    /// the configured one, and never shows the client certificate.
    pub(super) fn config_for_others(&self) -> Result<Arc<ClientConfig>> {
        let mut roots = tls::authorities_of_the_host();
        if let Some(path) = &self.ca {
            tls::read_certificates(path)
                .and_then(|certificates| tls::trust(&mut roots, &certificates))
                .map_err(|why| unusable("WALPOST_PULSAR_CA_FILE", path, &why))?;
        }
        tls::strict_config(roots, None)
            .map(Arc::new)
            .map_err(|error| Error::bug("cannot set up TLS").caused_by(error))
    }
}

fn identity((cert, key): &(PathBuf, PathBuf)) -> Result<tls::ClientIdentity> {
    let chain = tls::read_certificates(cert)
        .map_err(|why| unusable("WALPOST_PULSAR_CERT_FILE", cert, &why))?;
    let key = tls::read_key(key).map_err(|why| unusable("WALPOST_PULSAR_KEY_FILE", key, &why))?;
    Ok((chain, key))
}

fn unusable(setting: &str, path: &Path, why: &str) -> Error {
    Error::temporary(format!("{setting}: cannot use {}: {why}", path.display()))
}
