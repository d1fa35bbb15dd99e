//! What the broker does to those who keep messages for too long.

use crate::stage::{PATIENCE, Stage, events};
use broker::{Consumer, Publisher, Session};
use domain::{
    Envelope,
    topology::{Topology, exchange, queue},
};
use std::{
    thread,
    time::{Duration, Instant},
};
use test_support::{PrivateRabbitmq, eventually};

/// How long the broker bears with an unacknowledged message here.
const CONSUMER_TIMEOUT: Duration = Duration::from_secs(5);

/// Somebody who takes a message and never acknowledges it; answers when the broker has taken it away from him.
fn keep_a_message_for_too_long(settings: &broker::Settings) {
    let mut session = Session::open(settings, "test").expect("a session");
    broker::declare(&mut session, &Topology::fleet(&[])).expect("all declared");
    let mut publisher = Publisher::new(settings, "test");
    let message = Envelope::new(exchange::PUBLISH_TWEET, queue::PUBLISH_TWEET, b"{}".to_vec());
    publisher.publish_all(&[message], Instant::now() + PATIENCE).expect("it's confirmed");
    let mut consumer = Consumer::new(settings, "test", vec![queue::PUBLISH_TWEET.into()], 1);
    eventually("the broker hands it out once more", || {
        let batch = consumer.next_batch(1, Duration::ZERO, Duration::from_millis(100)).expect("a batch");
        batch.deliveries.first().filter(|delivery| delivery.redelivered).map(drop)
    });
}

#[test]
fn a_backlog_that_takes_longer_than_the_broker_waits_for_acknowledgements_costs_no_redelivery() {
    const EVENTS: usize = 50;
    let mut rabbitmq = PrivateRabbitmq::new();
    rabbitmq.start();
    // Channels look at the clock once a minute otherwise.
    let timeout = CONSUMER_TIMEOUT.as_millis();
    rabbitmq.eval(&format!(
        "application:set_env(rabbit, consumer_timeout, {timeout}), application:set_env(rabbit, channel_tick_interval, 250)"
    ));
    let mut stage = Stage::at(&rabbitmq.url());
    stage.start(&[("MURMURATION__EVENT_PROCESSOR__WORK_MS", "320"), ("RUST_LOG", "info,telemetry=debug")]);
    stage.await_shares(&[16]);
    let began = Instant::now();
    // A message each.
    events(1, EVENTS).chunks(1).for_each(|event| stage.database.append_events(event));
    thread::scope(|scope| {
        let settings = stage.broker();
        scope.spawn(|| keep_a_message_for_too_long(settings));
        stage.await_all();
    });
    assert!(began.elapsed() > 3 * CONSUMER_TIMEOUT, "the backlog takes longer than the broker waits");
    let log = stage.log(0);
    let batches = log.lines().filter(|line| line.contains("received a batch"));
    let messages = batches.filter_map(|line| line.split_once(" messages=")?.1.split(' ').next()?.parse::<usize>().ok());
    assert_eq!(messages.sum::<usize>(), EVENTS, "each came once");
    assert!(!log.contains("no connection to the broker"));
    stage.ends_well(EVENTS as i64);
}
