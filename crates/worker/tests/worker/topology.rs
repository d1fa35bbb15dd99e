//! What isn't as it must be at the broker stops those who need it, and nobody else.

use crate::health::get;
use crate::support::{
    MemoryLedger, Notes, QUEUE, broker_settings, depth, drain, publish, publish_all, while_running, worker,
};
use anyhow::anyhow;
use broker::{Publisher, Session};
use domain::{
    Envelope, Failure,
    topology::{Expiry, Queue, Topology, exchange, queue},
};
use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};
use test_support::{PrivateRabbitmq, TestVhost, eventually, free_ports};
use worker::{BatchHandler, Item, Outgoing, Queues, Received, Settings, Step, Worker};

/// A queue beside the fleet's.
const OTHER: &str = "other";

/// Long enough for its queue to be taken away while a message waits.
const DELAY: Duration = Duration::from_secs(3);

fn other() -> Topology {
    Topology { queues: vec![Queue { name: OTHER.into(), expiry: Expiry::DeadLetter }], ..Topology::default() }
}

fn session(vhost: &TestVhost) -> Session {
    Session::open(&broker_settings(vhost.url()), "test").expect("a session")
}

fn to_other(count: usize) -> Vec<Envelope> {
    let envelope =
        |n: usize| Envelope { message_id: format!("other {n}"), ..Envelope::new("", OTHER, b"\"other\"".to_vec()) };
    (0..count).map(envelope).collect()
}

/// Lets a worker fail with forty messages of the queue [`OTHER`], more than the broker's own window for dead letters, and leaves
/// them waiting for their next attempt.
fn forty_fail(vhost: &TestVhost) {
    publish(vhost.url(), []);
    broker::declare(&mut session(vhost), &other()).expect("it's declared");
    publish_all(vhost.url(), &to_other(40));
    let notes = Notes::default();
    let noting = notes.clone();
    let mut failing = worker(vhost.url(), Arc::new(MemoryLedger::default()), move |batch, _: &mut Outgoing, _| {
        // Alone, so that each is one failure.
        if batch.len() == 1 {
            noting.add(batch[0].received.message_id.clone().expect("it has one"));
        }
        Err(Failure::Transient(anyhow!("not yet")))
    });
    failing.settings = delayed(&failing.settings);
    failing.queues = Queues::declared_by(|| Ok(other()));
    failing.queues.set(vec![OTHER.into()]);
    while_running(failing, || {
        eventually("all have failed", || (notes.all().into_iter().collect::<BTreeSet<_>>().len() == 40).then_some(()));
    });
}

fn delayed(settings: &Settings) -> Settings {
    Settings { retry_delays_ms: vec![DELAY.as_millis().try_into().unwrap(); 5], ..settings.clone() }
}

/// Sees that a message of another queue is tried again meanwhile.
fn is_tried_again(vhost: &TestVhost) {
    let notes = Notes::default();
    let noting = notes.clone();
    let mut working = worker(vhost.url(), Arc::new(MemoryLedger::default()), move |batch, _: &mut Outgoing, _| {
        batch.iter().for_each(|item| noting.add(&item.message));
        let again = batch.iter().any(|item| item.received.attempts() == 0);
        if again { Err(Failure::Transient(anyhow!("not yet"))) } else { Ok(()) }
    });
    working.settings = delayed(&working.settings);
    publish(vhost.url(), ["tried"]);
    while_running(working, || {
        eventually("it's tried again", || (notes.all() == ["tried", "tried"]).then_some(()));
    });
}

#[test]
fn failed_messages_whose_queue_is_gone_are_set_aside_and_keep_no_others_from_being_tried_again() {
    let vhost = TestVhost::new();
    forty_fail(&vhost);
    // On a busy machine some may be back already.
    let deleted = broker::delete_queues(&mut session(&vhost), &[OTHER.into()]).expect("it's deleted");
    is_tried_again(&vhost);
    let mut dead = Vec::new();
    let working = worker(vhost.url(), Arc::new(MemoryLedger::default()), |_, _: &mut Outgoing, _| Ok(()));
    while_running(working, || {
        eventually("the others are set aside", || {
            dead.extend(drain(vhost.url(), queue::DEAD_LETTER));
            (dead.len() as u64 + deleted == 40).then_some(())
        });
    });
    for dead in dead {
        let error = "its queue was gone when it was due for another attempt";
        assert_eq!((&*dead.headers["x-died-in"], &*dead.headers["x-error"]), (OTHER, error));
    }
}

