//! Image, compose file, Kubernetes and systemd: what can be known without an engine, a cluster or a running systemd.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::process::Command;

use serde_json::Value;
use walpost::cli;

use super::{files_below, one_yaml, read, root, run, texts, yaml};
use crate::support::unique;

const DEPLOYMENT: &str = "deploy/kubernetes/deployment.yaml";

/// Fails unless walpost takes these arguments and settings.
fn walpost_takes(what: &str, args: &[&str], env: &BTreeMap<String, String>) {
    let args = std::iter::once("walpost").chain(args.iter().copied());
    let parsed = cli::parse(args.map(OsString::from), &|name| env.get(name).cloned());
    if let Err(stopped) = parsed {
        panic!("{what}: {stopped:?}");
    }
}

/// A secret file of these manifests, which is not here: walpost checks that it can read it.
fn without_files(env: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut env = env;
    env.retain(|name, _| !name.ends_with("_FILE"));
    env.entry("PGUSER".to_owned())
        .or_insert_with(|| "walpost".to_owned());
    env
}

#[test]
fn every_yaml_and_json_file_parses() {
    let mut count = 0;
    for path in files_below("deploy") {
        match path.rsplit_once('.') {
            Some((_, "yaml" | "yml")) => assert!(!yaml(&path).is_empty(), "{path} is empty"),
            Some((_, "json")) => {
                serde_json::from_str::<Value>(&read(&path))
                    .unwrap_or_else(|error| panic!("{path}: {error}"));
            }
            _ => continue,
        }
        count += 1;
    }
    assert!(count >= 12, "only {count} files were found");
}

#[test]
fn the_image_is_made_of_files_that_are_there_and_does_not_run_as_root() {
    let text = read("deploy/Dockerfile");
    let ignored = read("deploy/Dockerfile.dockerignore");
    let (_, last) = text.rsplit_once("\nFROM ").expect("stages");
    for line in text
        .lines()
        .filter(|line| line.starts_with("COPY ") && !line.contains("--from"))
    {
        let mut sources: Vec<&str> = line.split(' ').skip(1).collect();
        sources.pop();
        for source in sources {
            assert!(root().join(source).exists(), "{line}");
            assert!(
                ignored.lines().any(|kept| kept == format!("!{source}")),
                "{source} is kept out of the image"
            );
        }
    }
    let user = last
        .lines()
        .find_map(|line| line.strip_prefix("USER "))
        .expect("a user");
    assert!(
        !user.starts_with('0') && user.starts_with(|c: char| c.is_ascii_digit()),
        "{user}"
    );
    for line in last.lines() {
        if let Some(env) = line.strip_prefix("ENV ") {
            let (name, value) = env.split_once('=').expect("a value");
            let env = BTreeMap::from([(name.to_owned(), value.to_owned())]);
            walpost_takes("Dockerfile", &["run"], &without_files(env));
        }
        if let Some((_, command)) = line
            .split_once("HEALTHCHECK ")
            .and_then(|(_, line)| line.split_once("CMD "))
        {
            let command: Vec<String> = serde_json::from_str(command).expect("a list");
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            assert_eq!(command[0], "walpost");
            walpost_takes(
                "HEALTHCHECK",
                &command[1..],
                &without_files(BTreeMap::new()),
            );
        }
    }
    let toolchain = format!("FROM rust:{}-", env!("CARGO_PKG_RUST_VERSION"));
    assert!(text.contains(&toolchain), "not built by {toolchain}");
}

#[test]
fn the_compose_file_gives_walpost_settings_it_takes_and_opens_nothing_to_the_network() {
    let compose = one_yaml("deploy/compose.yaml");
    let services = compose["services"].as_object().expect("services");
    for (name, service) in services {
        assert!(service["image"].is_string(), "{name}");
        for port in service["ports"].as_array().into_iter().flatten() {
            let port = port.as_str().expect("a text");
            assert!(
                port.starts_with("127.0.0.1:"),
                "{name} is open to the network: {port}"
            );
        }
        for volume in service["volumes"].as_array().into_iter().flatten() {
            let (source, _) = volume
                .as_str()
                .and_then(|text| text.split_once(':'))
                .expect("source:target");
            let is_volume = compose["volumes"].get(source).is_some();
            assert!(
                is_volume || root().join("deploy").join(source).exists(),
                "{name}: {source}"
            );
        }
        let needed: Vec<&str> = match &service["depends_on"] {
            Value::Object(needed) => needed.keys().map(String::as_str).collect(),
            Value::Array(_) => texts(&service["depends_on"]),
            _ => Vec::new(),
        };
        for needed in needed {
            assert!(services.contains_key(needed), "{name} waits for {needed}");
        }
    }
    for name in ["init", "walpost"] {
        let service = &services[name];
        let env = service["environment"].as_object().expect("settings");
        let env = env
            .iter()
            .map(|(name, value)| (name.clone(), value.as_str().expect("a text").to_owned()));
        walpost_takes(name, &texts(&service["command"]), &env.collect());
        assert_eq!(service["read_only"], true);
        assert_eq!(texts(&service["cap_drop"]), ["ALL"]);
        assert!(
            root()
                .join("deploy")
                .join("..")
                .join(service["build"]["dockerfile"].as_str().expect("a path"))
                .exists()
        );
    }
    // Prometheus scrapes the service by its name, at the port of the image.
    let prometheus = one_yaml("deploy/prometheus/prometheus.yml");
    assert_eq!(
        texts(&prometheus["scrape_configs"][0]["static_configs"][0]["targets"]),
        ["walpost:9464"]
    );
    assert!(read("deploy/Dockerfile").contains("EXPOSE 9464\n"));
}

