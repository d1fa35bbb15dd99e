//! The servers and processes of an experiment, and their cleaning up.

use crate::{
    balances::{self, Counted},
    consume::{Consumer, Strategy},
    context::Settings,
    experiment::Experiment,
    interrupt::{Interrupt, Interrupted},
    load::{self, Fault, Message},
    names, produce,
    progress::Progress,
    report::Report,
    tables,
    work::WorkTime,
};
use anyhow::{Context as _, bail};
use broker::{Publisher, QueueDepth, Session};
use domain::{
    stream::shard_queue,
    topology::{ExchangeKind, Expiry, Queue, Topology},
};
use harness::Processes;
use std::{
    ops::Range,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};
use storage::{Database, resharding};

/// How often to look how far things are.
const POLL: Duration = Duration::from_millis(10);

/// The processes of an experiment.
pub(crate) type Children = Processes<String>;

/// How long a process may take to end that was asked to.
pub(crate) const GRACE: Duration = Duration::from_secs(5);

/// How long processes may take to start.
const START: Duration = Duration::from_secs(60);

/// What a run was asked for.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) users: u32,
    pub(crate) messages: u32,
    pub(crate) offset: i64,
    pub(crate) consumers: u32,
    pub(crate) work: WorkTime,
    pub(crate) seed: u64,
    pub(crate) tolerate_new: bool,
    pub(crate) fresh: bool,
    pub(crate) out: PathBuf,
}

/// One experiment's surroundings.
pub(crate) struct Lab {
    pub(crate) settings: Settings,
    pub(crate) options: Options,
    pub(crate) experiment: Experiment,
    pub(crate) interrupt: Interrupt,
    pub(crate) database: Database,
    pub(crate) session: Session,
    pub(crate) children: Children,
    pub(crate) progress: Progress,
    publisher: Publisher,
}

impl Lab {
    pub(crate) fn new(
        settings: &Settings,
        options: &Options,
        experiment: Experiment,
        interrupt: &Interrupt,
        database: &Database,
    ) -> anyhow::Result<Self> {
        let mut children = Processes::new(&options.out.join("logs").join(experiment.to_string()))?;
        for (name, value) in settings.variables() {
            children.set(name, &value);
        }
        Ok(Self {
            settings: settings.clone(),
            options: options.clone(),
            experiment,
            interrupt: interrupt.clone(),
            database: database.clone(),
            session: Session::open(&settings.broker, crate::SERVICE)?,
            children,
            progress: Progress::new(&experiment.to_string(), 1),
            publisher: Publisher::new(&settings.broker, crate::SERVICE),
        })
    }

    /// Runs the experiment, and takes away what it has set up, whatever becomes of it.
    pub(crate) fn run(
        mut self,
        experiment: impl FnOnce(&mut Self) -> anyhow::Result<Report>,
    ) -> anyhow::Result<Report> {
        let began = Instant::now();
        produce::prepare_users(&self.database, &self.users(), self.options.fresh)?;
        let result = experiment(&mut self);
        // Those that don't heed are killed.
        self.children.stop_all(GRACE);
        let cleaned = self.forget_users().and_then(|()| self.clean());
        let mut report = result.map_err(|error| {
            // Whoever interrupts it needs no logs.
            let logs = format!("{} (its logs are in {})", self.experiment, self.options.out.join("logs").display());
            if error.is::<Interrupted>() { error } else { error.context(logs) }
        })?;
        cleaned.context("can't take away what the experiment has set up")?;
        report.took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(report)
    }

    /// The users of this run.
    pub(crate) fn users(&self) -> Range<i64> {
        self.options.offset..self.options.offset + i64::from(self.options.users)
    }

    /// Everybody's messages, of version 1.
    pub(crate) fn messages(&self) -> Vec<Message> {
        load::messages(self.options.seed, self.users(), self.options.messages, 1)
    }

    /// The queues of the consumers from `first` on.
    pub(crate) fn queues(&self, first: u32, count: u32) -> Vec<String> {
        (first..first + count).map(|consumer| names::queue(self.experiment, consumer)).collect()
    }

    /// Declares the experiment's exchange and these queues, unbound.
    pub(crate) fn declare(&mut self, kind: ExchangeKind, queues: &[String]) -> anyhow::Result<()> {
        self.declare_with(kind, queues, &Expiry::Never)
    }

