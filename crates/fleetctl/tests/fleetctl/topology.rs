//! Queues and exchanges that aren't as they must be, and how they become so.

use crate::{NOWHERE, complaint, fleetctl, run, spawn};
use broker::{Consumer, Delivery, Publisher, Session};
use domain::{
    Envelope,
    topology::{Binding, Exchange, ExchangeKind, Topology, exchange, queue},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};
use test_support::{PrivateRabbitmq, TestDatabase, TestVhost, broker_settings, eventually};

const SMS: &str = queue::SEND_NOTIFICATION_SMS;

struct Stage {
    database: TestDatabase,
    vhost: TestVhost,
}

impl Stage {
    fn new() -> Self {
        Self { database: TestDatabase::new(), vhost: TestVhost::new() }
    }

    fn fleetctl(&self, args: &[&str]) -> Command {
        let mut command = fleetctl(&self.database, args);
        command.env("AMQP_URL", self.vhost.url()).env("RABBITMQ_MANAGEMENT_URL", self.vhost.management_url());
        command
    }

    fn session(&self) -> Session {
        Session::open(&broker_settings(self.vhost.url()), "test").expect("a session")
    }

    /// Declares this queue with these arguments, where the fleet would have its own, bound as that would be.
    fn with_another(arguments: &Value) -> Self {
        let stage = Self::new();
        run(stage.fleetctl(&["topology", "declare"]), 0);
        broker::delete_queues(&mut stage.session(), &[SMS.into()]).expect("it's deleted");
        stage.vhost.declare_queue(SMS, arguments);
        let exchanges = vec![Exchange { name: exchange::SEND_NOTIFICATION.into(), kind: ExchangeKind::Topic }];
        stage.bind(exchanges, &[(exchange::SEND_NOTIFICATION, SMS, "phone")]);
        stage
    }

    fn bind(&self, exchanges: Vec<Exchange>, bindings: &[(&str, &str, &str)]) {
        let binding = |(exchange, queue, key): &(&str, &str, &str)| Binding {
            exchange: (*exchange).into(),
            queue: (*queue).into(),
            routing_key: (*key).into(),
        };
        let bindings = bindings.iter().map(binding).collect();
        let topology = Topology { exchanges, bindings, ..Topology::default() };
        broker::declare(&mut self.session(), &topology).expect("all declared");
    }

    fn publish(&self, envelopes: &[Envelope]) {
        let mut publisher = Publisher::new(&broker_settings(self.vhost.url()), "test");
        publisher.publish_all(envelopes, Instant::now() + Duration::from_secs(30)).expect("all confirmed");
    }

    /// Takes all messages out of a queue: those with these ids, and no others.
    fn take(&self, queue: &str, expected: &BTreeSet<String>) -> Vec<Delivery> {
        let mut consumer = Consumer::new(&broker_settings(self.vhost.url()), "test", vec![queue.into()], u16::MAX);
        let (mut ids, mut all) = (BTreeSet::new(), Vec::new());
        eventually("all messages come", || {
            let batch = consumer.next_batch(1000, Duration::from_millis(20), Duration::from_millis(200)).unwrap();
            ids.extend(batch.deliveries.iter().filter_map(|delivery| delivery.message_id.clone()));
            let none = batch.deliveries.is_empty();
            all.extend(batch);
            (none && ids.is_superset(expected)).then_some(())
        });
        assert_eq!(ids, *expected);
        // They go back.
        consumer.close(Instant::now() + Duration::from_secs(5));
        all
    }

    fn there(&self, queue: &str) -> bool {
        !broker::existing(&mut self.session(), &[queue.into()]).expect("an answer").is_empty()
    }
}

fn to_sms(id: &str) -> Envelope {
    let mut envelope = Envelope::new(exchange::SEND_NOTIFICATION, "phone", format!("\"{id}\"").into_bytes());
    envelope.message_id = id.to_owned();
    envelope.kind = Some("send_notification".into());
    envelope.headers.insert("own".into(), "kept".into());
    envelope
}

