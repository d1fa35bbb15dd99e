use std::time::Instant;

use domain::Envelope;

use crate::{Error, Link, Session, Settings};

/// Why messages weren't all confirmed.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The broker confirmed all but these, or these were never sent because they can't be.
    #[error("{} messages refused, the first one because {}", refused.len(), refused[0].1)]
    Refused {
        /// Indexes into the published slice, ascending, and why. Never empty.
        refused: Vec<(usize, Reason)>,
    },
    /// The deadline passed first. Nothing is known about the messages that weren't confirmed: they may have arrived.
    #[error("{} messages unconfirmed", unconfirmed.len())]
    Unavailable {
        /// Indexes into the published slice, ascending. All the others are confirmed.
        unconfirmed: Vec<usize>,
        /// What kept them from being confirmed.
        source: Error,
    },
}

/// Why a message was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// It reaches no queue.
    #[error("it can't be routed: {code} {text}")]
    Returned {
        /// AMQP's reply code: 312 if no queue is bound for its key, 404 if there's no such exchange.
        code: u16,
        /// What the broker says.
        text: String,
    },
    /// A queue didn't take it, usually because it's full: may be tried again.
    #[error("the queue didn't take it")]
    Nacked,
    /// It can't be sent at all.
    #[error("{0}")]
    Invalid(String),
}

/// Publishes persistent messages and waits for the broker's confirms, on a connection of its own that it opens when
/// it's needed and again when it's lost.
pub struct Publisher {}

impl Publisher {
    /// A publisher; connects with the first messages.
    #[must_use]
    pub fn new(_settings: &Settings, _name: &str) -> Self {
        unimplemented!()
    }

    /// What to do on every new connection before publishing, such as declaring the topology: a broker may come back empty.
    #[must_use]
    pub fn on_connect(self, _hook: impl FnMut(&mut Session) -> Result<(), Error> + Send + 'static) -> Self {
        unimplemented!()
    }

    /// The state of the connection, for other threads.
    #[must_use]
    pub fn link(&self) -> Link {
        unimplemented!()
    }

    /// Publishes all in order, as many at a time as the window allows, and returns when each is confirmed. After a
    /// lost connection those that weren't confirmed are published again in order, until `deadline`; so some may
    /// arrive twice.
    ///
    /// # Errors
    /// [`PublishError::Refused`] if all others are confirmed; [`PublishError::Unavailable`] if that can't be said.
    pub fn publish_all(&mut self, _envelopes: &[Envelope], _deadline: Instant) -> Result<(), PublishError> {
        unimplemented!()
    }

    /// Says goodbye to the broker, until `deadline`. Dropping it cuts the connection instead.
    pub fn close(self, _deadline: Instant) {
        unimplemented!()
    }
}
