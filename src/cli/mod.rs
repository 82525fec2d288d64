//! The command line: one file a command; flags and `--help` come from the table of settings.
//!
//! Input: arguments and env vars. [`parse`] turns them into an [`Invocation`] without touching anything; [`dispatch`]
//! runs it. Only what this version can do is offered.

pub mod check;
pub mod ddl;
pub mod deduplication;
pub mod demo;
pub mod init;
mod manual;
pub mod replay;
pub mod run;
pub mod sql;
pub mod status;
pub mod stragglers;
pub mod verify;

use std::borrow::Cow;
use std::ffi::OsString;
use std::io::{self, Write};

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgMatches};

use crate::config::settings::{self, Kind, Setting};
use crate::config::{Config, Lookup};
use crate::logging::Warnings;
use crate::scanner::partitions::Span;
use crate::{Error, Result};
use ddl::Payload;

/// What walpost was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Stream until told to stop.
    Run,
    /// Make what is missing in the database.
    Init {
        /// The payload type that was asked for, if one was.
        payload: Option<Payload>,
        /// How the table is to be partitioned, if at all.
        partition_by: Option<Span>,
        /// Turn on the broker's deduplication too.
        enable_deduplication: bool,
        /// Make the roles too.
        roles: bool,
    },
    /// Look at both sides and say what holds.
    Check {
        /// As JSON.
        json: bool,
    },
    /// Say how a running walpost is.
    Status(status::Options),
    /// Show it all at work.
    Demo(demo::Options),
    /// List, retry or discard stragglers.
    Stragglers {
        /// What to do.
        action: stragglers::Action,
        /// With which.
        chosen: stragglers::Chosen,
    },
    /// Compare table and topics.
    Verify(verify::Options),
    /// Publish rows again.
    Replay(replay::Options),
    /// Print the DDL.
    Sql {
        /// Type of the payload column.
        payload: Payload,
        /// How the table is to be partitioned, if at all.
        partition_by: Option<Span>,
        /// Which part of it.
        part: sql::Part,
    },
}

/// A command and its settings, all checked.
#[derive(Debug)]
pub struct Invocation {
    /// The command.
    pub command: Command,
    /// The settings.
    pub config: Config,
}

/// Why there is no [`Invocation`].
#[derive(Debug)]
pub enum Stop {
    /// Help or version, or arguments that make no sense: clap has the text.
    Usage(clap::Error),
    /// A wrong setting.
    Wrong(Error),
    /// A text that takes no settings: it has only to be printed.
    Text(String),
}

/// Reads the arguments (the first is the program's name) and all settings.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    env: Lookup<'_>,
) -> Result<Invocation, Stop> {
    let matches = command().try_get_matches_from(args).map_err(Stop::Usage)?;
    let (name, mut matches) = matches
        .subcommand()
        .ok_or_else(|| Stop::Wrong(Error::bug("clap let a command line without command pass")))?;
    if let Some(text) = manual::asked(name, matches) {
        return Err(text.map_or_else(Stop::Wrong, Stop::Text));
    }
    let mut action = "";
    if let Some((below, its)) = matches.subcommand() {
        (action, matches) = (below, its);
    }
    let flags = |flag: &str| {
        // To this command it says which topic's rows are meant; they are routed as by run.
        let is_setting = name != "replay" || flag != settings::TOPIC.flag();
        matches
            .get_one::<String>(flag)
            .filter(|_| is_setting)
            .cloned()
    };
    let config = Config::load(&flags, env).map_err(Stop::Wrong)?;
    let command = match name {
        "init" => Command::Init {
            payload: payload(matches),
            partition_by: partition_by(matches),
            enable_deduplication: matches.get_flag(ENABLE_DEDUPLICATION),
            roles: matches.get_flag("roles"),
        },
        "check" => Command::Check {
            json: matches.get_flag("json"),
        },
        "sql" => Command::Sql {
            payload: payload(matches).unwrap_or_default(),
            partition_by: partition_by(matches),
            part: match (matches.get_flag("roles"), matches.get_flag("inbox")) {
                (true, _) => sql::Part::Roles,
                (_, true) => sql::Part::Inbox,
                _ => sql::Part::Outbox,
            },
        },
        "stragglers" => stragglers_command(action, matches),
        "status" => Command::Status(status::Options {
            json: matches.get_flag("json"),
            watch: matches.get_flag("watch"),
        }),
        "replay" => Command::Replay(replay::options(matches)),
        "verify" => Command::Verify(verify::options(matches)),
        "demo" => Command::Demo(demo_options(matches)),
        _ => Command::Run,
    };
    Ok(Invocation { command, config })
}

