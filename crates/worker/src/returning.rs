//! Brings messages back to their queues that have waited for their next attempt.
//!
//! The broker could do that by itself, but for messages whose queue is gone or full it stops for all the others. Here such a
//! message is set aside, or goes on waiting.

use crate::{Received, Settings, policy};
use anyhow::anyhow;
use broker::{Consumer, Delivery, Link, PublishError, Publisher, Reason};
use chrono::Utc;
use domain::{
    Envelope,
    topology::{Topology, queue},
};
use process::{Backoff, Pulse, Stop};
use std::{
    mem,
    sync::Arc,
    time::{Duration, Instant},
};
use telemetry::{MessageDeadLettered, emit};

/// How many messages are brought back at a time.
const BATCH: usize = 100;

/// How long to wait for more of them.
const LINGER: Duration = Duration::from_millis(5);

const IDLE: Duration = Duration::from_millis(250);

/// How long saying goodbye to the broker may take.
const GOODBYE: Duration = Duration::from_secs(2);

/// Why a message is set aside whose queue isn't there.
const GONE: &str = "its queue was gone when it was due for another attempt";

/// Consumes [`queue::RETURN`].
pub(crate) struct Returner {
    name: String,
    broker: broker::Settings,
    needs: Arc<Topology>,
    delays: Vec<Duration>,
    consumer: Consumer,
    publisher: Publisher,
    pulse: Arc<Pulse>,
    away: Backoff,
    full: Backoff,
}

impl Returner {
    /// Of the service of this name.
    pub(crate) fn new(service: &str, broker: &broker::Settings, settings: &Settings, pulse: Arc<Pulse>) -> Self {
        let delays = settings.retry_delays();
        // Nothing of what the service itself consumes or publishes to.
        let needs = Arc::new(Topology::fleet(&delays).part(&[], &[]));
        let name = format!("{service}.{}", queue::RETURN);
        let for_consumer = needs.clone();
        Self {
            consumer: Consumer::new(broker, &name, vec![queue::RETURN.into()], 2 * BATCH as u16)
                .on_connect(move |session| broker::declare(session, &for_consumer)),
            publisher: publisher(&name, broker, &needs),
            name,
            broker: broker.clone(),
            needs,
            delays,
            pulse,
            away: settings.backoff(),
            full: settings.backoff(),
        }
    }

    /// The state of its connection.
    pub(crate) fn link(&self) -> Link {
        self.consumer.link()
    }

    /// Works until it's time to stop.
    pub(crate) fn run(mut self, stop: &Stop) {
        while !stop.is_requested() {
            self.pulse.beat();
            match self.consumer.next_batch(BATCH, LINGER, IDLE) {
                Ok(batch) => {
                    self.away.reset();
                    self.bring_back(batch.into_iter().map(waited).collect(), stop);
                }
                Err(error) => {
                    let (delay, say) = self.away.failed();
                    if say {
                        log::error!("can't bring failed messages back until the broker is fixed: {error}");
                    }
                    stop.wait(delay);
                }
            }
        }
        let deadline = Instant::now() + GOODBYE;
        self.consumer.close(deadline);
        self.publisher.close(deadline);
    }

