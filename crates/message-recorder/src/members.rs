//! A member of a group: which partitions it reads.

use crate::{
    Reading, SERVICE, Start, group,
    reader::{Reader, Shared, State},
    streams,
};
use anyhow::{Context as _, anyhow};
use broker::{Link, Survey};
use domain::{
    log::{Group, partition_routing_key},
    topology::Retention,
};
use leases::Leases;
use process::{
    HealthSettings, Pulse, Stop,
    health::{self, Health},
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use storage::{Database, partitions};
use telemetry::{BrokerLost, DatabaseUnavailable, PartitionsChanged, emit};

/// How often a member looks whether a reader has finished whose partition is for somebody else.
const HANDOVER: Duration = Duration::from_millis(10);

/// A member of a consumer group, on a process of its own.
pub struct Recorder {
    /// The group.
    pub group: Group,
    /// Where it begins if it's new.
    pub from: Start,
    /// How it's read.
    pub reading: Reading,
    /// The section `[message_log]`.
    pub retention: Retention,
    /// The section `[worker]`.
    pub worker: worker::Settings,
    /// The section `[health]`.
    pub health: HealthSettings,
    /// The section `[broker]`.
    pub broker: broker::Settings,
    /// The database, for the readers.
    pub database: Database,
    /// The same, with a connection for the leases alone.
    pub leases: Database,
}

/// A partition that this process reads.
struct Held {
    stop: Stop,
    state: Arc<State>,
    link: Link,
    thread: JoinHandle<()>,
}

type Partitions = BTreeMap<i32, Held>;

fn lock(held: &Mutex<Partitions>) -> MutexGuard<'_, Partitions> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Recorder {
    /// Reads its share of the partitions until asked to stop, then finishes the batches in hand and hands the partitions
    /// over.
    ///
    /// # Errors
    /// When the settings can't be used, or a reader has died.
    pub fn run_until(self, stop: &Stop) -> anyhow::Result<()> {
        self.worker.check()?;
        self.reading.check()?;
        let held = Arc::new(Mutex::new(Partitions::new()));
        // A round takes as long as the database may take to answer.
        let pulse = Arc::new(Pulse::new(Duration::from_millis(self.worker.time_limit_ms)));
        let begun = Arc::<AtomicBool>::default();
        let _health = health::serve(&self.health, health(&begun, &held, &pulse, &self.database))?;
        let Some(log) = self.begin(stop, &pulse)? else { return Ok(()) };
        begun.store(true, Ordering::Relaxed);

        let mut leases = Leases::new(self.leases.clone(), &self.group.service(), self.reading.ttl());
        let shared = Arc::new(Shared {
            holder: leases.holder().into(),
            log,
            group: self.group,
            reading: self.reading,
            retention: self.retention,
            worker: self.worker,
            broker: self.broker,
            database: self.database,
            until: Mutex::new(Instant::now()),
        });
        let member = Member { shared, held, database: self.leases };
        let shared_out = member.share(&mut leases, stop, &pulse);
        member.leave(leases, &pulse);
        shared_out
    }

    /// Waits for both servers, and sees to it that the group has its offsets; answers what the ids of the log's messages
    /// begin with, unless it's time to stop.
    fn begin(&self, stop: &Stop, pulse: &Pulse) -> anyhow::Result<Option<String>> {
        let survey = || {
            let mut survey = Survey::open(&self.broker, SERVICE)?;
            streams::declare(survey.session(), &self.database, self.retention, None)?;
            Ok(survey)
        };
        let (mut broker_away, mut database_away) = (self.worker.backoff(), self.worker.backoff());
        loop {
            pulse.beat();
            let begun = group::found(&self.database, survey, &self.group, self.from)
                .and_then(|()| Ok(partitions::token(&mut *self.database.connection()?)?));
            let error = match begun {
                Ok(log) => return Ok(Some(log)),
                Err(error) => error,
            };
            let lost_broker = match error.downcast_ref() {
                Some(broker::Error::Url(_)) => return Err(error),
                broker => broker.is_some_and(broker::Error::is_lost),
            };
            let (delay, say) = if lost_broker { broker_away.failed() } else { database_away.failed() };
            if say {
                let chain = format_args!("{error:#}");
                if lost_broker {
                    emit(BrokerLost { purpose: "survey", error: &chain, retry_in: delay });
                } else if matches!(error.downcast_ref(), Some(storage::Error::Unavailable(_))) {
                    emit(DatabaseUnavailable { error: &chain, retry_in: Some(delay) });
                } else {
                    log::warn!(group = self.group.as_str(); "can't begin yet; retrying: {error:#}");
                }
            }
            if stop.wait(delay) {
                return Ok(None);
            }
        }
    }
}

/// A member that has begun.
struct Member {
    shared: Arc<Shared>,
    held: Arc<Mutex<Partitions>>,
    /// For what the leases need.
    database: Database,
}

impl Member {
    /// Reads this process's share of the partitions, until it's time to stop.
    fn share(&self, leases: &mut Leases, stop: &Stop, pulse: &Pulse) -> anyhow::Result<()> {
        let mut away = self.shared.worker.backoff();
        while !stop.is_requested() {
            pulse.beat();
            let next = Instant::now() + self.shared.reading.renew();
            match self.share_once(leases) {
                Ok(()) => _ = away.reset(),
                Err(error) if error.is::<storage::Error>() => {
                    if away.failed().1 {
                        log::warn!("can't renew the leases on partitions; reading pauses: {error:#}");
                    }
                }
                Err(error) => return Err(error),
            }
            while !stop.is_requested() && Instant::now() < next {
                self.hand_over(leases, true)?;
                let rest = next.saturating_duration_since(Instant::now());
                let leaving = lock(&self.held).values().any(|held| held.stop.is_requested());
                stop.wait(if leaving { rest.min(HANDOVER) } else { rest });
            }
        }
        Ok(())
    }

