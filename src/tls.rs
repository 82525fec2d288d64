//! What every TLS connection of walpost shares: the provider, PEM files, the host's authorities, and words for what goes
//! wrong in a handshake.
//!
//! Input: paths and errors of rustls. Output: certificates, keys, an [`Error`] that says who is at fault and what to do.
//! Who is trusted and which name is asked for is decided by the users: `postgres` by its `sslmode`, `pulsar` and `http`
//! always strictly. Keeps nothing: files are read again at each connect, so a rotated certificate is used without a restart.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore};

use crate::{Error, Result};

/// A client's certificate chain and its key.
pub(crate) type ClientIdentity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The one provider under rustls.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// All certificates of a PEM file; an error says what is wrong with the file, without naming it.
pub(crate) fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| error.to_string())?;
    if certificates.is_empty() {
        return Err("it holds no PEM certificate".to_owned());
    }
    Ok(certificates)
}

/// The first private key of a PEM file; never part of an error.
pub(crate) fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| error.to_string())
}

/// Adds the authorities of a PEM file.
pub(crate) fn trust(
    roots: &mut RootCertStore,
    certificates: &[CertificateDer<'static>],
) -> Result<(), String> {
    for certificate in certificates {
        roots
            .add(certificate.clone())
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// The authorities this host trusts; may be empty.
pub(crate) fn authorities_of_the_host() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// A configuration that checks chain, dates and name, and shows `identity` if the server asks.
pub(crate) fn strict_config(
    roots: RootCertStore,
    identity: Option<ClientIdentity>,
) -> Result<ClientConfig, rustls::Error> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    match identity {
        None => Ok(builder.with_no_client_auth()),
        Some((chain, key)) => builder.with_client_auth_cert(chain, key),
    }
}

/// What an I/O error on a TLS connection to `peer` means; `None` when TLS had no part in it.
///
/// Final where time cannot heal it. `host` is the name the certificate was asked for; `identified`, that we have shown a
/// certificate of our own.
pub(crate) fn explain(
    peer: &str,
    host: &str,
    identified: bool,
    error: &io::Error,
) -> Option<Error> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match error {
        rustls::Error::InvalidCertificate(why) => certificate_error(peer, host, why),
        rustls::Error::AlertReceived(alert) => alert_error(peer, identified, *alert),
        rustls::Error::InvalidMessage(_) => {
            Error::refused(format!("{peer} does not speak TLS on this port"))
                .hint("use its TLS port (6651 unless configured), or a URL without TLS")
        }
        other => Error::temporary(format!("the TLS handshake with {peer} failed: {other}")),
    })
}

fn certificate_error(peer: &str, host: &str, why: &CertificateError) -> Error {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            Error::refused(format!("the certificate of {peer} has expired"))
                .hint("renew the server's certificate; if it is new, set this machine's clock")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            Error::refused(format!("the certificate of {peer} is not valid yet"))
                .hint("set this machine's clock, or the server's certificate was made by one that is fast")
        }
        CertificateError::UnknownIssuer => Error::refused(format!(
            "the certificate of {peer} is signed by an authority that is not trusted here"
        ))
        .hint("set WALPOST_PULSAR_CA_FILE to a PEM file with that authority's certificate"),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            Error::refused(format!("the certificate of {peer} is not for the name {host}"))
                .hint("use a name that the certificate has, or issue one for this name (subjectAltName)")
        }
        other => Error::refused(format!(
            "the certificate of {peer} is not acceptable: {}",
            rustls::Error::InvalidCertificate(other.clone())
        )),
    }
}

/// The server ended the handshake. Only what is said about our certificate is final: the rest may be a restart.
fn alert_error(peer: &str, identified: bool, alert: AlertDescription) -> Error {
    let text = format!("{peer} refuses the TLS connection: {alert:?}");
    match alert {
        // BoringSSL, which Pulsar's broker uses, says so of a certificate that its trust manager refused.
        AlertDescription::InternalError if !identified => Error::temporary(text),
        AlertDescription::CertificateRequired
        | AlertDescription::NoCertificate
        | AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateRevoked
        | AlertDescription::CertificateExpired
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnknownCA
        | AlertDescription::AccessDenied
        | AlertDescription::DecryptError
        | AlertDescription::InternalError => Error::refused(text).hint(
            "set WALPOST_PULSAR_CERT_FILE and WALPOST_PULSAR_KEY_FILE to a valid client certificate that the server trusts",
        ),
        _ => Error::temporary(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(error: rustls::Error) -> Error {
        explained_to(false, error)
    }

    fn explained_to(identified: bool, error: rustls::Error) -> Error {
        let error = io::Error::new(io::ErrorKind::InvalidData, error);
        explain("the broker at b:1", "b", identified, &error).expect("rustls had a part in it")
    }

    #[test]
    fn a_bad_certificate_is_final_and_its_fault_is_named() {
        for (why, says) in [
            (CertificateError::Expired, "has expired"),
            (CertificateError::NotValidYet, "not valid yet"),
            (CertificateError::UnknownIssuer, "WALPOST_PULSAR_CA_FILE"),
            (CertificateError::NotValidForName, "not for the name b"),
            (CertificateError::Revoked, "Revoked"),
        ] {
            let error = explained(rustls::Error::InvalidCertificate(why));
            assert_eq!(error.exit_code(), 69);
            let said = error.report();
            assert!(
                said.contains(says) && said.contains("the broker at b:1"),
                "{said}"
            );
        }
    }

    #[test]
    fn an_alert_about_our_certificate_is_final_and_any_other_is_not() {
        let about_us = explained(rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired,
        ));
        assert_eq!(about_us.exit_code(), 69);
        assert!(about_us.report().contains("WALPOST_PULSAR_CERT_FILE"));
        let internal = || rustls::Error::AlertReceived(AlertDescription::InternalError);
        assert!(explained(internal()).is_temporary());
        assert_eq!(explained_to(true, internal()).exit_code(), 69);
    }

    #[test]
    fn an_error_of_the_network_is_none_of_ours() {
        assert!(explain("b", "b", true, &io::ErrorKind::ConnectionReset.into()).is_none());
    }
}
