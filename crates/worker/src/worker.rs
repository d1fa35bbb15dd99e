use crate::{
    BatchHandler, Consuming, Queues, Settings,
    consume::{Loop, Shared},
    needs::Needs,
    returning::Returner,
};
use anyhow::{Context as _, anyhow};
use broker::{Consumer, Link, Publisher};
use domain::{AttemptLedger, Failure, topology::Topology};
use process::{
    HealthSettings, Pulse, Stop,
    health::{self, Health},
};
use std::{
    sync::{Arc, RwLock},
    thread,
    time::Duration,
};

/// A service that consumes queues: everything that [`BatchHandler`] leaves to be said.
pub struct Worker<F> {
    /// The service's name, as the broker's tools show it.
    pub service: &'static str,
    /// The queues. They may change meanwhile.
    pub queues: Queues,
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
    /// Works until asked to stop, then finishes the batch in hand.
    ///
    /// # Errors
    /// When the settings can't be used, or a consumer has died.
    pub fn run_until(self, stop: Stop) -> anyhow::Result<()> {
        self.work(stop, None)
    }

    /// Works until the queues have had nothing for as long as `idle`.
    ///
    /// # Errors
    /// As for [`Worker::run_until`].
    pub fn run_until_idle(self, idle: Duration) -> anyhow::Result<()> {
        self.work(Stop::new(), Some(idle))
    }

    fn work(self, stop: Stop, until_idle: Option<Duration>) -> anyhow::Result<()> {
        self.settings.check()?;
        self.consuming.check().with_context(|| format!("settings of {}", self.service))?;
        let delays = self.settings.retry_delays();
        let needs = Arc::new(Needs::new(Topology::fleet(&delays), self.queues.clone(), H::PUBLISHES_TO));
        let limit = Duration::from_millis(self.settings.time_limit_ms);

        let lanes: Vec<_> = (0..self.consuming.concurrency)
            .map(|number| {
                let name = format!("{}.{number}", self.service);
                let (for_consumer, for_publisher) = (needs.clone(), needs.clone());
                let consumer = Consumer::new(&self.broker, &name, Vec::new(), self.consuming.prefetch)
                    .leaving_out(needs.left_out())
                    .on_connect(move |session| for_consumer.declare(session));
                let publisher =
                    Publisher::new(&self.broker, &name).on_connect(move |session| for_publisher.declare(session));
                (name, consumer, publisher, Arc::new(Pulse::new(limit)))
            })
            .collect();

        let pulse = Arc::new(Pulse::new(limit));
        let returner = Returner::new(self.service, &self.broker, &self.settings, pulse.clone());

        let pulses: Vec<_> = lanes.iter().map(|(.., pulse)| pulse.clone()).chain([pulse]).collect();
        process::guard(&pulses).context("can't start a thread")?;
        let consuming = lanes.iter().map(|(_, consumer, ..)| consumer.link()).chain([returner.link()]).collect();
        let publishing = lanes.iter().map(|(_, _, publisher, _)| publisher.link()).collect();
        let _health =
            health::serve(&self.health, health(self.database.clone(), consuming, publishing, &needs, pulses))?;

        let shared = Shared {
            queues: &self.queues,
            settings: &self.settings,
            delays: &delays,
            consuming: &self.consuming,
            service: self.service,
            broker: &self.broker,
            needs: &needs,
            ledger: &*self.ledger,
            database: &*self.database,
            make: &self.handler,
            stop,
            until_idle,
            quarantine: &RwLock::new(()),
        };
        let returning = Stop::new();
        thread::scope(|scope| {
            // When no consumer is left, nobody needs it.
            let _end = EndAll(Some(&returning));
            let returning = &returning;
            thread::Builder::new()
                .name(format!("{}.return", self.service))
                .spawn_scoped(scope, move || returner.run(returning))
                .context("can't start a thread")?;
            let mut threads = Vec::new();
            for (name, consumer, publisher, pulse) in lanes {
                let shared = &shared;
                let work = move || {
                    // However this thread ends, the others are not to go on without it.
                    let _end_all = EndAll(shared.until_idle.is_none().then_some(&shared.stop));
                    Loop::new(shared, consumer, publisher, pulse).run()
                };
                threads
                    .push(thread::Builder::new().name(name).spawn_scoped(scope, work).context("can't start a thread")?);
            }
            for thread in threads {
                thread.join().map_err(|_| anyhow!("a consumer thread panicked; see the log"))??;
            }
            Ok(())
        })
    }
}

struct EndAll<'a>(Option<&'a Stop>);

impl Drop for EndAll<'_> {
    fn drop(&mut self) {
        if let Some(stop) = self.0 {
            stop.request();
        }
    }
}

fn health(
    database: Arc<dyn Fn() -> Result<(), Failure> + Send + Sync>,
    consuming: Vec<Link>,
    publishing: Vec<Link>,
    needs: &Arc<Needs>,
    pulses: Vec<Arc<Pulse>>,
) -> Health {
    let said = |well: bool, otherwise: &str| if well { Ok(()) } else { Err(otherwise.to_owned()) };
    let needs = needs.clone();
    Health::new()
        .live("worker", move || said(pulses.iter().all(|pulse| pulse.is_alive()), "a consumer is stuck"))
        .ready("broker", move || {
            let mut links = consuming.iter().chain(&publishing);
            match needs.all_trouble().or_else(|| links.find_map(Link::held_up)) {
                Some(trouble) => Err(trouble),
                None => Link::check(consuming.iter().all(Link::is_connected), &publishing),
            }
        })
        .ready("database", move || database().map_err(|failure| failure.error().to_string()))
}
