use domain::topology::Topology;

use crate::{Error, Session};

/// How full a queue is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueDepth {
    /// Its name.
    pub name: String,
    /// Messages that are ready to be delivered.
    pub messages: u32,
    /// Consumers on it.
    pub consumers: u32,
}

/// Declares exchanges, queues and bindings in the order in which they're given. What is there already stays as it is.
///
/// # Errors
/// [`Error::MissingPlugin`], [`Error::Conflict`], [`Error::Refused`], or one that [is lost](Error::is_lost).
pub fn declare(_session: &mut Session, _topology: &Topology) -> Result<(), Error> {
    unimplemented!()
}

/// How full the queues are, in the same order.
///
/// # Errors
/// [`Error::MissingQueue`] for the first one that isn't there, or one that [is lost](Error::is_lost).
pub fn depths(_session: &mut Session, _names: &[String]) -> Result<Vec<QueueDepth>, Error> {
    unimplemented!()
}
