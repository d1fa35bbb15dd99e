use crate::{BatchHandler, Consuming, HealthSettings, Settings, Stop};
use domain::{AttemptLedger, Failure};
use std::{sync::Arc, time::Duration};

/// A service that consumes queues: everything that [`BatchHandler`] leaves to be said.
pub struct Worker<F> {
    /// The service's name, as the broker's tools show it.
    pub service: &'static str,
    /// The queues.
    pub queues: Vec<String>,
    /// The section `[worker]`.
    pub settings: Settings,
    /// How to consume.
    pub consuming: Consuming,
    /// The section `[health]`.
    pub health: HealthSettings,
    /// The section `[broker]`.
    pub broker: broker::Settings,
    /// Counts attempts at messages that may have killed a process.
    pub ledger: Arc<dyn AttemptLedger>,
    /// Whether the database answers. Asked before the first message is taken, and by health checks.
    pub database: Arc<dyn Fn() -> Result<(), Failure> + Send + Sync>,
    /// Makes a handler: one for each consumer, and a fresh one after a panic.
    pub handler: F,
}

impl<H: BatchHandler, F: Fn() -> H + Sync> Worker<F> {
    /// Works until SIGTERM or SIGINT.
    ///
    /// # Errors
    /// When the settings can't be used, or a consumer has died.
    pub fn run(self) -> anyhow::Result<()> {
        let stop = Stop::on_signals(Duration::from_millis(self.settings.stop_grace_ms))?;
        self.run_until(stop)
    }

    /// Works until asked to stop.
    ///
    /// # Errors
    /// As for [`Worker::run`].
    pub fn run_until(self, _stop: Stop) -> anyhow::Result<()> {
        unimplemented!()
    }
}
