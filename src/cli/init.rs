//! `walpost init`: makes what is missing in the database, and says what it made and what was there.
//!
//! Order: look at server, role and catalogue; refuse with the statement that mends it, before anything is written;
//! schema, function, table and publication in one transaction, what stops writers of the outbox at its end; the slot last and outside of it, because a slot cannot
//! be made by a transaction that has written, and because from then on the server keeps its log.
//! Applies the same files that `walpost sql` prints. Output: one line for each object, on `out`.

mod catalog;
mod rights;

use std::io::Write;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, Transaction};

use super::ddl::{Ddl, Payload, emit_transient_sql, own_table, refuse_update_sql, roles_sql};
use super::print;
use crate::config::{Config, Mode};
use crate::connector::subscription;
use crate::postgres::slot::{SlotState, slot_state};
use crate::postgres::{connect_sql, published, sql_error, sqlstate, waiting};
use crate::scanner::partitions::{self, Span};
use crate::scanner::{recovery, sequences, slot_maker};
use crate::{Error, Result};
use catalog::{
    Catalog, IdFunction, OpenFunction, ProgressTable, Server, StragglerTable, Table, check_slot,
};

/// Somebody made the same object in the meantime.
const DUPLICATE_OBJECT: &str = "42710";
/// `max_replication_slots` is used up.
const CONFIGURATION_LIMIT_EXCEEDED: &str = "53400";
/// A right is missing.
const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// A lock was waited for as long as `lock_timeout` allows.
const LOCK_NOT_AVAILABLE: &str = "55P03";

/// So long `init` waits for a lock on a table: others wait behind it, the application too.
const LOCK_TIMEOUT: &str = "set local lock_timeout = '10s'";
/// So long `init` waits for the slot's lock.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts at the slot's lock.
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// Makes what is missing. `payload` is the type that was asked for, if one was: an existing table must then have it; and so
/// with `partition_by`. With `roles`, also what `sql/12_roles.sql` says, last.
///
/// # Errors
/// Refused (exit 69) with a command that mends it, when the server, the role or an existing object does not fit.
pub async fn run(
    config: &Config,
    payload: Option<Payload>,
    partition_by: Option<Span>,
    roles: bool,
    out: &mut dyn Write,
) -> Result<()> {
    let ddl = Ddl::new(config, payload.unwrap_or_default(), partition_by.is_some())?;
    let mut client = connect_sql(&config.postgres, "walpost init").await?;
    // Two inits at once: the second waits here until the first has left, and then finds everything.
    client
        .batch_execute("select pg_advisory_lock(hashtext('walpost init'))")
        .await
        .map_err(|error| sql_error("wait for another init", error))?;
    let server = Server::read(&client).await?;
    // Polling takes neither publication nor slot.
    let streams = config.mode == Mode::Stream;
    server.check(config.mode)?;
    let slot = slot_state(&client, &config.slot).await?;
    if let Some(slot) = slot.as_ref().filter(|_| streams) {
        check_slot(&config.slot, slot, &server)?;
    }

    let asked = (payload, partition_by);
    let made = make_objects(&mut client, config, &ddl, asked, (&server, slot.as_ref())).await;
    let lines = match made {
        Ok(lines) => lines,
        Err(error) if sqlstate(&error) == Some(LOCK_NOT_AVAILABLE) => {
            return Err(held_up(&client, config, error).await);
        }
        Err(error) => return Err(error),
    };
    for line in lines {
        print(out, &format!("{line}\n"))?;
    }

    if streams {
        let line = match slot {
            Some(slot) => existing_slot_line(&slot, &config.slot, &server),
            None => create_slot(&client, config).await?,
        };
        print(out, &format!("{line}\n"))?;
    }
    if roles {
        apply_roles(&client, config, out).await?;
    }
    Ok(())
}

