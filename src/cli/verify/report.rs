//! What was found, for people and for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::judge::{Tally, Verdict};

/// What a run was about, and its verdict.
pub(super) struct Report {
    pub(super) tables: Vec<String>,
    /// Topics that rows go to.
    pub(super) topics: usize,
    /// Messages read.
    pub(super) messages: u64,
    /// The delivered snapshot.
    pub(super) upto: String,
    pub(super) verdict: Verdict,
}

impl Report {
    /// 0 or 1.
    pub(super) fn exit_code(&self) -> u8 {
        u8::from(!self.verdict.is_good())
    }

    /// A line for each count, below it the first ids.
    pub(super) fn text(&self) -> String {
        let verdict = &self.verdict;
        let mut text = format!(
            "{} against {} topics, rows delivered by snapshot {}\n",
            self.tables.join(", "),
            self.topics,
            self.upto
        );
        let mut count = |name: &str, count: u64, ids: &[String]| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<24}{count:>12}");
            for id in ids {
                let _ = writeln!(text, "    {id}");
            }
        };
        count("rows checked", verdict.rows, &[]);
        for (name, tally) in self.tallies() {
            count(name, tally.count, &tally.ids);
        }
        count("rows not judged", verdict.not_judged, &[]);
        count("messages read", self.messages, &[]);
        count("  sent by replay", verdict.replayed, &[]);
        if verdict.missing_older_than_topic > 0 {
            let _ = writeln!(
                text,
                "{} of the missing are older than anything their topic still has: the broker deletes what all its \
                 subscriptions have read unless the namespace has a retention. Look at younger rows with --from.",
                verdict.missing_older_than_topic
            );
        }
        text.push_str(if !verdict.is_good() {
            "WRONG: not every row has its message, once, in order\n"
        } else if verdict.retrying.count > 0 {
            "good: every row has its message, once, in order, or is a straggler that is being retried\n"
        } else {
            "good: every row has its message, once, in order\n"
        });
        text
    }

    /// The same as one object.
    pub(super) fn json(&self) -> String {
        let verdict = &self.verdict;
        let mut object = json!({
            "exit_code": self.exit_code(),
            "tables": self.tables,
            "topics": self.topics,
            "delivered": self.upto,
            "rows": verdict.rows,
            "rows_not_judged": verdict.not_judged,
            "messages": self.messages,
            "replayed": verdict.replayed,
            "missing_older_than_topic": verdict.missing_older_than_topic,
        });
        for (name, tally) in self.tallies() {
            let name = name.trim().replace(' ', "_");
            object[name] = Value::from_iter([
                ("count", json!(tally.count)),
                ("first_ids", json!(tally.ids)),
            ]);
        }
        format!("{object:#}\n")
    }

    fn tallies(&self) -> [(&'static str, &Tally); 7] {
        let verdict = &self.verdict;
        [
            ("  missing", &verdict.missing),
            ("  duplicates", &verdict.duplicates),
            ("  out of order", &verdict.out_of_order),
            ("  different", &verdict.different),
            ("  retrying", &verdict.retrying),
            ("  dead", &verdict.dead),
            ("unknown messages", &verdict.unknown),
        ]
    }
}