#[test]
fn failed_messages_whose_queue_is_full_go_on_waiting_and_keep_no_others_from_being_tried_again() {
    let vhost = TestVhost::new();
    forty_fail(&vhost);
    vhost.limit(OTHER, 1);
    let full = || {
        let url = vhost.url();
        let published = Publisher::new(&broker_settings(url), "test").publish_all(&to_other(1), Instant::now() + DELAY);
        published.err()
    };
    eventually("it's full", full);
    is_tried_again(&vhost);
    assert!(depth(vhost.url(), OTHER) < 40);

    vhost.no_limit(OTHER);
    let working = worker(vhost.url(), Arc::new(MemoryLedger::default()), |_, _: &mut Outgoing, _| Ok(()));
    let mut ids = Vec::new();
    while_running(working, || {
        eventually("all are back", || {
            ids.extend(drain(vhost.url(), OTHER).into_iter().filter_map(|received| received.message_id));
            ids.sort();
            ids.dedup();
            (ids.len() == 40).then_some(())
        });
    });
    assert_eq!(depth(vhost.url(), queue::DEAD_LETTER), 0);
}

/// What a health check says to be wrong with the broker.
fn trouble(port: u16) -> Option<String> {
    let (_, ready) = get(port, "/health/ready")?;
    let missing = ready["missing"].as_array()?;
    missing.iter().find(|one| one["what"] == "broker").map(|one| one["why"].as_str().unwrap_or_default().to_owned())
}

fn classic(vhost: &TestVhost, queue: &str) {
    let mut session = session(vhost);
    broker::delete_queues(&mut session, &[queue.into()]).expect("it's deleted");
    vhost.declare_classic(queue);
}

#[test]
fn a_queue_with_other_arguments_is_left_out_and_taken_back_in_when_it_is_put_right() {
    let vhost = TestVhost::new();
    publish(vhost.url(), ["first"]);
    classic(&vhost, OTHER);
    let notes = Notes::default();
    let noting = notes.clone();
    let mut consuming = worker(vhost.url(), Arc::new(MemoryLedger::default()), move |batch, _: &mut Outgoing, _| {
        batch.iter().for_each(|item| noting.add(&item.message));
        Ok(())
    });
    let [port] = free_ports();
    consuming.health.port = port;
    consuming.queues = Queues::declared_by(|| Ok(other()));
    consuming.queues.set(vec![QUEUE.into(), OTHER.into()]);
    while_running(consuming, || {
        eventually("the good one is consumed", || (notes.all() == ["first"]).then_some(()));
        let trouble = eventually("it says what is wrong", || trouble(port));
        assert!(trouble.starts_with("queue `other` exists with other arguments: its "), "{trouble}");
        assert!(trouble.contains("`fleetctl topology migrate other`"), "{trouble}");
        publish_all(vhost.url(), &to_other(1));
        broker::delete_queues(&mut session(&vhost), &[OTHER.into()]).expect("it's deleted");
        eventually("it's ready", || (get(port, "/health/ready")?.0 == 200).then_some(()));
        publish_all(vhost.url(), &to_other(1));
        eventually("the other one is consumed", || (notes.all() == ["first", "other"]).then_some(()));
    });
}

/// As a queue is that RabbitMQ has left without a leader, being killed while it was declared: it's there, and that's all.
#[test]
fn a_queue_that_does_not_answer_is_left_out_and_taken_back_in_when_it_does() {
    let mut node = PrivateRabbitmq::new();
    node.start();
    let url = node.url();
    let mut session = Session::open(&broker_settings(&url), "test").expect("a session");
    broker::declare(&mut session, &other()).expect("it's declared");
    node.eval("sys:suspend('%2F_other')");
    let notes = Notes::default();
    let noting = notes.clone();
    let mut consuming = worker(&url, Arc::new(MemoryLedger::default()), move |batch, _: &mut Outgoing, _| {
        batch.iter().for_each(|item| noting.add(&item.message));
        Ok(())
    });
    let [port] = free_ports();
    consuming.health.port = port;
    consuming.broker.confirm_timeout_ms = 6000;
    consuming.queues = Queues::declared_by(|| Ok(other()));
    // Whose turn comes first, since those after it would wait.
    consuming.queues.set(vec![OTHER.into(), QUEUE.into()]);
    while_running(consuming, || {
        eventually("it says what is wrong", || {
            (trouble(port)? == "queue `other` does not answer; see `fleetctl topology show`").then_some(())
        });
        publish(&url, ["first"]);
        eventually("the good one is consumed", || (notes.all() == ["first"]).then_some(()));
        node.eval("sys:resume('%2F_other')");
        eventually("it's ready", || (get(port, "/health/ready")?.0 == 200).then_some(()));
        publish_all(&url, &to_other(1));
        eventually("the other one is consumed", || (notes.all() == ["first", "other"]).then_some(()));
    });
}

