//! Alerts and dashboard: promtool judges them, and every metric they name is one that a running walpost serves.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{one_yaml, read, root, run, words};
use crate::support::{Database, Walpost, eventually, tool};

const DEADLINE: Duration = Duration::from_secs(60);
const ALERTS: &str = "deploy/prometheus/alerts.yml";
const DASHBOARD: &str = "deploy/grafana/dashboard.json";

fn promtool(args: &[&str]) -> String {
    let mut command = Command::new(tool("promtool"));
    let said = run(command
        .args(args)
        .current_dir(root().join("deploy/prometheus")));
    String::from_utf8_lossy(&said.stdout).into_owned()
}

fn rules() -> Vec<Value> {
    let groups = one_yaml(ALERTS)["groups"].clone();
    let groups = groups.as_array().expect("groups").iter();
    groups
        .flat_map(|group| group["rules"].as_array().expect("rules").clone())
        .collect()
}

/// Everything below a value that stands under this name as a text.
fn all_named(value: &Value, name: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            for (member, value) in members {
                match value.as_str() {
                    Some(text) if member == name => found.push(text.to_owned()),
                    _ => all_named(value, name, found),
                }
            }
        }
        Value::Array(values) => values
            .iter()
            .for_each(|value| all_named(value, name, found)),
        _ => {}
    }
}

/// The queries of the dashboard, as Prometheus gets them.
fn dashboard_queries() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)).expect("JSON");
    let mut found = Vec::new();
    all_named(&dashboard, "expr", &mut found);
    assert!(found.len() > 20, "{} queries", found.len());
    let filled = found
        .iter()
        .map(|query| query.replace("$__rate_interval", "1m"));
    filled.map(|query| query.replace("$job", ".*")).collect()
}

#[test]
fn promtool_finds_no_fault_with_alerts_and_configuration_and_each_alert_fires_when_it_should() {
    promtool(&["check", "rules", "alerts.yml"]);
    promtool(&["check", "config", "prometheus.yml"]);
    let said = promtool(&["test", "rules", "alerts.test.yml"]);
    assert!(said.contains("SUCCESS"), "{said}");

    // Each one is seen to fire, and to be silent in another case.
    let tests = one_yaml("deploy/prometheus/alerts.test.yml")["tests"].clone();
    let mut fired = BTreeSet::new();
    let mut silent = BTreeSet::new();
    for test in tests.as_array().expect("tests") {
        for case in test["alert_rule_test"].as_array().expect("cases") {
            let name = case["alertname"].as_str().expect("a name").to_owned();
            let goes_off = !case["exp_alerts"].as_array().expect("a list").is_empty();
            (if goes_off { &mut fired } else { &mut silent }).insert(name);
        }
    }
    let names = rules()
        .iter()
        .map(|rule| rule["alert"].as_str().expect("a name").to_owned())
        .collect();
    assert_eq!(fired, names);
    assert_eq!(silent, names);
}

#[test]
fn every_alert_has_a_severity_and_a_runbook_and_every_runbook_an_alert() {
    let page = read("deploy/OPERATIONS.md");
    let headings = page.lines().filter_map(|line| line.strip_prefix("### "));
    let runbooks: BTreeSet<&str> = headings
        .filter(|heading| heading.starts_with("Walpost"))
        .collect();
    let rules = rules();
    let mut names = BTreeSet::new();
    for rule in &rules {
        let name = rule["alert"].as_str().expect("a name");
        names.insert(name);
        let severity = rule["labels"]["severity"].as_str();
        assert!(matches!(severity, Some("warning" | "critical")), "{name}");
        let url = format!("deploy/OPERATIONS.md#{}", name.to_lowercase());
        assert_eq!(rule["annotations"]["runbook_url"], *url, "{name}");
        assert!(rule["annotations"]["summary"].is_string(), "{name}");
    }
    assert_eq!(names, runbooks);
}

