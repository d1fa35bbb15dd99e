//! Every dead letter becomes a row.

use broker::{Consumer, Publisher, Session};
use dead_letter_recorder::{Recorder, SERVICE};
use domain::{
    Envelope,
    envelope::header,
    topology::{Topology, exchange, queue},
};
use process::{HealthSettings, Stop};
use serde_json::json;
use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use storage::{
    attempts::Ledger,
    dead_letters::{self, DeadLetter},
};
use test_support::{TestDatabase, TestVhost, broker_settings, eventually};
use worker::{BatchHandler as _, Consuming, Item, Outgoing, Received, Settings, Step, Worker};

const RETRY_MS: u64 = 200;

struct Fleet {
    vhost: TestVhost,
    database: TestDatabase,
}

impl Fleet {
    fn new() -> Self {
        let fleet = Self { vhost: TestVhost::new(), database: TestDatabase::new() };
        let mut session = Session::open(&fleet.broker(), "test").expect("a session");
        let topology = Topology::fleet(&[Duration::from_millis(RETRY_MS)]);
        broker::declare(&mut session, &topology).expect("all declared");
        fleet
    }

    fn broker(&self) -> broker::Settings {
        broker_settings(self.vhost.url())
    }

    fn publish(&self, envelopes: &[Envelope]) {
        let mut publisher = Publisher::new(&self.broker(), "test");
        publisher.publish_all(envelopes, Instant::now() + Duration::from_secs(20)).expect("all confirmed");
    }

    /// Runs the recorder until `observe` is done.
    fn record<T>(&self, observe: impl FnOnce() -> T) -> T {
        struct StopAtEnd(Stop);
        impl Drop for StopAtEnd {
            fn drop(&mut self) {
                self.0.request();
            }
        }
        let database = self.database.database();
        let worker = Worker {
            service: SERVICE,
            queues: vec![queue::DEAD_LETTER.into()].into(),
            settings: Settings {
                time_limit_ms: 30_000,
                stop_grace_ms: 20_000,
                retry_delays_ms: vec![RETRY_MS],
                unavailable_backoff_ms: 20,
                unavailable_backoff_max_ms: 100,
            },
            consuming: Consuming { batch: 10, linger_ms: 20, prefetch: 20, concurrency: 1 },
            health: HealthSettings { address: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 0 },
            broker: self.broker(),
            ledger: Arc::new(Ledger::new(database.clone())),
            database: database.probe(),
            handler: || Recorder::new(database.clone()),
        };
        thread::scope(|scope| {
            let stop = StopAtEnd(Stop::new());
            let requested = stop.0.clone();
            let running = scope.spawn(move || worker.run_until(requested));
            let observed = observe();
            drop(stop);
            running.join().expect("no panic").expect("a clean end");
            observed
        })
    }

    /// The recorded letters, as soon as there are so many.
    fn letters(&self, count: usize) -> Vec<DeadLetter> {
        let mut conn = self.database.database().connection().expect("a connection");
        let mut letters = eventually("so many dead letters", || {
            let letters = dead_letters::list(&mut conn, None, None, i64::MAX, 1000).expect("the dead letters");
            (letters.len() >= count).then_some(letters)
        });
        letters.sort_by_key(|letter| letter.id);
        letters
    }

    fn depth(&self) -> u32 {
        let mut session = Session::open(&self.broker(), "test").expect("a session");
        let names = [queue::DEAD_LETTER.to_owned(), domain::topology::retry_name(Duration::from_millis(RETRY_MS))];
        broker::depths(&mut session, &names).expect("their depths").iter().map(|queue| queue.messages).sum()
    }
}

