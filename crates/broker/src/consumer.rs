use std::time::{Duration, Instant};

use crate::{Delivery, Error, Link, Session, Settings, Ticket};

/// Deliveries that came in one go, in the order in which the broker sent them. Empty if none came in time.
#[derive(Debug, Default)]
pub struct Batch {
    /// The deliveries.
    pub deliveries: Vec<Delivery>,
}

impl IntoIterator for Batch {
    type Item = Delivery;
    type IntoIter = std::vec::IntoIter<Delivery>;

    fn into_iter(self) -> Self::IntoIter {
        self.deliveries.into_iter()
    }
}

/// What became of acknowledgements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Acked {
    /// Deliveries whose acknowledgement was sent.
    pub sent: usize,
    /// Deliveries of a connection that is lost: the broker will hand them out again.
    pub stale: usize,
}

/// Takes deliveries from one or several queues, on a connection of its own that it opens when it's needed and again
/// when it's lost.
pub struct Consumer {}

impl Consumer {
    /// A consumer of these queues; connects with the first [`Consumer::next_batch`]. The broker sends up to `prefetch`
    /// messages of each queue ahead; at least twice as many as are taken in a batch keep it busy.
    #[must_use]
    pub fn new(_settings: &Settings, _name: &str, _queues: Vec<String>, _prefetch: u16) -> Self {
        unimplemented!()
    }

    /// What to do on every new connection before consuming, such as declaring the topology: a broker may come back empty.
    #[must_use]
    pub fn on_connect(self, _hook: impl FnMut(&mut Session) -> Result<(), Error> + Send + 'static) -> Self {
        unimplemented!()
    }

    /// Whether there is a connection that isn't known to be lost.
    #[must_use]
    pub fn connected(&self) -> bool {
        unimplemented!()
    }

    /// The state of the connection, for other threads.
    #[must_use]
    pub fn link(&self) -> Link {
        unimplemented!()
    }

    /// Waits up to `idle` for a delivery, then takes what comes until there are `max` or `linger` has passed. While
    /// the broker is away, tries to open a new connection, less and less often, and returns an empty batch after
    /// `idle` (or after an attempt to connect, which may take longer).
    ///
    /// # Errors
    /// Only what doesn't pass by itself: those that [are lost](Error::is_lost) are logged and tried again.
    pub fn next_batch(&mut self, _max: usize, _linger: Duration, _idle: Duration) -> Result<Batch, Error> {
        unimplemented!()
    }

    /// Acknowledges a batch, or some deliveries or tickets of one or several batches, in any order. Those of a lost
    /// connection are skipped.
    pub fn ack(&mut self, _deliveries: impl IntoIterator<Item = impl Into<Ticket>>) -> Acked {
        unimplemented!()
    }

    /// Gives back what isn't acknowledged, in order, and says goodbye to the broker, until `deadline`. Dropping it
    /// cuts the connection instead.
    pub fn close(self, _deadline: Instant) {
        unimplemented!()
    }
}
