//! Odd clients get a proper answer, and the pipe never notices.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{DEADLINE, ask, get, insert, insert_many, raw, streaming};
use crate::support::eventually;

/// What the server has room for.
const CONNECTIONS: usize = 64;

#[tokio::test]
async fn every_path_and_method_gets_its_answer() {
    let (_database, walpost, addr) = streaming("paths", &[]).await;
    for (path, content_type) in [
        ("/", "text/html"),
        ("/status", "application/json"),
        ("/history", "application/json"),
        ("/metrics", "text/plain"),
        ("/livez", "text/plain"),
        ("/readyz", "text/plain"),
        ("/status?pretty", "application/json"),
    ] {
        let answer = get(&addr, path).await;
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        let told = answer.header("content-type").unwrap_or_default();
        assert!(told.starts_with(content_type), "{path}: {told}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(answer.header("cache-control"), Some("no-store"));
        let length = answer.header("content-length").map(str::to_owned);
        assert_eq!(length, Some(answer.body.len().to_string()), "{path}");

        let head = ask(&addr, "HEAD", path).await;
        assert_eq!((head.status, &*head.body), (200, ""), "{path}");
        assert!(head.header("content-length").is_some(), "{path}: {head:?}");
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "BREW"] {
            let answer = ask(&addr, method, path).await;
            assert_eq!(answer.status, 405, "{method} {path}: {answer:?}");
            assert_eq!(answer.header("allow"), Some("GET, HEAD"));
        }
    }
    for path in ["/nothing", "/status/", "/../etc/passwd", "/%2e%2e", "//"] {
        let answer = get(&addr, path).await;
        assert_eq!(answer.status, 404, "{path}: {answer:?}");
        assert!(answer.body.contains("/metrics"), "{answer:?}");
    }
    let policy = get(&addr, "/").await;
    let policy = policy.header("content-security-policy").expect("a policy");
    assert!(
        policy.contains("default-src 'none'") && !policy.contains("unsafe"),
        "{policy}"
    );
    walpost.stop().await;
}

#[tokio::test]
async fn what_is_no_request_gets_400_or_431_and_a_body_is_not_read() {
    let (_database, walpost, addr) = streaming("garbage", &[]).await;
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"[..],
        b"\x00\xff\xfe\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /status HTTP/1.1\r\nbroken header\r\n\r\n",
    ] {
        let answer = raw(&addr, garbage).await;
        assert!(
            (400..=505).contains(&answer.status),
            "{garbage:?}: {answer:?}"
        );
    }
    let long = format!(
        "GET / HTTP/1.1\r\nHost: x\r\nX-Long: {}\r\n\r\n",
        "x".repeat(15_000)
    );
    assert_eq!(raw(&addr, long.as_bytes()).await.status, 200);
    let longer = format!(
        "GET / HTTP/1.1\r\nHost: x\r\nX-Long: {}\r\n\r\n",
        "x".repeat(17_000)
    );
    assert_eq!(raw(&addr, longer.as_bytes()).await.status, 431);
    let body = format!(
        "POST /status HTTP/1.1\r\nHost: x\r\nContent-Length: 30000\r\n\r\n{}",
        "x".repeat(30_000)
    );
    assert_eq!(raw(&addr, body.as_bytes()).await.status, 405);
    // One request a connection: a second one behind it is not answered.
    let two = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2);
    let answer = raw(&addr, two.as_bytes()).await;
    assert_eq!((answer.status, &*answer.body), (200, "alive\n"));
    assert_eq!(answer.header("connection"), Some("close"));
    walpost.stop().await;
}

#[tokio::test]
async fn slow_clients_hold_their_places_for_seconds_and_the_pipe_never_notices() {
    // GIVEN as many clients as there is room for, of whom half say nothing and half begin and never end
    let (database, walpost, addr) = streaming("slow", &[]).await;
    let mut slow = Vec::new();
    for number in 0..CONNECTIONS {
        let mut stream = TcpStream::connect(&addr).await.expect("it listens");
        if number % 2 == 0 {
            stream
                .write_all(b"GET / HTTP/1.1\r\nX-Slow: ")
                .await
                .expect("it reads");
        }
        slow.push(stream);
    }
    let began = Instant::now();

    // THEN one more is told so at once
    let mut busy = TcpStream::connect(&addr).await.expect("it listens");
    let mut said = String::new();
    busy.read_to_string(&mut said).await.expect("it answers");
    assert!(
        said.starts_with("HTTP/1.1 503 ") && said.contains("too many connections"),
        "{said}"
    );

    // AND the stream goes on as if nobody were there
    insert_many(&database, 20_000).await;
    insert(&database, "t", "k", "x").await;
    database.wait_all_confirmed(DEADLINE).await;

    // AND the slow ones are gone in seconds, though they are still there
    eventually(Duration::from_secs(30), "a place to be free", async || {
        let answer = get(&addr, "/livez").await;
        (answer.status == 200).then_some(())
    })
    .await;
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
    for mut stream in slow {
        // An answer (408 or nothing), and the end; a reset is an end too.
        let mut rest = Vec::new();
        let ended = timeout(DEADLINE, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "a slow client is still served");
    }

    // AND a client that asks and never reads is no better off
    let mut deaf = TcpStream::connect(&addr).await.expect("it listens");
    deaf.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .expect("it reads");
    for _ in 0..500 {
        let answer = get(&addr, "/metrics").await;
        assert!(matches!(answer.status, 200 | 503), "{answer:?}");
    }
    let peak_kib = walpost.peak_rss_kib();
    assert!(peak_kib < 96 * 1024, "peak RSS is {peak_kib} KiB");
    walpost.stop().await;
}
