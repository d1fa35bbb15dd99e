use std::{collections::BTreeMap, fmt, sync::Arc};

use chrono::{DateTime, Utc};

/// A message as a queue handed it out.
pub struct Delivery {
    /// What settles it: give it to [`Consumer::ack`](crate::Consumer::ack), once.
    pub ticket: Ticket,
    /// The queue.
    pub queue: Arc<str>,
    /// Whether it has been handed out before: whoever had it may have died of it.
    pub redelivered: bool,
    /// The exchange that it was published to.
    pub exchange: String,
    /// Its routing key.
    pub routing_key: String,
    /// The AMQP `type`.
    pub kind: Option<String>,
    /// The AMQP message id.
    pub message_id: Option<String>,
    /// The AMQP correlation id.
    pub correlation_id: Option<String>,
    /// Headers that are strings, numbers or booleans, as text. If the broker set the message aside, what it says last
    /// about that is in [`header::DEATH_REASON`], [`header::DEATH_QUEUE`] and [`header::DEATH_TIME`] (RFC 3339).
    ///
    /// [`header::DEATH_REASON`]: crate::header::DEATH_REASON
    /// [`header::DEATH_QUEUE`]: crate::header::DEATH_QUEUE
    /// [`header::DEATH_TIME`]: crate::header::DEATH_TIME
    pub headers: BTreeMap<String, String>,
    /// When it was published, to the second, if the publisher said so.
    pub timestamp: Option<DateTime<Utc>>,
    /// The body.
    pub body: Vec<u8>,
}

// The body holds texts of users, which stay out of logs.
impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("queue", &self.queue)
            .field("redelivered", &self.redelivered)
            .field("routing_key", &self.routing_key)
            .field("kind", &self.kind)
            .field("message_id", &self.message_id)
            .field("correlation_id", &self.correlation_id)
            .field("headers", &self.headers)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// The right to settle one delivery on the connection that it came by.
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket {
    pub(crate) epoch: u64,
    pub(crate) tag: u64,
}

impl From<Delivery> for Ticket {
    fn from(delivery: Delivery) -> Self {
        delivery.ticket
    }
}

/// Names of the headers that say why the broker set a message aside.
pub mod header {
    /// `rejected`, `expired`, `maxlen` or `delivery_limit`.
    pub const DEATH_REASON: &str = "x-death.reason";
    /// The queue that it died in.
    pub const DEATH_QUEUE: &str = "x-death.queue";
    /// When, RFC 3339.
    pub const DEATH_TIME: &str = "x-death.time";
}
