//! The status page in a real browser: Debian's Chromium, without a window.

use std::path::PathBuf;

use super::{DEADLINE, addr_of, insert_many, status_of};
use crate::support::{Database, Walpost, eventually, tool, unique};

/// Would change the title, if it were obeyed.
const HOSTILE: &str =
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">";

/// What a browser made of the page.
pub(super) struct Browsed {
    pub(super) dom: String,
    picture: PathBuf,
}

/// Opens the page, lets it fetch and draw, and takes both the document and a picture of it.
pub(super) async fn browse(url: &str, picture: &str, more: &[&str]) -> Browsed {
    let chromium = tool("chromium");
    let picture = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(picture);
    let mut answers = Vec::new();
    for what in [
        "--dump-dom".to_owned(),
        format!("--screenshot={}", picture.display()),
    ] {
        let profile = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(unique("chromium"));
        let mut command = tokio::process::Command::new(&chromium);
        command
            // Root, and a container's small /dev/shm: both usual where tests run, and the page is our own.
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--disable-gpu",
                "--no-first-run",
            ])
            .args([
                "--hide-scrollbars",
                "--window-size=1280,1500",
                "--virtual-time-budget=4000",
            ])
            .arg(format!("--user-data-dir={}", profile.display()))
            .args(more)
            .args([&what, url])
            .kill_on_drop(true);
        let output = tokio::time::timeout(DEADLINE * 2, command.output()).await;
        let output = output
            .expect("Chromium ends in time")
            .expect("Chromium starts");
        let _ = std::fs::remove_dir_all(&profile);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        answers.push(String::from_utf8(output.stdout).expect("UTF-8"));
    }
    Browsed {
        dom: answers.swap_remove(0),
        picture,
    }
}

/// A stream with events in several topics, one with a long name, and stragglers that are full of markup.
async fn busy() -> (Database, Walpost, String) {
    let database = Database::create("page").await;
    database
        .sql("CREATE TABLE events (id text, aggregatetype text, aggregateid text, type text, payload text)")
        .await;
    let settings = [("WALPOST_OUTBOX_TABLE", "events,walpost.outbox")];
    database.init(&[], &settings).await;
    let mut walpost = database.start(&settings).await;
    let addr = addr_of(&mut walpost).await;
    let long = "a-name-that-goes-on-".repeat(8);
    for topic in ["orders", "stock", &long] {
        let insert = "INSERT INTO events SELECT n::text, $1::text, 'k', 't', 'x' FROM generate_series(1, 50) n";
        database.rows(insert, &[&topic]).await;
    }
    // Without a key: becomes a dead straggler, by its own id.
    let insert = "INSERT INTO events VALUES ($1, 'orders', NULL, 't', 'x')";
    database.rows(insert, &[&HOSTILE]).await;
    let by_hand = "INSERT INTO walpost.straggler (slot, outbox, id, topic, key, commit_lsn, ordinal, state, reason)
                   VALUES ($1, 'events', $2, $3, $2, '0/1', 1, 'dead', $2)";
    database
        .rows(
            by_hand,
            &[&database.slot, &HOSTILE, &format!("persistent://{HOSTILE}")],
        )
        .await;
    for _ in 0..3 {
        insert_many(&database, 2000).await;
        database.wait_all_confirmed(DEADLINE).await;
    }
    // The observer counts every six seconds, and the history wants some points.
    eventually(DEADLINE, "both stragglers to be on /status", async || {
        (status_of(&addr).await["stragglers"]["dead"] == 2).then_some(())
    })
    .await;
    (database, walpost, addr)
}

#[tokio::test]
async fn a_browser_shows_the_page_and_obeys_nothing_that_stands_in_rows() {
    let (database, walpost, addr) = busy().await;
    let url = format!("http://{addr}/");
    let light = browse(&url, "status-page.png", &[]).await;
    let dom = &light.dom;

    // THEN the page has what /status has, as text
    let topics = [
        database.topic("orders"),
        database.topic("stock"),
        database.topic("load"),
    ];
    for part in topics.iter().map(String::as_str).chain([
        &*database.slot,
        "0 retrying, 0 parked, 2 dead",
        ">ready<",
        ">streaming<",
        "6,150 events",
    ]) {
        assert!(dom.contains(part), "{part}: {dom}");
    }
    // AND markup of rows is text: in id, topic, key and reason
    let escaped = "&lt;script&gt;document.title='owned'&lt;/script&gt;&lt;img src=x";
    assert!(dom.matches(escaped).count() >= 5, "{dom}");
    assert!(
        !dom.contains("<script>document.title") && !dom.contains("<img"),
        "{dom}"
    );
    let title = format!("<title>walpost {}</title>", database.slot);
    assert!(dom.contains(&title), "{dom}");
    // AND the charts have lines
    assert_eq!(
        dom.matches("<path class=\"line\" d=\"M").count(),
        4,
        "{dom}"
    );

    // AND in a narrow window and in the dark it is the same page
    let dark = [
        "--blink-settings=preferredColorScheme=0",
        "--window-size=500,2400",
    ];
    let dark = browse(&url, "status-page-dark.png", &dark).await;
    assert!(dark.dom.contains(&title), "{}", dark.dom);
    for picture in [&light.picture, &dark.picture] {
        let bytes = std::fs::metadata(picture).expect("a picture").len();
        assert!(bytes > 20_000, "{} has {bytes} bytes", picture.display());
        println!("look at {}", picture.display());
    }
    walpost.stop().await;
}
