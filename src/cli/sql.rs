//! `walpost sql`: prints what `walpost init` would apply, for a DBA to read and apply. Connects to nothing.

use std::io::Write;

use super::ddl::{Ddl, Payload};
use super::print;
use crate::Result;
use crate::config::Config;
use crate::scanner::partitions::Span;

/// Prints the DDL for these settings; it does not depend on the server's version.
pub fn run(
    config: &Config,
    payload: Payload,
    partition_by: Option<Span>,
    out: &mut dyn Write,
) -> Result<()> {
    print(
        out,
        &Ddl::new(config, payload, partition_by.is_some())?.text(),
    )
}