/// Schema, functions, tables and publication, in one transaction; returns the lines to print.
async fn make_objects(
    client: &mut Client,
    config: &Config,
    ddl: &Ddl,
    (payload, partition_by): (Option<Payload>, Option<Span>),
    (server, slot): (&Server, Option<&SlotState>),
) -> Result<Vec<String>> {
    let transaction = client
        .transaction()
        .await
        .map_err(|error| sql_error("begin a transaction", error))?;
    step(&transaction, "limit the wait for locks", LOCK_TIMEOUT).await?;
    let before = Catalog::read(&transaction, config).await?;
    check_tables(&before, config, payload)?;
    for (name, _) in &before.tables {
        if let Some(sequence) = sequences::unordered(&transaction, name).await?.first() {
            return Err(Error::refused(sequence.why()).hint(sequence.mend()));
        }
    }
    rights::check(server, &before, config.mode, slot.is_none())?;
    let mut lines = apply(&transaction, ddl, &before, config).await?;
    lines.extend(partition(&transaction, partition_by).await?);
    let after = Catalog::read(&transaction, config).await?;
    check_tables(&after, config, payload)?;
    if config.mode == Mode::Stream {
        lines.push(publication_line(&before, &after, config));
        // Before anything is kept: the first row would tell, and then it is in the log.
        published::watch(&transaction, &subscription(config)).await?;
        let pid = slot.and_then(|slot| slot.active_pid);
        lines.extend(pid.and_then(|pid| unknown_to_stream(&before, pid)));
    }
    let own_exists = before
        .tables
        .iter()
        .any(|(name, table)| *name == own_table() && table.is_some());
    if own_exists {
        // Last: writers wait for its lock, and behind it, and init waits for nothing else while it has it.
        lines.extend(refuse_updates(&transaction).await?);
    }
    transaction
        .commit()
        .await
        .map_err(|error| sql_error("commit", error))?;
    Ok(lines)
}

/// Names who holds the locks that were waited for. They are given back by now; whoever held them still does, as a rule.
async fn held_up(client: &Client, config: &Config, error: Error) -> Error {
    let mut tables = config.outbox_tables.clone();
    tables.push(own_table());
    let holders = waiting::table_holders(client, &tables).await;
    let (text, ends) = match &holders {
        Ok(holders) if !holders.is_empty() => waiting::listed(holders),
        Ok(_) => ("nobody holds it any more".to_owned(), String::new()),
        Err(error) => (
            format!("by whom is not known: {}", error.report()),
            String::new(),
        ),
    };
    let (what, _) = error.told();
    Error::temporary(format!(
        "{what}; nothing was changed, and init waits no longer because others wait behind it. Locks on these tables: {text}"
    ))
    .hint(format!("walpost init again once they have ended. They end by themselves, or by: {ends}"))
    .caused_by(error)
}

/// Refuses tables that cannot serve; the one that `init` makes may be missing.
fn check_tables(catalog: &Catalog, config: &Config, payload: Option<Payload>) -> Result<()> {
    for (name, table) in &catalog.tables {
        match table {
            Some(table) => {
                table.check(name, config)?;
                if let Some(asked) = payload {
                    check_payload(table, asked, config).map_err(|why| {
                        Error::refused(format!("table {name}: {why}")).hint(format!(
                            "leave --payload out to use the table as it is, or change it: ALTER TABLE {name} ALTER COLUMN … TYPE {}",
                            asked.sql_type()
                        ))
                    })?;
                }
            }
            None if *name == own_table() => {}
            None => {
                return Err(Error::refused(format!("table {name} does not exist")).hint(format!(
                    "create it or correct WALPOST_OUTBOX_TABLE; init makes no other table than {}",
                    own_table()
                )));
            }
        }
    }
    Ok(())
}

fn check_payload(table: &Table, asked: Payload, config: &Config) -> Result<(), String> {
    let column = &config.columns.payload;
    match table.column_type(column) {
        Some(found) if found != asked.sql_type() => Err(format!(
            "column {column} is {found}, and --payload asks for {}",
            asked.sql_type()
        )),
        _ => Ok(()),
    }
}

