//! `walpost man` and `walpost completions`: the manual's pages and the shells' completions, for packagers.
//!
//! Input: [`super::command`], the same command line that answers `--help`, so neither can be out of date. Output: text to
//! print. No setting is read and no server asked. Hidden in `--help`: they are of use once, when walpost is installed.

use clap::{Arg, Command, value_parser};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::{Error, Result};

const MAN: &str = "man";
const COMPLETIONS: &str = "completions";

/// The two commands, as clap wants them.
pub(super) fn subcommands() -> [Command; 2] {
    [
        Command::new(MAN)
            .about("Print a page of the manual, in roff: walpost(1), or that of a command")
            .hide(true)
            .arg(
                Arg::new("page")
                    .value_name("COMMAND")
                    .num_args(0..=2)
                    .help("the command, such as verify, or stragglers list"),
            ),
        Command::new(COMPLETIONS)
            .about("Print the completions for a shell")
            .hide(true)
            .arg(
                Arg::new("shell")
                    .value_name("SHELL")
                    .required(true)
                    .value_parser(value_parser!(Shell)),
            ),
    ]
}

/// The text that was asked for; `None` when the command is another one.
///
/// # Errors
/// Of the configuration (exit 64) for a page of a command that there is not.
pub(super) fn asked(name: &str, matches: &clap::ArgMatches) -> Option<Result<String>> {
    match name {
        MAN => {
            let words = matches.get_many::<String>("page").unwrap_or_default();
            Some(page(words.map(String::as_str)))
        }
        COMPLETIONS => {
            let shell = matches.get_one::<Shell>("shell")?;
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut super::command(), "walpost", &mut text);
            Some(utf8(text))
        }
        _ => None,
    }
}

/// A page of the manual. The settings, which every command takes, are listed in the first page only, and in no synopsis.
fn page<'a>(words: impl Iterator<Item = &'a str>) -> Result<String> {
    let mut command = super::command();
    command.build();
    let mut is_first = true;
    for word in words {
        is_first = false;
        let found = command.find_subcommand(word).cloned();
        command = found.ok_or_else(|| {
            Error::config(format!(
                "walpost has no command {word:?}; allowed: what walpost --help lists"
            ))
        })?;
    }
    let short = Man::new(command.clone().mut_args(|arg| {
        let is_setting = arg.get_help_heading() == Some(super::SETTINGS);
        arg.hide(is_setting)
    }));
    let mut text = Vec::new();
    let written = if is_first {
        let full = Man::new(command);
        short
            .render_title(&mut text)
            .and_then(|()| short.render_name_section(&mut text))
            .and_then(|()| short.render_synopsis_section(&mut text))
            .and_then(|()| full.render_description_section(&mut text))
            .and_then(|()| full.render_options_section(&mut text))
            .and_then(|()| full.render_subcommands_section(&mut text))
            .and_then(|()| full.render_extra_section(&mut text))
            .and_then(|()| full.render_version_section(&mut text))
    } else {
        short.render(&mut text)
    };
    written.map_err(|error| Error::bug("cannot write the manual").caused_by(error))?;
    utf8(text)
}

fn utf8(text: Vec<u8>) -> Result<String> {
    String::from_utf8(text)
        .map_err(|error| Error::bug("clap wrote something that is no text").caused_by(error))
}
