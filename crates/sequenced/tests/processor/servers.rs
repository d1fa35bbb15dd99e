//! Servers that freeze or die while events flow.

use crate::support::{Accounts, Running, Stage};
use std::{thread, time::Duration};
use storage::Database;
use test_support::{PrivatePostgres, PrivateRabbitmq, TestDatabase, eventually};

/// Awaits that more events are worked on.
fn await_more(accounts: &Accounts) {
    let before = accounts.attempts().len();
    eventually("events are worked on", || (accounts.attempts().len() >= before + 100).then_some(()));
}

#[test]
fn events_go_on_in_order_when_postgres_has_frozen_and_when_it_was_killed() {
    let mut postgres = PrivatePostgres::new();
    postgres.start();
    let stage = Stage::on(TestDatabase::on(&postgres.url()));
    let accounts = Accounts::new(|_| {
        thread::sleep(Duration::from_millis(5));
        Ok(())
    });
    // Soon convinced that nobody answers.
    let mut settings = stage.database.settings();
    settings.connect_timeout_ms = 2000;
    settings.call_timeout_ms = 2000;
    let impatient = || Database::open(&settings, "test").expect("a usable URL");
    let _relay = stage.relay();
    let processors = [(), ()].map(|()| {
        let mut processor = stage.processor(&accounts);
        processor.database = impatient();
        processor.settings.lease_ttl_ms = 3000;
        Running::start(processor)
    });
    let probe = impatient();
    stage.under_load(40, || {
        await_more(&accounts);
        let frozen = postgres.freeze();
        eventually("calls are given up", || probe.ping().err());
        drop(frozen);
        await_more(&accounts);
        postgres.kill();
        eventually("connections are refused", || probe.ping().err());
        postgres.start();
        await_more(&accounts);
    });
    stage.await_applied();
    stage.assert_in_order(stage.accepted());
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM stream_cursor WHERE parked_at IS NOT NULL"), 0);
    for processor in processors {
        processor.stop();
    }
}

#[test]
fn events_go_on_in_order_when_the_broker_was_killed() {
    let mut rabbitmq = PrivateRabbitmq::new();
    rabbitmq.start();
    let stage = Stage::at(&rabbitmq.url());
    let accounts = Accounts::prompt();
    let _relay = stage.relay();
    let processors = [stage.start(&accounts), stage.start(&accounts)];
    let unrelayed = || stage.database.count("SELECT count(*) AS n FROM outbox");
    let last_declared = [domain::log::partition_queue(3)];
    stage.under_load(40, || {
        await_more(&accounts);
        // RabbitMQ 3.10 leaves a queue without a leader for good if it's killed while that is declared.
        eventually("all is declared", || (stage.existing(&last_declared) == 1).then_some(()));
        rabbitmq.write_down();
        rabbitmq.kill();
        eventually("messages wait", || (unrelayed() > 300).then_some(()));
        await_more(&accounts);
    });
    // The sweep does without them.
    stage.await_applied();
    rabbitmq.start();
    stage.under_load(40, || await_more(&accounts));
    stage.await_applied();
    stage.assert_in_order(stage.accepted());
    eventually("messages flow again", || (unrelayed() == 0).then_some(()));
    for processor in processors {
        processor.stop();
    }
}
