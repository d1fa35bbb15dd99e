//! Processors whose handler is a closure, and what it takes to watch them.

use broker::{Publisher, Session};
use domain::{
    Envelope, Failure,
    stream::{ACCOUNT_EVENT, AccountId, Payload, SHARDS_MAX, shard_queue, shard_resource},
    topology::{Binding, Topology},
};
use outbox_relay::{Relay, Round};
use process::{HealthSettings, Stop};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use sequenced::{Event, Handler, Processor, Settings};
use serde_json::json;
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use storage::{
    Database, PgConnection,
    account_effects::{self, Effect},
    leases, outbox,
    parked::{self, Standing},
    stream_audit,
    streams::{self, Layout},
};
use test_support::{TestDatabase, TestVhost, broker_settings, eventually_within, log_retention};
use worker::Consuming;

/// How long it may take until everything has come to rest, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Two retries, soon: the third failure parks a key.
const RETRY_DELAYS_MS: [u64; 2] = [10, 20];
pub(crate) const ATTEMPTS: i32 = 3;

/// No sweep comes in the time of a test, but for those that something calls for.
pub(crate) const NEVER_MS: u64 = 3_600_000;

/// A database and a broker of its own.
pub(crate) struct Stage {
    pub(crate) database: TestDatabase,
    broker: broker::Settings,
    vhost: Option<TestVhost>,
}

impl Stage {
    /// On the servers that all tests share.
    pub(crate) fn new() -> Self {
        Self::on(TestDatabase::new())
    }

    /// In this database.
    pub(crate) fn on(database: TestDatabase) -> Self {
        let vhost = TestVhost::new();
        Self { broker: broker_settings(vhost.url()), database, vhost: Some(vhost) }
    }

    /// At this broker, which nobody else uses.
    pub(crate) fn at(url: &str) -> Self {
        Self { broker: broker_settings(url), database: TestDatabase::new(), vhost: None }
    }

    /// One that doesn't run yet.
    pub(crate) fn processor(&self, accounts: &Accounts) -> Processor<Accounts> {
        self.processor_of("event-processor", ACCOUNT_EVENT, accounts.clone())
    }

    /// One of another stream.
    pub(crate) fn processor_of<H>(&self, service: &'static str, stream: &'static str, handler: H) -> Processor<H> {
        Processor {
            service,
            stream,
            // Who waits for a lease to run out waits for long.
            settings: Settings { lease_ttl_ms: 600_000, lease_renew_ms: 50, sweep_ms: 100 },
            lanes: 64,
            worker: worker::Settings {
                time_limit_ms: 600_000,
                stop_grace_ms: 600_000,
                retry_delays_ms: RETRY_DELAYS_MS.into(),
                unavailable_backoff_ms: 10,
                unavailable_backoff_max_ms: 20,
            },
            consuming: Consuming { batch: 100, linger_ms: 1, prefetch: 200, concurrency: 1 },
            health: HealthSettings { address: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 0 },
            broker: self.broker.clone(),
            database: self.own_database(),
            leases: Database::open_alone(&self.database.settings(), "test").expect("a usable URL"),
            handler,
        }
    }

    /// A pool of its own: whoever waits for a connection waits for himself alone.
    fn own_database(&self) -> Database {
        Database::open(&self.database.settings(), "test").expect("a usable URL")
    }

    pub(crate) fn start(&self, accounts: &Accounts) -> Running {
        Running::start(self.processor(accounts))
    }

    /// A relay that runs from now on.
    pub(crate) fn relay(&self) -> Running {
        let mut relay = Relay::new(self.own_database(), &self.broker, self.fleet(), log_retention(), 200);
        Running::spawn(move |stop| {
            while !stop.is_requested() {
                match relay.round() {
                    Ok(Round::Relayed) => {}
                    Ok(Round::Idle) => _ = stop.wait(Duration::from_millis(2)),
                    Ok(Round::BrokerAway) | Err(_) => _ = stop.wait(Duration::from_millis(50)),
                }
            }
            relay.close();
            Ok(())
        })
    }

    /// Relays everything that there is by now.
    pub(crate) fn relay_all(&self) {
        let mut relay = Relay::new(self.own_database(), &self.broker, self.fleet(), log_retention(), 200);
        while relay.round().expect("the database answers") != Round::Idle {}
    }

    fn fleet(&self) -> Topology {
        Topology::fleet(&RETRY_DELAYS_MS.map(Duration::from_millis))
    }

