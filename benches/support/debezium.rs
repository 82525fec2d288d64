//! Debezium Server as a reference for the drain, where its folder is given: `DEBEZIUM_DIR`.
//!
//! Its settings are `benches/debezium/application.properties`. It needs a Java 21 or newer: `DEBEZIUM_JAVA_HOME`, where the local
//! servers run on an older one. It is done when the broker has taken as many messages as
//! there are rows: it tells Postgres later, and that is not counted against it. A missing message would show as a drain
//! that never ends.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::tests::{Command, Database, servers, try_admin, unique};
use super::{Drained, folder};

/// Java's way to end on SIGTERM, and Quarkus' own.
const EXIT_CODES: [i32; 3] = [0, 130, 143];
/// Enough for the queue of `application.properties`, as its operators give it.
const HEAP: &str = "-Xmx1g";

/// A folder with `debezium-server-dist-*-runner.jar` and `lib`.
pub(crate) struct Debezium(PathBuf);

impl Debezium {
    /// `None`, with a line that says so, when there is none.
    pub(crate) fn find() -> Option<Self> {
        let Ok(folder) = std::env::var("DEBEZIUM_DIR") else {
            println!("Debezium Server is left out: DEBEZIUM_DIR names no folder of it");
            return None;
        };
        let folder = PathBuf::from(folder);
        assert!(
            runner(&folder).is_some() && folder.join("lib").is_dir(),
            "DEBEZIUM_DIR={} holds no debezium-server-dist-*-runner.jar with its lib: unpack debezium-server-dist there",
            folder.display()
        );
        Some(Self(folder))
    }

    /// How long it takes from this copy of the slot into the broker.
    pub(crate) async fn drain(&self, database: &Database, copy: &str, rows: u64) -> Drained {
        let topic = unique("debezium");
        let properties = folder().join("debezium.properties");
        let text = settings(database, copy, &topic);
        std::fs::write(&properties, text).expect("the target folder can be written");
        let runner = runner(&self.0).expect("looked for before");
        let classes = format!("{}:{}", runner.display(), self.0.join("lib/*").display());
        let java_home = std::env::var("DEBEZIUM_JAVA_HOME");
        let java_home =
            java_home.unwrap_or_else(|_| servers().var("WALPOST_LOCAL_JAVA_HOME").to_owned());
        let java = format!("{java_home}/bin/java");
        let locations = format!("-Dquarkus.config.locations={}", properties.display());
        let args = [HEAP, &locations, "-cp", &classes, "io.debezium.server.Main"];
        let started = Instant::now();
        let child = Command::program(&java, args).spawn();
        let done = async || messages_in(&topic).await >= rows;
        Drained::of(child, started, rows, done, &EXIT_CODES).await
    }
}

fn settings(database: &Database, copy: &str, topic: &str) -> String {
    let url = url_parts(&database.url);
    let [user, password, host, port] = url;
    let (slot, name) = (&database.slot, &database.name);
    let service = &servers().pulsar_url;
    let fixed = include_str!("../debezium/application.properties");
    format!(
        "{fixed}
debezium.source.database.hostname={host}
debezium.source.database.port={port}
debezium.source.database.user={user}
debezium.source.database.password={password}
debezium.source.database.dbname={name}
debezium.source.slot.name={slot}_{copy}
debezium.transforms.outbox.route.topic.replacement={topic}
debezium.sink.pulsar.client.serviceUrl={service}
"
    )
}

fn runner(folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.flatten();
    let mut paths = files.map(|file| file.path());
    paths.find(|path| path.to_string_lossy().ends_with("-runner.jar"))
}

/// User, password, host and port of `postgres://user:password@host:port/database`.
fn url_parts(url: &str) -> [&str; 4] {
    let parts = || {
        let (login, server) = url.strip_prefix("postgres://")?.split_once('@')?;
        let (user, password) = login.split_once(':')?;
        let (host, port) = server.split_once('/')?.0.split_once(':')?;
        Some([user, password, host, port])
    };
    // Without the URL: it holds the password.
    parts().expect("the local Postgres' URL has all parts")
}

/// Messages that the broker has taken for a topic; none while there is no such topic.
async fn messages_in(topic: &str) -> u64 {
    let path = format!("/admin/v2/persistent/public/default/{topic}/stats");
    let Ok(stats) = try_admin(&servers().pulsar_admin_url, "GET", &path, "").await else {
        return 0;
    };
    let stats: serde_json::Value = serde_json::from_str(&stats).expect("the broker's JSON");
    stats["msgInCounter"].as_u64().unwrap_or(0)
}
