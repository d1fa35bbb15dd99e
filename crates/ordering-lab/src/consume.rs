//! One consumer, as a process.

use crate::{
    balances::{self, Applied, Balance, Change, Treatment},
    context::Settings,
    experiment::Experiment,
    load::{Fault, Message},
    names,
    work::WorkTime,
};
use anyhow::Context as _;
use clap::{Args, ValueEnum};
use domain::{Failure, stream::AccountId, topology::ExchangeKind};
use process::Stop;
use rand::{SeedableRng as _, rngs::SmallRng};
use sequenced::{Event, Processor};
use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};
use storage::{Database, PgConnection, attempts::Ledger};
use telemetry::{BalanceChanged, emit};
use worker::{BatchHandler, Consuming, Item, Outgoing, Received, Step, Worker};

/// How a consumer ends that failed at a message.
pub(crate) const FAILED: i32 = 3;

/// How a process ends that wants to be started again, as sysexits.h has it.
pub(crate) const EX_TEMPFAIL: i32 = 75;

/// How messages are consumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Strategy {
    /// With others from the same queue
    Competing,
    /// From a queue of its own, bound to a consistent-hash exchange
    ConsistentHash,
    /// The same, turning away messages of a version that the consumers before haven't come to yet
    MessageVersion,
    /// From the shards of a sequenced stream
    Sequenced,
    /// With the loop of the fleet's services: time limit, retries, dead letters
    Worker,
}

/// One consumer, until it's told to stop; prints what it counted.
#[derive(Args)]
pub(crate) struct Consume {
    /// How it consumes
    #[arg(value_enum)]
    strategy: Strategy,
    /// Its number, from 1
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=2 * i64::from(names::CONSUMERS_MAX)))]
    consumer_id: u32,
    /// How long a message's work takes, in ms
    #[arg(long, value_name = "MS", default_value = "200..1500")]
    work_ms: WorkTime,
    /// How many messages the broker sends ahead
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    prefetch: u16,
    /// Count consumer errors for the first consumers only
    #[arg(long)]
    tolerate_new: bool,
    /// How many are the first consumers
    #[arg(long, value_name = "N", default_value_t = 4)]
    first: u32,
    /// Change nothing for a message that isn't newer than the last one
    #[arg(long)]
    idempotent: bool,
    /// Makes the times of work repeatable
    #[arg(long)]
    seed: Option<u64>,
    /// The queue, if it isn't the strategy's own; it must be there
    #[arg(long)]
    queue: Option<String>,
    /// Handle well the messages that ask for failures
    #[arg(long, hide = true)]
    ignore_faults: bool,
}

/// What a consumer counts; what it saw of each message is in `balance_delivery`.
#[derive(Default)]
struct Counters(Mutex<BTreeMap<String, u64>>);

impl Counters {
    fn count(&self, consumer: u32, change: &Change, errors: balances::Errors) {
        emit(BalanceChanged {
            consumer: number(consumer),
            user: change.user_id,
            version: change.version,
            order_error: errors.order,
            value_error: errors.value,
            consumer_error: errors.consumer,
        });
        let mut counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, seen) in [
            ("order_error".to_owned(), errors.order),
            ("value_error".to_owned(), errors.value),
            ("consumer_error".to_owned(), errors.consumer),
            (format!("processed_version.{}", change.version), true),
        ] {
            *counters.entry(name).or_default() += u64::from(seen);
        }
    }

    fn to_json(&self) -> String {
        let counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        serde_json::to_string(&*counters).expect("names and numbers can be written as JSON")
    }
}

/// A consumer's number, as the tables have it.
fn number(consumer: u32) -> i32 {
    i32::try_from(consumer).unwrap_or(i32::MAX)
}

/// Whether a row that another consumer made is an error for this one.
fn is_foreign(consumer: u32, tolerate_new: bool, first: u32) -> bool {
    !tolerate_new || consumer <= first
}

impl Consume {
    /// Consumes until SIGTERM or SIGINT, and returns what it counted.
    pub(crate) fn run(self, settings: &Settings) -> anyhow::Result<String> {
        let database = settings.database()?;
        let stop = Stop::on_signals(Duration::from_millis(settings.worker.stop_grace_ms))?;
        let counters = Arc::<Counters>::default();
        match self.strategy {
            Strategy::Sequenced => self.sequenced(settings, database, stop, counters.clone())?,
            Strategy::Worker => self.worker(settings, &database, stop, &counters)?,
            _ => self.naive(settings, &database, &stop, &counters)?,
        }
        Ok(counters.to_json())
    }

    fn random(&self) -> SmallRng {
        let seed = self.seed.unwrap_or_else(rand::random);
        SmallRng::seed_from_u64(seed.wrapping_mul(31).wrapping_add(self.consumer_id.into()))
    }