    /// Takes messages away from the relay.
    pub(crate) fn intercept(&self) -> Vec<Envelope> {
        let taken = self.database.database().transaction(|conn| {
            let rows = outbox::take(conn, 100_000)?;
            outbox::delete(conn, &rows.iter().map(|row| row.id).collect::<Vec<_>>())?;
            Ok(rows)
        });
        taken.expect("the rows are taken").into_iter().map(|row| row.envelope).collect()
    }

    /// Accepts events of so many keys while `observe` runs, and whenever the database takes them; but never so many
    /// that they pile up.
    pub(crate) fn under_load<T>(&self, keys: usize, observe: impl FnOnce() -> T) -> T {
        const PILE: i64 = 300;
        /// Stops also when `observe` panics: the scope waits for it.
        struct StopAtEnd(Stop);
        impl Drop for StopAtEnd {
            fn drop(&mut self) {
                self.0.request();
            }
        }
        let database = self.own_database();
        let produce = |batch: &[(AccountId, Payload)]| {
            let waiting = stream_audit::backlog(&mut *database.connection()?, ACCOUNT_EVENT, "")?.waiting;
            if waiting < PILE {
                database.transaction(|conn| streams::append(conn, ACCOUNT_EVENT, batch, None))?;
            }
            storage::Result::Ok(waiting < PILE)
        };
        thread::scope(|scope| {
            let stop = StopAtEnd(Stop::new());
            let requested = stop.0.clone();
            scope.spawn(move || {
                for batch in (0..).flat_map(|seed| random_batches(seed, keys, 50)) {
                    let parse = |(key, payload): &(String, String)| {
                        (AccountId::parse(key).expect("an id"), Payload::parse(payload.as_str()).expect("JSON"))
                    };
                    let batch: Vec<_> = batch.iter().map(parse).collect();
                    while !requested.is_requested() && !produce(&batch).unwrap_or(false) {
                        requested.wait(Duration::from_millis(5));
                    }
                    if requested.is_requested() {
                        return;
                    }
                }
            });
            observe()
        })
    }

    /// Declares so many queues of the stream.
    pub(crate) fn declare(&self, queues: i32) {
        let mut session = Session::open(&self.broker, "test").expect("a session");
        broker::declare(&mut session, &Topology::stream(ACCOUNT_EVENT, queues)).expect("all declared");
    }

    /// How many of the queues are there.
    pub(crate) fn existing(&self, queues: &[String]) -> usize {
        eventually_within(PATIENCE, "the broker answers", || {
            let mut session = Session::open(&self.broker, "test").ok()?;
            Some(broker::existing(&mut session, queues).ok()?.len())
        })
    }

    /// Deletes queues with what is in them.
    pub(crate) fn delete(&self, queues: &[String]) {
        // One that is just being made, or whose leader is, can't be deleted yet.
        eventually_within(PATIENCE, "the queues are deleted", || {
            let mut session = Session::open(&self.broker, "test").ok()?;
            broker::delete_queues(&mut session, queues).ok()
        });
    }

    /// Takes a queue's binding to the stream's exchange away.
    pub(crate) fn unbind(&self, queue: &str, routing_key: &str) {
        let mut session = Session::open(&self.broker, "test").expect("a session");
        let binding = Binding { exchange: ACCOUNT_EVENT.into(), queue: queue.into(), routing_key: routing_key.into() };
        broker::unbind(&mut session, &[binding]).expect("it's unbound");
    }

    /// Whether the stream's exchange has a queue for this routing key, which gets a message thereby.
    pub(crate) fn is_bound(&self, routing_key: &str) -> bool {
        let vhost = self.vhost.as_ref().expect("a vhost");
        vhost.publish(ACCOUNT_EVENT, routing_key, &json!({}), b"{}")
    }

    /// Closes every connection to the broker.
    pub(crate) fn close_connections(&self) {
        self.vhost.as_ref().expect("a vhost").close_connections();
    }

    /// Publishes what has a queue.
    pub(crate) fn publish(&self, envelopes: &[Envelope]) {
        let mut publisher = Publisher::new(&self.broker, "test");
        publisher
            .publish_all(envelopes, Instant::now() + PATIENCE)
            .map_err(|error| error.to_string())
            .expect("all confirmed");
    }

    /// Messages that are ready in queues.
    pub(crate) fn depth(&self, queues: &[String]) -> u32 {
        let mut session = Session::open(&self.broker, "test").expect("a session");
        broker::depths(&mut session, queues).expect("their depths").iter().map(|queue| queue.messages).sum()
    }

    /// Takes everything out of queues, and returns what was in them: of each message its headers.
    pub(crate) fn drain(&self, queues: &[String]) -> Vec<BTreeMap<String, String>> {
        test_support::drain(&self.broker, queues, |delivery| (delivery.ticket, delivery.headers))
    }

