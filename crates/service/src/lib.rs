#![doc = include_str!("../README.md")]

use process::{HealthSettings, Stop};
use serde::{Deserialize, de::DeserializeOwned};
use std::{sync::Arc, time::Duration};
use storage::{Database, attempts::Ledger};
use worker::{BatchHandler, Consuming, Queues, Worker};

/// The sections of the settings that every service has.
#[derive(Deserialize)]
struct Sections {
    database: storage::Settings,
    broker: broker::Settings,
    worker: worker::Settings,
    health: HealthSettings,
}

/// A service that has begun.
pub struct Service {
    /// Its name.
    pub name: &'static str,
    /// The section `[database]`.
    pub storage: storage::Settings,
    /// The section `[broker]`.
    pub broker: broker::Settings,
    /// The section `[worker]`.
    pub worker: worker::Settings,
    /// The section `[health]`.
    pub health: HealthSettings,
    /// The database; there's no connection yet.
    pub database: Database,
    /// Requested by SIGTERM or SIGINT.
    pub stop: Stop,
    _telemetry: telemetry::Guard,
}

impl Service {
    /// Begins the service of this name, and loads the sections of the settings that are its own.
    ///
    /// # Errors
    /// When the settings can't be used.
    pub fn begin<T: DeserializeOwned>(name: &'static str) -> anyhow::Result<(Self, T)> {
        let (Sections { database, broker, worker, health }, _telemetry) = process::begin(name)?;
        let own = settings::load(name)?;
        let service = Self {
            name,
            _telemetry,
            database: Database::open(&database, name)?,
            stop: Stop::on_signals(Duration::from_millis(worker.stop_grace_ms))?,
            storage: database,
            broker,
            worker,
            health,
        };
        Ok((service, own))
    }

    /// Hands the messages of queues to handlers until it's told to stop; each consumer has a handler of its own.
    ///
    /// # Errors
    /// When the settings can't be used, or a consumer has died.
    pub fn consume<H: BatchHandler>(
        self,
        queues: impl Into<Queues>,
        consuming: Consuming,
        handler: impl Fn(Database) -> H + Sync,
    ) -> anyhow::Result<()> {
        let Self { name, broker, worker, health, database, stop, .. } = &self;
        Worker {
            service: name,
            queues: queues.into(),
            settings: worker.clone(),
            consuming,
            health: health.clone(),
            broker: broker.clone(),
            ledger: Arc::new(Ledger::new(database.clone())),
            database: database.probe(),
            handler: || handler(database.clone()),
        }
        .run_until(stop.clone())
    }
}
