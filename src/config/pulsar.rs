//! The settings of the way to Pulsar: where, as whom, under whose certificate.
//!
//! Exactly one kind of credentials may be given; a client certificate may come with any of them, and stands for itself
//! when there is no other. Files are read once here, so that a wrong one is told before anything is touched; they are read
//! again whenever they are used.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::reader::Reader;
use super::settings::{self as s, Setting};
use super::values::{self, PulsarUrl, SecretSource};
use crate::http::HttpUrl;
use crate::pulsar::{Auth, ClientCredentials, OAuth2, TlsFiles};
use crate::tls;

/// All of them, checked.
pub(super) struct Pulsar {
    pub(super) url: PulsarUrl,
    pub(super) admin_url: Option<HttpUrl>,
    pub(super) auth: Auth,
    pub(super) tls: TlsFiles,
    pub(super) keepalive_interval: Duration,
}

/// Reads all of them. What is optional and wrong has been noted, and comes as if it were not given.
pub(super) fn read(reader: &mut Reader<'_>) -> Option<Pulsar> {
    let url = reader.text(&s::PULSAR_URL, PulsarUrl::parse);
    let admin_url = reader.text(&s::PULSAR_ADMIN_URL, HttpUrl::parse);
    let keepalive_interval = reader.duration(&s::PULSAR_KEEPALIVE_INTERVAL);
    let tls = tls_files(reader);
    let token = token(reader);
    let oauth2 = oauth2(reader, &tls);
    let basic = basic(reader);

    let no_tls = url.as_ref().is_some_and(|url| !url.tls);
    if no_tls && !admin_url.as_ref().is_some_and(HttpUrl::is_tls) {
        let unused = [
            (tls.ca.is_some() && oauth2.is_none(), &s::PULSAR_CA_FILE),
            (tls.client.is_some(), &s::PULSAR_CERT_FILE),
        ];
        for (_, setting) in unused.iter().filter(|(unused, _)| *unused) {
            reader.note(format!(
                "{} is given, but nothing here uses TLS; allowed: with {}=pulsar+ssl://… or {}=https://…",
                setting.env,
                s::PULSAR_URL.env,
                s::PULSAR_ADMIN_URL.env
            ));
        }
    }

    let mut kinds: Vec<(&str, Auth)> = [token, oauth2, basic].into_iter().flatten().collect();
    if let [(first, _), (second, _), ..] = kinds[..] {
        reader.note(format!(
            "{first} and {second}: two kinds of credentials; allowed: one of them"
        ));
    }
    let auth = match kinds.pop() {
        Some((_, auth)) => auth,
        None if tls.client.is_some() => Auth::Tls,
        None => Auth::None,
    };
    Some(Pulsar {
        url: url?,
        admin_url,
        auth,
        tls,
        keepalive_interval: keepalive_interval?,
    })
}

fn tls_files(reader: &mut Reader<'_>) -> TlsFiles {
    let certificates = |path: &str| {
        let certificates = tls::read_certificates(Path::new(path))?;
        Ok((PathBuf::from(path), certificates))
    };
    let ca = reader.text(&s::PULSAR_CA_FILE, |path| {
        let (path, certificates) = certificates(path)?;
        tls::trust(&mut rustls::RootCertStore::empty(), &certificates)?;
        Ok(path)
    });
    let before = reader.noted();
    let cert = reader.text(&s::PULSAR_CERT_FILE, certificates);
    let key = reader.text(&s::PULSAR_KEY_FILE, |path| {
        let key = tls::read_key(Path::new(path))?;
        Ok((PathBuf::from(path), key))
    });
    let sound = reader.noted() == before;
    let client = match (cert, key) {
        (Some((cert, chain)), Some((key, private))) => {
            let made = tls::strict_config(rustls::RootCertStore::empty(), Some((chain, private)));
            if let Err(why) = made {
                reader.note(format!(
                    "{}={} and {}={}: they do not fit together: {why}; allowed: a certificate and its own key",
                    s::PULSAR_CERT_FILE.env,
                    cert.display(),
                    s::PULSAR_KEY_FILE.env,
                    key.display()
                ));
            }
            Some((cert, key))
        }
        (Some(_), None) if sound => alone(reader, &s::PULSAR_CERT_FILE, &s::PULSAR_KEY_FILE),
        (None, Some(_)) if sound => alone(reader, &s::PULSAR_KEY_FILE, &s::PULSAR_CERT_FILE),
        _ => None,
    };
    TlsFiles { ca, client }
}

