//! Steps that most tests begin or end with: an outbox, a running connector, the moment when everything is confirmed.

use std::time::Duration;

use super::{Command, Database, Servers, Walpost, eventually};

/// Far longer than any single step takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

impl Database {
    /// `walpost <args>` for this database, with these settings besides.
    pub(crate) fn walpost(&self, args: &[&str], settings: &[(&str, &str)]) -> Command {
        let command = Command::walpost(args).on(self);
        settings
            .iter()
            .fold(command, |command, (name, value)| command.env(name, value))
    }

    /// Runs `walpost init --roles <args>` as the superuser; from then on `walpost run` has the role that this makes. What
    /// the settings ask for (`mark`, retention) is granted with it.
    pub(crate) async fn init(&self, args: &[&str], settings: &[(&str, &str)]) {
        let args: Vec<&str> = ["init", "--roles"].iter().chain(args).copied().collect();
        let (code, said) = self.walpost(&args, settings).run(DEADLINE).await;
        assert_eq!(code, 0, "walpost init failed:\n{said}");
        self.let_run().await;
    }

    /// Starts `walpost run` and waits until it streams.
    pub(crate) async fn start(&self, settings: &[(&str, &str)]) -> Walpost {
        let mut walpost = self.walpost(&["run"], settings).spawn();
        walpost.wait_for_line("streaming", DEADLINE).await;
        walpost
    }

    /// Gives the test's topics a namespace of their own in which that broker deduplicates.
    pub(crate) async fn deduplicate(&mut self, servers: &Servers) {
        let policy = ("deduplication", "true", "true");
        self.own_namespace(&servers.pulsar_admin_url, &[policy])
            .await;
    }

    /// Waits until everything committed so far is confirmed: it has its receipt and is in its topic.
    pub(crate) async fn wait_all_confirmed(&self, deadline: Duration) {
        let now = self.current_wal_lsn().await;
        self.wait_confirmed(&self.slot, now, deadline).await;
    }

    /// Waits until the status of every row is "sent".
    pub(crate) async fn wait_all_sent(&self, deadline: Duration) {
        eventually(deadline, "every row to be known as sent", async || {
            let sql = "SELECT FROM walpost.outbox_status WHERE status <> 'sent' LIMIT 1";
            // The view goes when a test drops its table.
            let rows = self.client.query(sql, &[]).await.ok()?;
            rows.is_empty().then_some(())
        })
        .await;
    }

    /// Waits until the retention has looked through the table once more from beginning to end.
    pub(crate) async fn retention_walked(&self, deadline: Duration) {
        let sql = "SELECT query_start::text FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name = 'walpost retention' AND query LIKE 'DELETE%'";
        let mut seen = std::collections::BTreeSet::new();
        // The first may have begun before the call, the second may have passed over the block in question: the third has not.
        eventually(deadline, "the retention's walks", async || {
            let rows = self.rows(sql, &[]).await;
            seen.insert(rows.first()?.get::<_, String>(0));
            (seen.len() > 3).then_some(())
        })
        .await;
    }

    /// The topic that the test's template gives an aggregate type.
    pub(crate) fn topic(&self, aggregatetype: &str) -> String {
        format!("{}.{aggregatetype}", self.topic_prefix)
    }
}

impl Walpost {
    /// SIGTERM, once it has said anything, and an end with exit code 0.
    pub(crate) async fn stop(mut self) {
        // Whatever it is: walpost listens for signals before its first line.
        self.wait_for_line("", DEADLINE).await;
        self.sigterm();
        let code = self.wait_exit(DEADLINE).await;
        assert_eq!(code, 0, "{}", self.output());
    }
}
