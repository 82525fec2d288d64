//! An event that the broker refused, behind which it stored others: whoever begins afterwards may not believe "stored before" of it. The broker here
//! deduplicates, and knows the highest id of each name only.

use std::collections::BTreeSet;
use std::time::Instant;

use pulsar::{Pulsar, TokioExecutor};

use crate::support::{
    Asked, Database, FakeBroker, Proxy, Reaction, Walpost, admin, consume, eventually, servers,
};
use crate::{DEADLINE, NOTED_SOON, POLL};

/// One event a batch, all on one lane.
const SINGLY: [(&str, &str); 3] = [
    NOTED_SOON,
    ("WALPOST_LANES", "1"),
    ("WALPOST_BATCH_MAX_MESSAGES", "1"),
];
const UNSTORED: &str = "that producer names are not to be used again could not be stored";

/// A database whose outbox has `large`, `first`, `refused` and `last`, in one transaction, and a broker that has taken all of them: it has stored all but
/// `refused`, and nobody knows yet.
struct Scene {
    database: Database,
    broker: FakeBroker,
    url: String,
}

impl Scene {
    async fn prepare(mode: Option<(&str, &str)>, has_stragglers: bool) -> Self {
        let database = Database::create("mark").await;
        let mode: Vec<_> = mode.into_iter().collect();
        database.init(&["--payload", "text"], &mode).await;
        if !has_stragglers {
            database.sql("DROP TABLE walpost.straggler CASCADE").await;
        }
        database.let_run().await;
        let broker = FakeBroker::start_deduplicating().await;
        let url = broker.url();
        Self {
            database,
            broker,
            url,
        }
    }

    fn settings<'a>(&'a self, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let mut settings = SINGLY.to_vec();
        settings.push(("WALPOST_PULSAR_URL", &self.url));
        settings.extend(more);
        settings
    }

    /// Lets walpost send all four. What the broker has to say of the last three waits for [`FakeBroker::release`].
    async fn send_all(&self) {
        self.broker.script_rest(|asked, _| match asked {
            Asked::Send => Reaction::Hold,
            _ => Reaction::Obey,
        });
        // Behind a message that is larger than any before it nothing is sent until it is accepted.
        self.database
            .sql(
                "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                 SELECT 't', 'k', name, rpad(name, bytes, 'x')
                 FROM (VALUES ('large', 3000), ('first', 10), ('refused', 2000), ('last', 10)) events (name, bytes)",
            )
            .await;
        self.broker.wait_for(Asked::Send, 1).await;
        let topic = self.database.topic("t");
        self.broker
            .set(&topic, |topic| topic.max_message_bytes = Some(1500));
        self.broker.release(|_| {});
        self.broker.wait_for(Asked::Send, 4).await;
    }

    /// Before a producer is closed, a refused event behind others is not handed over.
    fn ignore_closes(&self) {
        self.broker.script_rest(|asked, _| match asked {
            Asked::CloseProducer => Reaction::Ignore,
            _ => Reaction::Obey,
        });
    }

    /// The policy is what it was.
    fn mend(&self) {
        let topic = self.database.topic("t");
        self.broker
            .set(&topic, |topic| topic.max_message_bytes = None);
        self.broker.heal();
    }

    async fn generation(&self) -> i64 {
        let sql = "SELECT producer_generation FROM walpost.progress";
        self.database.rows(sql, &[]).await[0].get(0)
    }

    async fn wait_for_mark(&self) {
        eventually(DEADLINE, "the mark", async || {
            (self.generation().await == 1).then_some(())
        })
        .await;
    }

    /// (The view of the status is gone with the table of the stragglers.)
    async fn wait_all_delivered(&self) {
        let sql = "SELECT bool_and(coalesce(pg_visible_in_snapshot(txid, delivered), false)) FROM walpost.outbox, walpost.progress";
        eventually(DEADLINE, "every row to count as delivered", async || {
            self.database.rows(sql, &[]).await[0]
                .get::<_, bool>(0)
                .then_some(())
        })
        .await;
    }

    /// A process that begins now publishes everything.
    async fn assert_all_arrive(&self, more: &[(&str, &str)]) {
        let mut walpost = self
            .database
            .walpost(&["run"], &self.settings(more))
            .spawn();
        let line = if more.contains(&POLL) {
            "polling"
        } else {
            "streaming"
        };
        walpost.wait_for_line(line, DEADLINE).await;
        self.wait_all_delivered().await;
        walpost.stop().await;
        self.assert_all_there().await;
    }

    async fn assert_all_there(&self) {
        let rows = self
            .database
            .rows("SELECT id::text FROM walpost.outbox", &[])
            .await;
        let committed: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
        let stored = self.broker.stored();
        let arrived: BTreeSet<String> = stored.iter().map(|event| event.id.clone()).collect();
        assert_eq!(arrived, committed, "{stored:?}");
    }

    /// Names of the producers that stored something, in order.
    fn names(&self) -> Vec<String> {
        let stored = self.broker.stored().into_iter();
        let mut names: Vec<String> = stored.map(|event| event.producer).collect();
        names.dedup();
        names
    }
}