/// Migrates the queue while somebody publishes to it by its exchange.
fn migrate_under_load(stage: &Stage, first: usize) {
    let published = (0..first).map(|n| format!("before {n}")).collect::<Vec<_>>();
    stage.publish(&published.iter().map(|id| to_sms(id)).collect::<Vec<_>>());
    let mut expected: BTreeSet<_> = published.into_iter().collect();
    let done = AtomicBool::new(false);
    let said = thread::scope(|scope| {
        let publishing = scope.spawn(|| {
            let mut ids = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let id = format!("amid {}", ids.len());
                stage.publish(&[to_sms(&id)]);
                ids.push(id);
            }
            ids
        });
        let said = run(stage.fleetctl(&["topology", "migrate", SMS]), 0);
        done.store(true, Ordering::Relaxed);
        expected.extend(publishing.join().expect("all was confirmed"));
        said
    });
    assert!(said.contains(&format!("queue `{SMS}` is declared correctly, with ")), "{said}");
    assert!(expected.len() > first);

    assert_eq!(run(stage.fleetctl(&["topology", "declare"]), 0).lines().count(), 1);
    let arrived = stage.take(SMS, &expected);
    let moved = arrived.iter().find(|delivery| delivery.message_id.as_deref() == Some("before 0")).expect("it's there");
    assert_eq!((moved.kind.as_deref(), &*moved.headers["own"]), (Some("send_notification"), "kept"));
    assert_eq!(
        (&*moved.headers["x-original-exchange"], &*moved.headers["x-original-routing-key"]),
        (exchange::SEND_NOTIFICATION, "phone")
    );
    let said = run(stage.fleetctl(&["topology", "migrate", SMS]), 0);
    assert_eq!(said, format!("queue `{SMS}` is declared correctly\n"));
    assert!(!stage.there(&format!("{SMS}.migrating")));
    assert!(stage.vhost.publish(exchange::SEND_NOTIFICATION, "phone", &json!({}), b"{}"), "it's bound");
}

#[test]
fn a_classic_queue_becomes_what_it_must_be_under_load_and_loses_no_message() {
    migrate_under_load(&Stage::with_another(&json!({"x-queue-type": "classic"})), 2000);
}

#[test]
fn an_earlier_versions_arguments_are_changed_under_load_and_no_message_is_lost() {
    // As if the delivery limit had been another one.
    let arguments = json!({
        "x-queue-type": "quorum", "x-overflow": "reject-publish", "x-delivery-limit": 20,
        "x-dead-letter-exchange": "dead_letter", "x-dead-letter-routing-key": SMS,
        "x-dead-letter-strategy": "at-least-once",
    });
    let stage = Stage::with_another(&arguments);
    let refused = run(stage.fleetctl(&["topology", "declare"]), 1);
    assert!(refused.contains("its x-delivery-limit is 20, expected 1000"), "{refused}");
    migrate_under_load(&stage, 500);
}

#[test]
fn a_migration_that_is_killed_is_gone_on_with_and_no_message_is_lost() {
    let stage = Stage::with_another(&json!({"x-queue-type": "classic"}));
    let ids: BTreeSet<_> = (0..3000).map(|n| format!("m{n:04}")).collect();
    stage.publish(&ids.iter().map(|id| to_sms(id)).collect::<Vec<_>>());
    for after_ms in [50, 400, 1100, 1600] {
        let mut killed = spawn(stage.fleetctl(&["topology", "migrate", SMS]));
        // Wherever it is by then: each place is as good as another.
        thread::sleep(Duration::from_millis(after_ms));
        killed.kill().expect("it can be killed");
        killed.wait().expect("it has ended");
        // The broker finds out before the next one looks for consumers.
        eventually("its consumer is gone", || {
            let depths = broker::existing(&mut stage.session(), &[SMS.into()]).expect("an answer");
            depths.iter().all(|queue| queue.consumers == 0).then_some(())
        });
    }
    run(stage.fleetctl(&["topology", "migrate", SMS]), 0);
    stage.take(SMS, &ids);
}

