#![doc = include_str!("../README.md")]

mod message_log;
mod refusals;
mod relay;
mod topology;

use anyhow::{Context as _, anyhow, ensure};
use broker::Link;
use domain::topology::{Retention, Topology};
use process::{Program, Pulse, Stop, health};
use serde::Deserialize;
use service::Service;
use std::{
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use storage::{
    Database,
    sleeper::{Sleeper, Table},
};
use telemetry::{BrokerLost, DatabaseAvailable, DatabaseUnavailable, emit};
use topology::Destinations;

pub use message_log::LogRelay;
pub use relay::{Relay, Round};

/// How long saying goodbye to the broker may take.
const GOODBYE: Duration = Duration::from_secs(2);

/// The service's name.
pub const SERVICE: &str = "outbox-relay";

/// The service as a program.
pub const PROGRAM: Program =
    Program::new(SERVICE, "Publishes what is committed in the tables outbox and message_outbox.", run);

/// The sections of the settings that are this service's own.
#[derive(Deserialize)]
struct Settings {
    outbox_relay: Pace,
    message_log: Retention,
}

/// The section `[outbox_relay]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pace {
    /// Rows taken at a time; of the message log, of each partition.
    batch: i64,
    /// The first wait after finding no row; each further one is twice as long.
    idle_min_ms: u64,
    /// The longest of those waits.
    idle_max_ms: u64,
}

/// The most that the broker allows.
const SEGMENT_BYTES_MAX: u64 = 3_000_000_000;

impl Settings {
    fn check(&self) -> anyhow::Result<()> {
        let Pace { batch, idle_min_ms, idle_max_ms } = self.outbox_relay;
        ensure!(batch > 0, "outbox_relay.batch must be above 0");
        ensure!(
            idle_min_ms > 0 && idle_min_ms <= idle_max_ms,
            "outbox_relay.idle_min_ms must be above 0 and at most outbox_relay.idle_max_ms"
        );
        ensure!(
            (1..=SEGMENT_BYTES_MAX).contains(&self.message_log.segment_bytes),
            "message_log.segment_bytes must be above 0 and at most {SEGMENT_BYTES_MAX}"
        );
        Ok(())
    }
}

/// What health checks see of a loop.
struct Signs {
    /// What it relays.
    of: &'static str,
    pulse: Pulse,
    broker_answers: AtomicBool,
    /// Set once there's a loop.
    link: OnceLock<Link>,
    /// What else waits.
    trouble: Mutex<Option<String>>,
}

/// What a loop does, round by round.
trait Relaying {
    fn round(&mut self) -> storage::Result<Round>;
    /// Whether something waits that it tries again by itself.
    fn holds(&self) -> bool;
    /// The next round will find something.
    fn expect(&mut self);
    /// What takes no messages, unless its connection tells.
    fn trouble(&self) -> Option<String>;
}

impl Relaying for Relay {
    fn round(&mut self) -> storage::Result<Round> {
        self.round()
    }

    fn holds(&self) -> bool {
        self.holds()
    }

    fn expect(&mut self) {
        self.expect();
    }

    fn trouble(&self) -> Option<String> {
        None
    }
}

impl Relaying for LogRelay {
    fn round(&mut self) -> storage::Result<Round> {
        self.round()
    }

    fn holds(&self) -> bool {
        self.holds()
    }

    fn expect(&mut self) {
        self.expect();
    }

    fn trouble(&self) -> Option<String> {
        self.trouble()
    }
}

/// Runs the service until it's told to stop.
///
/// # Errors
/// When the settings can't be used.
pub fn run() -> anyhow::Result<()> {
    let (service, settings) = Service::begin::<Settings>(SERVICE)?;
    settings.check()?;
    // Two loops, and connecting to the broker asks the database, amid a loop's transaction.
    ensure!(service.storage.pool_size > 2, "database.pool_size must be above 2");
    let Service { broker, worker, health, database, stop, .. } = &service;
    let Settings { outbox_relay, message_log } = &settings;
    let batch = outbox_relay.batch;
    // One round takes as long as the broker may take to confirm and the database to answer.
    let limit = Duration::from_millis(worker.time_limit_ms);
    let signs = ["the outbox", "the message log"].map(|of| Signs {
        of,
        pulse: Pulse::new(limit),
        broker_answers: AtomicBool::new(false),
        link: OnceLock::new(),
        trouble: Mutex::default(),
    });
    let signs = Arc::new(signs);
    let fleet = Topology::fleet(&worker.retry_delays());
    let destinations = Destinations::new(fleet.clone(), *message_log, database.clone());
    let _health = health::serve(health, checks(&signs, &destinations, database))?;

    let mut away = worker.backoff();
    while let Err(error) = destinations.declare_at(broker) {
        if matches!(error, broker::Error::Url(_)) {
            return Err(error.into());
        }
        let (delay, say) = away.failed();
        if say {
            let error = anyhow::Error::new(error);
            emit(BrokerLost { purpose: "declare", error: &format_args!("{error:#}"), retry_in: delay });
        }
        signs.iter().for_each(|signs| signs.pulse.beat());
        if stop.wait(delay) {
            return Ok(());
        }
    }
    signs.iter().for_each(|signs| signs.broker_answers.store(true, Ordering::Relaxed));

    let mut outbox = Relay::to(destinations, database.clone(), broker, batch);
    let mut log = LogRelay::new(database.clone(), broker, fleet, *message_log, batch);
    let [of_outbox, of_log] = &*signs;
    let _ = (of_outbox.link.set(outbox.link()), of_log.link.set(log.link()));
    // Apart from the pool: each keeps its connection while it sleeps.
    let for_sleepers = Database::open(&storage::Settings { pool_size: 2, ..service.storage.clone() }, SERVICE)?;
    let for_outbox = Sleeper::new(for_sleepers.clone(), Table::Outbox);
    let for_log = Sleeper::new(for_sleepers, Table::MessageOutbox);
    thread::scope(|scope| {
        // On a thread of its own, so that neither waits for the other's confirms.
        let log = thread::Builder::new().name("message-log".into()).spawn_scoped(scope, || {
            repeat(outbox_relay, worker, stop, of_log, for_log, &mut log);
            log.close();
        });
        let log = log.context("can't start a thread")?;
        repeat(outbox_relay, worker, stop, of_outbox, for_outbox, &mut outbox);
        outbox.close();
        log.join().map_err(|_| anyhow!("the message log's relay thread panicked; see the log"))
    })
}

