use broker::{Consumer, Delivery, Publisher, Settings, Ticket};
use domain::Envelope;
use harness::eventually;
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// Takes everything out of queues, as far as others don't have it in hand. `open` parts each delivery from its ticket.
///
/// A queue's depth doesn't say when that's done: RabbitMQ answers 0 of a quorum queue that keeps it waiting for a quarter of
/// a second, and what is on its way to a consumer isn't counted. So each queue gets one more message, and what comes before
/// that is all.
///
/// # Panics
/// When the broker doesn't answer.
pub fn drain<T>(settings: &Settings, queues: &[String], open: impl Fn(Delivery) -> (Ticket, T)) -> Vec<T> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let ends: Vec<_> = queues.iter().map(|queue| Envelope::new("", queue.clone(), b"the end".to_vec())).collect();
    let published = Publisher::new(settings, "test").publish_all(&ends, Instant::now() + PATIENCE);
    published.map_err(|error| error.to_string()).expect("the queues are there, and have room");
    let mut left: BTreeSet<&str> = ends.iter().map(|end| &*end.message_id).collect();

    let mut consumer = Consumer::new(settings, "test", queues.to_vec(), 1000);
    let mut all = Vec::new();
    eventually("the end of each queue", || {
        let batch = consumer.next_batch(1000, Duration::ZERO, Duration::from_secs(1)).expect("a batch");
        let mut tickets = Vec::new();
        for delivery in batch {
            let is_end = delivery.message_id.as_deref().is_some_and(|id| left.remove(id));
            let (ticket, opened) = open(delivery);
            tickets.push(ticket);
            all.extend((!is_end).then_some(opened));
        }
        assert_eq!(consumer.ack(tickets).stale, 0, "nothing disturbs this connection");
        left.is_empty().then_some(())
    });
    consumer.close(Instant::now() + PATIENCE);
    all
}