fn token(reader: &mut Reader<'_>) -> Option<(&'static str, Auth)> {
    let source = reader.text_or_file(
        &s::PULSAR_TOKEN,
        &s::PULSAR_TOKEN_FILE,
        |text| values::token(text).map(SecretSource::Value),
        |path, text| values::token(text).map(|_| SecretSource::File(path.to_owned())),
    );
    let source = source.ok().flatten()?;
    let name = match source {
        SecretSource::Value(_) => s::PULSAR_TOKEN.env,
        SecretSource::File(_) => s::PULSAR_TOKEN_FILE.env,
    };
    Some((name, Auth::Token(source)))
}

fn basic(reader: &mut Reader<'_>) -> Option<(&'static str, Auth)> {
    let before = reader.noted();
    let user = reader.text(&s::PULSAR_BASIC_USER, values::user);
    let password = secret(
        reader,
        &s::PULSAR_BASIC_PASSWORD,
        &s::PULSAR_BASIC_PASSWORD_FILE,
    );
    let sound = reader.noted() == before;
    match (user, password) {
        (Some(user), Some(password)) => {
            Some((s::PULSAR_BASIC_USER.env, Auth::Basic { user, password }))
        }
        (Some(_), None) if sound => alone(reader, &s::PULSAR_BASIC_USER, &s::PULSAR_BASIC_PASSWORD),
        (None, Some(_)) if sound => alone(reader, &s::PULSAR_BASIC_PASSWORD, &s::PULSAR_BASIC_USER),
        _ => None,
    }
}

fn oauth2(reader: &mut Reader<'_>, tls: &TlsFiles) -> Option<(&'static str, Auth)> {
    let before = reader.noted();
    let issuer = reader.text(&s::PULSAR_OAUTH2_ISSUER_URL, HttpUrl::parse);
    let id = reader.text(&s::PULSAR_OAUTH2_CLIENT_ID, values::words);
    let secret = secret(
        reader,
        &s::PULSAR_OAUTH2_CLIENT_SECRET,
        &s::PULSAR_OAUTH2_CLIENT_SECRET_FILE,
    );
    let key_file = reader.text(&s::PULSAR_OAUTH2_KEY_FILE, |path| {
        let path = PathBuf::from(path);
        OAuth2::check_key_file(&values::secret_file(&path)?, issuer.is_some())?;
        Ok(path)
    });
    let audience = reader.text(&s::PULSAR_OAUTH2_AUDIENCE, values::words);
    let scope = reader.text(&s::PULSAR_OAUTH2_SCOPE, values::words);
    if reader.noted() != before {
        return None;
    }
    let given = [
        (issuer.is_some(), &s::PULSAR_OAUTH2_ISSUER_URL),
        (id.is_some(), &s::PULSAR_OAUTH2_CLIENT_ID),
        (secret.is_some(), &s::PULSAR_OAUTH2_CLIENT_SECRET),
        (key_file.is_some(), &s::PULSAR_OAUTH2_KEY_FILE),
        (audience.is_some(), &s::PULSAR_OAUTH2_AUDIENCE),
        (scope.is_some(), &s::PULSAR_OAUTH2_SCOPE),
    ];
    let first = given.iter().find(|(given, _)| *given)?.1.env;
    let client = match (key_file, id, secret) {
        (Some(path), None, None) => ClientCredentials::KeyFile(path),
        (None, Some(id), Some(secret)) if issuer.is_some() => {
            ClientCredentials::Given { id, secret }
        }
        _ => {
            let given: Vec<&str> = given
                .iter()
                .filter_map(|(given, setting)| given.then_some(setting.env))
                .collect();
            reader.note(format!(
                "{}: not what OAuth2 takes; allowed: {}, {} and {} (or _FILE), or {} in place of the last two",
                given.join(" and "),
                s::PULSAR_OAUTH2_ISSUER_URL.env,
                s::PULSAR_OAUTH2_CLIENT_ID.env,
                s::PULSAR_OAUTH2_CLIENT_SECRET.env,
                s::PULSAR_OAUTH2_KEY_FILE.env,
            ));
            return None;
        }
    };
    let source = OAuth2::new(issuer, client, audience, scope, tls.clone());
    Some((first, Auth::OAuth2(Arc::new(source))))
}

fn secret(
    reader: &mut Reader<'_>,
    setting: &Setting,
    file_setting: &Setting,
) -> Option<SecretSource> {
    let source = reader.text_or_file(
        setting,
        file_setting,
        |text| values::password(text).map(SecretSource::Value),
        |path, text| values::password(text).map(|_| SecretSource::File(path.to_owned())),
    );
    source.ok().flatten()
}

/// Notes that one of two settings is given without the other.
fn alone<T>(reader: &mut Reader<'_>, given: &Setting, missing: &Setting) -> Option<T> {
    reader.note(format!(
        "{} is given without {}; allowed: both or neither",
        given.env, missing.env
    ));
    None
}
