//! TLS by `sslmode`: which certificates are believed, and the client's own.
//!
//! Input: [`SslConfig`] and a host. Output: a rustls configuration and the name to ask for. Files are read at each
//! connect. Modes are those of libpq's "SSL Mode Descriptions"; without `sslrootcert`, `verify-ca` and `verify-full`
//! trust the authorities of the host (libpq: `~/.postgresql/root.crt`).

use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};

use super::config::{SslConfig, SslMode};
use crate::{Error, Result, tls};

/// A rustls configuration that checks what `ssl` asks for, and the name for the handshake with `host`.
pub(super) fn client_config(
    ssl: &SslConfig,
    host: &str,
) -> Result<(Arc<ClientConfig>, ServerName<'static>)> {
    let provider = tls::provider();
    let verifier = Arc::new(Verifier {
        trust: trust(ssl)?,
        check_name: ssl.mode == SslMode::VerifyFull,
        algorithms: provider.signature_verification_algorithms,
    });
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::bug("cannot set up TLS").caused_by(error))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match &ssl.client_cert {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let chain = read_certificates("sslcert", cert)?;
            let private = tls::read_key(key).map_err(|why| unreadable("sslkey", key, &why))?;
            builder
                .with_client_auth_cert(chain, private)
                .map_err(|error| {
                    Error::config("sslcert and sslkey do not make a client certificate")
                        .caused_by(error)
                })?
        }
    };
    let name = match ServerName::try_from(host.to_owned()) {
        Ok(name) => name,
        Err(_) if ssl.mode == SslMode::VerifyFull => {
            return Err(Error::config(format!(
                "{host} is no name that a certificate could be for"
            ))
            .hint("use the server's DNS name or address, or sslmode=verify-ca"));
        }
        Err(_) => {
            // The name is not checked: any will do, as long as it is not sent.
            config.enable_sni = false;
            ServerName::try_from("localhost")
                .map_err(|error| Error::bug("cannot set up TLS").caused_by(error))?
        }
    };
    Ok((Arc::new(config), name))
}

fn unreadable(parameter: &str, path: &Path, why: &dyn Display) -> Error {
    Error::config(format!("{parameter}: cannot use {}: {why}", path.display()))
}

fn read_certificates(parameter: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    tls::read_certificates(path).map_err(|why| unreadable(parameter, path, &why))
}

/// Whom to believe; `None` is anyone.
fn trust(ssl: &SslConfig) -> Result<Option<Trust>> {
    match (ssl.mode, &ssl.root_cert) {
        (SslMode::Disable | SslMode::Allow | SslMode::Prefer, _) | (SslMode::Require, None) => {
            Ok(None)
        }
        // As in libpq: with `require`, someone who names an authority means it.
        (SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull, Some(path)) => {
            let pinned = read_certificates("sslrootcert", path)?;
            let mut roots = RootCertStore::empty();
            tls::trust(&mut roots, &pinned).map_err(|why| unreadable("sslrootcert", path, &why))?;
            Ok(Some(Trust { roots, pinned }))
        }
        (SslMode::VerifyCa | SslMode::VerifyFull, None) => {
            let roots = tls::authorities_of_the_host();
            if roots.is_empty() {
                return Err(
                    Error::config("this host has no trusted certificate authorities").hint(
                        "set sslrootcert (PGSSLROOTCERT) to a PEM file with the server's authority",
                    ),
                );
            }
            let pinned = Vec::new();
            Ok(Some(Trust { roots, pinned }))
        }
    }
}

/// Authorities, and certificates that are believed as they are.
#[derive(Debug)]
struct Trust {
    roots: RootCertStore,
    /// The certificates of `sslrootcert`: a self-signed server certificate listed there is the server's own word, which
    /// webpki would refuse as "an authority's certificate used by a server". Its validity dates are not looked at.
    pinned: Vec<CertificateDer<'static>>,
}

/// Verifies by mode. In every mode the server must prove that it holds the certificate's key: SCRAM's channel binding
/// would be worth nothing otherwise.
#[derive(Debug)]
struct Verifier {
    trust: Option<Trust>,
    check_name: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    /// With nobody to verify, a certificate that webpki cannot even read (X.509 version 1, which the Postgres
    /// documentation's own `openssl` commands make) must not stop an encrypted connection; a wrong signature must.
    fn tolerate(
        &self,
        outcome: Result<HandshakeSignatureValid, rustls::Error>,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        match outcome {
            Err(rustls::Error::InvalidCertificate(error))
                if self.trust.is_none() && error != CertificateError::BadSignature =>
            {
                Ok(HandshakeSignatureValid::assertion())
            }
            other => other,
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(trust) = &self.trust else {
            return Ok(ServerCertVerified::assertion());
        };
        let certificate = ParsedCertificate::try_from(end_entity)?;
        if !trust.pinned.contains(end_entity) {
            verify_server_cert_signed_by_trust_anchor(
                &certificate,
                &trust.roots,
                intermediates,
                now,
                self.algorithms.all,
            )?;
        }
        if self.check_name {
            verify_server_name(&certificate, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.tolerate(verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.algorithms,
        ))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.tolerate(verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.algorithms,
        ))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
