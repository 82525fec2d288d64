//! Looks each setting up (flag before env var before default), checks it by its row, and collects what is wrong.
//!
//! Nothing stops at the first wrong value: the operator sees all of them at once.

use std::path::Path;
use std::time::Duration;

use super::settings::{Fallback, Kind, Setting};
use super::values;

/// Finds a value by name: a flag by its name without dashes, or an env var.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Where a value stood; flags win.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Origin {
    Default,
    Env,
    Flag,
}

/// A value as it was given.
struct Given {
    text: String,
    origin: Origin,
}

/// What was wrong has been noted.
pub(super) struct Noted;

/// Reads settings from flags, env vars and defaults.
pub(super) struct Reader<'a> {
    flags: Lookup<'a>,
    env: Lookup<'a>,
    problems: Vec<String>,
    #[cfg(test)]
    pub(super) read: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(flags: Lookup<'a>, env: Lookup<'a>) -> Self {
        Self {
            flags,
            env,
            problems: Vec::new(),
            #[cfg(test)]
            read: Vec::new(),
        }
    }

    /// What was wrong so far, one sentence each.
    pub(super) fn problems(self) -> Vec<String> {
        self.problems
    }

    /// How many things were wrong so far.
    pub(super) fn noted(&self) -> usize {
        self.problems.len()
    }

    /// Notes something wrong in words of the caller's.
    pub(super) fn note(&mut self, problem: String) {
        self.problems.push(problem);
    }

    fn given(&mut self, setting: &Setting) -> Option<Given> {
        self.given_if(setting, |text| !text.is_empty())
    }

    /// The value, an env var only if its text `counts`.
    fn given_if(&mut self, setting: &Setting, counts: impl Fn(&String) -> bool) -> Option<Given> {
        #[cfg(test)]
        self.read.push(setting.env);
        if let Some(text) = (self.flags)(&setting.flag()) {
            let origin = Origin::Flag;
            return Some(Given { text, origin });
        }
        // Templates of orchestrators set variables to nothing when they mean "not set".
        if let Some(text) = (self.env)(setting.env).filter(counts) {
            let origin = Origin::Env;
            return Some(Given { text, origin });
        }
        match setting.default {
            Fallback::Value(text) => Some(Given {
                text: text.to_owned(),
                origin: Origin::Default,
            }),
            Fallback::Described(_) => None,
        }
    }

    /// Notes that a value is wrong: name, value (never a secret), reason, what is allowed.
    fn wrong(&mut self, setting: &Setting, given: &Given, why: &str) {
        let name = match given.origin {
            Origin::Flag => format!("--{}", setting.flag()),
            Origin::Env | Origin::Default => setting.env.to_owned(),
        };
        // An '@' may be the end of a URL's password, also in a setting that should hold none.
        let shown = if setting.secret || given.text.contains('@') {
            " (value not shown)".to_owned()
        } else {
            format!("={:?}", given.text)
        };
        let mut problem = format!("{name}{shown}: {why}");
        // Some parsers know better than the table what would have been right.
        if !why.contains("allowed") {
            problem.push_str("; allowed: ");
            problem.push_str(&setting.kind.allowed());
        }
        self.note(problem);
    }

    /// A setting with a parser of its own. `None`: absent, or wrong and noted.
    pub(super) fn text<T>(
        &mut self,
        setting: &Setting,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let given = self.given(setting)?;
        self.parsed(setting, &given, parse)
    }

    /// The same for a setting that an empty env var switches off.
    pub(super) fn text_or_nothing<T>(
        &mut self,
        setting: &Setting,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let given = self.given_if(setting, |_| true)?;
        self.parsed(setting, &given, parse)
    }

    fn parsed<T>(
        &mut self,
        setting: &Setting,
        given: &Given,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        parse(&given.text)
            .map_err(|why| self.wrong(setting, given, &why))
            .ok()
    }

    pub(super) fn duration(&mut self, setting: &Setting) -> Option<Duration> {
        self.text(setting, |text| {
            let value = values::duration(text)?;
            match setting.kind {
                Kind::Duration { min, max } if value < min || value > max => Err(out_of_range()),
                _ => Ok(value),
            }
        })
    }

    pub(super) fn size(&mut self, setting: &Setting) -> Option<u64> {
        self.text(setting, |text| {
            let value = values::size(text)?;
            match setting.kind {
                Kind::Size { min, max } if value < min || value > max => Err(out_of_range()),
                _ => Ok(value),
            }
        })
    }

    pub(super) fn count(&mut self, setting: &Setting) -> Option<usize> {
        self.text(setting, |text| {
            let value = values::count(text)?;
            match setting.kind {
                Kind::Count { min, max } if value < min || value > max => Err(out_of_range()),
                _ => usize::try_from(value).map_err(|_| out_of_range()),
            }
        })
    }

    /// A setting that may stand in a file instead. Both at once is wrong, unless one is a flag, which wins.
    pub(super) fn text_or_file<T>(
        &mut self,
        setting: &Setting,
        file_setting: &Setting,
        from_text: impl FnOnce(&str) -> Result<T, String>,
        from_file: impl FnOnce(&Path, &str) -> Result<T, String>,
    ) -> Result<Option<T>, Noted> {
        let direct = self.given(setting);
        let file = self.given(file_setting);
        let value = match (direct, file) {
            (None, None) => return Ok(None),
            (Some(direct), Some(file)) if direct.origin == file.origin => {
                self.note(format!(
                    "{} and {}: both are given; allowed: one of them",
                    setting.env, file_setting.env
                ));
                None
            }
            (Some(direct), None) => self.parsed(setting, &direct, from_text),
            (Some(direct), Some(file)) if direct.origin > file.origin => {
                self.parsed(setting, &direct, from_text)
            }
            (_, Some(file)) => self.parsed(file_setting, &file, |path| {
                let path = Path::new(path);
                let text = values::secret_file(path)?;
                from_file(path, &text).map_err(|why| format!("what it holds is wrong: {why}"))
            }),
        };
        value.map(Some).ok_or(Noted)
    }

    /// Notes that `small` is above `large` though it must not be. Values that were wrong by themselves are skipped.
    pub(super) fn not_above<T: PartialOrd + Copy>(
        &mut self,
        (small_setting, small): (&Setting, Option<T>),
        (large_setting, large): (&Setting, Option<T>),
        show: impl Fn(T) -> String,
    ) {
        if let (Some(small), Some(large)) = (small, large)
            && small > large
        {
            self.note(format!(
                "{}={}: it is above {}={}; allowed: at most that",
                small_setting.env,
                show(small),
                large_setting.env,
                show(large)
            ));
        }
    }
}

fn out_of_range() -> String {
    "it is out of range".to_owned()
}
