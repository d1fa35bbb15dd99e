use anyhow::ensure;
use process::Backoff;
use serde::Deserialize;
use std::time::Duration;

/// The section `[worker]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// How long one step of handling may take. Past it the process ends.
    pub time_limit_ms: u64,
    /// How long a stopping worker may take to finish the batch in hand.
    pub stop_grace_ms: u64,
    /// The wait before each further attempt; at least one.
    pub retry_delays_ms: Vec<u64>,
    /// The first wait while something that every message needs is away.
    pub unavailable_backoff_ms: u64,
    /// The longest such wait.
    pub unavailable_backoff_max_ms: u64,
}

impl Settings {
    /// The wait before each further attempt.
    pub fn retry_delays(&self) -> Vec<Duration> {
        self.retry_delays_ms.iter().copied().map(Duration::from_millis).collect()
    }

    /// The waits while something is away.
    pub fn backoff(&self) -> Backoff {
        let ms = Duration::from_millis;
        Backoff::new(ms(self.unavailable_backoff_ms), ms(self.unavailable_backoff_max_ms))
    }

    /// Whether they can be used.
    ///
    /// # Errors
    /// Says which can't.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(self.time_limit_ms > 0, "worker.time_limit_ms must be above 0");
        ensure!(!self.retry_delays_ms.is_empty(), "worker.retry_delays_ms must hold at least one delay");
        ensure!(
            self.unavailable_backoff_ms > 0 && self.unavailable_backoff_ms <= self.unavailable_backoff_max_ms,
            "worker.unavailable_backoff_ms must be above 0 and at most worker.unavailable_backoff_max_ms"
        );
        Ok(())
    }
}

/// How a service consumes: flattened into the service's own section.
#[derive(Clone, Debug, Deserialize)]
pub struct Consuming {
    /// The most messages handled in one transaction.
    pub batch: usize,
    /// How long to wait for a batch to fill once it has its first message.
    pub linger_ms: u64,
    /// How many messages the broker sends ahead; at least the batch, twice that keeps the pipe full.
    pub prefetch: u16,
    /// How many consumers run side by side in this process.
    pub concurrency: usize,
}

impl Consuming {
    /// Whether it can be done.
    ///
    /// # Errors
    /// Says which setting is wrong.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(self.batch > 0, "batch must be above 0");
        ensure!(self.concurrency > 0, "concurrency must be above 0");
        ensure!(usize::from(self.prefetch) >= self.batch, "prefetch must be at least the batch");
        Ok(())
    }
}