#[test]
fn a_queue_that_is_consumed_isnt_touched_nor_one_that_isnt_the_fleets() {
    let stage = Stage::with_another(&json!({"x-queue-type": "classic"}));
    let mut consumer = Consumer::new(&broker_settings(stage.vhost.url()), "test", vec![SMS.into()], 10);
    consumer.next_batch(1, Duration::ZERO, Duration::from_millis(10)).expect("it consumes");
    let said = complaint(stage.fleetctl(&["topology", "migrate", SMS]), 2);
    assert!(said.contains("has 1 consumers"), "{said}");
    let said = complaint(stage.fleetctl(&["topology", "migrate", "nowhere"]), 2);
    assert!(said.contains("no queue or exchange `nowhere`"), "{said}");
    let mut without = stage.fleetctl(&["topology", "migrate", SMS]);
    without.env_remove("RABBITMQ_MANAGEMENT_URL").current_dir("/");
    let said = complaint(without, 2);
    assert!(said.contains("Set RABBITMQ_MANAGEMENT_URL"), "{said}");
    assert!(
        complaint(
            {
                let mut away = stage.fleetctl(&["topology", "migrate", SMS]);
                away.env("AMQP_URL", NOWHERE);
                away
            },
            2
        )
        .contains("lost the broker")
    );
}

#[test]
fn an_exchange_of_another_type_is_made_anew_and_bound() {
    let stage = Stage::new();
    stage.vhost.declare_exchange(exchange::SEND_NOTIFICATION, "fanout");
    let said = run(stage.fleetctl(&["topology", "declare"]), 1);
    assert!(
        said.contains("exchange `send_notification` exists with other arguments: its type is fanout, expected topic")
    );
    run(stage.fleetctl(&["topology", "migrate", exchange::SEND_NOTIFICATION]), 0);
    run(stage.fleetctl(&["topology", "declare"]), 0);
    assert!(stage.vhost.publish(exchange::SEND_NOTIFICATION, "phone", &json!({}), b"{}"), "it's bound");
}

/// What the version before this one had for messages that failed.
fn earlier_retry_queue(stage: &Stage, name: &str, delay_ms: u32) {
    let arguments = json!({
        "x-queue-type": "quorum", "x-overflow": "reject-publish", "x-delivery-limit": i32::MAX,
        "x-message-ttl": delay_ms, "x-dead-letter-exchange": "", "x-dead-letter-strategy": "at-least-once",
    });
    stage.vhost.declare_queue(name, &arguments);
    stage.bind(vec![Exchange { name: name.into(), kind: ExchangeKind::Fanout }], &[(name, name, "")]);
}

fn retried(id: &str, home: &str) -> Envelope {
    Envelope { message_id: id.to_owned(), ..Envelope::new("retry.1s", home, b"{}".to_vec()) }
}

