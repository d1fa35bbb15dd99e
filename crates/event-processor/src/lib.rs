#![doc = include_str!("../README.md")]

mod simulation;

use domain::{
    Failure,
    stream::{ACCOUNT_EVENT, AccountId},
};
use process::Program;
use sequenced::{Event, Handler, Processor};
use serde::Deserialize;
use service::Service;
use std::{
    thread,
    time::{Duration, Instant},
};
use storage::{
    Database, PgConnection,
    account_effects::{self, Effect},
};
use worker::Consuming;

pub use simulation::{Simulation, WorkTime};

/// The service's name.
pub const SERVICE: &str = "event-processor";

/// The service as a program.
pub const PROGRAM: Program = Program::new(
    SERVICE,
    "Handles account events, in order per account: queues account_event.s000 and following.",
    run,
);

/// The sections of the settings that are this service's own.
#[derive(Deserialize)]
struct Settings {
    sequenced: sequenced::Settings,
    event_processor: Section,
}

#[derive(Deserialize)]
struct Section {
    #[serde(flatten)]
    consuming: Consuming,
    lanes: usize,
    work_ms: WorkTime,
    simulate_failures: bool,
}

/// Runs the service until it's told to stop.
///
/// # Errors
/// When the settings can't be used.
pub fn run() -> anyhow::Result<()> {
    let (service, Settings { sequenced, event_processor }) = Service::begin(SERVICE)?;
    let Section { consuming, lanes, work_ms, simulate_failures } = event_processor;
    Processor {
        service: SERVICE,
        stream: ACCOUNT_EVENT,
        settings: sequenced,
        lanes,
        worker: service.worker,
        consuming,
        health: service.health,
        broker: service.broker,
        leases: Database::open_alone(&service.storage, SERVICE)?,
        database: service.database,
        handler: AccountEvents { work: work_ms, simulate_failures },
    }
    .run_until(service.stop)
}

/// The handler: some work that takes its time, and a row for each event that takes effect.
pub struct AccountEvents {
    /// How long the work takes.
    pub work: WorkTime,
    /// Whether payloads may ask for failures.
    pub simulate_failures: bool,
}

impl Handler for AccountEvents {
    type Key = AccountId;

    /// How long the work took.
    type Done = Duration;

    fn work(&self, event: &Event) -> Result<Duration, Failure> {
        let began = Instant::now();
        if self.simulate_failures {
            Simulation::asked_for(&event.payload).map_or(Ok(()), Simulation::run)?;
        }
        let time = self.work.pick();
        if !time.is_zero() {
            thread::sleep(time);
        }
        Ok(began.elapsed())
    }

    fn apply(&self, conn: &mut PgConnection, worker: &str, done: &[(&Event, &Duration)]) -> storage::Result<()> {
        let effects: Vec<_> = done
            .iter()
            .map(|(event, took)| Effect {
                account: &event.key,
                seq: event.seq,
                work_ms: i32::try_from(took.as_millis()).unwrap_or(i32::MAX),
            })
            .collect();
        account_effects::record(conn, worker, &effects)
    }
}
