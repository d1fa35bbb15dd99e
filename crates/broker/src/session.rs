use std::time::Instant;

use crate::{Error, Settings};

/// One connection to the broker. No call on it lasts longer than the settings say, whatever the broker does; dropping
/// it never waits for the broker.
pub struct Session {}

impl Session {
    /// Connects, under a name that the broker's tools show.
    ///
    /// # Errors
    /// [`Error::Url`], [`Error::NoHeartbeat`], or one that [is lost](Error::is_lost).
    pub fn open(_settings: &Settings, _name: &str) -> Result<Self, Error> {
        unimplemented!()
    }

    /// Whether the broker accepts no messages on this connection for now, because it lacks memory or disk.
    pub fn is_blocked(&self) -> bool {
        unimplemented!()
    }

    /// Cuts the connection at once. Every call that waits on it returns.
    pub fn abort(&self) {
        unimplemented!()
    }

    /// Says goodbye to the broker, and cuts the connection if that isn't answered by `deadline`.
    pub fn close(self, _deadline: Instant) {
        unimplemented!()
    }
}