#[test]
fn what_waits_in_an_earlier_versions_queues_comes_back_and_they_are_taken_away_when_they_are_empty() {
    let stage = Stage::new();
    earlier_retry_queue(&stage, "retry.1s", 1000);
    earlier_retry_queue(&stage, "retry.10m", 600_000);
    run(stage.fleetctl(&["topology", "declare"]), 0);
    let ids: BTreeSet<_> = (0..50).map(|n| format!("m{n}")).collect();
    stage.publish(&ids.iter().map(|id| retried(id, queue::PUBLISH_TWEET)).collect::<Vec<_>>());
    assert!(stage.vhost.publish("retry.10m", queue::PUBLISH_TWEET, &json!({"message_id": "late"}), b"{}"));
    let shown = || run(stage.fleetctl(&["topology", "show"]), 0);
    eventually("it's shown", || shown().contains("retry.10m is an earlier version's (0 overdue)").then_some(()));

    let mut pruning = spawn(stage.fleetctl(&["topology", "prune"]));
    eventually("the empty one is gone", || (!stage.there("retry.1s")).then_some(()));
    assert_eq!(stage.take(queue::PUBLISH_TWEET, &ids).len(), 50);
    // The other one has a message that waits for ten minutes.
    assert!(pruning.try_wait().expect("it can be looked after").is_none());
    assert!(stage.there("retry.10m"));
    let mut consumer = Consumer::new(&broker_settings(stage.vhost.url()), "test", vec!["retry.10m".into()], 10);
    eventually("it's taken out", || {
        let batch = consumer.next_batch(1, Duration::ZERO, Duration::from_millis(100)).expect("it consumes");
        (consumer.ack(batch).sent == 1).then_some(())
    });
    consumer.close(Instant::now() + Duration::from_secs(5));
    assert!(pruning.wait().expect("it ends").success());
    assert!(!stage.there("retry.10m"));
}

#[test]
fn messages_that_do_not_arrive_where_they_go_are_shown_as_overdue() {
    let stage = Stage::new();
    earlier_retry_queue(&stage, "retry.1s", 1000);
    stage.publish(&(0..40).map(|n| retried(&format!("m{n}"), "gone")).collect::<Vec<_>>());
    run(stage.fleetctl(&["topology", "declare"]), 0);
    eventually("they are overdue", || {
        run(stage.fleetctl(&["topology", "show"]), 0)
            .contains("retry.1s is an earlier version's (40 overdue)")
            .then_some(())
    });
    // The same for the present version's, where what they go to doesn't take them.
    broker::delete_exchanges(&mut stage.session(), &[exchange::RETURN.into()]).expect("it's deleted");
    stage.publish(&[Envelope::new("wait.1s", queue::PUBLISH_TWEET, b"{}".to_vec())]);
    eventually("it's overdue", || {
        let shown = run(stage.fleetctl(&["topology", "show"]), 0);
        let row = shown.lines().find(|line| line.starts_with("wait.1s"))?;
        (row.split_whitespace().last() == Some("1")).then_some(())
    });
}

#[test]
fn a_queue_without_a_leader_is_shown_and_discarded_when_told_to() {
    let (mut node, database) = (PrivateRabbitmq::new(), TestDatabase::new());
    node.start();
    let fleetctl = |args: &[&str]| {
        let mut command = fleetctl(&database, args);
        command.env("AMQP_URL", node.url()).env("RABBITMQ_MANAGEMENT_URL", node.management_url());
        command
    };
    let mut session = Session::open(&broker_settings(&node.url()), "test").expect("a session");
    let sms = Topology::fleet(&[]).queues.into_iter().filter(|queue| queue.name == SMS).collect();
    broker::declare(&mut session, &Topology { queues: sms, ..Topology::default() }).expect("it's declared");
    // Before it has counted anything.
    node.eval("sys:suspend('%2F_send_notification.sms')");
    let shown = run(fleetctl(&["topology", "show"]), 0);
    let line = shown.lines().find(|line| line.contains(SMS)).expect("it's shown");
    assert!(line.contains("no answer"), "{line}");
    let said = complaint(fleetctl(&["topology", "migrate", SMS]), 2);
    assert!(said.contains(&format!("`fleetctl topology migrate {SMS} --discard`")), "{said}");
    let said = run(fleetctl(&["topology", "migrate", SMS, "--discard"]), 0);
    assert!(said.contains("and is deleted") && said.contains("is declared correctly"), "{said}");
    broker::ask(&mut session, SMS).expect("it answers");
    let said = complaint(fleetctl(&["topology", "migrate", SMS, "--discard"]), 2);
    assert!(said.contains("nothing is discarded"), "{said}");
    let said = complaint(fleetctl(&["topology", "migrate", "message.p00", "--discard"]), 2);
    assert!(said.contains("not for one of the message log"), "{said}");
}
