//! What a service implements, and what it's given.

use crate::header;
use anyhow::ensure;
use broker::{Delivery, Ticket};
use chrono::{DateTime, Utc};
use domain::{
    Envelope, Failure,
    envelope::{self, identifies, is_blank},
    topology::queue,
};
use process::{InHand, Pulse, Stop};
use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

/// A service's business: decoding its messages and giving them effect.
pub trait BatchHandler {
    /// A decoded message.
    type Message;

    /// The exchanges that it publishes to. The worker takes no message while one of them, or a queue that is bound to it, isn't as
    /// it must be.
    const PUBLISHES_TO: &'static [&'static str] = &[];

    /// Decodes one message by itself. One that can't be decoded is dead-lettered alone, with the error as its reason.
    ///
    /// # Errors
    /// Says what is wrong with the message, without repeating what users wrote.
    fn decode(&self, received: &Received) -> anyhow::Result<Self::Message>;

    /// Gives a batch its effects, all or none of them, in one transaction, and stages what is to be published once they
    /// are committed. The messages are acknowledged when the broker has confirmed that. Every message may come
    /// again, alone or in another batch, even after success: a second time must change nothing, and must stage the same.
    ///
    /// # Errors
    /// See [`Failure`]. A failing batch comes again in halves, so that in the end each message fails for itself.
    fn handle(&mut self, batch: &[Item<Self::Message>], out: &mut Outgoing, step: &Step) -> Result<(), Failure>;
}

/// Decodes a message, unless it claims an id that can't be kept. But a dead letter can't be refused, whatever its id.
pub(crate) fn decode<H: BatchHandler>(handler: &H, received: &Received) -> anyhow::Result<H::Message> {
    ensure!(
        received.broken_id.is_none() || &*received.queue == queue::DEAD_LETTER,
        "its message id contains the NUL character"
    );
    handler.decode(received)
}

/// A message as it was received, undecoded.
pub struct Received {
    /// The queue.
    pub queue: Arc<str>,
    /// The exchange that it was published to in the first place.
    pub exchange: String,
    /// The routing key that it was published with in the first place.
    pub routing_key: String,
    /// The AMQP `type`; `None` means the exchange's first shape.
    pub kind: Option<String>,
    /// The AMQP message id, if there's one that [identifies](identifies) anything. Other programs' messages may lack one.
    pub message_id: Option<String>,
    /// The request that it follows from, if it has an id that identifies anything.
    pub correlation_id: Option<String>,
    /// The headers.
    pub headers: BTreeMap<String, String>,
    /// When it was published, if it says so.
    pub published_at: Option<DateTime<Utc>>,
    /// The body.
    pub body: Vec<u8>,
    /// Whether it was handed out before.
    pub(crate) redelivered: bool,
    /// How many processes have died while handling it since it was last published.
    pub(crate) deaths: u32,
    /// A message id with the NUL character in it: whoever sent it meant something by it.
    pub(crate) broken_id: Option<String>,
    pub(crate) ticket: Option<Ticket>,
}

impl Received {
    /// A message that no broker sent: for tests of handlers.
    pub fn new(queue: &str, body: impl Into<Vec<u8>>) -> Self {
        Self {
            queue: queue.into(),
            exchange: String::new(),
            routing_key: queue.into(),
            kind: None,
            message_id: None,
            correlation_id: None,
            headers: BTreeMap::new(),
            published_at: None,
            body: body.into(),
            redelivered: false,
            deaths: 0,
            broken_id: None,
            ticket: None,
        }
    }

    /// How many attempts at it have failed so far.
    pub fn attempts(&self) -> u32 {
        let failed = self.headers.get(envelope::header::ATTEMPTS).and_then(|text| text.parse().ok()).unwrap_or(0u32);
        failed.saturating_add(self.deaths)
    }