    /// Divides the stream anew.
    pub(crate) fn divide(&self, shards: i32, queues: i32) {
        let layout = Layout { shards, queues };
        let divided = self.database.database().transaction(|conn| streams::divide(conn, ACCOUNT_EVENT, layout));
        divided.expect("it's divided");
    }

    pub(crate) fn standing(&self, key: &str) -> Standing {
        let mut conn = self.database.database().connection().expect("a connection");
        parked::get(&mut conn, ACCOUNT_EVENT, key).expect("the key is known")
    }

    /// Does what an operator does to a parked key.
    pub(crate) fn operate<T>(
        &self,
        key: &str,
        change: impl Fn(&mut PgConnection, &parked::Order<'_>) -> storage::Result<T>,
    ) {
        let order = parked::Order { stream: ACCOUNT_EVENT, key, seq: None, by: "test" };
        self.database.database().transaction(|conn| change(conn, &order)).expect("it's changed");
    }

    /// Who holds the leases on shards, and on which.
    pub(crate) fn holders(&self) -> BTreeMap<String, Vec<i32>> {
        let shards = 0..SHARDS_MAX;
        let names: BTreeMap<String, i32> = shards.map(|shard| (shard_resource(ACCOUNT_EVENT, shard), shard)).collect();
        let resources: Vec<&str> = names.keys().map(String::as_str).collect();
        let mut conn = self.database.database().connection().expect("a connection");
        let mut holders = BTreeMap::<String, Vec<i32>>::new();
        for lease in leases::list(&mut conn, &resources).expect("the leases") {
            if let (Some(holder), false) = (lease.holder, lease.expired) {
                holders.entry(holder).or_default().push(names[&lease.resource]);
            }
        }
        holders
    }

    /// How many shards each of the processes has, in rising order.
    pub(crate) fn shares(&self) -> Vec<usize> {
        let mut shares: Vec<usize> = self.holders().values().map(Vec::len).collect();
        shares.sort_unstable();
        shares
    }

    /// The events that were accepted.
    pub(crate) fn accepted(&self) -> usize {
        self.database.count("SELECT count(*) AS n FROM stream_event") as usize
    }

    /// Awaits that no event waits any more, but for those of parked keys.
    pub(crate) fn await_applied(&self) {
        eventually_within(PATIENCE, "all events take effect", || (self.database.events_waiting() == 0).then_some(()));
    }

    /// Awaits that a key is parked.
    pub(crate) fn await_parked(&self, key: &str) -> Standing {
        eventually_within(PATIENCE, "the key is parked", || {
            Some(self.standing(key)).filter(|standing| standing.parked_at.is_some())
        })
    }

    /// Every event took effect once and in order, and there were so many.
    #[track_caller]
    pub(crate) fn assert_in_order(&self, events: usize) {
        assert_eq!(self.database.event_errors(), [""; 0]);
        let count = |what: &str| {
            self.database.count(&format!(
                "SELECT {what} AS n FROM (SELECT seq, row_number() OVER (PARTITION BY account_id ORDER BY id) AS place
                                          FROM account_effect) effect"
            ))
        };
        assert_eq!(count("count(*) FILTER (WHERE seq <> place)"), 0);
        assert_eq!(count("count(*)"), events as i64);
    }
}

/// The queues of these shards.
pub(crate) fn queues(shards: impl IntoIterator<Item = i32>) -> Vec<String> {
    shards.into_iter().map(|shard| shard_queue(ACCOUNT_EVENT, shard)).collect()
}

/// Events of keys `k000` and so on, each with this payload: the keys take turns.
pub(crate) fn events(keys: usize, each: usize, payload: &str) -> Vec<(String, String)> {
    (0..keys * each).map(|n| (format!("k{:03}", n % keys), payload.to_owned())).collect()
}

/// Batches of events of so many keys, of any sizes and in any order.
pub(crate) fn random_batches(seed: u64, keys: usize, batches: usize) -> Vec<Vec<(String, String)>> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut batch = || {
        let size = random.random_range(1..20);
        (0..size).map(|_| (format!("k{:03}", random.random_range(0..keys)), "1".to_owned())).collect()
    };
    (0..batches).map(|_| batch()).collect()
}

/// An attempt that has ended.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    pub(crate) key: Arc<str>,
    pub(crate) seq: i64,
    began: Instant,
    ended: Instant,
}

type Work = dyn Fn(&Event) -> Result<(), Failure> + Send + Sync;
type Apply = dyn Fn(&[&Event]) + Send + Sync;

/// A handler that writes a row for each event, and does at the same time what a test likes.
#[derive(Clone)]
pub(crate) struct Accounts {
    work: Arc<Work>,
    apply: Arc<Apply>,
    attempts: Arc<Mutex<Vec<Attempt>>>,
}