    fn share_once(&self, leases: &mut Leases) -> anyhow::Result<()> {
        let group = &self.shared.group;
        let count = partitions::count(&mut *self.database.connection()?)?;
        let resources: BTreeMap<String, i32> = (0..count).map(|number| (group.resource(number), number)).collect();
        let names: Vec<String> = resources.keys().cloned().collect();
        let round = leases.round(&names)?;
        *self.shared.until.lock().unwrap_or_else(PoisonError::into_inner) = round.until;
        let mut held = lock(&self.held);
        let mut leaving = 0;
        for (partition, reading) in &*held {
            let resource = group.resource(*partition);
            let goes = round.lost.contains(&resource) || round.surplus.contains(&resource);
            if goes && !reading.stop.is_requested() {
                reading.stop.request();
                leaving += 1;
            }
        }
        for (resource, partition) in &resources {
            // One that was given up and came back before its reader had finished begins once that has.
            if leases.held().contains(resource) && !round.surplus.contains(resource) && !held.contains_key(partition) {
                held.insert(*partition, self.read(*partition)?);
            }
        }
        let taken_over = round.gained.iter().filter(|claimed| claimed.taken_over_at.is_some()).count();
        if !round.gained.is_empty() || leaving > 0 {
            emit(PartitionsChanged {
                group: group.as_str(),
                held: held.values().filter(|reading| !reading.stop.is_requested()).count() as u64,
                taken: (round.gained.len() - taken_over) as u64,
                taken_over: taken_over as u64,
                given_up: leaving,
                members: round.members as u64,
            });
        }
        Ok(())
    }

    fn read(&self, partition: i32) -> anyhow::Result<Held> {
        let (stop, state) = (Stop::new(), Arc::<State>::default());
        let reader = Reader::new(self.shared.clone(), partition, stop.clone(), state.clone());
        let link = reader.link();
        let thread = thread::Builder::new()
            .name(format!("{SERVICE}.{}", partition_routing_key(partition)))
            .spawn(move || reader.run())
            .context("can't start a thread")?;
        Ok(Held { stop, state, link, thread })
    }

    /// Gives back the leases on partitions whose readers have finished, if the database is `there`.
    fn hand_over(&self, leases: &mut Leases, there: bool) -> anyhow::Result<()> {
        let mut held = lock(&self.held);
        let finished: Vec<i32> =
            held.iter().filter(|(_, reading)| reading.thread.is_finished()).map(|(number, _)| *number).collect();
        for partition in finished {
            let Some(reading) = held.remove(&partition) else { continue };
            reading.thread.join().map_err(|_| anyhow!("a reader thread panicked; see the log"))?;
            let resource = self.shared.group.resource(partition);
            if there
                && leases.held().contains(&resource)
                && let Err(error) = leases.release(&[resource])
            {
                log::warn!(
                    "could not release the lease on a partition, which will expire: {:#}",
                    anyhow::Error::new(error)
                );
            }
        }
        Ok(())
    }

    /// Finishes what is in hand, and leaves the group.
    fn leave(&self, mut leases: Leases, pulse: &Pulse) {
        // While the database is away nothing can be handed over, and trying that for each partition takes long.
        let there = leases.retire().is_ok();
        lock(&self.held).values().for_each(|reading| reading.stop.request());
        let mut renewed = Instant::now();
        while !lock(&self.held).is_empty() {
            pulse.beat();
            // One that has died is finished as well.
            let _ = self.hand_over(&mut leases, there);
            if there && renewed.elapsed() >= self.shared.reading.renew() {
                let _ = leases.keep();
                renewed = Instant::now();
            }
            thread::sleep(HANDOVER);
        }
        if let Err(error) = leases.leave() {
            log::warn!(
                "could not release the leases on partitions, which will expire: {:#}",
                anyhow::Error::new(error)
            );
        }
    }
}

fn health(begun: &Arc<AtomicBool>, held: &Arc<Mutex<Partitions>>, pulse: &Arc<Pulse>, database: &Database) -> Health {
    let (begun, pulse, database) = (begun.clone(), pulse.clone(), database.probe());
    let (connected, going) = (held.clone(), held.clone());
    let said = |well: bool, otherwise: &str| if well { Ok(()) } else { Err(otherwise.to_owned()) };
    Health::new()
        .live("member", move || said(pulse.is_alive(), "it is stuck"))
        .ready("group", move || said(begun.load(Ordering::Relaxed), "it hasn't begun; see the log"))
        .ready("broker", move || {
            let held = lock(&connected);
            said(held.values().all(|held| held.link.is_connected()), "not connected")
        })
        .ready("database", move || database().map_err(|failure| failure.error().to_string()))
        .ready("partitions", move || {
            let held = lock(&going);
            let trouble = |state: &State| {
                state
                    .trouble()
                    .map(|trouble| trouble.to_string())
                    .or_else(|| state.refusal())
                    .or_else(|| state.refused())
            };
            let trouble = held.iter().find_map(|(number, held)| Some((number, trouble(&held.state)?)));
            trouble.map_or(Ok(()), |(number, trouble)| Err(format!("partition {number}: {trouble}")))
        })
}
