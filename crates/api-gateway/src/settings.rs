use anyhow::ensure;
use ipnet::IpNet;
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
    /// How long a request waits for one of the blocking threads at most.
    pub queue_timeout_ms: u64,
    /// The longest head of a request.
    pub head_limit_bytes: usize,
    /// The longest path and query.
    pub uri_limit_bytes: usize,
    /// How long a request's head may take from its first byte on.
    pub head_timeout_ms: u64,
    /// How long a connection may be without a request.
    pub idle_timeout_ms: u64,
    /// How long a client may take to read an answer.
    pub write_timeout_ms: u64,
    /// Connections at most.
    pub connections: usize,
    /// Connections of one address at most.
    pub connections_per_address: usize,
    /// Bytes of request bodies in hand at most, all together.
    pub body_budget_bytes: usize,
    /// Bytes of answers on their way at most, all together, those below 8 KiB apart.
    pub answer_budget_bytes: usize,
    /// Names by which the gateway is called, besides addresses and `localhost`; `*` for any.
    pub hosts: Vec<String>,
    /// Origins whose pages may have a browser change something, besides the gateway's own.
    pub origins: Vec<String>,
    /// Proxies whose `X-Forwarded-For` counts.
    pub trusted_proxies: Vec<IpNet>,
    /// Clients that no limit by address holds for.
    pub unlimited_addresses: Vec<IpNet>,
    /// Requests a second that read, of one address; 0 for no limit, as in those that follow.
    pub reads_per_s: u32,
    /// Requests a second that change something, of one address.
    pub writes_per_s: u32,
    /// Requests a second that bring imports, events or messages, of one address.
    pub bulk_writes_per_s: u32,
    /// New users a minute, of one address.
    pub sign_ups_per_minute: u32,
    /// How long a stopping gateway may take to answer the requests in hand.
    pub stop_grace_ms: u64,
}

impl HttpSettings {
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        ensure!(self.workers > 0, "api_gateway.workers must be above 0");
        ensure!(self.blocking_threads > 0, "api_gateway.blocking_threads must be above 0");
        ensure!(self.import_step > 0, "api_gateway.import_step must be above 0");
        ensure!(
            self.request_timeout_ms > 0 && self.request_timeout_ms <= self.long_request_timeout_ms,
            "api_gateway.request_timeout_ms must be above 0 and at most api_gateway.long_request_timeout_ms"
        );
        ensure!(
            self.body_budget_bytes >= self.event_body_limit_bytes,
            "api_gateway.body_budget_bytes must be at least api_gateway.event_body_limit_bytes"
        );
        ensure!(self.connections >= self.workers, "api_gateway.connections must be at least api_gateway.workers");
        Ok(())
    }

    /// The longest body that brings an avatar: Base64 makes three bytes four, and the form around them has some of its own.
    pub(crate) fn avatar_body_limit_bytes(&self) -> usize {
        self.avatar_limit_bytes / 3 * 4 + self.body_limit_bytes
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.request_timeout_ms)
    }

    pub(crate) fn long_request_timeout(&self) -> Duration {
        Duration::from_millis(self.long_request_timeout_ms)
    }
}