/// The settings of a container, those of the generated `ConfigMap` among them.
fn settings_of(container: &Value, kustomization: &Value) -> BTreeMap<String, String> {
    let generated = &kustomization["configMapGenerator"][0];
    assert_eq!(
        container["envFrom"][0]["configMapRef"]["name"],
        generated["name"]
    );
    let literals = texts(&generated["literals"]).into_iter();
    let mut env: BTreeMap<String, String> = literals
        .map(|literal| literal.split_once('=').expect("a value"))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    for entry in container["env"].as_array().expect("settings") {
        let text = |name: &str| entry[name].as_str().expect("a text").to_owned();
        env.insert(text("name"), text("value"));
    }
    env
}

#[test]
fn kubernetes_runs_walpost_twice_without_rights_and_asks_it_the_right_questions() {
    let kustomization = one_yaml("deploy/kubernetes/kustomization.yaml");
    let mut listed = texts(&kustomization["resources"]);
    listed.sort_unstable();
    let there: Vec<String> = files_below("deploy/kubernetes");
    let there: Vec<&str> = there
        .iter()
        .filter_map(|path| path.rsplit_once('/'))
        .map(|(_, name)| name)
        .collect();
    let there: Vec<&str> = there
        .into_iter()
        .filter(|name| *name != "kustomization.yaml")
        .collect();
    assert_eq!(listed, there);
    assert_eq!(
        kustomization["images"][0]["newTag"],
        env!("CARGO_PKG_VERSION")
    );

    let deployment = one_yaml(DEPLOYMENT);
    assert_eq!(deployment["spec"]["replicas"], 2);
    for (path, secret) in [
        (DEPLOYMENT, "walpost"),
        ("deploy/kubernetes/init.yaml", "walpost-init"),
    ] {
        let pod = one_yaml(path)["spec"]["template"]["spec"].clone();
        let container = &pod["containers"][0];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{path}");
        assert_eq!(pod["automountServiceAccountToken"], false, "{path}");
        let rights = &container["securityContext"];
        assert_eq!(rights["readOnlyRootFilesystem"], true, "{path}");
        assert_eq!(rights["allowPrivilegeEscalation"], false, "{path}");
        assert_eq!(texts(&rights["capabilities"]["drop"]), ["ALL"], "{path}");
        assert_eq!(pod["volumes"][0]["secret"]["secretName"], secret, "{path}");
        let env = settings_of(container, &kustomization);
        let folder = container["volumeMounts"][0]["mountPath"]
            .as_str()
            .expect("a path");
        for (name, value) in env.iter().filter(|(name, _)| name.ends_with("_FILE")) {
            assert!(
                value.starts_with(&format!("{folder}/")),
                "{path}: {name} is in no Secret"
            );
        }
        walpost_takes(path, &texts(&container["args"]), &without_files(env));
    }

    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["livenessProbe"]["httpGet"]["path"], "/livez");
    assert_eq!(container["readinessProbe"]["httpGet"]["path"], "/readyz");
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    assert_eq!(&deployment["spec"]["selector"]["matchLabels"], labels);
    assert_eq!(
        &one_yaml("deploy/kubernetes/pdb.yaml")["spec"]["selector"]["matchLabels"],
        labels
    );
    assert_eq!(
        &one_yaml("deploy/kubernetes/service.yaml")["spec"]["selector"],
        labels
    );
    let job = one_yaml("deploy/kubernetes/init.yaml");
    assert_ne!(
        &job["spec"]["template"]["metadata"]["labels"], labels,
        "the budget would count the Job"
    );
}

#[test]
fn the_unit_restarts_what_a_restart_may_mend() {
    let unit = read("deploy/systemd/walpost.service");
    let has = |line: &str| assert!(unit.lines().any(|found| found == line), "no {line}");
    has("Restart=on-failure");
    has("RestartPreventExitStatus=64 69");
    has("User=walpost");
    let command = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="))
        .expect("a command");
    let (program, args) = command.split_once(' ').expect("arguments");
    walpost_takes(
        "ExecStart",
        &args.split(' ').collect::<Vec<_>>(),
        &without_files(BTreeMap::new()),
    );

    let Ok(found) = Command::new("systemd-analyze").arg("--version").output() else {
        eprintln!("no systemd-analyze here: the unit was not verified");
        return;
    };
    assert!(found.status.success());
    // It looks whether the program is there.
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(unique("unit"));
    std::fs::create_dir_all(&folder).expect("a folder");
    let file = folder.join("walpost.service");
    std::fs::write(&file, unit.replace(program, env!("CARGO_BIN_EXE_walpost"))).expect("a file");
    let said = run(Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(&file));
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    let ours: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("walpost.service"))
        .collect();
    assert!(ours.is_empty(), "{ours:#?}");
    std::fs::remove_dir_all(&folder).expect("it is ours");
}