    /// Brings these back, and acknowledges them. Those that can't be go on waiting or are set aside.
    fn bring_back(&mut self, mut waited: Vec<Received>, stop: &Stop) {
        if waited.is_empty() {
            return;
        }
        let envelopes: Vec<_> = waited.iter().map(policy::back).collect();
        let refused = match self.publish(&envelopes) {
            Ok(()) => Vec::new(),
            Err(PublishError::Refused { refused }) => refused.into_iter().map(|(at, why)| (at, Some(why))).collect(),
            Err(PublishError::Unavailable { unconfirmed, .. }) => {
                unconfirmed.into_iter().map(|at| (at, None)).collect()
            }
        };
        // From the last on, so that the others keep their places.
        let left: Vec<_> = refused.into_iter().rev().map(|(at, reason)| (waited.swap_remove(at), reason)).collect();
        // The others have arrived, whatever becomes of these.
        self.ack(waited);
        if left.is_empty() {
            self.full.reset();
            return;
        }
        // A channel that a full quorum queue has refused once may be refused by it for ever.
        self.reconnect();
        let (gone, full): (Vec<_>, Vec<_>) = left.into_iter().partition(|(received, reason)| is_gone(received, reason));
        let dead = gone
            .iter()
            .map(|(received, _)| policy::dead_letter(received, received.attempts(), &anyhow!(GONE), Utc::now()));
        let waiting = full.iter().map(|(received, _)| policy::wait_again(received, &self.delays));
        let onward = dead.chain(waiting).collect();
        if !self.send_on(onward, stop) {
            return;
        }
        for (received, _) in &gone {
            let Received { queue, message_id, correlation_id, .. } = received;
            let (message_id, correlation_id) = (message_id.as_deref(), correlation_id.as_deref());
            emit(MessageDeadLettered {
                queue,
                message_id,
                correlation_id,
                attempts: received.attempts(),
                error: &GONE,
            });
        }
        if let Some((Received { queue, .. }, _)) = full.first()
            && self.full.failed().1
        {
            log::warn!(queue = &**queue; "a queue takes no messages, so {} that failed go on waiting", full.len());
        }
        self.ack(gone.into_iter().chain(full).map(|(received, _)| received));
    }

    fn ack(&mut self, received: impl IntoIterator<Item = Received>) {
        self.consumer.ack(received.into_iter().filter_map(|received| received.ticket));
    }

    /// Publishes until all is confirmed. False if it's time to stop, or the messages come again.
    fn send_on(&mut self, mut envelopes: Vec<Envelope>, stop: &Stop) -> bool {
        while let Err(error) = self.publish(&envelopes) {
            let again: Vec<_> = match error {
                PublishError::Unavailable { unconfirmed, .. } => {
                    unconfirmed.into_iter().map(|index| envelopes[index].clone()).collect()
                }
                PublishError::Refused { refused } => refused
                    .into_iter()
                    .map(|(index, reason)| match reason {
                        Reason::Invalid(why) => policy::cut(envelopes[index].clone(), &why),
                        Reason::Returned { .. } | Reason::Nacked => envelopes[index].clone(),
                    })
                    .collect(),
            };
            envelopes = again;
            // What has been deleted is declared again.
            self.reconnect();
            if stop.wait(self.away.failed().0) || !self.consumer.connected() {
                return false;
            }
        }
        self.away.reset();
        true
    }

    fn publish(&mut self, envelopes: &[Envelope]) -> Result<(), PublishError> {
        self.pulse.beat();
        let deadline = Instant::now() + Duration::from_millis(self.broker.confirm_timeout_ms);
        self.publisher.publish_all(envelopes, deadline)
    }

    fn reconnect(&mut self) {
        let new = publisher(&self.name, &self.broker, &self.needs);
        mem::replace(&mut self.publisher, new).close(Instant::now() + GOODBYE);
    }
}

/// A message under the queue that it's to be brought back to.
fn waited(delivery: Delivery) -> Received {
    let home = delivery.routing_key.as_str().into();
    Received { queue: home, ..Received::from(delivery) }
}

/// Whether a message can't ever be brought back. What comes from `dead_letter` never becomes a dead letter again.
fn is_gone(received: &Received, reason: &Option<Reason>) -> bool {
    &*received.queue != queue::DEAD_LETTER && matches!(reason, Some(Reason::Returned { .. } | Reason::Invalid(_)))
}

fn publisher(name: &str, broker: &broker::Settings, needs: &Arc<Topology>) -> Publisher {
    let needs = needs.clone();
    Publisher::new(broker, name).on_connect(move |session| broker::declare(session, &needs))
}
