//! One bad message stops nothing else.

use crate::support::{
    DELAYS_MS, MemoryLedger, Notes, QUEUE, broker_settings, depth, drain, publish, run_until_idle, worker,
};
use anyhow::anyhow;
use broker::Consumer;
use chrono::Utc;
use domain::{AttemptLedger, Envelope, Failure, Suspect, topology::queue};
use serde_json::json;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};
use storage::Database;
use test_support::{TestDatabase, TestVhost, eventually, sql};
use uuid::Uuid;
use worker::{Death, Item, Outgoing, Received, Step, Worker};

fn texts(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("m{n:03}")).collect()
}

fn strs(texts: &[String]) -> impl Iterator<Item = &str> {
    texts.iter().map(String::as_str)
}

fn death(dead: &Received) -> (String, Death) {
    (dead.message_id.clone().unwrap_or_default(), Death::of(dead))
}

/// How many messages are set aside.
fn dead(url: &str) -> u32 {
    depth(url, queue::DEAD_LETTER)
}

#[test]
fn bad_messages_are_set_aside_with_their_reason_and_their_neighbours_are_handled() {
    let vhost = TestVhost::new();
    let good = texts(50);
    publish(vhost.url(), strs(&good[..25]).chain(["poison"]).chain(strs(&good[25..])));
    for (id, kind, body) in [("torn", QUEUE, &b"\"torn"[..]), ("bytes", QUEUE, b"\xff"), ("shape", QUEUE, b"{}")] {
        assert!(vhost.publish(QUEUE, QUEUE, &json!({"message_id": id, "type": kind}), body));
    }
    let (notes, noted) = <(Notes, Notes)>::default();
    let handled = notes.clone();
    let handler = move |batch: &[Item<String>], _: &mut Outgoing, _: &Step| {
        // Like a transaction: all of it or nothing.
        if batch.iter().any(|item| item.message == "poison") {
            noted.add("failed");
            return Err(Failure::Permanent(anyhow!("unknown user 7").context("storing")));
        }
        batch.iter().for_each(|item| handled.add(&item.message));
        Ok(())
    };
    run_until_idle(
        || worker(vhost.url(), Arc::new(MemoryLedger::default()), handler.clone()),
        || dead(vhost.url()) == 4 && notes.all().len() == 50,
    );

    assert_eq!(notes.sorted(), good);
    let mut deaths: Vec<_> = drain(vhost.url(), queue::DEAD_LETTER).iter().map(death).collect();
    deaths.sort_by(|(one, _), (other, _)| one.cmp(other));
    let reasons: Vec<_> = deaths.iter().map(|(id, death)| (&**id, &*death.error)).collect();
    assert_eq!(
        reasons,
        [
            ("bytes", "not UTF-8 after byte 0"),
            ("poison", "storing: unknown user 7"),
            ("shape", "wrong shape: invalid type: map, expected a string at line 1 column 0"),
            ("torn", "not JSON: EOF while parsing a string at line 1 column 5"),
        ]
    );
    assert!(deaths.iter().all(|(_, death)| death.queue == QUEUE && death.attempts == 1));
    assert_eq!(depth(vhost.url(), QUEUE), 0);
}

#[test]
fn a_transient_failure_comes_back_later_with_its_attempts_and_dies_after_the_last() {
    let vhost = TestVhost::new();
    publish(vhost.url(), ["flaky", "hopeless"]);
    let (notes, times) = (Notes::default(), Notes::default());
    let (noted, begin, began_at) = (notes.clone(), Instant::now(), Utc::now());
    let timed = times.clone();
    let handler = move |batch: &[Item<String>], _: &mut Outgoing, _: &Step| {
        let [item] = batch else { return Err(anyhow!("one at a time").into()) };
        let Received { exchange, routing_key, correlation_id, .. } = &item.received;
        let attempts = item.received.attempts();
        noted.add(format!("{} {attempts} {exchange} {routing_key} {correlation_id:?}", item.message));
        timed.add(format!("{}", begin.elapsed().as_millis()));
        if item.message == "flaky" && attempts == 1 { Ok(()) } else { Err(anyhow!("the disk is full").into()) }
    };
    run_until_idle(
        || worker(vhost.url(), Arc::new(MemoryLedger::default()), handler.clone()),
        || dead(vhost.url()) == 1 && notes.all().len() >= 5,
    );

    let expected = [0, 1].map(|n| format!("flaky {n} {QUEUE} {QUEUE} Some(\"request of flaky\")"));
    let expected_dead = [0, 1, 2].map(|n| format!("hopeless {n} {QUEUE} {QUEUE} Some(\"request of hopeless\")"));
    assert_eq!(notes.sorted(), [&expected[..], &expected_dead].concat());
    let times: Vec<u64> = times.all().iter().map(|time| time.parse().unwrap()).collect();
    assert!(times[4] - times[0] >= DELAYS_MS.iter().sum(), "{times:?}");

    let (id, death) = drain(vhost.url(), queue::DEAD_LETTER).first().map(death).expect("one dead letter");
    assert_eq!((&*id, &*death.error, death.attempts), ("hopeless", "the disk is full", 3));
    let failed_at = death.failed_at.expect("it says when");
    assert!(failed_at > began_at && failed_at <= Utc::now(), "{failed_at}");
}