    /// The same with queues whose messages end in another way.
    pub(crate) fn declare_with(
        &mut self,
        kind: ExchangeKind,
        queues: &[String],
        expiry: &Expiry,
    ) -> anyhow::Result<()> {
        let mut topology = names::unbound(self.experiment, kind, queues);
        topology.queues.iter_mut().for_each(|queue| queue.expiry = expiry.clone());
        Ok(broker::declare(&mut self.session, &topology)?)
    }

    /// Binds queues to the experiment's exchange, in this order.
    pub(crate) fn bind(&mut self, queues: &[String]) -> anyhow::Result<()> {
        Ok(broker::declare(&mut self.session, &names::bindings(self.experiment, queues, "1"))?)
    }

    /// Publishes messages to the experiment's exchange, with what is to go wrong with each.
    pub(crate) fn publish(
        &mut self,
        messages: &[Message],
        mut fault: impl FnMut(usize) -> Option<Fault>,
    ) -> anyhow::Result<()> {
        self.interrupt.check()?;
        let exchange = names::exchange(self.experiment);
        let envelope = |(index, message)| load::envelope(&exchange, message, fault(index));
        let envelopes: Vec<_> = messages.iter().enumerate().map(envelope).collect();
        produce::publish(&mut self.publisher, &envelopes)
    }

    /// A consumer with the run's options.
    pub(crate) fn consumer(&self, strategy: Strategy, id: u32, queue: &str) -> Consumer {
        Consumer {
            strategy,
            id,
            queue: Some(queue.to_owned()),
            prefetch: 1,
            first: self.options.consumers,
            tolerate_new: self.options.tolerate_new,
            idempotent: false,
            ignore_faults: false,
            work: self.options.work,
            seed: self.options.seed,
        }
    }

    /// Starts a consumer's process.
    pub(crate) fn start(&mut self, consumer: &Consumer) -> anyhow::Result<()> {
        self.children.start(consumer.name(), crate::SERVICE, consumer.arguments(), &consumer.variables())
    }

    /// Starts a consumer for each queue, numbered from `first`, and awaits that all consume.
    pub(crate) fn start_each(&mut self, strategy: Strategy, first: u32, queues: &[String]) -> anyhow::Result<()> {
        for (id, queue) in (first..).zip(queues) {
            self.start(&self.consumer(strategy, id, queue))?;
        }
        self.await_consumers(queues, 1)
    }

    /// Awaits that each of the queues has so many consumers.
    pub(crate) fn await_consumers(&mut self, queues: &[String], count: u32) -> anyhow::Result<()> {
        let end = Instant::now() + START;
        while self.depths(queues)?.iter().any(|depth| depth.consumers < count) {
            self.children.all_run()?;
            if Instant::now() > end {
                bail!("the consumers haven't begun after {START:?}");
            }
            self.interrupt.sleep(POLL)?;
        }
        Ok(())
    }

    pub(crate) fn depths(&mut self, queues: &[String]) -> anyhow::Result<Vec<QueueDepth>> {
        Ok(broker::depths(&mut self.session, queues)?)
    }

    /// How many messages are ready in these queues.
    pub(crate) fn ready(&mut self, queues: &[String]) -> anyhow::Result<u64> {
        Ok(self.depths(queues)?.iter().map(|depth| u64::from(depth.messages)).sum())
    }

    /// How many effects there are.
    pub(crate) fn effects(&self) -> anyhow::Result<u64> {
        Ok(balances::effects(&mut *self.database.connection()?, &self.users())?.unsigned_abs())
    }

    /// What each consumer has done.
    pub(crate) fn counts(&self) -> anyhow::Result<Vec<Counted>> {
        Ok(balances::counts(&mut *self.database.connection()?, &self.users())?)
    }

    /// Longer than any single message may take: when nothing has happened for this time, nothing will.
    pub(crate) fn patience(&self) -> Duration {
        Duration::from_secs(2) + 2 * self.options.work.longest()
    }

    /// Waits until there are so many effects, and returns true; or false when there has been no further one for as long
    /// as `patience`. Meanwhile looks after the processes.
    pub(crate) fn watch(
        &mut self,
        doing: &str,
        effects: u64,
        patience: Duration,
        mut look_after: impl FnMut(&mut Children) -> anyhow::Result<()>,
    ) -> anyhow::Result<bool> {
        self.progress.step(doing, effects);
        let (mut reached, mut changed) = (0, Instant::now());
        loop {
            let now = self.effects()?;
            if now >= effects {
                return Ok(true);
            }
            if now != reached {
                (reached, changed) = (now, Instant::now());
                self.progress.reached(now);
            }
            if changed.elapsed() > patience {
                return Ok(false);
            }
            look_after(&mut self.children)?;
            self.interrupt.sleep(POLL)?;
        }
    }