async fn an_exit(mode: Option<(&str, &str)>) {
    // GIVEN events that were stored behind one that is refused, and no table for stragglers
    let scene = Scene::prepare(mode, false).await;
    let mode: Vec<_> = mode.into_iter().collect();
    let settings = scene.settings(&mode);
    let mut walpost = scene.database.walpost(&["run"], &settings).spawn();
    scene.send_all().await;
    assert_eq!(scene.generation().await, 0);

    // WHEN walpost hears of it THEN it ends
    scene.broker.release(|_| {});
    let code = walpost.wait_exit(DEADLINE).await;
    let said = walpost.output();
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("Exceed maximum message size"), "{said}");
    let generation = scene.generation().await;

    // AND once the policy is mended the refused one arrives
    scene.mend();
    scene.assert_all_arrive(&mode).await;

    // AND that is because walpost has noted that its names are not to be used again
    assert_eq!(generation, 1, "{said}");
    let names = scene.names();
    let [before, after] = &names[..] else {
        panic!("{names:?}");
    };
    assert!(
        !before.contains("-1g1-") && after.contains("-1g1-"),
        "{names:?}"
    );
}

#[tokio::test]
async fn an_event_that_was_refused_before_an_exit_is_published_by_the_next_start() {
    an_exit(None).await;
}

#[tokio::test]
async fn an_event_that_was_refused_before_an_exit_of_a_poller_is_published_by_the_next_start() {
    an_exit(Some(POLL)).await;
}

#[tokio::test]
async fn an_exit_on_a_refused_event_with_nothing_behind_it_leaves_the_names_as_they_are() {
    // GIVEN a topic that takes nothing of that size
    let scene = Scene::prepare(None, false).await;
    let topic = scene.database.topic("t");
    let limit = |bytes| {
        scene
            .broker
            .set(&topic, |topic| topic.max_message_bytes = bytes);
    };
    limit(Some(1500));
    let mut walpost = scene
        .database
        .walpost(&["run"], &scene.settings(&[]))
        .spawn();

    // WHEN it refuses the first event of all
    let sql = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
               SELECT 't', 'k', 'e', repeat('x', bytes) FROM unnest(ARRAY[2000, 10]) bytes";
    scene.database.sql(sql).await;
    let code = walpost.wait_exit(DEADLINE).await;
    assert_eq!(code, 69, "{}", walpost.output());

    // THEN nothing comes under other names
    assert_eq!(scene.generation().await, 0);
    limit(None);
    scene.assert_all_arrive(&[]).await;
    let names = scene.names();
    assert!(names.len() == 1 && !names[0].contains("-1g"), "{names:?}");
}