#[test]
fn while_the_database_is_away_messages_wait_in_hand_and_no_attempt_counts() {
    let vhost = TestVhost::new();
    publish(vhost.url(), strs(&texts(10)));
    let (calls, notes) = (Arc::new(AtomicU32::new(0)), Notes::default());
    let (called, noted) = (calls.clone(), notes.clone());
    let handler = move |batch: &[Item<String>], _: &mut Outgoing, _: &Step| {
        if called.fetch_add(1, Ordering::Relaxed) < 5 {
            return Err(Failure::Unavailable(anyhow!("connection refused")));
        }
        batch.iter().for_each(|item| noted.add(format!("{} {}", item.message, item.received.attempts())));
        Ok(())
    };
    run_until_idle(
        || worker(vhost.url(), Arc::new(MemoryLedger::default()), handler.clone()),
        || notes.all().len() == 10,
    );
    assert_eq!(notes.all(), texts(10).iter().map(|text| format!("{text} 0")).collect::<Vec<_>>());
    assert!(calls.load(Ordering::Relaxed) >= 6);
    assert_eq!(depth(vhost.url(), queue::DEAD_LETTER), 0);
}

#[test]
fn a_message_whose_row_somebody_holds_comes_back_without_an_attempt_and_holds_up_no_other() {
    let (vhost, db) = (TestVhost::new(), TestDatabase::new());
    db.execute("CREATE TABLE touched (id text PRIMARY KEY, attempts int)");
    db.execute("INSERT INTO touched VALUES ('held')");
    let database = Database::open(&storage::Settings { lock_timeout_ms: 100, ..db.settings() }, "test").unwrap();
    let good = texts(9);
    publish(vhost.url(), strs(&good[..4]).chain(["held"]).chain(strs(&good[4..])));
    // More often than a message is tried.
    let failures = Arc::new(AtomicU32::new(0));
    let failed = failures.clone();
    let handler = move |batch: &[Item<String>], _: &mut Outgoing, _: &Step| {
        let touch = database.transaction(|conn| {
            for Item { message, received } in batch {
                let attempts = received.attempts();
                sql::execute(
                    conn,
                    &format!(
                        "INSERT INTO touched VALUES ('{message}', {attempts})
                         ON CONFLICT (id) DO UPDATE SET attempts = excluded.attempts"
                    ),
                )?;
            }
            Ok(())
        });
        failed.fetch_add(u32::from(touch.is_err() && batch.len() == 1), Ordering::Relaxed);
        Ok(touch?)
    };
    let touched = || db.count("SELECT count(*) AS n FROM touched WHERE attempts = 0");
    thread::scope(|scope| {
        let (holds, held) = mpsc::channel();
        let hold = move |conn: &mut _| {
            sql::execute(conn, "SELECT FROM touched WHERE id = 'held' FOR UPDATE")?;
            holds.send(()).unwrap();
            eventually("the others are handled, and this one failed more often than a message may", || {
                let often = failures.load(Ordering::Relaxed) > DELAYS_MS.len() as u32 + 1;
                (touched() == 9 && often).then_some(())
            });
            Ok(())
        };
        let holder = scope.spawn(|| db.database().transaction(hold));
        held.recv().unwrap();
        run_until_idle(
            || worker(vhost.url(), Arc::new(MemoryLedger::default()), handler.clone()),
            || holder.is_finished() && touched() == 10,
        );
        holder.join().unwrap().unwrap();
    });
    assert_eq!(dead(vhost.url()), 0);
}