    /// The queue, which is declared and bound if it's the strategy's own: so a further consumer changes the exchange's
    /// mapping when it starts.
    fn prepare_queue(&self, settings: &Settings) -> anyhow::Result<String> {
        if let Some(queue) = &self.queue {
            return Ok(queue.clone());
        }
        let (experiment, kind, consumer) = match self.strategy {
            Strategy::ConsistentHash | Strategy::MessageVersion => {
                (Experiment::ConsistentHash, ExchangeKind::ConsistentHash, self.consumer_id)
            }
            _ => (Experiment::Competing, ExchangeKind::Fanout, 1),
        };
        let queue = names::queue(experiment, consumer);
        let queues = std::slice::from_ref(&queue);
        let mut session = broker::Session::open(&settings.broker, crate::SERVICE)?;
        let topology = names::unbound(experiment, kind, queues).and(names::bindings(experiment, queues, "1"));
        broker::declare(&mut session, &topology)?;
        Ok(queue)
    }

    /// One message after another, each acknowledged when its effect is committed.
    fn naive(&self, settings: &Settings, database: &Database, stop: &Stop, counters: &Counters) -> anyhow::Result<()> {
        let queue = self.prepare_queue(settings)?;
        let name = format!("{}.{}", crate::SERVICE, self.consumer_id);
        let mut consumer = broker::Consumer::new(&settings.broker, &name, vec![queue], self.prefetch);
        let mut random = self.random();
        while !stop.is_requested() {
            let batch = consumer.next_batch(1, Duration::ZERO, Duration::from_millis(50))?;
            let Some(delivery) = batch.into_iter().next() else { continue };
            let message: Message = serde_json::from_slice(&delivery.body).context("a message isn't the lab's")?;
            let change = Change::from(&message);
            if self.strategy == Strategy::MessageVersion && !self.is_its_turn(database, &change)? {
                self.note(database, &change, Treatment::TurnedAway)?;
                consumer.give_back([delivery]);
                continue;
            }
            thread::sleep(self.work_ms.pick(&mut random));
            let fault = Fault::asked_for(&delivery.headers).filter(|_| !self.ignore_faults);
            match fault {
                Some(Fault::Fail) => {
                    self.note(database, &change, Treatment::Failed)?;
                    end(FAILED);
                }
                Some(Fault::Hang) => {
                    while !stop.wait(Duration::from_secs(3600)) {}
                    break;
                }
                Some(Fault::AfterEffect) | None => {}
            }
            let applied = database.transaction(|conn| self.apply(conn, &change))?;
            if let Applied::Changed(errors) = applied {
                counters.count(self.consumer_id, &change, errors);
            }
            if fault == Some(Fault::AfterEffect) && !delivery.redelivered {
                end(FAILED);
            }
            consumer.ack([delivery]);
        }
        consumer.close(Instant::now() + Duration::from_secs(2));
        Ok(())
    }

    fn apply(&self, conn: &mut PgConnection, change: &Change) -> storage::Result<Applied> {
        let foreign = is_foreign(self.consumer_id, self.tolerate_new, self.first);
        balances::apply(conn, number(self.consumer_id), change, self.idempotent, |_| foreign)
    }

    fn note(&self, database: &Database, change: &Change, treatment: Treatment) -> anyhow::Result<()> {
        Ok(database.transaction(|conn| balances::note(conn, number(self.consumer_id), change, treatment))?)
    }

    /// Whether the consumers before have all come to messages of this version: then, as their queues are in order, they
    /// have none of an earlier one left.
    fn is_its_turn(&self, database: &Database, change: &Change) -> anyhow::Result<bool> {
        const ALL: Range<i64> = 0..i64::MAX;
        if self.consumer_id <= self.first {
            return Ok(true);
        }
        let mut conn = database.connection()?;
        for before in 1..=self.first {
            if balances::processed_version(&mut conn, number(before), &ALL)? < change.version {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// As the fleet's services do it.
    fn worker(&self, settings: &Settings, database: &Database, stop: Stop, counters: &Counters) -> anyhow::Result<()> {
        let queue = self.prepare_queue(settings)?;
        Worker {
            service: crate::SERVICE,
            queues: vec![queue].into(),
            settings: settings.worker.clone(),
            consuming: Consuming { batch: 1, linger_ms: 0, prefetch: self.prefetch, concurrency: 1 },
            health: settings.health.clone(),
            broker: settings.broker.clone(),
            ledger: Arc::new(Ledger::new(database.clone())),
            database: database.probe(),
            handler: || Balances { consume: self, database: database.clone(), counters, random: self.random() },
        }
        .run_until(stop)
    }

    fn sequenced(
        self,
        settings: &Settings,
        database: Database,
        stop: Stop,
        counters: Arc<Counters>,
    ) -> anyhow::Result<()> {
        let random = Mutex::new(self.random());
        Processor {
            service: crate::SERVICE,
            stream: names::STREAM,
            settings: settings.sequenced.clone(),
            lanes: 64,
            worker: settings.worker.clone(),
            consuming: Consuming { batch: 100, linger_ms: 1, prefetch: 200, concurrency: 1 },
            health: settings.health.clone(),
            broker: settings.broker.clone(),
            leases: Database::open_alone(&settings.database, crate::SERVICE)?,
            database,
            handler: Sequenced { consumer: self.consumer_id, work: self.work_ms, random, counters },
        }
        .run_until(stop)
    }
}

/// Ends the process without a word to the broker.
fn end(status: i32) -> ! {
    telemetry::flush();
    command_line::end(status)
}

/// The fleet's loop, with a balance as the effect.
struct Balances<'a> {
    consume: &'a Consume,
    database: Database,
    counters: &'a Counters,
    random: SmallRng,
}

impl BatchHandler for Balances<'_> {
    type Message = Message;

    fn decode(&self, received: &Received) -> anyhow::Result<Message> {
        worker::json(received)
    }

    fn handle(&mut self, batch: &[Item<Message>], _: &mut Outgoing, _: &Step) -> Result<(), Failure> {
        for Item { message, received } in batch {
            thread::sleep(self.consume.work_ms.pick(&mut self.random));
            if received.headers.get(Fault::HEADER).is_some_and(|fault| fault == Fault::Hang.as_str()) {
                loop {
                    thread::park();
                }
            }
            let change = Change::from(message);
            let consumer = self.consume.consumer_id;
            if let Applied::Changed(errors) = self.database.transaction(|conn| self.consume.apply(conn, &change))? {
                self.counters.count(consumer, &change, errors);
            }
        }
        Ok(())
    }
}

/// The same effect on a sequenced stream.
struct Sequenced {
    consumer: u32,
    work: WorkTime,
    random: Mutex<SmallRng>,
    counters: Arc<Counters>,
}

impl sequenced::Handler for Sequenced {
    /// Written as a user's number is.
    type Key = AccountId;

