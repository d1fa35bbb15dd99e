#![doc = include_str!("../README.md")]

mod refusals;
mod relay;
mod topology;

use anyhow::ensure;
use broker::Session;
use domain::topology::Topology;
use serde::Deserialize;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use storage::Database;
use telemetry::{BrokerLost, DatabaseAvailable, DatabaseUnavailable, emit};
use worker::{HealthSettings, Pulse, Stop, health};

pub use relay::{Relay, Round};

/// How long saying goodbye to the broker may take.
const GOODBYE: Duration = Duration::from_secs(2);

/// The service's name.
pub const SERVICE: &str = "outbox-relay";

/// The sections of the settings that this service needs.
#[derive(Deserialize)]
struct Settings {
    database: storage::Settings,
    broker: broker::Settings,
    worker: worker::Settings,
    health: HealthSettings,
    telemetry: telemetry::Settings,
    outbox_relay: Relaying,
}

/// The section `[outbox_relay]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Relaying {
    /// Rows taken at a time.
    batch: i64,
    /// The first wait after finding no row; each further one is twice as long.
    idle_min_ms: u64,
    /// The longest of those waits.
    idle_max_ms: u64,
}

/// Runs the service until it's told to stop.
///
/// # Errors
/// When the settings can't be used.
pub fn run() -> anyhow::Result<()> {
    let settings: Settings = settings::load(SERVICE)?;
    let _telemetry = telemetry::init(SERVICE, &settings.telemetry)?;
    let Relaying { batch, idle_min_ms, idle_max_ms } = settings.outbox_relay;
    ensure!(batch > 0, "outbox_relay.batch must be above 0");
    ensure!(
        idle_min_ms > 0 && idle_min_ms <= idle_max_ms,
        "outbox_relay.idle_min_ms must be above 0 and at most outbox_relay.idle_max_ms"
    );
    // Connecting to the broker asks the database, amid a transaction.
    ensure!(settings.database.pool_size > 1, "database.pool_size must be above 1");
    let database = Database::open(&settings.database, SERVICE)?;
    let stop = Stop::on_signals(Duration::from_millis(settings.worker.stop_grace_ms))?;
    // One round takes as long as the broker may take to confirm and the database to answer.
    let pulse = Arc::new(Pulse::new(Duration::from_millis(settings.worker.time_limit_ms)));
    let broker_answers = Arc::new(AtomicBool::new(false));
    let _health = health::serve(&settings.health, {
        let (pulse, broker_answers, database) = (pulse.clone(), broker_answers.clone(), database.probe());
        health::Health::new()
            .live("relay", move || pulse.is_alive().then_some(()).ok_or_else(|| "it hasn't moved for too long".into()))
            .ready("broker", move || {
                broker_answers.load(Ordering::Relaxed).then_some(()).ok_or_else(|| "not connected".into())
            })
            .ready("database", move || database().map_err(|failure| failure.error().to_string()))
    })?;

    let fleet = Topology::fleet(&settings.worker.retry_delays());
    let mut away = settings.worker.backoff();
    while let Err(error) = declare(&settings.broker, &fleet, &database) {
        if matches!(error, broker::Error::Url(_)) {
            return Err(error.into());
        }
        let (delay, say) = away.failed();
        if say {
            let error = anyhow::Error::new(error);
            emit(BrokerLost { purpose: "declare", error: &format_args!("{error:#}"), retry_in: delay });
        }
        pulse.beat();
        if stop.wait(delay) {
            return Ok(());
        }
    }
    broker_answers.store(true, Ordering::Relaxed);

    let mut relay = Relay::new(database, &settings.broker, fleet, batch);
    let mut broker_away = settings.worker.backoff();
    let mut database_away = settings.worker.backoff();
    let mut idle_ms = idle_min_ms;
    while !stop.is_requested() {
        pulse.beat();
        let round = relay.round();
        if round.is_ok()
            && let Some(after) = database_away.reset()
        {
            emit(DatabaseAvailable { after });
        }
        let wait = match round {
            Ok(Round::Relayed) => {
                broker_away.reset();
                broker_answers.store(true, Ordering::Relaxed);
                idle_ms = idle_min_ms;
                continue;
            }
            Ok(Round::Idle) => {
                let wait = Duration::from_millis(idle_ms);
                idle_ms = (idle_ms * 2).min(idle_max_ms);
                wait
            }
            // The publisher has said so.
            Ok(Round::BrokerAway) => {
                broker_answers.store(false, Ordering::Relaxed);
                broker_away.failed().0
            }
            Err(error) => {
                let (delay, say) = database_away.failed();
                if say {
                    let error = anyhow::Error::new(error);
                    emit(DatabaseUnavailable { error: &format_args!("{error:#}"), retry_in: Some(delay) });
                }
                delay
            }
        };
        stop.wait(wait);
    }
    relay.close();
    Ok(())
}

fn declare(settings: &broker::Settings, fleet: &Topology, database: &Database) -> Result<(), broker::Error> {
    let mut session = Session::open(settings, SERVICE)?;
    topology::declare(&mut session, fleet, database)?;
    session.close(Instant::now() + GOODBYE);
    Ok(())
}
