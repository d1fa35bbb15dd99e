use crate::{Error, address::Address};
use ::settings::Secret;
use serde::Deserialize;

/// The section `[broker]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `amqp://user:password@host:port/vhost`, its parts percent-encoded.
    pub url: Secret,
    /// How long opening a connection may take, handshake included.
    pub connect_timeout_ms: u64,
    /// The longest heartbeat to agree to; the broker's own counts if it is shorter.
    pub heartbeat_s: u16,
    /// How long to wait for the next confirm before the connection is given up.
    pub confirm_timeout_ms: u64,
    /// Messages that may be unconfirmed at a time.
    pub window_messages: usize,
    /// Bytes of bodies that may be unconfirmed at a time, and the largest body that is published.
    pub window_bytes: usize,
}

impl Settings {
    /// The vhost.
    ///
    /// # Errors
    /// [`Error::Url`].
    pub fn vhost(&self) -> Result<String, Error> {
        Ok(Address::parse(&self.url)?.vhost)
    }
}