    type Done = Change;

    fn work(&self, event: &Event) -> Result<Change, Failure> {
        let message: Message =
            serde_json::from_str(&event.payload).map_err(|error| Failure::Permanent(error.into()))?;
        let time = self.work.pick(&mut self.random.lock().unwrap_or_else(PoisonError::into_inner));
        thread::sleep(time);
        Ok(Change::from(&message))
    }

    fn apply(&self, conn: &mut PgConnection, _: &str, done: &[(&Event, &Change)]) -> storage::Result<()> {
        for (event, change) in done {
            // A stream's keys may pass from one process to another. It's an error if the row isn't as the event before left it.
            let foreign = |before: &Balance| before.effects != event.seq - 1;
            let applied = balances::apply(conn, number(self.consumer), change, false, foreign)?;
            if let Applied::Changed(errors) = applied {
                // If the commit fails, this is counted twice here and once in the table.
                self.counters.count(self.consumer, change, errors);
            }
        }
        Ok(())
    }
}

/// How a process is told to be a consumer.
pub(crate) struct Consumer {
    pub(crate) strategy: Strategy,
    pub(crate) id: u32,
    pub(crate) queue: Option<String>,
    pub(crate) prefetch: u16,
    pub(crate) first: u32,
    pub(crate) tolerate_new: bool,
    pub(crate) idempotent: bool,
    pub(crate) ignore_faults: bool,
    pub(crate) work: WorkTime,
    pub(crate) seed: u64,
}

impl Consumer {
    /// The process's name.
    pub(crate) fn name(&self) -> String {
        format!("consumer-{}", self.id)
    }

    /// The command's arguments.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let strategy = self.strategy.to_possible_value().expect("no strategy is hidden");
        let mut arguments = vec!["consume".to_owned(), strategy.get_name().to_owned()];
        for (name, value) in [
            ("--consumer-id", self.id.to_string()),
            ("--prefetch", self.prefetch.to_string()),
            ("--first", self.first.to_string()),
            ("--work-ms", self.work.to_string()),
            ("--seed", self.seed.to_string()),
        ] {
            arguments.extend([name.to_owned(), value]);
        }
        arguments.extend(self.queue.iter().flat_map(|queue| ["--queue".to_owned(), queue.clone()]));
        for (name, set) in [
            ("--tolerate-new", self.tolerate_new),
            ("--idempotent", self.idempotent),
            ("--ignore-faults", self.ignore_faults),
        ] {
            arguments.extend(set.then(|| name.to_owned()));
        }
        arguments
    }

    /// Settings of its own. One that takes message after message needs one connection to the database.
    pub(crate) fn variables(&self) -> Vec<(&'static str, &'static str)> {
        match self.strategy {
            Strategy::Sequenced => vec![
                ("MURMURATION__SEQUENCED__LEASE_TTL_MS", "1000"),
                ("MURMURATION__SEQUENCED__LEASE_RENEW_MS", "200"),
                ("MURMURATION__SEQUENCED__SWEEP_MS", "500"),
                // One that freezes within a transaction holds its locks until the server ends that, after twice this time.
                ("MURMURATION__DATABASE__STATEMENT_TIMEOUT_MS", "2000"),
                ("MURMURATION__DATABASE__CALL_TIMEOUT_MS", "2500"),
            ],
            Strategy::Worker => Vec::new(),
            _ => vec![("MURMURATION__DATABASE__POOL_SIZE", "1")],
        }
    }
}
