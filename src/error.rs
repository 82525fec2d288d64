//! The crate's one error type: what went wrong, what the operator can do, and which exit code it leads to.
//!
//! Opaque on purpose: callers ask [`Error::is_temporary`] or [`Error::exit_code`], people read the message. The source
//! chain is kept and printed by [`Error::report`]. No secret and no payload is ever put into a message (a row is named by
//! its id, a URL is shown without its password).

use std::error::Error as StdError;
use std::fmt;

/// What an error means for the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A setting is wrong: nothing was touched. Exit 64.
    Config,
    /// A server refuses, and asking again will not change its mind. Exit 69.
    Refused,
    /// A promise of our own was broken. Exit 70.
    Bug,
    /// Time may heal it: the connector retries, a one-shot command exits 75.
    Temporary,
}

/// An error with a meaning for the operator.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            hint: None,
            source: None,
        }))
    }

    /// A setting is wrong (exit 64).
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Kind::Config, message)
    }

    /// A server, or the data itself, refuses for good (exit 69).
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(Kind::Refused, message)
    }

    /// An invariant of walpost's own does not hold (exit 70).
    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(Kind::Bug, message)
    }

    /// Something that may pass: a server away, a slot in use (retried by `run`; exit 75 elsewhere).
    pub fn temporary(message: impl Into<String>) -> Self {
        Self::new(Kind::Temporary, message)
    }

    /// Adds what the operator should do, best as a command that can be pasted.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Keeps the error that led to this one.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// True when the same attempt may succeed later.
    pub fn is_temporary(&self) -> bool {
        self.0.kind == Kind::Temporary
    }

    /// The process exit code: 64 configuration, 69 refused, 70 bug, 75 try again later (sysexits.h).
    pub fn exit_code(&self) -> u8 {
        match self.0.kind {
            Kind::Config => 64,
            Kind::Refused => 69,
            Kind::Bug => 70,
            Kind::Temporary => 75,
        }
    }

    /// What the operator should do, if there is something to do.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The whole story in one line: message, causes, and the hints of all of them.
    pub fn report(&self) -> String {
        let (mut text, hints) = self.told();
        if let Some(hints) = hints {
            text.push_str(" (hint: ");
            text.push_str(&hints);
            text.push(')');
        }
        text
    }

    /// The same in two parts: message and causes, and what the operator should do, if there is something to do.
    pub fn told(&self) -> (String, Option<String>) {
        let mut text = self.0.message.clone();
        let mut hints: Vec<&str> = self.hint_text().into_iter().collect();
        let mut cause: Option<&(dyn StdError + 'static)> = self.source();
        while let Some(error) = cause {
            let said = error.to_string();
            // Some libraries repeat their cause in their own message; saying it twice helps nobody.
            if !text.contains(&said) {
                text.push_str(": ");
                text.push_str(&said);
            }
            // Nearest to the cause first: it knows best what to do.
            let hint = error.downcast_ref::<Self>().and_then(Self::hint_text);
            hints.splice(0..0, hint);
            cause = error.source();
        }
        let hints = (!hints.is_empty()).then(|| hints.join("; "));
        (text, hints)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0
            .source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_the_causes_and_their_hints() {
        let inner = Error::refused("the topic is terminated").hint("use another");
        let middle = Error::temporary("no producer").caused_by(inner);
        let outer = Error::refused("cannot publish").hint("start again");
        assert_eq!(
            outer.caused_by(middle).report(),
            "cannot publish: no producer: the topic is terminated (hint: use another; start again)"
        );
        assert_eq!(Error::bug("broken").report(), "broken");
    }
}