#[test]
fn a_panic_counts_as_an_attempt_and_the_handler_is_made_anew() {
    let vhost = TestVhost::new();
    publish(vhost.url(), ["a", "panics", "b"]);
    let (notes, noted) = {
        let notes = Notes::default();
        (notes.clone(), notes)
    };
    let handler = move |batch: &[Item<String>], _: &mut Outgoing, _: &Step| {
        assert!(!batch.iter().any(|item| item.message == "panics"), "what users wrote: {}", batch[0].message);
        batch.iter().for_each(|item| noted.add(&item.message));
        Ok(())
    };
    run_until_idle(
        || worker(vhost.url(), Arc::new(MemoryLedger::default()), handler.clone()),
        || dead(vhost.url()) == 1,
    );
    assert_eq!(notes.sorted(), ["a", "b"]);
    let (id, death) = drain(vhost.url(), queue::DEAD_LETTER).first().map(death).expect("one dead letter");
    assert_eq!((&*id, death.attempts), ("panics", 3));
    assert!(death.error.starts_with("handling panicked at "), "{}", death.error);
    assert!(!death.error.contains("what users wrote"), "{}", death.error);
}

/// Takes everything from the queue and lets go of the connection, as a process does that dies.
fn hand_out_once(url: &str, messages: usize) {
    let mut consumer = Consumer::new(&broker_settings(url), "victim", vec![QUEUE.into()], 100);
    let mut taken = 0;
    eventually("all messages are handed out", || {
        taken += consumer.next_batch(100, Duration::ZERO, Duration::from_secs(1)).unwrap().deliveries.len();
        (taken == messages).then_some(())
    });
    drop(consumer);
    eventually("they are back", || (depth(url, QUEUE) as usize == messages).then_some(()));
}

/// So many messages make a batch, however long the broker takes to send them.
fn in_one_batch<F>(mut worker: Worker<F>, messages: usize) -> Worker<F> {
    worker.consuming.batch = messages;
    worker.consuming.linger_ms = 60_000;
    worker
}

/// What the ledger knows a message of [`publish`] by.
fn on_record(text: &str) -> String {
    let content = [QUEUE.as_bytes(), b"\0", json!(text).to_string().as_bytes()].concat();
    format!("{text} {}", Uuid::new_v5(&Uuid::NAMESPACE_OID, &content))
}

fn attempt(message_id: &str) -> Suspect<'_> {
    Suspect { queue: QUEUE, message_id }
}

#[test]
fn redelivered_messages_are_on_record_while_they_run_and_suspects_run_alone() {
    let vhost = TestVhost::new();
    publish(vhost.url(), ["a", "b", "suspect", "c", "killer"]);
    hand_out_once(vhost.url(), 5);
    let ledger = Arc::new(MemoryLedger::default());
    ledger.begin(&[(attempt(&on_record("suspect")), 0), (attempt(&on_record("killer")), 2)]).unwrap();

    let notes = Notes::default();
    let (noted, seen) = (notes.clone(), ledger.clone());
    let handler = move |batch: &[Item<String>], _: &mut Outgoing, _: &Step| {
        let texts: Vec<_> = batch.iter().map(|item| item.message.as_str()).collect();
        let known: Vec<_> = texts.iter().map(|text| on_record(text)).collect();
        let suspects: Vec<_> = known.iter().map(|id| attempt(id)).collect();
        noted.add(format!("{} with {:?} on record", texts.join(" "), seen.counts(&suspects)?));
        Ok(())
    };
    run_until_idle(|| in_one_batch(worker(vhost.url(), ledger.clone(), handler.clone()), 5), || dead(vhost.url()) == 1);

    assert_eq!(notes.all(), ["a b c with [1, 1, 1] on record", "suspect with [2] on record"]);
    assert!(ledger.0.lock().unwrap().is_empty(), "all is settled");
    let (id, death) = drain(vhost.url(), queue::DEAD_LETTER).first().map(death).expect("one dead letter");
    assert_eq!((&*id, death.attempts), ("killer", 3));
    assert_eq!(death.error, "its worker died while handling it (3 times)");
}

