//! Queues that take nothing for a while, and that a publisher goes on with once they do.

use broker::{Consumer, Destination, PublishError, Publisher, Reason, Session, Settings};
use chrono::Utc;
use domain::{
    Envelope,
    topology::{Expiry, Queue, Topology},
};
use std::time::{Duration, Instant};
use test_support::{TestVhost, broker_settings, eventually_within};

/// A bound against hanging.
const PATIENCE: Duration = Duration::from_secs(120);

fn declare(settings: &Settings, names: &[&str]) {
    let queues = names.iter().map(|&name| Queue { name: name.into(), expiry: Expiry::DeadLetter }).collect();
    let topology = Topology { queues, ..Topology::default() };
    broker::declare(&mut Session::open(settings, "test").unwrap(), &topology).unwrap();
}

fn messages(queue: &str, count: usize) -> Vec<Envelope> {
    (0..count).map(|number| Envelope::new("", queue, number.to_string().into_bytes())).collect()
}

fn publish(publisher: &mut Publisher, envelopes: &[Envelope]) -> Result<(), PublishError> {
    publisher.publish_all(envelopes, Instant::now() + PATIENCE)
}

/// Publishes until the queue takes no more.
#[track_caller]
fn fill(publisher: &mut Publisher, queue: &str) {
    eventually_within(PATIENCE, "the queue is full", || {
        let Err(PublishError::Refused { refused }) = publish(publisher, &messages(queue, 5)) else { return None };
        refused.iter().all(|(_, reason)| *reason == Reason::Nacked).then_some(())
    });
}

fn empty(settings: &Settings, queue: &str) {
    let mut consumer = Consumer::new(settings, "test", vec![queue.into()], 100);
    eventually_within(PATIENCE, "the queue is empty", || {
        let batch = consumer.next_batch(100, Duration::ZERO, Duration::from_millis(500)).unwrap();
        let empty = batch.deliveries.is_empty() && consumer.connected();
        consumer.ack(batch);
        empty.then_some(())
    });
    consumer.close(Instant::now() + PATIENCE);
}

#[test]
fn a_publisher_that_was_refused_for_long_says_so_and_goes_on_once_there_is_room() {
    let vhost = TestVhost::new();
    let settings = broker_settings(vhost.url());
    declare(&settings, &["narrow", "wide"]);
    let publishers = [Publisher::new(&settings, "test"), Publisher::new(&settings, "test").for_stream_queues()];
    for mut publisher in publishers {
        let (link, began) = (publisher.link(), Utc::now());
        vhost.limit("narrow", 1);
        fill(&mut publisher, "narrow");
        let refused = eventually_within(PATIENCE, "it goes on for long", || {
            publish(&mut publisher, &messages("narrow", 1)).unwrap_err();
            publish(&mut publisher, &messages("wide", 1)).expect("another queue has nothing to do with it");
            link.refused().pop()
        });
        let narrow = Destination { exchange: String::new(), routing_key: "narrow".into() };
        assert!(refused.0 == narrow && refused.1 >= began && refused.1 <= Utc::now(), "{refused:?}");
        let trouble = link.trouble().expect("a reason");
        assert!(trouble.starts_with("queue `narrow` takes no messages since 2"), "{trouble}");

        vhost.no_limit("narrow");
        empty(&settings, "narrow");
        eventually_within(PATIENCE, "the queue takes messages again", || {
            publish(&mut publisher, &messages("narrow", 5)).ok()
        });
        assert_eq!((link.refused(), link.trouble()), (vec![], None));
        empty(&settings, "narrow");
    }
}