/// Begins to listen for the signals that `command` ends with in good order; `None` where the default (to die) is right, or the
/// command sees to it itself. To be called within the runtime, before anything is printed.
pub fn listen_for_signals(command: &Command) -> Result<Option<run::Shutdown>> {
    Ok(match command {
        Command::Run => Some(Box::pin(run::shutdown_signal()?)),
        _ => None,
    })
}

/// Runs the command to its end and gives its exit code. `warnings` are what is logged meanwhile; `shutdown` is from
/// [`listen_for_signals`].
pub async fn dispatch(
    invocation: Invocation,
    warnings: Warnings,
    shutdown: Option<run::Shutdown>,
) -> Result<u8> {
    let Invocation { command, config } = invocation;
    let out = &mut io::stdout();
    match command {
        Command::Run => {
            let shutdown = shutdown.ok_or_else(|| Error::bug("nobody listens for signals"))?;
            run::run(config, warnings, shutdown).await?;
        }
        Command::Init {
            payload,
            partition_by,
            enable_deduplication,
            roles,
        } => {
            // Asked first and turned on last: a refusal touches nothing.
            let deduplication = if enable_deduplication {
                Some(deduplication::Wanted::look(&config).await?)
            } else {
                None
            };
            init::run(&config, payload, partition_by, roles, out).await?;
            if let Some(wanted) = deduplication {
                wanted.enable(out).await?;
            }
        }
        Command::Check { json } => return check::run(&config, json, out).await,
        Command::Sql {
            payload,
            partition_by,
            part,
        } => sql::run(&config, payload, partition_by, part, out)?,
        Command::Stragglers { action, chosen } => {
            return stragglers::run(&config, action, &chosen, out).await;
        }
        Command::Status(options) => status::run(&config, options, out).await?,
        Command::Replay(options) => {
            return Box::pin(replay::run(&config, &options, out)).await;
        }
        Command::Verify(options) => {
            return Box::pin(verify::run(&config, &options, out)).await;
        }
        Command::Demo(options) => return Box::pin(demo::run(&config, options, out)).await,
    }
    Ok(0)
}

/// Writes a command's output. A reader that has gone away (`walpost sql | head`) is no error.
pub fn print(out: &mut dyn Write, text: &str) -> Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::temporary("cannot write the output").caused_by(error))
        }
        _ => Ok(()),
    }
}

/// Text of a row, such as a topic's name, for a line: control characters are escaped.
fn shown(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let escaped = text.chars().map(|c| {
        if c.is_control() {
            c.escape_default().to_string()
        } else {
            c.to_string()
        }
    });
    Cow::Owned(escaped.collect())
}

const PAYLOAD: &str = "payload";
const ENABLE_DEDUPLICATION: &str = "enable-deduplication";

fn payload(matches: &ArgMatches) -> Option<Payload> {
    let name = matches.get_one::<String>(PAYLOAD)?;
    Payload::from_name(name)
}

const PARTITION_BY: &str = "partition-by";

fn partition_by(matches: &ArgMatches) -> Option<Span> {
    let name = matches.get_one::<String>(PARTITION_BY)?;
    Span::from_name(name)
}

fn partition_arg() -> Arg {
    Arg::new(PARTITION_BY)
        .long(PARTITION_BY)
        .value_name("SPAN")
        .help("partition the table that is made by time, so that WALPOST_RETENTION drops whole partitions")
        .value_parser(PossibleValuesParser::new(Span::ALL.map(Span::name)))
}

fn payload_arg() -> Arg {
    Arg::new(PAYLOAD)
        .long(PAYLOAD)
        .value_name("TYPE")
        .help("type of the payload column of a table that is made [default: json]")
        .value_parser(PossibleValuesParser::new(
            Payload::ALL.map(Payload::sql_type),
        ))
}

fn switch(name: &'static str) -> Arg {
    Arg::new(name).long(name).action(clap::ArgAction::SetTrue)
}