fn checks(signs: &Arc<[Signs; 2]>, destinations: &Destinations, database: &Database) -> health::Health {
    let (moving, connected, database) = (signs.clone(), signs.clone(), database.probe());
    let destinations = destinations.clone();
    health::Health::new()
        .live("relay", move || match moving.iter().find(|signs| !signs.pulse.is_alive()) {
            Some(Signs { of, .. }) => Err(format!("the loop for {of} is stuck")),
            None => Ok(()),
        })
        .ready("broker", move || {
            let answers = connected.iter().all(|signs| signs.broker_answers.load(Ordering::Relaxed));
            let links: Vec<_> = connected.iter().filter_map(|signs| signs.link.get().cloned()).collect();
            Link::check(answers, &links)?;
            connected.iter().find_map(|signs| lock(&signs.trouble).clone()).map_or(Ok(()), Err)
        })
        .ready("destinations", move || destinations.trouble().map_or(Ok(()), Err))
        .ready("database", move || database().map_err(|failure| failure.error().to_string()))
}

/// Stops everything when it's dropped: one loop isn't to go on without the other.
struct EndAll<'a>(&'a Stop);

impl Drop for EndAll<'_> {
    fn drop(&mut self) {
        self.0.request();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long nothing has come before the loop sleeps until it's called.
const SLEEPS_AFTER: Duration = Duration::from_millis(50);

/// How often a sleeper looks all the same, and says that it's there.
const LOOKS_EVERY: Duration = Duration::from_secs(1);

/// How long it doesn't try to sleep after it couldn't.
const SLEEPLESS: Duration = Duration::from_secs(30);

/// Relays round by round until it's time to stop: the next at once while there may be more, else after a wait, and when
/// nothing comes for long, whenever it's called.
fn repeat(
    &Pace { idle_min_ms, idle_max_ms, .. }: &Pace,
    worker: &worker::Settings,
    stop: &Stop,
    signs: &Signs,
    mut sleeper: Sleeper,
    relay: &mut impl Relaying,
) {
    let _end_all = EndAll(stop);
    let mut broker_away = worker.backoff();
    let mut database_away = worker.backoff();
    let mut idle_ms = idle_min_ms;
    let mut tired_at = Instant::now() + SLEEPS_AFTER;
    while !stop.is_requested() {
        signs.pulse.beat();
        let round = relay.round();
        *lock(&signs.trouble) = relay.trouble();
        if round.is_ok()
            && let Some(after) = database_away.reset()
        {
            emit(DatabaseAvailable { after });
        }
        let wait = match round {
            Ok(Round::Relayed) => {
                sleeper.wake();
                broker_away.reset();
                signs.broker_answers.store(true, Ordering::Relaxed);
                idle_ms = idle_min_ms;
                tired_at = Instant::now() + SLEEPS_AFTER;
                continue;
            }
            Ok(Round::Idle) if sleeper.is_asleep() => {
                if sleep(&mut sleeper, stop, idle_max_ms) {
                    // It wakes up when it has relayed what it was called for, which is first.
                    relay.expect();
                } else if let Err(error) = sleeper.fall_asleep() {
                    log::debug!("woken by the database: {error}");
                }
                continue;
            }
            Ok(Round::Idle) => {
                if tired_at <= Instant::now() && !relay.holds() {
                    match sleeper.fall_asleep() {
                        // What came before is to be seen now.
                        Ok(true) => continue,
                        // Somebody is just inserting.
                        Ok(false) => tired_at = Instant::now() + SLEEPS_AFTER,
                        Err(error) => {
                            log::debug!("can't sleep, so it polls: {error}");
                            tired_at = Instant::now() + SLEEPLESS;
                        }
                    }
                }
                let wait = Duration::from_millis(idle_ms);
                idle_ms = (idle_ms * 2).min(idle_max_ms);
                wait
            }
            // That has been said.
            Ok(Round::BrokerAway) => {
                sleeper.wake();
                signs.broker_answers.store(false, Ordering::Relaxed);
                broker_away.failed().0
            }
            Err(error) => {
                sleeper.wake();
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
}

/// Sleeps until it's called, which it returns, or for as long as it may without looking.
fn sleep(sleeper: &mut Sleeper, stop: &Stop, listen_every_ms: u64) -> bool {
    let began = Instant::now();
    while began.elapsed() < LOOKS_EVERY {
        if sleeper.is_called() {
            return true;
        }
        if stop.wait(Duration::from_millis(listen_every_ms)) {
            break;
        }
    }
    false
}
