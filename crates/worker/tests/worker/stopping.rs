//! Stopping loses nothing, and nothing is acknowledged before what follows from it is confirmed.

use crate::support::{
    MemoryLedger, Notes, QUEUE, broker_settings, depth, drain, publish, run_until_idle, while_running, worker,
};
use anyhow::anyhow;
use broker::{Consumer, PublishError, Publisher};
use domain::{Envelope, Failure, topology::queue};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    env, fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};
use test_support::{TestVhost, eventually};
use url::Url;
use worker::{Item, Outgoing, Step};

#[test]
fn a_stop_finishes_the_batch_in_hand_and_gives_the_rest_back() {
    let vhost = TestVhost::new();
    let texts: Vec<_> = (0..100).map(|n| format!("m{n:03}")).collect();
    publish(vhost.url(), texts.iter().map(String::as_str));
    let (notes, (begun, has_begun)) = (Notes::default(), mpsc::channel());
    let noted = notes.clone();
    let first = worker(vhost.url(), Arc::new(MemoryLedger::default()), move |batch, _, step| {
        let _ = begun.send(());
        // In hand until the stop.
        eventually("the stop", || step.is_stopping().then_some(()));
        batch.iter().for_each(|item| noted.add(&item.message));
        Ok(())
    });
    while_running(first, || has_begun.recv().expect("a batch in hand"));
    let handled = notes.all().len();
    assert!((1..=20).contains(&handled), "one batch, not {handled} messages");
    eventually("the rest is back", || (depth(vhost.url(), QUEUE) as usize == 100 - handled).then_some(()));

    let noted = notes.clone();
    let handler = move |batch: &[Item<String>], _: &mut Outgoing, _: &Step| {
        batch.iter().for_each(|item| noted.add(&item.message));
        Ok(())
    };
    let second = || worker(vhost.url(), Arc::new(MemoryLedger::default()), handler.clone());
    run_until_idle(second, || notes.all().len() >= 100);
    assert_eq!(notes.sorted(), texts, "each once");
}

#[test]
fn closed_connections_lose_nothing() {
    const TIMES: u32 = 3;
    let vhost = TestVhost::new();
    let texts: Vec<_> = (0..100).map(|n| format!("m{n:03}")).collect();
    publish(vhost.url(), texts.iter().map(String::as_str));
    let (notes, (begun, has_begun)) = (Notes::default(), mpsc::channel());
    let closed = Arc::new(AtomicU32::new(0));
    let (noted, seen) = (notes.clone(), closed.clone());
    let follows = |text: &str| Envelope::new("send_notification", "email", text.as_bytes().to_vec());
    let handler = move |batch: &[Item<String>], out: &mut Outgoing, _: &Step| {
        let already = seen.load(Ordering::Relaxed);
        if already < TIMES {
            let _ = begun.send(());
            eventually("the connections are closed", || (seen.load(Ordering::Relaxed) > already).then_some(()));
        }
        for item in batch {
            noted.add(&item.message);
            out.publish(&item.received, follows(&item.message));
        }
        Ok(())
    };
    let disturbed = || worker(vhost.url(), Arc::new(MemoryLedger::default()), handler.clone());
    while_running(disturbed(), || {
        for _ in 0..TIMES {
            has_begun.recv().expect("a batch in hand");
            eventually("its connections are closed", || (vhost.close_connections() > 0).then_some(()));
            closed.fetch_add(1, Ordering::Relaxed);
        }
    });
    // What was in hand may come again at last, behind everything else.
    run_until_idle(disturbed, || {
        let all: BTreeSet<_> = notes.all().into_iter().collect();
        all.len() == texts.len() && depth(vhost.url(), QUEUE) == 0
    });
    assert_eq!((depth(vhost.url(), QUEUE), depth(vhost.url(), queue::DEAD_LETTER)), (0, 0));
    assert!(notes.all().len() > texts.len(), "what was in hand has come again");
    let sent = drain(vhost.url(), queue::SEND_NOTIFICATION_EMAIL);
    let sent: BTreeSet<_> = sent.iter().map(|sent| str::from_utf8(&sent.body).expect("a text")).collect();
    assert_eq!(sent, texts.iter().map(String::as_str).collect());
}

