//! A broker of the test's own with TLS, three ways of authentication, and authorization; its certificates and tokens.
//!
//! Everything is made when the test runs: an authority, the server's and the clients' certificates (by the `openssl`
//! command, which Debian's Postgres brings), tokens signed with a key that only this broker knows.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use ring::hmac;

use crate::support::{OwnServers, Servers, admin_as, unique};

/// Password of user `basic-user`; stands in an htpasswd file as its hash.
pub(crate) const PASSWORD: &str = "open sesame, 4711";
/// Signs every token.
const KEY: &[u8] = b"a key that only this broker has !";
/// The broker looks for renewed certificates this often.
const CERTIFICATE_CHECK_SECONDS: u32 = 1;
/// It looks for expired tokens this often, and waits so long for the answer to a challenge before it hangs up.
const TOKEN_CHECK_SECONDS: u32 = 4;

/// The broker and the folder with its certificates.
pub(crate) struct Broker {
    pub(crate) servers: OwnServers,
    /// `pulsar+ssl://127.0.0.1:…`
    pub(crate) url: String,
    /// The same port by a name that its certificate lacks.
    pub(crate) url_by_name: String,
    /// `https://127.0.0.1:…`
    pub(crate) admin_url: String,
    /// A token of a role that may do everything.
    pub(crate) admin_token: String,
    folder: Folder,
}

/// Removed when dropped.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Broker {
    pub(crate) fn start() -> Self {
        let folder = Folder(std::env::temp_dir().join(unique("walpost_security")));
        fs::create_dir(&folder.0).expect("a folder for certificates");
        make_certificates(&folder.0);
        let (port, web_port) = (free_port(), free_port());
        let admin_token = token("admin", Duration::from_secs(3600));
        let conf = folder.0.join("broker.conf");
        fs::write(&conf, conf_lines(&folder.0, port, web_port, &admin_token)).expect("the conf");
        let conf = conf.to_str().expect("a plain path");
        let servers = Servers::own("security", &["--pulsar-conf", conf]);
        Self {
            servers,
            url: format!("pulsar+ssl://127.0.0.1:{port}"),
            url_by_name: format!("pulsar+ssl://localhost:{port}"),
            admin_url: format!("https://127.0.0.1:{web_port}"),
            admin_token,
            folder,
        }
    }

    /// A file of the certificates' folder, such as `ca.crt`.
    pub(crate) fn file(&self, name: &str) -> String {
        let path = self.folder.0.join(name);
        path.to_str().expect("a plain path").to_owned()
    }

    /// Writes such a file as whoever rotates one should: aside, then renamed.
    pub(crate) fn write(&self, name: &str, text: &str) {
        let aside = self.file(&format!("{name}.new"));
        fs::write(&aside, text).expect("written");
        fs::rename(aside, self.file(name)).expect("renamed");
    }

    /// Lets a role produce and look up in `public/default`.
    pub(crate) async fn may_produce(&self, role: &str) {
        let path = format!("/admin/v2/namespaces/public/default/permissions/{role}");
        self.admin("POST", &path, r#"["produce"]"#).await;
    }

    pub(crate) async fn admin(&self, method: &str, path: &str, body: &str) -> String {
        let url = &self.servers.pulsar_admin_url;
        admin_as(url, Some(&self.admin_token), method, path, body).await
    }

    /// From now on (soon) the broker shows a certificate that expired yesterday.
    pub(crate) fn let_the_certificate_expire(&self) {
        for kind in ["key", "crt"] {
            let text = fs::read_to_string(self.file(&format!("expired.{kind}"))).expect("made");
            self.write(&format!("server.{kind}"), &text);
        }
    }
}

fn conf_lines(folder: &Path, port: u16, web_port: u16, admin_token: &str) -> String {
    let folder = folder.display();
    let key = BASE64_STANDARD.encode(KEY);
    format!(
        "brokerServicePortTls={port}\n\
         webServicePortTls={web_port}\n\
         tlsCertificateFilePath={folder}/server.crt\n\
         tlsKeyFilePath={folder}/server.key\n\
         tlsTrustCertsFilePath={folder}/ca.crt\n\
         tlsCertRefreshCheckDurationSec={CERTIFICATE_CHECK_SECONDS}\n\
         authenticationEnabled=true\n\
         authenticationProviders=org.apache.pulsar.broker.authentication.AuthenticationProviderTls,\
         org.apache.pulsar.broker.authentication.AuthenticationProviderToken,\
         org.apache.pulsar.broker.authentication.AuthenticationProviderBasic\n\
         authenticationRefreshCheckSeconds={TOKEN_CHECK_SECONDS}\n\
         tokenSecretKey=data:;base64,{key}\n\
         basicAuthConf=file://{folder}/htpasswd\n\
         authorizationEnabled=true\n\
         superUserRoles=admin\n\
         brokerClientAuthenticationPlugin=org.apache.pulsar.client.impl.auth.AuthenticationToken\n\
         brokerClientAuthenticationParameters=token:{admin_token}\n"
    )
}

/// A JSON Web Token (RFC 7519, HS256) for `role` that the broker accepts for `life` from now.
pub(crate) fn token(role: &str, life: Duration) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let expires = (now.expect("after 1970") + life).as_secs();
    signed(role, expires, KEY)
}

/// A token that another one has signed.
pub(crate) fn forged_token(role: &str) -> String {
    signed(role, 4_000_000_000, b"a key that this broker never saw!")
}

fn signed(role: &str, expires: u64, key: &[u8]) -> String {
    let part = |json: &str| BASE64_URL_SAFE_NO_PAD.encode(json);
    let claims = format!(
        r#"{{"sub":"{role}","exp":{expires},"jti":"{}"}}"#,
        unique("t")
    );
    let text = format!("{}.{}", part(r#"{"alg":"HS256"}"#), part(&claims));
    let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes());
    format!("{text}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

/// The keys are readable by all: the broker runs under another account, and nobody else ever trusts them.
fn make_certificates(folder: &Path) {
    let script = r#"
        set -e
        new() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "$@" 2>/dev/null; }
        new -x509 -days 2 -subj /CN=walpost-test -keyout ca.key -out ca.crt
        new -x509 -days 2 -subj /CN=somebody-else -keyout other.key -out other.crt
        sign() { # name, subject, days, authority
            new -subj "/CN=$2" -keyout $1.key -out $1.csr
            printf 'subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n' > $1.ext
            openssl x509 -req -in $1.csr -CA $4.crt -CAkey $4.key -CAcreateserial -days $3 -extfile $1.ext -out $1.crt 2>/dev/null
        }
        sign server broker 2 ca
        sign expired broker -1 ca
        sign client tls-user 2 ca
        sign foreign tls-user 2 other
        printf 'basic-user:%s\n' "$(openssl passwd -apr1 "$1")" > htpasswd
        chmod 0755 .
        chmod 0644 *
    "#;
    let status = Command::new("bash")
        .args(["-c", script, "bash", PASSWORD])
        .current_dir(folder)
        .stdin(Stdio::null())
        .status()
        .expect("bash can be run");
    assert!(status.success(), "the certificates could not be made");
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").port()
}