/// Applies the files for what is missing; returns the lines to print once it is committed.
async fn apply(
    transaction: &Transaction<'_>,
    ddl: &Ddl,
    before: &Catalog,
    config: &Config,
) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let own_exists = before
        .tables
        .iter()
        .any(|(name, table)| *name == own_table() && table.is_some());
    if !before.has_schema {
        step(transaction, "create schema walpost", &ddl.schema).await?;
    }
    lines.push(line(before.has_schema, "schema walpost"));
    if let Some([uuidv7, outbox]) = &ddl.outbox {
        if !own_exists {
            step(transaction, "create function walpost.uuidv7", uuidv7).await?;
            step(transaction, "create table walpost.outbox", outbox).await?;
        }
        let function = "function walpost.uuidv7";
        match before.id_function {
            IdFunction::Missing if !own_exists => lines.push(line(false, function)),
            IdFunction::Ours => lines.push(line(true, function)),
            // Native, or a table from elsewhere with ids of its own.
            IdFunction::Native | IdFunction::Missing => {}
        }
    }
    let after = Catalog::read(transaction, config).await?;
    for (name, table) in &after.tables {
        let payload = table
            .as_ref()
            .and_then(|table| table.column_type(&config.columns.payload))
            .unwrap_or("absent");
        let existed = own_exists || *name != own_table();
        lines.push(line(existed, &format!("table {name} (payload {payload})")));
    }
    if config.mode == Mode::Stream {
        step(transaction, "set up the publication", &ddl.publication).await?;
    }
    let doing = match before.progress {
        ProgressTable::Missing => Some("create table walpost.progress"),
        ProgressTable::Older => Some("bring table walpost.progress up to date"),
        ProgressTable::Closed | ProgressTable::Usable => None,
    };
    if let Some(doing) = doing {
        step(transaction, doing, &ddl.progress).await?;
    }
    lines.push(match before.progress {
        ProgressTable::Older => "brought up to date table walpost.progress".to_owned(),
        other => line(other != ProgressTable::Missing, "table walpost.progress"),
    });
    if before.straggler == StragglerTable::Missing {
        step(
            transaction,
            "create table walpost.straggler",
            &ddl.straggler,
        )
        .await?;
    }
    lines.push(match before.straggler {
        StragglerTable::Missing => line(false, "table walpost.straggler"),
        StragglerTable::Older => "brought up to date table walpost.straggler".to_owned(),
        StragglerTable::Current => line(true, "table walpost.straggler"),
    });
    let what = "table walpost.left_undone";
    if !before.has_left_undone {
        step(transaction, &format!("create {what}"), &ddl.left_undone).await?;
    }
    lines.push(line(before.has_left_undone, what));
    let mut missing_status = None;
    if let Some(status) = &ddl.status {
        let own = after.tables.iter().find(|(name, _)| *name == own_table());
        let own = own.and_then(|(_, table)| table.as_ref());
        if before.has_status || own.is_some_and(Table::has_status_columns) {
            missing_status = Some(status).filter(|_| !before.has_status);
            lines.push(line(before.has_status, "view walpost.outbox_status"));
        }
    }
    if let Some(after_publish) = &ddl.after_publish {
        let doing = "set up walpost.after_publish";
        let existed = transaction
            .query_one(
                "select to_regclass('walpost.after_publish') is not null",
                &[],
            )
            .await
            .map_err(|error| sql_error(doing, error))?;
        step(transaction, doing, after_publish).await?;
        lines.push(line(existed.get(0), "table walpost.after_publish"));
    }
    lines.extend(apply_emit(transaction, ddl, before, &after).await?);
    lines.extend(close_functions(transaction, &after.open_functions).await?);
    if before.straggler == StragglerTable::Older {
        // Late: nobody else can use the table from here to the end of the transaction.
        let doing = "bring table walpost.straggler up to date";
        step(transaction, doing, &ddl.straggler).await?;
    }
    if let Some(status) = missing_status {
        // It reads the columns that were added.
        step(transaction, "create view walpost.outbox_status", status).await?;
    }
    Ok(lines)
}

/// Gives a `walpost.outbox` of an earlier version the trigger that refuses updates.
async fn refuse_updates(transaction: &Transaction<'_>) -> Result<Option<String>> {
    let doing = "make walpost.outbox refuse updates";
    let found = transaction
        .query_one(
            "select pg_catalog.pg_has_role(c.relowner, 'usage') from pg_catalog.pg_class c
             where c.oid = 'walpost.outbox'::regclass
               and not exists (select from pg_catalog.pg_trigger where tgrelid = c.oid and tgname = 'walpost_refuse_update')
             union all select null limit 1",
            &[],
        )
        .await
        .map_err(|error| sql_error(doing, error))?;
    Ok(match found.get(0) {
        None => None,
        Some(false) => Some(
            "exists but differs: table walpost.outbox: it does not refuse updates, which send nothing; let its owner run walpost init"
                .to_owned(),
        ),
        Some(true) => {
            step(transaction, doing, refuse_update_sql()?).await?;
            Some("brought up to date table walpost.outbox: it refuses updates, which send nothing".to_owned())
        }
    })
}