impl Accounts {
    /// With this slow part.
    pub(crate) fn new(work: impl Fn(&Event) -> Result<(), Failure> + Send + Sync + 'static) -> Self {
        Self { work: Arc::new(work), apply: Arc::new(|_| {}), attempts: Arc::default() }
    }

    /// With nothing to do.
    pub(crate) fn prompt() -> Self {
        Self::new(|_| Ok(()))
    }

    /// What to do when these events are to take effect.
    pub(crate) fn on_apply(mut self, apply: impl Fn(&[&Event]) + Send + Sync + 'static) -> Self {
        self.apply = Arc::new(apply);
        self
    }

    /// The attempts that have ended, in that order.
    pub(crate) fn attempts(&self) -> Vec<Attempt> {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many attempts at events of a key have ended.
    pub(crate) fn attempts_at(&self, key: &str) -> usize {
        self.attempts().iter().filter(|attempt| *attempt.key == *key).count()
    }

    /// The work of a key never overlapped itself, and each event was worked on after the one before. Returns how many
    /// attempts there were.
    #[track_caller]
    pub(crate) fn assert_one_at_a_time(&self) -> usize {
        let attempts = self.attempts();
        let mut by_key = BTreeMap::<&str, Vec<&Attempt>>::new();
        attempts.iter().for_each(|attempt| by_key.entry(&attempt.key).or_default().push(attempt));
        for attempts in by_key.values_mut() {
            attempts.sort_by_key(|attempt| attempt.began);
            for pair in attempts.windows(2) {
                assert!(pair[0].ended <= pair[1].began, "{pair:?} overlap");
                assert!(pair[0].seq <= pair[1].seq, "{pair:?} are out of order");
            }
        }
        attempts.len()
    }
}

impl Handler for Accounts {
    type Key = AccountId;

    type Done = ();

    fn work(&self, event: &Event) -> Result<(), Failure> {
        /// Notes it when it ends, by a panic too.
        struct Noted<'a>(&'a Event, &'a Accounts, Instant);
        impl Drop for Noted<'_> {
            fn drop(&mut self) {
                let Self(event, accounts, began) = *self;
                let attempt = Attempt { key: event.key.clone(), seq: event.seq, began, ended: Instant::now() };
                accounts.attempts.lock().unwrap_or_else(PoisonError::into_inner).push(attempt);
            }
        }
        let _noted = Noted(event, self, Instant::now());
        (self.work)(event)
    }

    fn apply(&self, conn: &mut PgConnection, worker: &str, done: &[(&Event, &())]) -> storage::Result<()> {
        let events: Vec<&Event> = done.iter().map(|(event, ())| *event).collect();
        (self.apply)(&events);
        let effects: Vec<_> =
            events.iter().map(|event| Effect { account: &event.key, seq: event.seq, work_ms: 0 }).collect();
        account_effects::record(conn, worker, &effects)
    }
}

/// A thread that stops when it's told to, and at the latest with this value.
pub(crate) struct Running {
    stop: Stop,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Running {
    pub(crate) fn start(processor: Processor<impl Handler>) -> Self {
        Self::spawn(|stop| processor.run_until(stop))
    }

    fn spawn(run: impl FnOnce(Stop) -> anyhow::Result<()> + Send + 'static) -> Self {
        let stop = Stop::new();
        let requested = stop.clone();
        Self { stop, thread: Some(thread::spawn(|| run(requested))) }
    }

    /// Asks it to stop.
    pub(crate) fn ask_to_stop(&self) {
        self.stop.request();
    }

    /// Stops it, and sees that it ends well.
    pub(crate) fn stop(mut self) {
        self.stop.request();
        let thread = self.thread.take().expect("it's there until now");
        thread.join().expect("no panic").expect("a clean end");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.request();
        if let Some(thread) = self.thread.take() {
            // A test that fails says why itself.
            let _ = thread.join();
        }
    }
}

/// Where events wait until the test lets them go on.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<(Mutex<GateState>, Condvar)>);

#[derive(Default)]
struct GateState {
    waiting: usize,
    open: bool,
}

impl Gate {
    /// Waits until it's open.
    pub(crate) fn pass(&self) {
        let (state, changed) = &*self.0;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting += 1;
        let (mut state, _) = changed
            .wait_timeout_while(state, 5 * PATIENCE, |state| !state.open)
            .unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
    }

    /// Lets everybody pass from now on.
    pub(crate) fn open(&self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).open = true;
        self.0.1.notify_all();
    }

    /// How many wait here.
    pub(crate) fn waiting(&self) -> usize {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).waiting
    }
}