#[tokio::test]
async fn an_event_that_was_refused_before_a_kill_is_published_by_the_next_start() {
    // GIVEN an event that is refused and to become a straggler
    let scene = Scene::prepare(None, true).await;
    let settings = scene.settings(&[]);
    let mut walpost = scene.database.walpost(&["run"], &settings).spawn();
    scene.send_all().await;

    // WHEN the process is killed before that, while its producer is being closed
    scene.ignore_closes();
    scene.broker.release(|_| {});
    scene.wait_for_mark().await;
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    let stragglers = "SELECT FROM walpost.straggler";
    assert!(scene.database.rows(stragglers, &[]).await.is_empty());

    // THEN the next one publishes it
    scene.mend();
    scene.assert_all_arrive(&[]).await;
}

/// The same refusal while Postgres is away.
async fn refused_without_postgres(scene: &Scene, first: impl FnOnce(&Scene)) -> (Walpost, Proxy) {
    let postgres = Proxy::start(&servers().postgres_addr);
    let url = scene.database.url_through(&postgres.addr());
    let walpost = scene
        .database
        .walpost(&["run"], &scene.settings(&[]))
        .env("WALPOST_POSTGRES_URL", url);
    let mut walpost = walpost.spawn();
    scene.send_all().await;
    first(scene);
    postgres.refuse(true);
    postgres.cut();
    scene.broker.release(|_| {});
    walpost.wait_for_line(UNSTORED, DEADLINE).await;
    (walpost, postgres)
}

#[tokio::test]
async fn what_a_process_forgets_with_its_lost_stream_it_does_not_believe_of_the_broker_either() {
    // GIVEN a refused event that is to become a straggler, and is not stored because Postgres is away
    let scene = Scene::prepare(None, true).await;
    let (mut walpost, postgres) = refused_without_postgres(&scene, Scene::ignore_closes).await;

    // WHEN the process gives its producers up, and goes on
    let line = "the producers are closed, so that another instance can open them; events without a receipt come again";
    walpost.wait_for_line(line, DEADLINE).await;
    scene.mend();
    postgres.refuse(false);
    scene.wait_all_delivered().await;
    walpost.stop().await;

    // THEN the refused event arrives
    scene.assert_all_there().await;
    assert_eq!(scene.generation().await, 1);
}

#[tokio::test]
async fn an_exit_without_postgres_waits_until_the_mark_is_stored() {
    let scene = Scene::prepare(None, false).await;
    // GIVEN a refusal while Postgres is away
    let (mut walpost, postgres) = refused_without_postgres(&scene, |_| {}).await;
    assert!(walpost.try_exit().is_none(), "{}", walpost.output());

    // WHEN it is back THEN walpost stores the mark and ends as it would have
    postgres.refuse(false);
    let code = walpost.wait_exit(DEADLINE).await;
    let said = walpost.output();
    assert_eq!(code, 69, "{said}");
    assert!(
        said.contains("Exceed maximum message size") && !said.contains("events may be lost"),
        "{said}"
    );
    assert_eq!(scene.generation().await, 1, "{said}");
    scene.mend();
    scene.assert_all_arrive(&[]).await;
}

#[tokio::test]
async fn a_stop_without_postgres_says_that_events_may_be_lost_and_what_prevents_it() {
    let scene = Scene::prepare(None, false).await;
    // GIVEN a refusal while Postgres is away
    let (mut walpost, _postgres) = refused_without_postgres(&scene, |_| {}).await;

    // WHEN walpost is told to stop
    walpost.sigterm();
    let code = walpost.wait_exit(DEADLINE).await;
    let said = walpost.output();

    // THEN it does not end as if all were well
    assert_eq!(code, 69, "{said}");
    let slot = &scene.database.slot;
    let statement =
        format!("UPDATE walpost.progress SET producer_generation = 1 WHERE slot = '{slot}'");
    for part in ["events may be lost at the next start", &*statement] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    assert_eq!(scene.generation().await, 0, "{said}");

    // AND what it says helps
    scene.database.sql(&statement).await;
    scene.mend();
    scene.assert_all_arrive(&[]).await;
}