/// Gives functions of an earlier version a `search_path` of their own; names those that belong to somebody else.
async fn close_functions(
    transaction: &Transaction<'_>,
    functions: &[OpenFunction],
) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for function in functions {
        let (signature, close) = (&function.signature, function.close());
        lines.push(if function.is_ours {
            step(transaction, &format!("alter function {signature}"), &close).await?;
            format!("brought up to date function {signature}: it has a search_path of its own")
        } else {
            format!("exists but differs: function {signature}: names in it depend on its caller's search_path; as its owner: {close}")
        });
    }
    Ok(lines)
}

/// Makes the functions of System A.
async fn apply_emit(
    transaction: &Transaction<'_>,
    ddl: &Ddl,
    before: &Catalog,
    after: &Catalog,
) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let own = after.tables.iter().find(|(name, _)| *name == own_table());
    let own = own.and_then(|(_, table)| table.as_ref());
    if let Some(emit) = &ddl.emit
        && (before.has_emit || own.is_some_and(Table::has_emit_columns))
    {
        if !before.has_emit {
            step(transaction, "create function walpost.emit", emit).await?;
        }
        lines.push(line(before.has_emit, "function walpost.emit"));
    }
    if !before.has_emit_transient {
        // One type of payload for both, where there is a table.
        let of_own = own.and_then(|table| table.column_type("payload"));
        let sql = match of_own.and_then(Payload::from_name) {
            Some(payload) => emit_transient_sql(payload)?,
            None => ddl.emit_transient.clone(),
        };
        step(transaction, "create function walpost.emit_transient", &sql).await?;
    }
    lines.push(line(
        before.has_emit_transient,
        "function walpost.emit_transient",
    ));
    Ok(lines)
}

/// Makes the roles of System A and of the connector, or brings their rights up to these settings.
async fn apply_roles(client: &Client, config: &Config, out: &mut dyn Write) -> Result<()> {
    let applied = client.batch_execute(&roles_sql(config)?).await;
    applied.map_err(|error| {
        let error = sql_error("make the roles", error);
        if sqlstate(&error) == Some(INSUFFICIENT_PRIVILEGE) {
            error.hint("let a superuser apply what walpost sql --roles prints: it takes CREATEROLE and the tables' owner")
        } else {
            error
        }
    })?;
    print(
        out,
        "granted walpost_producer and walpost_connector what each needs in this database\n\
         to use them: GRANT walpost_producer TO <the application's role>;\n\
         CREATE ROLE <connector> LOGIN REPLICATION PASSWORD '<password>'; GRANT walpost_connector TO <connector>;\n",
    )
}

/// Makes the first partitions; refuses a table that was there and has none, or others.
async fn partition(
    transaction: &Transaction<'_>,
    partition_by: Option<Span>,
) -> Result<Option<String>> {
    let Some(span) = partition_by else {
        return Ok(None);
    };
    let (table, name) = (own_table(), span.name());
    let partitioned = transaction
        .query_one(
            "select relkind = 'p' from pg_class where oid = to_regclass($1::text)",
            &[&table.to_string()],
        )
        .await
        .map_err(|error| sql_error("look at the outbox table", error))?;
    let is = partitions::span_of(transaction, &table).await?;
    if !partitioned.get::<_, bool>(0) || is.is_some_and(|is| is != span) {
        return Err(Error::refused(format!(
            "table {table} exists and is not partitioned by {name}"
        ))
        .hint("leave --partition-by out to use the table as it is, or rename it and let init make another"));
    }
    let made = partitions::make_ahead(transaction, &table, span).await?;
    if let Some((_, error)) = made.refused.into_iter().next() {
        return Err(error);
    }
    Ok(Some(format!(
        "created {} partitions of {table}, each a {name}; walpost run makes more",
        made.count
    )))
}

/// Runs one file, or one statement without parameters.
async fn step(transaction: &Transaction<'_>, doing: &str, sql: &str) -> Result<()> {
    transaction.batch_execute(sql).await.map_err(|error| {
        let error = sql_error(doing, error);
        with_own_hint(error)
    })
}

/// The checks before should have found a missing right; where they could not, the DBA has the files.
fn with_own_hint(error: Error) -> Error {
    if sqlstate(&error) == Some(INSUFFICIENT_PRIVILEGE) {
        error.hint("let a superuser apply what walpost sql prints")
    } else {
        error
    }
}