fn stragglers_command(action: &str, matches: &ArgMatches) -> Command {
    let given = |name: &str| matches.get_one::<String>(name).cloned();
    Command::Stragglers {
        action: match action {
            "retry" => stragglers::Action::Retry,
            "discard" => stragglers::Action::Discard {
                yes: matches.get_flag("yes"),
            },
            _ => stragglers::Action::List {
                json: matches.get_flag("json"),
            },
        },
        chosen: stragglers::Chosen {
            id: given("id"),
            // The flag of the setting: for this command it says which, as a topic without columns.
            topic: given("topic").map(full_topic),
            state: given("state"),
        },
    }
}

/// A name alone is one in public/default, as in a row.
fn full_topic(topic: String) -> String {
    let mut full = String::new();
    match crate::outbox::own_topic_into(&topic, &mut full) {
        Ok(()) => full,
        Err(_) => topic,
    }
}

fn stragglers_subcommands() -> [clap::Command; 3] {
    let which = || {
        let option = |name: &'static str, long: &'static str, value: &'static str| {
            Arg::new(name).long(long).value_name(value)
        };
        [
            option("id", "id", "ID").help("only those of this message id"),
            option("state", "state", "STATE")
                .help("only those in this state")
                .value_parser(["retrying", "parked", "dead"]),
        ]
    };
    let new = |name, about| {
        let hint = "--id, --topic (here: a topic's name) and --state say which; only what fits all of them is meant.";
        clap::Command::new(name)
            .about(about)
            .after_help(hint)
            .args(which())
    };
    [
        new("list", "Print them, oldest first").arg(switch("json").help("a JSON object a line")),
        new("retry", "Make them due now, dead ones too"),
        new(
            "discard",
            "Delete them for good: their messages are never published",
        )
        .arg(switch("yes").help("without asking")),
    ]
}

fn demo_options(matches: &ArgMatches) -> demo::Options {
    let number = |name: &str| matches.get_one::<u32>(name).copied().unwrap_or(1);
    demo::Options {
        seconds: u64::from(number("seconds")),
        rate: number("rate"),
        writers: number("writers"),
        kills: number("kills"),
        keep: matches.get_flag("keep"),
    }
}

fn demo_args() -> [Arg; 5] {
    let number =
        |name: &'static str, range: std::ops::RangeInclusive<i64>, default: &'static str| {
            Arg::new(name)
                .long(name)
                .value_name("COUNT")
                .value_parser(clap::value_parser!(u32).range(range))
                .default_value(default)
        };
    [
        number("seconds", 1..=3600, "15").help("how long System A commits orders"),
        number("rate", 1..=1_000_000, "1000").help("orders a second, over all writers"),
        number("writers", 1..=64, "8").help("connections that commit at the same time"),
        number("kills", 0..=100, "1").help(
            "how often connector, System B and System A are killed and started again, after those seconds",
        ),
        switch("keep").help("go on streaming until Ctrl-C, and remove nothing"),
    ]
}

