//! A message as it's handed to the broker: where it goes, what identifies it, and its body.

use chrono::{DateTime, Utc};
use std::{collections::BTreeMap, fmt};
use uuid::Uuid;

/// Names of the headers that the fleet sets.
pub mod header {
    /// How many attempts of handling the message have failed so far.
    pub const ATTEMPTS: &str = "x-attempts";
    /// Why handling failed (on dead letters).
    pub const ERROR: &str = "x-error";
    /// When handling failed for the last time (on dead letters), RFC 3339.
    pub const FAILED_AT: &str = "x-failed-at";
    /// When the message was published, in milliseconds since the epoch: AMQP's own timestamp has whole seconds.
    pub const PUBLISHED_AT_MS: &str = "x-published-at-ms";
    /// How often an operator has replayed the message from the dead letters.
    pub const REPLAY: &str = "x-replay";
    /// The exchange that a message was published to in the first place that has been sent on since.
    pub const ORIGINAL_EXCHANGE: &str = "x-original-exchange";
    /// The routing key that it was published with in the first place.
    pub const ORIGINAL_ROUTING_KEY: &str = "x-original-routing-key";
}

/// The longest id, in bytes: AMQP has no room for a longer one.
pub const ID_MAX: usize = 255;

/// Whether a text says nothing: it's empty, or of blanks and control characters alone.
pub fn is_blank(text: &str) -> bool {
    text.chars().all(|c| c.is_whitespace() || c.is_control())
}

/// What stands in a name for each of its bytes that wasn't UTF-8.
pub const SUBSTITUTE: u8 = 0x1a;

/// Whether something can be told by this id. One that is blank, too long, holds the NUL character, which no text of the
/// database does, or wasn't UTF-8, so that another may look the same, counts as none, wherever an id of somebody else's is
/// read.
pub fn identifies(id: &str) -> bool {
    id.len() <= ID_MAX && !id.bytes().any(|byte| byte == 0 || byte == SUBSTITUTE) && !is_blank(id)
}

/// A message to be published.
#[derive(Clone, PartialEq, Eq)]
pub struct Envelope {
    /// The exchange; empty for the default exchange, which routes to the queue that the key names.
    pub exchange: String,
    /// The routing key, at most 255 bytes.
    pub routing_key: String,
    /// The AMQP `type`: which shape the body has. `None` means the exchange's first shape.
    pub kind: Option<String>,
    /// The AMQP message id, at most 255 bytes, unique to this message and kept over retries and replays.
    pub message_id: String,
    /// What ties together everything that follows from one request.
    pub correlation_id: Option<String>,
    /// Headers, all of them strings.
    pub headers: BTreeMap<String, String>,
    /// When it came to be.
    pub created_at: DateTime<Utc>,
    /// The JSON text.
    pub body: Vec<u8>,
}

impl Envelope {
    /// A message with a fresh random id, made now.
    pub fn new(exchange: impl Into<String>, routing_key: impl Into<String>, body: Vec<u8>) -> Self {
        Self {
            exchange: exchange.into(),
            routing_key: routing_key.into(),
            kind: None,
            message_id: Uuid::new_v4().to_string(),
            correlation_id: None,
            headers: BTreeMap::new(),
            created_at: Utc::now(),
            body,
        }
    }

    /// The same, tied to the request that it follows from.
    #[must_use]
    pub fn correlated(mut self, correlation_id: Option<&str>) -> Self {
        self.correlation_id = correlation_id.map(Into::into);
        self
    }
}

// The body holds texts of users, which stay out of logs.
impl fmt::Debug for Envelope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Envelope")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_says_nothing_or_cannot_be_kept_identifies_nothing() {
        for id in ["42", " 42", "é", "a b", &"x".repeat(ID_MAX)] {
            assert!(identifies(id), "{id:?}");
        }
        for id in ["", " ", "\t\u{a0}\n", "\0", "a\0b", "a\u{1a}b", "\u{1}", &"x".repeat(ID_MAX + 1)] {
            assert!(!identifies(id), "{id:?}");
        }
    }
}