fn line(existed: bool, what: &str) -> String {
    format!("{} {what}", if existed { "exists" } else { "created" })
}

/// Tells what was made of the publication by comparing the catalogue before and after.
fn publication_line(before: &Catalog, after: &Catalog, config: &Config) -> String {
    let name = &config.publication;
    let Some(publication) = &before.publication else {
        let tables: Vec<String> = after
            .tables
            .iter()
            .map(|(name, _)| name.to_string())
            .collect();
        return format!("created publication {name} for {}", tables.join(", "));
    };
    let mut mended = Vec::new();
    if !publication.inserts {
        mended.push("inserts were not published: now they are".to_owned());
    }
    if !publication.via_root {
        mended.push("publish_via_partition_root was off: now it is on".to_owned());
    }
    for (table, state) in &before.tables {
        if state.as_ref().is_none_or(|state| !state.published) {
            mended.push(format!("table {table} was missing: added"));
        }
    }
    if mended.is_empty() {
        format!("exists publication {name}")
    } else {
        format!(
            "exists but differs: publication {name}: {}",
            mended.join("; ")
        )
    }
}

/// Tables that are published from now on, while a process streams that cannot know them.
fn unknown_to_stream(before: &Catalog, pid: i32) -> Option<String> {
    before.publication.as_ref()?;
    let added = before.tables.iter().filter(|(_, state)| {
        let table = state.as_ref();
        table.is_none_or(|table| !table.published)
    });
    let added: Vec<String> = added.map(|(name, _)| name.to_string()).collect();
    (!added.is_empty()).then(|| {
        format!(
            "restart walpost run with these settings now: server process {pid} streams for one that skips the rows of {}",
            added.join(", ")
        )
    })
}

fn existing_slot_line(slot: &SlotState, name: &str, server: &Server) -> String {
    if server.has_failover_slots() && !slot.failover {
        format!(
            "exists but differs: slot {name}: without failover, so it stays behind when a standby takes over"
        )
    } else {
        format!("exists slot {name}")
    }
}

/// Makes the slot, and names what it waits for when it takes long. Holds the slot's lock from here to the end of the session: what
/// it writes into `walpost.progress` must not meet the writes of a running walpost.
async fn create_slot(client: &Client, config: &Config) -> Result<String> {
    let slot = &config.slot;
    lock_slot(client, slot).await?;
    // A walpost that had the lock until now may have made it.
    match slot_state(client, slot).await? {
        Some(_) => Ok(line(true, &format!("slot {slot}"))),
        None => make_slot(client, config).await,
    }
}

/// Takes the slot's lock. An instance that only looks whether it can run has it for a moment.
async fn lock_slot(client: &Client, slot: &str) -> Result<()> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let error = match recovery::lock(client, slot).await {
            Err(error) if recovery::is_busy(&error) => error,
            taken => return taken,
        };
        if Instant::now() >= deadline {
            let who = recovery::lock_holder(client, slot).await?;
            return Err(Error::temporary(format!(
                "slot {slot} does not exist and cannot be made: {} has its lock and writes its row in walpost.progress",
                who.unwrap_or_else(|| "another walpost".to_owned())
            ))
            .hint("stop that walpost, then: walpost init")
            .caused_by(error));
        }
        sleep(LOCK_PAUSE).await;
    }
}

async fn make_slot(client: &Client, config: &Config) -> Result<String> {
    let slot = &config.slot;
    let creating = slot_maker::make_slot(client, slot, &config.publication, &config.outbox_tables);
    let created = waiting::naming_holders(&config.postgres, waiting::SLOT_WAITS, creating).await;
    let made = match created {
        Ok(_) => true,
        Err(error) => match sqlstate(&error) {
            Some(DUPLICATE_OBJECT) => false,
            Some(CONFIGURATION_LIMIT_EXCEEDED) => {
                return Err(error.hint(
                    "raise max_replication_slots with ALTER SYSTEM and restart Postgres, or drop a slot that nobody needs",
                ));
            }
            _ => return Err(with_own_hint(error)),
        },
    };
    let state = slot_state(client, slot).await?;
    let kind = if state.is_some_and(|state| state.failover) {
        "pgoutput, failover"
    } else {
        "pgoutput"
    };
    Ok(line(!made, &format!("slot {slot} ({kind})")))
}
