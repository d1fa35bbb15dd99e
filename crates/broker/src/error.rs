use std::time::Duration;

/// Why the broker didn't do something. No text holds the URL's password.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The settings' URL can't be used.
    #[error("broker.url {0}")]
    Url(String),
    /// The connection was lost, or couldn't be made.
    #[error("lost the broker while {doing}")]
    Lost {
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The broker didn't answer in time, and the connection was given up.
    #[error("no answer from the broker within {after:?} while {doing}")]
    TimedOut {
        /// What was being done.
        doing: &'static str,
        /// How long it was waited.
        after: Duration,
    },
    /// The broker switches heartbeats off, so a frozen one would never be noticed.
    #[error("the broker's settings switch heartbeats off (`heartbeat = 0`); give them a value of some seconds")]
    NoHeartbeat,
    /// A queue isn't there.
    #[error("there is no queue `{queue}`; declare the topology first")]
    MissingQueue {
        /// The queue.
        queue: String,
    },
    /// The broker doesn't know an exchange's type.
    #[error(
        "the broker doesn't know the type of the exchange `{exchange}`; enable its plugin with \
         `rabbitmq-plugins enable rabbitmq_consistent_hash_exchange`"
    )]
    MissingPlugin {
        /// The exchange.
        exchange: String,
    },
    /// Something of this name exists with other arguments.
    #[error("{what} exists with other arguments than wanted: {text}")]
    Conflict {
        /// The queue or exchange.
        what: String,
        /// What the broker says.
        text: String,
    },
    /// The broker refused for another reason.
    #[error("the broker refused {doing}: {code} {text}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// AMQP's reply code.
        code: u16,
        /// What the broker says.
        text: String,
    },
}

impl Error {
    /// Whether the broker is away or the connection was lost: open a new one and go on. Anything else stays as it is
    /// until somebody changes the settings or the broker.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. } | Self::TimedOut { .. })
    }
}
