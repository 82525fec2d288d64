//! Pulsar's Java client, the reference implementation: its jars are part of the server's distribution. Debian's `BeanShell`
//! runs the program, so that no Java compiler is needed.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::Servers;

/// A JVM takes seconds to start on a busy machine.
const DEADLINE: Duration = Duration::from_secs(90);

/// Publishes an empty message of each key to a partitioned topic, and returns the partitions the Java client chose. `scheme`
/// is a name of its `HashingScheme`.
pub(crate) async fn java_partitions(
    servers: &Servers,
    topic: &str,
    scheme: &str,
    keys: &[String],
) -> Vec<u32> {
    let mut input = format!("{}\n{topic}\n{scheme}\n", servers.pulsar_url);
    for key in keys {
        for byte in key.bytes() {
            write!(input, "{byte:02x}").expect("a String takes everything");
        }
        input.push('\n');
    }
    let said = run(servers, "publish.bsh", &input).await;
    let numbers = said
        .lines()
        .filter_map(|line| line.strip_prefix("partition "));
    let partitions: Result<Vec<u32>, _> = numbers.map(str::parse).collect();
    match partitions {
        Ok(partitions) if partitions.len() == keys.len() => partitions,
        _ => panic!(
            "publish.bsh did not name a partition for each of {} keys:\n{said}",
            keys.len()
        ),
    }
}

/// For each name, the topic that a Java client's producer of that name reaches; none where there is no such topic, or where
/// it is one partition of another.
pub(crate) async fn java_topics(servers: &Servers, names: &[String]) -> Vec<Option<String>> {
    let mut input = String::new();
    for name in names {
        for byte in name.bytes() {
            write!(input, "{byte:02x}").expect("a String takes everything");
        }
        input.push('\n');
    }
    let said = run(servers, "topics.bsh", &input).await;
    let topics: Vec<Option<String>> = said
        .lines()
        .filter_map(|line| line.strip_prefix("topic"))
        .map(|topic| {
            let topic = topic.strip_prefix(' ')?;
            Some(String::from_utf8(super::hex(topic)).expect("UTF-8"))
        })
        .collect();
    assert_eq!(topics.len(), names.len(), "topics.bsh said:\n{said}");
    topics
}

/// Runs a program of this folder to its end and returns what it printed.
async fn run(servers: &Servers, program: &str, input: &str) -> String {
    let java = Path::new(servers.var("WALPOST_LOCAL_JAVA_HOME")).join("bin/java");
    let jars = Path::new(servers.var("WALPOST_LOCAL_PULSAR_HOME")).join("lib/*");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support");
    let mut child = Command::new(java)
        .arg("-cp")
        .arg(format!("/usr/share/java/bsh.jar:{}", jars.display()))
        // The machine has the other servers too.
        .args(["-Xmx256m", "-XX:TieredStopAtLevel=1", "bsh.Interpreter"])
        .arg(folder.join(program))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start Java: {error}"));
    let mut pipe = child.stdin.take().expect("piped");
    // More than a pipe holds may be on its way in both directions.
    let writing = async {
        let written = pipe.write_all(input.as_bytes()).await;
        drop(pipe);
        written
    };
    let both = async { tokio::join!(writing, child.wait_with_output()) };
    let (written, output) = tokio::time::timeout(DEADLINE, both)
        .await
        .unwrap_or_else(|_| panic!("{program} did not end within {DEADLINE:?}"));
    let output = output.expect("a child can be waited for");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && written.is_ok(),
        "{program} failed ({}):\n{said}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    said
}