/// Sends messages of 2000 bytes to a real topic as another program would, until they are stored, or refused.
struct Probe {
    producer: pulsar::Producer<TokioExecutor>,
    stored: usize,
}

impl Probe {
    async fn on(topic: &str) -> Self {
        let pulsar = Pulsar::builder(&*servers().pulsar_url, TokioExecutor);
        let pulsar = Box::pin(pulsar.build()).await.expect("the broker");
        let producer = pulsar.producer().with_topic(topic);
        Self {
            producer: Box::pin(producer.build()).await.expect("a producer"),
            stored: 0,
        }
    }

    async fn is_stored(&mut self) -> bool {
        let message = pulsar::producer::Message {
            payload: vec![b'x'; 2000],
            ..pulsar::producer::Message::default()
        };
        let sent = Box::pin(self.producer.send_non_blocking(message)).await;
        let is_stored = match sent {
            Ok(receipt) => receipt.await.is_ok(),
            Err(_) => false,
        };
        self.stored += usize::from(is_stored);
        is_stored
    }

    async fn wait_until_stored(&mut self, stored: bool) {
        let end = Instant::now() + DEADLINE;
        while self.is_stored().await != stored {
            assert!(Instant::now() < end, "the policy is still another");
        }
    }
}

#[tokio::test]
async fn a_real_broker_that_refuses_one_event_of_three_loses_none_over_an_exit() {
    // GIVEN a namespace that deduplicates, no table for stragglers, and a topic that has taken something large
    let mut database = Database::create("mark").await;
    database.deduplicate(servers()).await;
    database.init(&["--payload", "text"], &[]).await;
    database.sql("DROP TABLE walpost.straggler CASCADE").await;
    let insert = async |events: &str| {
        let sql = format!(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             SELECT 't', 'k', name, rpad(name, bytes, 'x') FROM (VALUES {events}) events (name, bytes)"
        );
        database.sql(&sql).await;
    };
    let broker = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", broker.addr());
    let settings = [&SINGLY[..], &[("WALPOST_PULSAR_URL", &*url)]].concat();
    let mut walpost = database.start(&settings).await;
    insert("('large', 3000)").await;
    database.wait_all_confirmed(DEADLINE).await;

    // AND three more events, the second of which a new policy refuses, and whose answers are still on their way
    let topic = database.topic("t");
    let path = topic.replace("persistent://", "/admin/v2/persistent/");
    let admin_url = &servers().pulsar_admin_url;
    let policy = format!("{path}/maxMessageSize");
    let mut probe = Probe::on(&topic).await;
    admin(admin_url, "POST", &policy, "1500").await;
    probe.wait_until_stored(false).await;
    let count = async || -> u64 {
        let stats = admin(admin_url, "GET", &format!("{path}/stats"), "").await;
        let stats: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
        stats["msgInCounter"].as_u64().expect("a count")
    };
    let before = count().await;
    broker.hold_upstream_replies(true);
    insert("('first', 10), ('refused', 2000), ('last', 10)").await;
    eventually(DEADLINE, "two of them to be stored", async || {
        (count().await >= before + 2).then_some(())
    })
    .await;

    // WHEN they come THEN walpost ends
    broker.hold_upstream_replies(false);
    let code = walpost.wait_exit(DEADLINE).await;
    assert_eq!(code, 69, "{}", walpost.output());

    // AND once the policy is gone, every event arrives
    admin(admin_url, "DELETE", &policy, "").await;
    probe.wait_until_stored(true).await;
    let walpost = database.start(&SINGLY).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let expected = 4 + probe.stored;
    let received = consume(&servers().pulsar_url, &topic, expected, DEADLINE).await;
    let arrived = received
        .iter()
        .filter_map(|message| message.properties.get("id").cloned());
    let rows = database
        .rows("SELECT id::text FROM walpost.outbox", &[])
        .await;
    let committed: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(arrived.collect::<BTreeSet<_>>(), committed);
}
