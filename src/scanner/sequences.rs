//! Sequences behind `seq` that do not give numbers in the order of insertion. Scans and poll mode read in the order of `seq`, so they would
//! publish a key's rows in another order, and a scan that keeps how far it is may pass rows that get a lower number later.
//!
//! Input: a table. Output: its sequences that will not do, and the statements that mend each. The documentation of CREATE SEQUENCE says
//! what the options mean: with a CACHE each session takes several numbers at once, and uses them later.

use tokio_postgres::GenericClient;

use super::outbox::SEQ;
use crate::Result;
use crate::postgres::{TableName, quote_literal, sql_error};

/// A sequence that will not do.
#[derive(Debug)]
pub(crate) struct Unordered {
    table: TableName,
    /// As it is named in SQL.
    sequence: String,
    cache: i64,
    descends: bool,
    cycles: bool,
}

impl Unordered {
    /// What is wrong with it.
    pub(crate) fn why(&self) -> String {
        let mut why = Vec::new();
        if self.cache > 1 {
            why.push(format!(
                "has CACHE {}, so sessions insert numbers that they took earlier",
                self.cache
            ));
        }
        if self.descends {
            why.push("has a negative INCREMENT".to_owned());
        }
        if self.cycles {
            why.push("has CYCLE, so it begins again".to_owned());
        }
        format!(
            "column {SEQ} of {} is not in the order of insertion: sequence {} {}; scans and poll mode publish in the order of {SEQ}",
            self.table,
            self.sequence,
            why.join(" and ")
        )
    }

    /// The statements that mend it.
    pub(crate) fn mend(&self) -> String {
        let (table, sequence) = (&self.table, &self.sequence);
        // Sessions that are connected use up what they have cached.
        let anew = if self.cache > 1 {
            " then let all sessions that insert connect anew"
        } else {
            ""
        };
        if !self.descends {
            return format!("ALTER SEQUENCE {sequence} CACHE 1 NO CYCLE;{anew}");
        }
        let quoted = quote_literal(sequence);
        format!(
            "BEGIN; LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE; \
             ALTER SEQUENCE {sequence} INCREMENT BY 1 NO MINVALUE NO MAXVALUE START WITH 1 RESTART WITH 1 CACHE 1 NO CYCLE; \
             SELECT setval({}, greatest((SELECT max({SEQ}) FROM {table}), 0) + 1, false); COMMIT;{anew}",
            quoted.trim()
        )
    }
}

/// The sequences of the table's `seq`, and of its partitions', that do not give numbers in order: of an identity column, or in a default.
pub(crate) async fn unordered(
    client: &impl GenericClient,
    table: &TableName,
) -> Result<Vec<Unordered>> {
    const SQL: &str = "
        SELECT DISTINCT format('%I.%I', n.nspname, q.relname), s.seqcache, s.seqincrement < 0, s.seqcycle
        FROM (SELECT c.oid FROM pg_class c JOIN pg_namespace cn ON cn.oid = c.relnamespace WHERE cn.nspname = $1 AND c.relname = $2) t
             CROSS JOIN LATERAL (SELECT t.oid UNION SELECT relid FROM pg_partition_tree(t.oid)) r (oid)
             JOIN pg_attribute a ON a.attrelid = r.oid AND a.attname = $3 AND NOT a.attisdropped
             LEFT JOIN pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
             JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.deptype = 'i'
                                 AND d.refclassid = 'pg_class'::regclass AND d.refobjid = a.attrelid AND d.refobjsubid = a.attnum
                              OR d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid AND d.refclassid = 'pg_class'::regclass
             JOIN pg_sequence s ON s.seqrelid = CASE WHEN d.classid = 'pg_class'::regclass THEN d.objid ELSE d.refobjid END
             JOIN pg_class q ON q.oid = s.seqrelid
             JOIN pg_namespace n ON n.oid = q.relnamespace
        WHERE s.seqcache > 1 OR s.seqincrement < 0 OR s.seqcycle
        ORDER BY 1";
    let rows = client
        .query(SQL, &[&table.schema, &table.name, &SEQ])
        .await
        .map_err(|error| sql_error(&format!("look at the sequence of table {table}"), error))?;
    let unordered = |row: &tokio_postgres::Row| Unordered {
        table: table.clone(),
        sequence: row.get(0),
        cache: row.get(1),
        descends: row.get(2),
        cycles: row.get(3),
    };
    Ok(rows.iter().map(unordered).collect())
}