    /// Waits until there are so many effects.
    ///
    /// # Errors
    /// When there come no further ones for a long time.
    pub(crate) fn await_effects(&mut self, doing: &str, effects: u64) -> anyhow::Result<()> {
        let patience = START + self.patience();
        if self.watch(doing, effects, patience, Children::all_run)? {
            return Ok(());
        }
        bail!("{} of {effects} messages have taken effect, and no further one for {patience:?}", self.effects()?)
    }

    /// Forgets what the users' messages have done so far.
    pub(crate) fn forget_users(&self) -> anyhow::Result<()> {
        Ok(self.database.transaction(|conn| balances::forget(conn, &self.users()))?)
    }

    /// Takes away what this experiment has set up, or one of the same name that crashed.
    pub(crate) fn clean(&mut self) -> anyhow::Result<()> {
        clean(&self.settings, &mut self.session, &self.database, &[self.experiment])
    }

    /// To be said before anything that declares the fleet's exchanges and queues: if they aren't there, they'll go with
    /// the lab.
    pub(crate) fn be_guest(&mut self) -> anyhow::Result<()> {
        let names: Vec<_> = fleet(&self.settings, &self.database)?.queues.into_iter().map(|queue| queue.name).collect();
        if broker::existing(&mut self.session, &names)?.is_empty() {
            let marker = Queue { name: names::GUEST.into(), expiry: Expiry::Never };
            broker::declare(&mut self.session, &Topology { queues: vec![marker], ..Topology::default() })?;
        }
        Ok(())
    }
}

/// The exchanges and queues that the fleet's own services declare.
fn fleet(settings: &Settings, database: &Database) -> anyhow::Result<Topology> {
    let streams = resharding::topology(&mut *database.connection()?)?;
    Ok(Topology::fleet(&settings.worker.retry_delays()).and(streams))
}

/// Takes away the exchanges, queues and rows of experiments, whoever has left them behind.
pub(crate) fn clean(
    settings: &Settings,
    session: &mut Session,
    database: &Database,
    experiments: &[Experiment],
) -> anyhow::Result<()> {
    let queues: Vec<_> = experiments.iter().flat_map(|experiment| names::queues(*experiment)).collect();
    broker::delete_queues(session, &queues)?;
    for experiment in experiments {
        match experiment {
            Experiment::Killer => {
                for queue in names::queues(*experiment) {
                    database.transaction(|conn| tables::remove_failures(conn, &queue))?;
                }
            }
            Experiment::Sequenced => {
                database.transaction(|conn| tables::remove_stream(conn, names::STREAM, crate::SERVICE))?;
                let shards: Vec<_> = (0..SHARDS_MAX).map(|shard| shard_queue(names::STREAM, shard)).collect();
                broker::delete_queues(session, &shards)?;
            }
            _ => {}
        }
    }
    let exchanges: Vec<_> = experiments.iter().map(|experiment| names::exchange(*experiment)).collect();
    broker::delete_exchanges(session, &exchanges)?;
    if !broker::existing(session, &[names::GUEST.to_owned()])?.is_empty() {
        leave(settings, session, database)?;
    }
    Ok(())
}

/// The most shards of the lab's stream.
pub(crate) const SHARDS_MAX: i32 = 16;

/// Takes away the fleet's exchanges and queues, which weren't there before the lab, unless the fleet has come meanwhile.
fn leave(settings: &Settings, session: &mut Session, database: &Database) -> anyhow::Result<()> {
    let topology = fleet(settings, database)?;
    let names: Vec<_> = topology.queues.into_iter().map(|queue| queue.name).collect();
    let mut used = broker::existing(session, &names)?;
    // A connection that has just ended may still be counted.
    let end = Instant::now() + Duration::from_secs(30);
    while used.iter().any(|queue| queue.consumers > 0) && Instant::now() < end {
        thread::sleep(POLL);
        used = broker::existing(session, &names)?;
    }
    if used.iter().all(|queue| queue.consumers == 0 && queue.messages == 0) {
        broker::delete_queues(session, &names)?;
        let exchanges: Vec<_> = topology.exchanges.into_iter().map(|exchange| exchange.name).collect();
        broker::delete_exchanges(session, &exchanges)?;
    }
    broker::delete_queues(session, &[names::GUEST.to_owned()])?;
    Ok(())
}
