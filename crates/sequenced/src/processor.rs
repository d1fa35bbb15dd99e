//! A service on a sequenced stream: its threads.

use crate::{
    Handler, Settings,
    engine::{Engine, SharedLanes},
    intake::Intake,
    lanes::Lanes,
    pool::Pool,
    recorder::Recorder,
    shares::{Shards, Sharer},
    signal::Signal,
    sweep::Sweep,
    time_limit::TimeLimit,
    work::Work,
};
use ::process::{HealthSettings, Stop};
use anyhow::{Context as _, ensure};
use domain::topology::Topology;
use leases::Leases;
use std::{
    process,
    sync::Arc,
    thread::{self, Scope, ScopedJoinHandle},
    time::Duration,
};
use storage::{Database, attempts::Ledger, streams};
use worker::{Consuming, Queues, Worker};

/// What sysexits.h calls an internal software error.
const EX_SOFTWARE: i32 = 70;

/// A service that handles a stream's events: everything that [`Handler`] leaves to be said.
pub struct Processor<H> {
    /// The service's name, as the broker's tools show it.
    pub service: &'static str,
    /// The stream.
    pub stream: &'static str,
    /// The section `[sequenced]`.
    pub settings: Settings,
    /// How many events are worked on side by side, each of another key.
    pub lanes: usize,
    /// The section `[worker]`: time limit, retry delays and backoff hold for events as for messages.
    pub worker: worker::Settings,
    /// How to take messages in.
    pub consuming: Consuming,
    /// The section `[health]`.
    pub health: HealthSettings,
    /// The section `[broker]`.
    pub broker: broker::Settings,
    /// The database.
    pub database: Database,
    /// The same, with a connection for the leases alone.
    pub leases: Database,
    /// The business.
    pub handler: H,
}

impl<H: Handler> Processor<H> {
    /// Works until asked to stop, then finishes the events in hand and hands the shards over.
    ///
    /// # Errors
    /// When the settings can't be used, or a thread has died.
    pub fn run_until(self, stop: Stop) -> anyhow::Result<()> {
        self.settings.check()?;
        self.worker.check()?;
        self.consuming.check().with_context(|| format!("settings of {}", self.service))?;
        ensure!(self.lanes > 0, "lanes must be above 0");
        let leases = Leases::new(self.leases.clone(), self.service, self.settings.ttl());
        let holder = leases.holder().to_owned();
        let (outcomes, recorded) = crossbeam_channel::unbounded();
        let attempts = u32::try_from(self.worker.retry_delays_ms.len()).unwrap_or(u32::MAX).saturating_add(1);
        let (handler, sweep) = (Arc::new(self.handler), Arc::<Signal>::default());
        let lanes = SharedLanes::new(Lanes::new(self.lanes, attempts));
        let work = Work { handler: handler.clone(), lanes: lanes.clone(), outcomes: outcomes.clone() };
        let engine = Arc::new(Engine {
            stream: self.stream,
            database: self.database.clone(),
            lanes,
            pool: Pool::new(self.lanes, move |task| work.on(task)),
            outcomes,
            stop,
        });

        let (database, stream) = (self.database.clone(), self.stream);
        let queues = Queues::declared_by(move || {
            let layout = streams::layout(&mut *database.connection()?, stream)?;
            Ok(Topology::stream(stream, layout.queues))
        });
        let recorder = Recorder {
            engine: engine.clone(),
            handler,
            holder,
            ttl: self.settings.ttl(),
            settings: self.worker.clone(),
            outcomes: recorded,
            sweep: sweep.clone(),
        };
        let time_limit = TimeLimit { engine: engine.clone(), settings: self.worker.clone() };
        let delays = self.worker.retry_delays_ms.iter().chain([&self.worker.unavailable_backoff_max_ms]);
        let sweeper = Sweep {
            engine: engine.clone(),
            ttl: self.settings.ttl(),
            longest_wait: Duration::from_millis(delays.copied().max().unwrap_or(0)),
            signal: sweep.clone(),
        };
        let sharer = Sharer {
            engine: engine.clone(),
            leases,
            database: self.leases.clone(),
            queues: queues.clone(),
            settings: self.worker.clone(),
            sweep: sweep.clone(),
            shards: Shards::default(),
        };
        let finished = Stop::new();
        thread::scope(|scope| {
            spawn(scope, "recorder", || recorder.run(&finished))?;
            spawn(scope, "time-limit", || time_limit.run(&finished))?;
            spawn(scope, "sweep", || sweeper.run(self.settings.sweep()))?;
            let sharer = spawn(scope, "leases", || sharer.run(self.settings.renew()))?;

            let consumed = Worker {
                service: self.service,
                queues,
                settings: self.worker.clone(),
                consuming: self.consuming.clone(),
                health: self.health.clone(),
                broker: self.broker.clone(),
                ledger: Arc::new(Ledger::new(self.database.clone())),
                database: self.database.probe(),
                handler: || Intake::<H> { engine: engine.clone() },
            }
            .run_until(engine.stop.clone());
            engine.stop.request();
            sweep.give();
            // It ends when everything that was in hand is recorded; a panic of it ends the process.
            let _ = sharer.join();
            finished.request();
            consumed
        })
    }
}

/// Starts a thread that the others can't do without.
fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    run: impl FnOnce() + Send + 'scope,
) -> anyhow::Result<ScopedJoinHandle<'scope, ()>> {
    let run = move || {
        let _with_it = EndProcess;
        run();
    };
    thread::Builder::new().name(name.into()).spawn_scoped(scope, run).context("can't start a thread")
}

/// Ends the process when its thread panics: the others would wait for it for ever.
struct EndProcess;

impl Drop for EndProcess {
    fn drop(&mut self) {
        if thread::panicking() {
            log::error!("a thread panicked; see the log. The process exits");
            telemetry::flush();
            process::exit(EX_SOFTWARE);
        }
    }
}