#[test]
fn a_message_isnt_suspected_for_what_another_one_with_its_id_did() {
    let vhost = TestVhost::new();
    publish(vhost.url(), []);
    for text in ["killer", "innocent"] {
        assert!(vhost.publish(QUEUE, QUEUE, &json!({"message_id": "42"}), json!(text).to_string().as_bytes()));
    }
    hand_out_once(vhost.url(), 2);
    let ledger = Arc::new(MemoryLedger::default());
    let killer = on_record("killer").replace("killer ", "42 ");
    (0..3).for_each(|deaths| ledger.begin(&[(attempt(&killer), deaths)]).unwrap());
    let notes = Notes::default();
    let noted = notes.clone();
    let handler = move |batch: &[Item<String>], _: &mut Outgoing, _: &Step| {
        batch.iter().for_each(|item| noted.add(&item.message));
        Ok(())
    };
    run_until_idle(|| in_one_batch(worker(vhost.url(), ledger.clone(), handler.clone()), 2), || dead(vhost.url()) == 1);
    assert_eq!(notes.all(), ["innocent"]);
    let bodies: Vec<_> = drain(vhost.url(), queue::DEAD_LETTER).into_iter().map(|dead| dead.body).collect();
    assert_eq!(bodies, [b"\"killer\""]);
}

#[test]
fn a_count_of_attempts_that_cannot_grow_is_as_good_as_the_last() {
    let vhost = TestVhost::new();
    publish(vhost.url(), []);
    let headers = json!({"headers": {"x-attempts": u32::MAX.to_string()}});
    assert!(vhost.publish(QUEUE, QUEUE, &headers, b"\"x\""));
    let failing = |_: &[Item<String>], _: &mut Outgoing, _: &Step| Err(anyhow::anyhow!("it fails").into());
    let ledger = Arc::new(MemoryLedger::default());
    run_until_idle(|| worker(vhost.url(), ledger.clone(), failing), || dead(vhost.url()) == 1);
    let (_, death) = drain(vhost.url(), queue::DEAD_LETTER).first().map(death).expect("one dead letter");
    assert_eq!((death.attempts, &*death.error), (u32::MAX, "it fails"));
}

#[test]
fn an_id_that_identifies_nothing_is_none_and_an_empty_type_is_the_first_shape() {
    let vhost = TestVhost::new();
    publish(vhost.url(), []);
    for property in ["", " ", "\t"] {
        let properties = json!({"message_id": property, "correlation_id": property, "type": property});
        assert!(vhost.publish(QUEUE, QUEUE, &properties, b"\"blank\""));
    }
    assert!(vhost.publish(QUEUE, QUEUE, &json!({"message_id": "a\0b", "correlation_id": "c\0"}), b"\"nul\""));
    let notes = Notes::default();
    let noted = notes.clone();
    let handler = move |batch: &[Item<String>], _: &mut Outgoing, _: &Step| {
        for Item { message, received } in batch {
            let Received { kind, message_id, correlation_id, .. } = received;
            noted.add(format!("{message} {kind:?} {message_id:?} {correlation_id:?}"));
        }
        Ok(())
    };
    let ledger = Arc::new(MemoryLedger::default());
    run_until_idle(|| worker(vhost.url(), ledger.clone(), handler.clone()), || dead(vhost.url()) == 1);
    assert_eq!(notes.all(), ["blank None None None"; 3]);
    let dead = drain(vhost.url(), queue::DEAD_LETTER).pop().expect("one dead letter");
    let (id, death) = death(&dead);
    assert_eq!((death.attempts, &*death.error), (1, "its message id contains the NUL character"));
    assert!(!id.contains('\0') && dead.headers["x-original-message-id"] == "a\u{fffd}b", "{id:?}");
}

#[test]
fn the_same_message_twice_and_messages_without_an_id_are_told_apart_as_far_as_they_can_be() {
    let vhost = TestVhost::new();
    publish(vhost.url(), ["twice", "twice"]);
    for text in ["\"x\"", "\"x\"", "\"y\""] {
        assert!(vhost.publish(QUEUE, QUEUE, &json!({}), text.as_bytes()));
    }
    hand_out_once(vhost.url(), 5);
    let ledger = Arc::new(MemoryLedger::default());
    let (notes, seen) = (Notes::default(), ledger.clone());
    let noted = notes.clone();
    let handler = move |batch: &[Item<String>], _: &mut Outgoing, _: &Step| {
        let attempts: Vec<_> = seen.0.lock().unwrap().values().copied().collect();
        noted.add(format!("{} messages, attempts {attempts:?}", batch.len()));
        Ok(())
    };
    run_until_idle(
        || in_one_batch(worker(vhost.url(), ledger.clone(), handler.clone()), 5),
        || !notes.all().is_empty(),
    );
    assert_eq!(notes.all(), ["5 messages, attempts [1, 1, 1]"]);
    assert!(ledger.0.lock().unwrap().is_empty());
}