/// As a worker sets a message of the queue `update_feed.03` aside.
fn dead(id: &str) -> Envelope {
    let mut envelope = Envelope::new(exchange::DEAD_LETTER, "update_feed.03", br#"{"id":1}"#.to_vec());
    envelope.kind = Some("update_feed.chunk".into());
    envelope.message_id = id.into();
    envelope.correlation_id = Some("c1".into());
    envelope.headers = [
        (header::ATTEMPTS, "5"),
        (header::ERROR, "unknown user"),
        (header::FAILED_AT, "2024-05-01T10:00:00.123Z"),
        (worker::header::DIED_IN, "update_feed.03"),
        (worker::header::ORIGINAL_EXCHANGE, "update_feed"),
        (worker::header::ORIGINAL_ROUTING_KEY, "17"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    envelope
}

#[test]
fn a_workers_dead_letter_is_recorded_once_for_each_death() {
    let fleet = Fleet::new();
    let mut replayed = dead("m1");
    replayed.headers.insert(header::REPLAY.into(), "1".into());
    let mut elsewhere = dead("m1");
    elsewhere.headers.insert(worker::header::DIED_IN.into(), "update_feed.04".into());
    let mut other = dead("m1");
    other.body = br#"{"id":2}"#.to_vec();
    let mut later = dead("m1");
    later.headers.insert(header::FAILED_AT.into(), "2024-05-01T10:00:00.124Z".into());
    let mut another = dead("m1");
    another.headers.insert(worker::header::SET_ASIDE.into(), "s2".into());
    // Copied with its headers by somebody else, and died of it.
    let mut copied = another.clone();
    copied.body = b"copied".to_vec();
    let deaths = [dead("m1"), replayed, elsewhere, other, later, another, copied];
    // A publisher that doesn't hear the confirm publishes the same again.
    fleet.publish(&deaths);
    fleet.publish(&deaths);
    fleet.publish(&[dead("last")]);
    let letters = fleet.record(|| {
        eventually("the last one", || {
            fleet.letters(1).iter().any(|letter| letter.message_id.as_deref() == Some("last")).then_some(())
        });
        fleet.letters(8)
    });
    assert_eq!(letters.len(), 8);
    let DeadLetter { queue, message_id, kind, correlation_id, exchange, routing_key, error, attempts, body, .. } =
        &letters[0];
    assert_eq!(
        (&**queue, message_id.as_deref(), kind.as_deref()),
        ("update_feed.03", Some("m1"), Some("update_feed.chunk"))
    );
    assert_eq!((correlation_id.as_deref(), &**exchange, &**routing_key), (Some("c1"), "update_feed", "17"));
    assert_eq!((&**error, *attempts, &body[..]), ("unknown user", 5, &br#"{"id":1}"#[..]));
    assert_eq!(letters[0].failed_at.to_rfc3339(), "2024-05-01T10:00:00.123+00:00");
    let headers = letters[0].headers.as_object().expect("an object");
    assert!(headers.keys().all(|name| !name.starts_with("x-error") && !name.starts_with("x-attempts")), "{headers:?}");
    assert_eq!(fleet.depth(), 0);
}

#[test]
fn whatever_anybody_puts_into_the_queue_is_recorded() {
    let fleet = Fleet::new();
    // The broker's own: it expires in its queue and comes here.
    let expires = json!({"message_id": "expired", "expiration": "50"});
    assert!(fleet.vhost.publish("publish_tweet", "publish_tweet", &expires, b"expired"));
    let garbage = [&b"\xff\0"[..], b"", b"the same", b"the same"];
    for body in garbage {
        let headers = json!({"nul": "a\0b", "x-replay": "many", "x-attempts": "-1", "x-failed-at": "noon"});
        assert!(fleet.vhost.publish("", queue::DEAD_LETTER, &json!({"headers": headers, "type": "no\0type"}), body));
    }
    let long = json!({"headers": {"x-died-in": "q".repeat(5000), "x-error": "e".repeat(50_000)}, "message_id": "long"});
    assert!(fleet.vhost.publish(exchange::DEAD_LETTER, "", &long, b"long"));

    let letters = fleet.record(|| fleet.letters(6));
    assert_eq!(letters.len(), 6);
    let of = |body: &[u8]| letters.iter().filter(|letter| letter.body == body).collect::<Vec<_>>();
    assert_eq!(of(b"the same").len(), 2, "without an id, two that are alike may be meant twice");
    let expired = of(b"expired")[0];
    assert_eq!((&*expired.error, &*expired.queue), ("the broker gave it up: expired", "publish_tweet"));
    let garbage = of(b"\xff\0")[0];
    assert_eq!(garbage.error, "another program published it as a dead letter, without a reason");
    assert_eq!((&*garbage.queue, &*garbage.exchange, &*garbage.routing_key), ("dead_letter", "", "dead_letter"));
    assert_eq!((garbage.attempts, garbage.kind.as_deref()), (0, Some("no\u{fffd}type")));
    assert_eq!(of(b"long")[0].queue, "dead_letter", "no queue has such a name");
    assert_eq!(fleet.depth(), 0);
}

#[test]
fn what_died_with_an_unusable_id_is_recorded_with_what_can_be_written_of_it() {
    let fleet = Fleet::new();
    let headers = json!({"x-died-in": "", "x-failed-at": "2024-05-01T10:00:00Z"});
    for id in ["", " ", "a\0b", "a\0b"] {
        let properties = json!({"headers": headers, "message_id": id, "correlation_id": id});
        assert!(fleet.vhost.publish(exchange::DEAD_LETTER, "publish_tweet", &properties, b"{}"));
    }
    let letters = fleet.record(|| fleet.letters(4));
    assert_eq!(letters.len(), 4);
    assert!(letters.iter().all(|letter| letter.message_id.is_none() && letter.correlation_id.is_none()));
    assert!(letters.iter().all(|letter| letter.queue == "publish_tweet"));
    let written = letters.iter().filter(|letter| letter.headers["x-original-message-id"] == "a\u{fffd}b");
    assert_eq!(written.count(), 2);
    assert_eq!(fleet.depth(), 0);
}

#[test]
fn a_dead_letter_that_is_delivered_again_after_its_commit_is_one_row() {
    let fleet = Fleet::new();
    let mut set_aside = dead("m1");
    set_aside.headers.insert(worker::header::SET_ASIDE.into(), "s1".into());
    // The broker's own: its time is over in a queue whose messages come here then.
    let arguments = json!({"x-message-ttl": RETRY_MS, "x-dead-letter-exchange": exchange::DEAD_LETTER});
    fleet.vhost.declare_queue("expiring", &arguments);
    let mut expired = Envelope::new("", "expiring", b"expired".to_vec());
    expired.message_id = "m1".into();
    fleet.publish(&[set_aside, dead("m1"), expired]);

    // A recorder that dies between its commit and the acknowledgement.
    let mut consumer = Consumer::new(&fleet.broker(), "test", vec![queue::DEAD_LETTER.into()], 10);
    let mut recorder = Recorder::new(fleet.database.database().clone());
    let mut recorded = 0;
    eventually("all are recorded", || {
        let batch = consumer.next_batch(10, Duration::ZERO, Duration::from_secs(1)).expect("the broker answers");
        let items: Vec<_> = batch
            .into_iter()
            .map(|delivery| {
                let received = Received::from(delivery);
                Item { message: recorder.decode(&received).expect("nothing is refused"), received }
            })
            .collect();
        recorder.handle(&items, &mut Outgoing::default(), &Step::unlimited()).expect("they are recorded");
        recorded += items.len();
        (recorded == 3).then_some(())
    });
    drop(consumer);

    // What is returned comes before it.
    fleet.publish(&[dead("last")]);
    let letters = fleet.record(|| fleet.letters(4));
    assert_eq!(letters.len(), 4);
    assert_eq!(fleet.depth(), 0);
}

#[test]
fn what_cannot_be_recorded_comes_again_and_keeps_what_it_died_of() {
    let fleet = Fleet::new();
    fleet.database.execute("ALTER TABLE dead_letter RENAME TO elsewhere");
    fleet.publish(&[dead("m1")]);
    assert!(fleet.vhost.publish(exchange::DEAD_LETTER, "publish_tweet", &json!({"message_id": "m2"}), b"{}"));
    let letters = fleet.record(|| {
        let mut session = Session::open(&fleet.broker(), "test").expect("a session");
        let retry = [domain::topology::retry_name(Duration::from_millis(RETRY_MS))];
        // As often as it takes: far more than any other message's attempts.
        for _ in 0..3 {
            for full in [true, false] {
                eventually("they go to the retry queue and come back", || {
                    let depth = broker::depths(&mut session, &retry).expect("its depth")[0].messages;
                    ((depth > 0) == full).then_some(())
                });
            }
        }
        fleet.database.execute("ALTER TABLE elsewhere RENAME TO dead_letter");
        fleet.letters(2)
    });
    assert_eq!(letters.len(), 2);
    let of = |id| letters.iter().find(|letter| letter.message_id.as_deref() == Some(id)).expect("it's recorded");
    let DeadLetter { queue, error, attempts, exchange, routing_key, .. } = of("m1");
    assert_eq!((&**queue, &**error, *attempts), ("update_feed.03", "unknown user", 5));
    assert_eq!((&**exchange, &**routing_key), ("update_feed", "17"));
    let DeadLetter { queue, error, exchange, routing_key, .. } = of("m2");
    assert_eq!((&**queue, &**exchange, &**routing_key), ("publish_tweet", "", "publish_tweet"));
    assert_eq!(error, "another program published it as a dead letter, without a reason");
    assert_eq!(fleet.depth(), 0);
}
