//! `walpost sql`: prints what `walpost init` would apply, for a DBA to read and apply. Connects to nothing.

use std::io::Write;

use super::ddl::{Ddl, Payload, roles_sql};
use super::print;
use crate::config::Config;
use crate::scanner::partitions::Span;
use crate::{Result, inbox};

/// Which SQL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    /// What `init` makes.
    #[default]
    Outbox,
    /// The roles of System A and of the connector.
    Roles,
    /// What System B keeps, in its database.
    Inbox,
}

/// Prints the DDL for these settings; it does not depend on the server's version.
pub fn run(
    config: &Config,
    payload: Payload,
    partition_by: Option<Span>,
    part: Part,
    out: &mut dyn Write,
) -> Result<()> {
    let text = match part {
        Part::Outbox => Ddl::new(config, payload, partition_by.is_some())?.text(),
        Part::Roles => roles_sql(config)?,
        Part::Inbox => inbox::SQL.to_owned(),
    };
    print(out, &text)
}
