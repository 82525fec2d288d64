//! Against a TLS server in the test, whose certificate the `openssl` command makes (Debian's Postgres brings it).

use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use futures::FutureExt as _;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;

const DEADLINE: Duration = Duration::from_secs(30);
const FRAME_BYTES: usize = 16 * 1024;
/// Far more than the buffers of a loopback connection take.
const MAX_FRAMES: usize = 4096;

/// A folder with `ca.crt`, `server.crt` and `server.key`; removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("walpost-socket-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let script = r"
            set -e
            new() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes $@ 2>/dev/null; }
            new -x509 -days 2 -subj /CN=ca -keyout ca.key -out ca.crt
            new -subj /CN=server -keyout server.key -out server.csr
            printf 'subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n' > ext
            openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out server.crt 2>/dev/null
        ";
        let mut command = Command::new("bash");
        let made = command.args(["-c", script]).current_dir(&folder).status();
        assert!(
            made.unwrap().success(),
            "the certificates could not be made"
        );
        Self(folder)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn acceptor(cert: &Path, key: &Path) -> TlsAcceptor {
    let config = rustls::ServerConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            tls::read_certificates(cert).unwrap(),
            tls::read_key(key).unwrap(),
        );
    TlsAcceptor::from(std::sync::Arc::new(config.unwrap()))
}

#[tokio::test]
async fn what_tls_has_taken_reaches_the_peer_without_another_write() {
    // GIVEN a TLS connection whose peer does not read
    let folder = Folder::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint {
        host: "127.0.0.1".to_owned(),
        port: listener.local_addr().unwrap().port(),
        via_proxy_to: None,
    };
    let files = TlsFiles {
        ca: Some(folder.file("ca.crt")),
        client: None,
    };
    let acceptor = acceptor(&folder.file("server.crt"), &folder.file("server.key"));
    let accepting = async { acceptor.accept(listener.accept().await.unwrap().0).await };
    let (connected, peer) = tokio::join!(connect(&endpoint, 0, Some(&files)), accepting);
    let ((_reader, mut writer), mut peer) = (connected.unwrap(), peer.unwrap());
    assert!(writer.is_tls());

    // WHEN so much is written that the kernel takes no more of what TLS has encrypted
    let mut frame = Unwritten::default();
    frame.push_data(1, Bytes::from(vec![7; FRAME_BYTES]));
    let (mut taken, mut full) = (0, false);
    for _ in 0..MAX_FRAMES {
        let Some(written) = writer.write_some(&frame).now_or_never() else {
            full = true;
            break;
        };
        taken += written.unwrap().unwrap();
    }
    assert!(full, "{taken} bytes and still not full");
    let nothing = Unwritten::default();
    assert!(writer.write_some(&nothing).now_or_never().is_none());

    // THEN the flush that the driver then does brings all of it to a peer that reads again
    let reading = async {
        let mut received = 0;
        let mut buffer = vec![0; FRAME_BYTES];
        while received < taken {
            received += peer.read(&mut buffer).await.unwrap();
        }
        received
    };
    let both = async { tokio::join!(writer.write_some(&nothing), reading) };
    let (flushed, received) = timeout(DEADLINE, both).await.unwrap();
    assert_eq!(flushed.unwrap(), None);
    assert_eq!(received, taken);
}