/// The whole command line, for clap.
pub fn command() -> clap::Command {
    clap::Command::new("walpost")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Tails a Postgres outbox by logical replication and publishes every committed row to Apache Pulsar.")
        .after_help(
            "Every setting is a flag and an env var; the flag wins, and an empty env var counts as not set (an empty WALPOST_HTTP_ADDR as none).\n\
             Exit codes: 0 done; 64 wrong configuration; 69 a server refuses for good; 70 a bug; 75 try again later.",
        )
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .next_line_help(true)
        .subcommand(
            clap::Command::new("run").about("Stream committed rows to Pulsar until SIGTERM or SIGINT"),
        )
        .subcommand(
            clap::Command::new("init")
                .about("Make schema, table, publication and slot; what is there already stays")
                .arg(payload_arg())
                .arg(partition_arg())
                .arg(
                    switch(ENABLE_DEDUPLICATION)
                        .help("also turn on the broker's deduplication for the topics' namespace (needs WALPOST_PULSAR_ADMIN_URL)"),
                )
                .arg(
                    switch("roles")
                        .help("also make the roles walpost_producer and walpost_connector, and grant each what it needs"),
                ),
        )
        .subcommand(
            clap::Command::new("check")
                .about("Look at Postgres, broker and settings: what is wrong, how to mend it, which guarantee holds")
                .arg(switch("json").help("print one JSON object instead of lines")),
        )
        .subcommand(
            clap::Command::new("stragglers")
                .about("List, retry or discard the events that could not be published")
                .subcommand_required(true)
                .arg_required_else_help(true)
                .subcommands(stragglers_subcommands()),
        )
        .subcommand(verify::subcommand())
        .subcommand(replay::subcommand())
        .subcommand(
            clap::Command::new("status")
                .about("Say how the walpost is that runs on this machine, as it tells at WALPOST_HTTP_ADDR")
                .arg(switch("json").help("print what /status says, one JSON object"))
                .arg(switch("watch").help("again every two seconds, until Ctrl-C")),
        )
        .subcommand(
            clap::Command::new("demo")
                .about("Show it at work: orders are committed, streamed, consumed, and the sums compared")
                .args(demo_args()),
        )
        .subcommand(
            clap::Command::new("sql")
                .about("Print the SQL that init would apply")
                .arg(payload_arg())
                .arg(partition_arg())
                .arg(switch("roles").help("print instead what init --roles applies besides"))
                .arg(
                    switch("inbox")
                        .help("print instead what System B, the consuming application, needs in its database")
                        .conflicts_with("roles"),
                ),
        )
        .subcommands(manual::subcommands())
        .args(settings::ALL.iter().map(setting_arg))
}

/// Above the settings in `--help`.
const SETTINGS: &str = "Settings";

/// A setting as a flag that stands before or after the command's name.
fn setting_arg(setting: &Setting) -> Arg {
    let value_name = match setting.kind {
        Kind::Duration { .. } => "DURATION",
        Kind::Size { .. } => "SIZE",
        Kind::Count { .. } => "COUNT",
        Kind::Text(_) => "TEXT",
    };
    let (meaning, allowed) = (setting.meaning, setting.kind.allowed());
    let (default, env) = (setting.default.text(), setting.env);
    Arg::new(setting.flag())
        .long(setting.flag())
        .value_name(value_name)
        .help(format!(
            "{meaning}\n[{allowed}]\n[default: {default}] [env: {env}]"
        ))
        .help_heading(SETTINGS)
        // So that "--lanes -1" is answered by what is allowed, not by "unexpected argument".
        .allow_negative_numbers(true)
        .global(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<Invocation, Stop> {
        let args = std::iter::once("walpost").chain(args.iter().copied());
        parse(args.map(OsString::from), &|name| {
            (name == "PGUSER").then(|| "postgres".to_owned())
        })
    }

    #[test]
    fn clap_finds_no_fault_with_the_command_line() {
        command().debug_assert();
    }

    #[test]
    fn a_setting_may_stand_before_or_after_the_command() {
        for args in [["--lanes", "3", "run"], ["run", "--lanes", "3"]] {
            let invocation = run(&args).unwrap();
            assert_eq!(invocation.command, Command::Run);
            assert_eq!(invocation.config.lanes, 3);
        }
    }

    #[test]
    fn the_payload_type_is_an_option_of_init_and_sql() {
        let asked = |args: &[&str]| run(args).unwrap().command;
        assert_eq!(
            asked(&["init"]),
            Command::Init {
                payload: None,
                partition_by: None,
                enable_deduplication: false,
                roles: false
            }
        );
        assert_eq!(
            asked(&["init", "--payload", "bytea", "--enable-deduplication"]),
            Command::Init {
                payload: Some(Payload::Bytea),
                partition_by: None,
                enable_deduplication: true,
                roles: false
            }
        );
        assert_eq!(
            asked(&["sql", "--inbox"]),
            Command::Sql {
                payload: Payload::Json,
                partition_by: None,
                part: sql::Part::Inbox
            }
        );
        assert!(matches!(
            run(&["run", "--payload", "json"]),
            Err(Stop::Usage(_))
        ));
    }

    #[test]
    fn a_reader_that_has_gone_away_is_no_error() {
        struct Gone(io::ErrorKind);
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(self.0.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert!(print(&mut Gone(io::ErrorKind::BrokenPipe), "x").is_ok());
        assert!(print(&mut Gone(io::ErrorKind::StorageFull), "x").is_err());
    }
}
