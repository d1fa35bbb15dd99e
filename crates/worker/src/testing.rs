//! Runs handlers as the loop does, without a broker: for the tests of services.

use crate::{
    BatchHandler, Item, Outgoing, Received, Step,
    handler::decode,
    policy::{self, Course},
};
use domain::{Envelope, Failure};
use std::time::Duration;

/// What became of messages.
#[derive(Debug, Default)]
pub struct Handled {
    /// What is published because of those that had their effect.
    pub published: Vec<Envelope>,
    /// Which messages go to the dead letters, by their place in what was given, and why.
    pub dead: Vec<(usize, String)>,
    /// Which ones come again after a delay, and why.
    pub retried: Vec<(usize, String)>,
    /// Which ones wait for the database, in hand.
    pub waiting: Vec<usize>,
}

impl Handled {
    /// Whether every message had its effect.
    pub fn is_done(&self) -> bool {
        self.dead.is_empty() && self.retried.is_empty() && self.waiting.is_empty()
    }

    /// The bodies of what is published, as JSON.
    ///
    /// # Panics
    /// When one isn't JSON.
    pub fn bodies(&self) -> Vec<serde_json::Value> {
        let body = |envelope: &Envelope| serde_json::from_slice(&envelope.body).expect("a wire message is JSON");
        self.published.iter().map(body).collect()
    }
}

/// Gives a batch of messages to a handler, in halves when it fails, as often as the loop would at once. No message is given
/// a second time after a failure of its own.
pub fn handle<H: BatchHandler>(handler: &mut H, messages: impl IntoIterator<Item = Received>) -> Handled {
    let mut handled = Handled::default();
    let mut items = Vec::new();
    for (place, received) in messages.into_iter().enumerate() {
        match decode(handler, &received) {
            Ok(message) => items.push((place, Item { message, received })),
            Err(error) => handled.dead.push((place, policy::reason(&error))),
        }
    }
    let (places, items): (Vec<_>, Vec<_>) = items.into_iter().unzip();
    divide(handler, &places, &items, &mut handled);
    handled.dead.sort_unstable();
    handled
}

fn divide<H: BatchHandler>(handler: &mut H, places: &[usize], items: &[Item<H::Message>], handled: &mut Handled) {
    const DELAYS: &[Duration] = &[Duration::from_secs(1)];
    let Some(Item { received, .. }) = items.first() else { return };
    let mut out = Outgoing::default();
    let Err(failure) = handler.handle(items, &mut out, &Step::unlimited()) else {
        handled.published.extend(out.into_envelopes());
        return;
    };
    let fate = |failure: &Failure| (places[0], policy::reason(failure.error()));
    match policy::course(&failure, items.len(), &received.queue, received.attempts().saturating_add(1), DELAYS) {
        Course::Wait => handled.waiting.extend(places),
        Course::Divide => {
            let ((left, right), (first, second)) = (places.split_at(items.len() / 2), items.split_at(items.len() / 2));
            divide(handler, left, first, handled);
            divide(handler, right, second, handled);
        }
        Course::Retry(_) => handled.retried.push(fate(&failure)),
        Course::DeadLetter => handled.dead.push(fate(&failure)),
    }
}

impl Received {
    /// A message of the fleet's own as it comes out of a queue.
    pub fn of(queue: &str, envelope: Envelope) -> Self {
        Self {
            exchange: envelope.exchange,
            routing_key: envelope.routing_key,
            kind: envelope.kind,
            message_id: Some(envelope.message_id),
            correlation_id: envelope.correlation_id,
            headers: envelope.headers,
            published_at: Some(envelope.created_at),
            ..Self::new(queue, envelope.body)
        }
    }
}