#[test]
fn the_dashboards_queries_are_queries() {
    // As rules, because promtool checks those.
    let mut text = "groups: [{name: dashboard, rules: [\n".to_owned();
    for (number, query) in dashboard_queries().iter().enumerate() {
        let query = Value::from(query.as_str());
        writeln!(text, "{{record: 'panel:{number}', expr: {query}}},").expect("a String takes it");
    }
    text.push_str("]}]\n");
    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("dashboard-rules.yml");
    std::fs::write(&file, text).expect("a file");
    promtool(&["check", "rules", file.to_str().expect("UTF-8")]);
}

#[test]
fn panels_stand_side_by_side_with_a_text_each() {
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut taken = BTreeSet::new();
    let mut ids = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().expect("a title");
        assert!(panel["description"].is_string(), "{title}");
        assert!(
            ids.insert(panel["id"].as_u64()),
            "{title} has the id of another"
        );
        let place = |name: &str| panel["gridPos"][name].as_u64().expect("a place");
        assert!(place("x") + place("w") <= 24, "{title} is too far right");
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                assert!(taken.insert((x, y)), "{title} covers another panel");
            }
        }
    }
}

async fn metrics_of(addr: &str) -> Option<String> {
    let mut stream = TcpStream::connect(addr).await.ok()?;
    let request = format!("GET /metrics HTTP/1.0\r\nHost: {addr}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.ok()?;
    Some(text)
}

/// Where a child serves, as its log says.
async fn addr_of(walpost: &mut Walpost) -> String {
    let line = walpost.wait_for_line("health at http://", DEADLINE).await;
    let (_, addr) = line.split_once("http://").expect("just found");
    addr.trim_end_matches('/').to_owned()
}

#[tokio::test]
async fn every_metric_that_alerts_dashboard_and_documents_name_is_one_that_a_running_walpost_serves()
 {
    // GIVEN a walpost that has published something and has asked Postgres
    let database = Database::create("named").await;
    database.init(&["--payload", "text"], &[]).await;
    let mut walpost = database.start(&[]).await;
    let addr = addr_of(&mut walpost).await;
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('a', 'k', 't', 'x')";
    database.rows(insert, &[]).await;
    database.wait_all_confirmed(DEADLINE).await;
    let text = eventually(DEADLINE, "lag and topic to be known", async || {
        let text = metrics_of(&addr).await?;
        let whole = text.contains("\nwalpost_replication_lag_seconds 0\n")
            && text.contains("\nwalpost_events_published_total{");
        whole.then_some(text)
    })
    .await;
    walpost.stop().await;

    // WHEN it is asked what it serves
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let served: BTreeSet<&str> = lines
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();

    // THEN that is what the queries name, with the labels they ask for
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let alerts = rules()
        .iter()
        .map(|rule| rule["expr"].as_str().expect("a query").to_owned())
        .collect::<Vec<_>>();
    let mut sources = vec![
        ("alerts", alerts.join("\n")),
        ("dashboard", dashboard_queries().join("\n")),
    ];
    for page in ["README.md", "deploy/OPERATIONS.md"] {
        sources.push((page, read(page)));
    }
    let mut count = 0;
    for (source, queries) in &sources {
        let named = [
            words(queries, "walpost_", is_part),
            words(queries, "process_", is_part),
        ]
        .concat();
        count += named.len();
        for name in named {
            // Roles of the database stand in the documents too.
            let is_role = ["walpost_producer", "walpost_connector"].contains(&name);
            assert!(
                served.contains(name) || is_role,
                "{source} names {name}, and no walpost serves that"
            );
        }
        for label in ["state", "role", "side", "work"] {
            for value in words(queries, &format!("{label}=\""), |c| {
                is_part(c) || "=\"".contains(c)
            }) {
                assert!(text.contains(value), "{source} asks for {value}");
            }
        }
    }
    assert!(count > 30, "only {count} names were found");
}