#[test]
fn what_can_never_be_published_kills_its_message_alone() {
    let vhost = TestVhost::new();
    publish(vhost.url(), ["a", "too long", "no route", "b"]);
    let notes = Notes::default();
    let noted = notes.clone();
    let handler = move |batch: &[Item<String>], out: &mut Outgoing, _: &Step| {
        for item in batch {
            noted.add(&item.message);
            let (exchange, key) = match &*item.message {
                "too long" => ("send_notification", "x".repeat(300)),
                "no route" => ("no such exchange", String::new()),
                _ => ("send_notification", "email".into()),
            };
            out.publish(&item.received, Envelope::new(exchange, key, item.message.clone().into_bytes()));
        }
        Ok(())
    };
    run_until_idle(
        || worker(vhost.url(), Arc::new(MemoryLedger::default()), handler.clone()),
        || dead(vhost.url()) == 2,
    );

    let mut deaths: Vec<_> = drain(vhost.url(), queue::DEAD_LETTER).iter().map(death).collect();
    deaths.sort_by(|(one, _), (other, _)| one.cmp(other));
    let summary: Vec<_> = deaths.iter().map(|(id, death)| (&**id, death.attempts)).collect();
    assert_eq!(summary, [("no route", 3), ("too long", 1)]);
    assert!(deaths[0].1.error.starts_with("it can't be routed: 404"), "{}", deaths[0].1.error);
    let sent = drain(vhost.url(), queue::SEND_NOTIFICATION_EMAIL);
    for text in ["a", "b"] {
        let of_text: Vec<_> = sent.iter().filter(|delivery| delivery.body == text.as_bytes()).collect();
        assert!(!of_text.is_empty(), "{text} was sent on");
        let correlation_id = format!("request of {text}");
        assert!(of_text.iter().all(|delivery| delivery.correlation_id.as_deref() == Some(&*correlation_id)));
    }
}

/// Runs a worker that does nothing until so many messages are set aside.
fn ignore_until(vhost: &TestVhost, count: u32) {
    let idler = || worker(vhost.url(), Arc::new(MemoryLedger::default()), |_, _, _| Ok(()));
    run_until_idle(idler, || dead(vhost.url()) == count);
}

#[test]
fn a_message_too_large_to_be_sent_on_is_set_aside_in_part() {
    let vhost = TestVhost::new();
    publish(vhost.url(), []);
    let body = vec![b'x'; 2 << 20];
    assert!(vhost.publish(QUEUE, QUEUE, &json!({"message_id": "large"}), &body));
    ignore_until(&vhost, 1);
    let dead = drain(vhost.url(), queue::DEAD_LETTER).pop().expect("one dead letter");
    assert_eq!(dead.body.len(), 65536);
    let (_, death) = death(&dead);
    assert!(death.error.starts_with("only 65536 of its 2097152 bytes are kept: "), "{}", death.error);
    assert!(death.error.ends_with("; not JSON: expected value at line 1 column 1"), "{}", death.error);
}

#[test]
fn a_message_without_an_id_gets_one_when_it_is_set_aside() {
    let vhost = TestVhost::new();
    publish(vhost.url(), []);
    for _ in 0..2 {
        assert!(vhost.publish(QUEUE, QUEUE, &json!({}), b"garbage"));
    }
    ignore_until(&vhost, 2);
    let ids: Vec<_> = drain(vhost.url(), queue::DEAD_LETTER).into_iter().map(|dead| dead.message_id).collect();
    assert_eq!(ids.len(), 2);
    assert!(ids[0].is_some() && ids[0] != ids[1]);
}

#[test]
fn what_the_broker_gives_up_tells_its_end() {
    let vhost = TestVhost::new();
    publish(vhost.url(), []);
    // It expires in its queue.
    assert!(vhost.publish(QUEUE, QUEUE, &json!({"message_id": "lost", "expiration": "50"}), b"{}"));
    let dead = eventually("it has expired", || drain(vhost.url(), queue::DEAD_LETTER).pop());
    let (id, death) = death(&dead);
    assert_eq!((&*id, &*death.error, &*death.queue), ("lost", "the broker gave it up: expired", QUEUE));
}