#[test]
fn a_stop_does_not_wait_for_a_database_that_is_away() {
    let vhost = TestVhost::new();
    publish(vhost.url(), ["a", "b"]);
    let (begun, has_begun) = mpsc::channel();
    let mut away = worker(vhost.url(), Arc::new(MemoryLedger::default()), move |_, _, _| {
        let _ = begun.send(());
        Err(Failure::Unavailable(anyhow!("connection refused")))
    });
    away.settings.unavailable_backoff_ms = 600_000;
    away.settings.unavailable_backoff_max_ms = 600_000;
    let asked = while_running(away, || {
        has_begun.recv().expect("a batch in hand");
        Instant::now()
    });
    assert!(asked.elapsed() < Duration::from_secs(60));
    eventually("both are back", || (depth(vhost.url(), QUEUE) == 2).then_some(()));
}

#[test]
fn nothing_is_acknowledged_before_what_follows_from_it_is_confirmed() {
    let vhost = TestVhost::new();
    publish(vhost.url(), ["a"]);
    set_policy(&vhost, &json!({"pattern": "^send_notification.email$", "definition": {"max-length": 1}}));
    let follows = |text: &str| Envelope::new("send_notification", "email", text.as_bytes().to_vec());
    let mut publisher = Publisher::new(&broker_settings(vhost.url()), "test");
    eventually("the queue is full", || {
        let published = publisher.publish_all(&[follows("full")], Instant::now() + Duration::from_secs(20));
        matches!(published, Err(PublishError::Refused { .. })).then_some(())
    });

    let (begun, has_begun) = mpsc::channel();
    let handler = move |batch: &[Item<String>], out: &mut Outgoing, _: &Step| {
        let _ = begun.send(());
        batch.iter().for_each(|item| out.publish(&item.received, follows("follows")));
        Ok(())
    };
    let blocked = worker(vhost.url(), Arc::new(MemoryLedger::default()), handler.clone());
    while_running(blocked, || {
        has_begun.recv().expect("the batch is handled");
        // Nothing can be awaited here: this is many times as long as handling takes where nothing is in the way.
        thread::sleep(Duration::from_millis(500));
    });
    eventually("the message wasn't acknowledged", || (depth(vhost.url(), QUEUE) == 1).then_some(()));
    assert_eq!(depth(vhost.url(), queue::DEAD_LETTER), 0, "a full queue is no failure of the message");

    while_running(worker(vhost.url(), Arc::new(MemoryLedger::default()), handler), || {
        has_begun.recv().expect("the batch is handled again");
        let emails = vec![queue::SEND_NOTIFICATION_EMAIL.to_owned()];
        let mut consumer = Consumer::new(&broker_settings(vhost.url()), "test", emails, 10);
        eventually("what follows has arrived", || {
            let batch = consumer.next_batch(10, Duration::ZERO, Duration::from_secs(1)).expect("a batch");
            let arrived = batch.deliveries.iter().any(|delivery| delivery.body == b"follows");
            consumer.ack(batch);
            arrived.then_some(())
        });
    });
    assert_eq!(depth(vhost.url(), QUEUE), 0);
    assert!(has_begun.try_recv().is_err(), "while it waited for room, it was handled once");
}

/// Sets a policy by the management API, at the URL in the environment or in the checkout's `.local/env`.
fn set_policy(vhost: &TestVhost, policy: &Value) {
    const NAME: &str = "RABBITMQ_MANAGEMENT_URL";
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.local/env");
    let local = fs::read_to_string(local).unwrap_or_default();
    let url = env::var(NAME).ok().or_else(|| {
        let line = local.lines().find_map(|line| line.strip_prefix(NAME)?.strip_prefix('='));
        line.map(str::to_owned)
    });
    let url = Url::parse(&url.expect("run `make servers` first")).expect("a URL");
    ureq::put(format!("{url}api/policies/{}/test", vhost.name())).send_json(policy).expect("the policy is set");
}
