use anyhow::ensure;
use serde::Deserialize;
use std::{net::IpAddr, time::Duration};

/// What the gateway needs of the settings.
#[derive(Clone, Debug, Deserialize)]
pub struct Settings {
    /// Where the rows are. Its `pool_size` doesn't count here: each blocking thread has a connection.
    pub database: storage::Settings,
    /// The gateway's own.
    pub api_gateway: HttpSettings,
}

/// The section `[api_gateway]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpSettings {
    /// The address to listen on.
    pub address: IpAddr,
    /// The port; 0 takes any that is free.
    pub port: u16,
    /// Threads that read and write HTTP.
    pub workers: usize,
    /// Threads that wait for the database, each with a connection of its own, or hash a password.
    pub blocking_threads: usize,
    /// The longest request body, those of avatars, events and messages apart.
    pub body_limit_bytes: usize,
    /// The longest request body that brings events.
    pub event_body_limit_bytes: usize,
    /// The longest request body that brings messages of the log.
    pub message_body_limit_bytes: usize,
    /// The largest avatar.
    pub avatar_limit_bytes: usize,
    /// The most followers that an import in the request may ask for.
    pub import_sync_limit: u32,
    /// The most followers that an import by a worker may ask for.
    pub import_async_limit: u32,
    /// Users created in one transaction of an import in the request.
    pub import_step: u32,
    /// How long receiving a request's body may take, and as long again its answer.
    pub request_timeout_ms: u64,
    /// The same for an answer that writes many rows: posts and imports without `async`, messages by the thousand.
    pub long_request_timeout_ms: u64,
    /// How long a stopping gateway may take to answer the requests in hand.
    pub stop_grace_ms: u64,
}

impl HttpSettings {
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        ensure!(self.workers > 0, "api_gateway.workers must be above 0");
        ensure!(
            self.blocking_threads >= 2 * self.workers,
            "api_gateway.blocking_threads must be at least twice api_gateway.workers: of each worker's share, one may \
             be hashing a password"
        );
        ensure!(self.import_step > 0, "api_gateway.import_step must be above 0");
        ensure!(
            self.request_timeout_ms > 0 && self.request_timeout_ms <= self.long_request_timeout_ms,
            "api_gateway.request_timeout_ms must be above 0 and at most api_gateway.long_request_timeout_ms"
        );
        Ok(())
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.request_timeout_ms)
    }

    pub(crate) fn long_request_timeout(&self) -> Duration {
        Duration::from_millis(self.long_request_timeout_ms)
    }
}
