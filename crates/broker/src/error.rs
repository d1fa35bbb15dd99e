use std::time::Duration;

use crate::Difference;

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
    /// The broker closed the connection or its channel, and said why.
    #[error("the broker closed the connection while {doing}: {code} {text}")]
    Closed {
        /// What was being done.
        doing: &'static str,
        /// AMQP's reply code.
        code: u16,
        /// What the broker says.
        text: String,
    },
    /// The broker didn't answer in time, and the connection was given up.
    #[error("no answer from the broker within {after:?} while {doing}")]
    TimedOut {
        /// What was being done.
        doing: &'static str,
        /// How long it was waited.
        after: Duration,
    },
    /// The broker accepts no messages for now, because it lacks memory or disk.
    #[error("the broker has blocked publishing: {0}")]
    Blocked(String),
    /// Heartbeats are off, so a frozen broker would never be noticed.
    #[error(
        "heartbeats are off: set broker.heartbeat_s, and `heartbeat` in the broker's own settings, to some seconds"
    )]
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
    #[error(
        "{what} exists with other arguments: {difference}; `fleetctl topology migrate {name}` changes them, and \
         keeps its messages"
    )]
    Conflict {
        /// Queue or exchange, and its name.
        what: String,
        /// Its name.
        name: String,
        /// In what it differs, or the first thing of several.
        difference: Box<Difference>,
    },
    /// The broker refused for another reason, and closed the channel.
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

/// The client's thread has ended, and hasn't said why yet.
#[derive(Debug, thiserror::Error)]
#[error("the client's thread has ended")]
pub(crate) struct ThreadGone;

impl Error {
    /// Whether it passes by itself: the broker is away, or short of something, or the connection was lost. Open a new
    /// one and go on. Anything else stays as it is until somebody changes the settings or the broker.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. } | Self::Closed { .. } | Self::TimedOut { .. } | Self::Blocked(_))
    }

    pub(crate) fn lost(doing: &'static str, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Lost { doing, source: why.into() }
    }

    pub(crate) fn from_client(doing: &'static str, error: amiquip::Error) -> Self {
        match error {
            amiquip::Error::ServerClosedChannel { code, message, .. } => Self::Refused { doing, code, text: message },
            amiquip::Error::ServerClosedConnection { code, message } => Self::Closed { doing, code, text: message },
            amiquip::Error::EventLoopDropped | amiquip::Error::EventLoopClientDropped => Self::lost(doing, ThreadGone),
            // Among them a panic of the client's thread, which a close that races a call can cause. As text, because the
            // client's errors repeat their causes.
            other => Self::lost(doing, other.to_string()),
        }
    }

    /// What closes a channel that has worked so far passes: a new one works again.
    pub(crate) fn passing(self) -> Self {
        match self {
            Self::Refused { doing, code, text } => Self::Closed { doing, code, text },
            other => other,
        }
    }

    /// The error with its causes, for a log line.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text = format!("{text}: {cause}");
            next = cause.source();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_the_clients_thread_is_a_lost_connection() {
        let error = Error::from_client("publishing", amiquip::Error::IoThreadPanic);
        assert!(error.is_lost());
        assert_eq!(error.chain(), "lost the broker while publishing: I/O thread panicked");
    }
}