#[test]
fn what_a_worker_does_not_need_may_be_as_it_likes() {
    let vhost = TestVhost::new();
    // Not what it consumes, nor the exchange that its messages come by.
    classic(&vhost, queue::SEND_NOTIFICATION_SMS);
    vhost.declare_exchange(QUEUE, "topic");
    let notes = Notes::default();
    let noting = notes.clone();
    let mut consuming = worker(vhost.url(), Arc::new(MemoryLedger::default()), move |batch, _: &mut Outgoing, _| {
        batch.iter().for_each(|item| noting.add(&item.message));
        Ok(())
    });
    let [port] = free_ports();
    consuming.health.port = port;
    while_running(consuming, || {
        eventually("it's ready", || (get(port, "/health/ready")?.0 == 200).then_some(()));
        let envelope = Envelope::new("", QUEUE, b"\"directly\"".to_vec());
        let mut publisher = Publisher::new(&broker_settings(vhost.url()), "test");
        publisher.publish_all(&[envelope], Instant::now() + DELAY).expect("it's confirmed");
        eventually("it's consumed", || (notes.all() == ["directly"]).then_some(()));
    });
}

/// A handler that sends on what it gets.
struct SendsOn(Notes);

impl BatchHandler for SendsOn {
    type Message = ();

    const PUBLISHES_TO: &'static [&'static str] = &[exchange::SEND_NOTIFICATION];

    fn decode(&self, _: &Received) -> anyhow::Result<()> {
        Ok(())
    }

    fn handle(&mut self, batch: &[Item<()>], out: &mut Outgoing, _: &Step) -> Result<(), Failure> {
        for item in batch {
            self.0.add("handled");
            out.publish(
                &item.received,
                Envelope::new(exchange::SEND_NOTIFICATION, "phone", item.received.body.clone()),
            );
        }
        Ok(())
    }
}

fn sending_on(vhost: &TestVhost, port: u16, notes: &Notes) -> Worker<impl Fn() -> SendsOn + Send + Sync + use<>> {
    let Worker { service, queues, settings, consuming, health, broker, ledger, database, .. } =
        worker(vhost.url(), Arc::new(MemoryLedger::default()), |_, _: &mut Outgoing, _| Ok(()));
    let notes = notes.clone();
    let mut worker = Worker {
        service,
        queues,
        settings,
        consuming,
        health,
        broker,
        ledger,
        database,
        handler: move || SendsOn(notes.clone()),
    };
    worker.health.port = port;
    worker
}

#[test]
fn a_worker_takes_nothing_while_what_it_publishes_to_is_wrong() {
    let vhost = TestVhost::new();
    publish(vhost.url(), ["first"]);
    broker::delete_exchanges(&mut session(&vhost), &[exchange::SEND_NOTIFICATION.into()]).expect("it's deleted");
    vhost.declare_exchange(exchange::SEND_NOTIFICATION, "fanout");
    let notes = Notes::default();
    let [port] = free_ports();
    while_running(sending_on(&vhost, port, &notes), || {
        let trouble = eventually("it says what is wrong", || trouble(port).filter(|why| why != "not connected"));
        assert_eq!(
            trouble,
            "exchange `send_notification` exists with other arguments: its type is fanout, expected topic; \
             `fleetctl topology migrate send_notification` changes them, and keeps its messages"
        );
        assert_eq!(depth(vhost.url(), QUEUE), 1);
        broker::delete_exchanges(&mut session(&vhost), &[exchange::SEND_NOTIFICATION.into()]).expect("it's deleted");
        eventually("it's sent on", || (depth(vhost.url(), queue::SEND_NOTIFICATION_SMS) == 1).then_some(()));
    });
    assert_eq!(notes.all(), ["handled"]);
}

#[test]
fn what_is_deleted_while_a_worker_runs_is_declared_again_and_costs_no_attempt() {
    let vhost = TestVhost::new();
    publish(vhost.url(), ["first"]);
    let notes = Notes::default();
    let [port] = free_ports();
    while_running(sending_on(&vhost, port, &notes), || {
        eventually("it's sent on", || (depth(vhost.url(), queue::SEND_NOTIFICATION_SMS) == 1).then_some(()));
        broker::delete_queues(&mut session(&vhost), &[queue::SEND_NOTIFICATION_SMS.into()]).expect("it's deleted");
        let mut publisher = Publisher::new(&broker_settings(vhost.url()), "test");
        let envelope = Envelope::new(QUEUE, QUEUE, b"\"second\"".to_vec());
        publisher.publish_all(&[envelope], Instant::now() + DELAY).expect("it's confirmed");
        let there =
            || broker::existing(&mut session(&vhost), &[queue::SEND_NOTIFICATION_SMS.into()]).expect("an answer");
        eventually("it's sent on", || there().first().is_some_and(|queue| queue.messages == 1).then_some(()));
    });
    assert_eq!(notes.all(), ["handled", "handled"]);
}