    /// The headers that it was published with, without those that tell of failures and of its end. With a message id that
    /// can't be used as one, as far as it can be written.
    pub fn own_headers(&self) -> BTreeMap<String, String> {
        const OURS: [&str; 5] = [
            envelope::header::ATTEMPTS,
            envelope::header::ERROR,
            envelope::header::FAILED_AT,
            header::DIED_IN,
            header::SET_ASIDE,
        ];
        const BROKERS: [&str; 5] =
            ["x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count"];
        let mut headers = self.headers.clone();
        headers
            .retain(|name, _| !OURS.contains(&name.as_str()) && !BROKERS.iter().any(|prefix| name.starts_with(prefix)));
        headers
            .extend(self.broken_id.iter().map(|id| (header::ORIGINAL_MESSAGE_ID.into(), id.replace('\0', "\u{fffd}"))));
        headers
    }
}

/// What a handler is about to have in hand, for the log: one message is named.
pub(crate) fn in_hand<'a>(received: impl IntoIterator<Item = &'a Received>) -> InHand {
    let mut received = received.into_iter();
    let first = received.next();
    let only = first.filter(|_| received.next().is_none());
    InHand {
        queue: first.map(|received| received.queue.clone()).unwrap_or_default(),
        message_id: only.and_then(|received| received.message_id.clone()),
        correlation_id: only.and_then(|received| received.correlation_id.clone()),
    }
}

impl From<Delivery> for Received {
    fn from(delivery: Delivery) -> Self {
        let headers = delivery.headers;
        let exact = headers.get(envelope::header::PUBLISHED_AT_MS).and_then(|text| text.parse().ok());
        let (message_id, broken_id) = match delivery.message_id {
            Some(id) if id.contains('\0') => (None, Some(id)),
            id => (id.filter(|id| identifies(id)), None),
        };
        Self {
            queue: delivery.queue,
            exchange: headers.get(header::ORIGINAL_EXCHANGE).cloned().unwrap_or(delivery.exchange),
            routing_key: headers.get(header::ORIGINAL_ROUTING_KEY).cloned().unwrap_or(delivery.routing_key),
            kind: delivery.kind.filter(|kind| !is_blank(kind)),
            message_id,
            correlation_id: delivery.correlation_id.filter(|id| identifies(id)),
            published_at: exact.and_then(DateTime::from_timestamp_millis).or(delivery.timestamp),
            headers,
            body: delivery.body,
            redelivered: delivery.redelivered,
            deaths: 0,
            broken_id,
            ticket: Some(delivery.ticket),
        }
    }
}

// The body holds texts of users, which stay out of logs.
impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("queue", &self.queue)
            .field("exchange", &self.exchange)
            .field("routing_key", &self.routing_key)
            .field("kind", &self.kind)
            .field("message_id", &self.message_id)
            .field("correlation_id", &self.correlation_id)
            .field("headers", &self.headers)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// One message of a batch.
#[derive(Debug)]
pub struct Item<M> {
    /// What it says.
    pub message: M,
    /// How it came.
    pub received: Received,
}

/// What a handler stages to be published after its transaction has committed.
#[derive(Debug, Default)]
pub struct Outgoing {
    envelopes: Vec<Envelope>,
}

impl Outgoing {
    /// Stages a message that follows from `cause`, under the same correlation id unless it has its own.
    pub fn publish(&mut self, cause: &Received, mut envelope: Envelope) {
        if envelope.correlation_id.is_none() {
            envelope.correlation_id.clone_from(&cause.correlation_id);
        }
        self.envelopes.push(envelope);
    }

    /// What was staged so far.
    pub fn envelopes(&self) -> &[Envelope] {
        &self.envelopes
    }

    pub(crate) fn into_envelopes(self) -> Vec<Envelope> {
        self.envelopes
    }
}

/// The step of handling in hand, whose time is limited.
pub struct Step {
    pulse: Arc<Pulse>,
    stop: Stop,
}

impl Step {
    pub(crate) fn new(pulse: Arc<Pulse>, stop: Stop) -> Self {
        Self { pulse, stop }
    }

    /// A step without a limit, for tests of handlers.
    pub fn unlimited() -> Self {
        Self::new(Arc::new(Pulse::new(Duration::MAX)), Stop::new())
    }

    /// Begins the next step of long work: the time limit counts anew.
    pub fn renew(&self) {
        self.pulse.begin_step();
    }

    /// Whether the process is to stop. Long work may return [`Failure::Unavailable`] then: its message goes back to the
    /// queue as if it had never been taken, and what is committed stays.
    pub fn is_stopping(&self) -> bool {
        self.stop.is_requested()
    }
}
