//! A service on a sequenced stream: threads, and what they do with the lanes.

use crate::{
    Event, Handler, Leases, Settings,
    handler::apply,
    lanes::{Actions, Lanes, Owned, Place, Task},
    pool::Pool,
};
use anyhow::{Context as _, anyhow, ensure};
use chrono::{DateTime, Utc};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use domain::{
    Failure,
    stream::{AccountEvent, shard_queue, shard_resource},
    topology::Topology,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    mem, process,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread::{self, Scope, ScopedJoinHandle},
    time::{Duration, Instant},
};
use storage::{
    Database, PgConnection,
    attempts::Ledger,
    streams::{self, Failed, Layout, Position, State},
};
use telemetry::{
    DatabaseAvailable, DatabaseUnavailable, EventFailed, EventOverran, EventsApplied, EventsSwept, ShardsChanged, emit,
};
use worker::{BatchHandler, Consuming, HealthSettings, Item, Outgoing, Queues, Received, Step, Stop, Worker};

/// What sysexits.h calls a temporary failure: start me again.
const EX_TEMPFAIL: i32 = 75;

/// What sysexits.h calls an internal software error.
const EX_SOFTWARE: i32 = 70;

/// The most outcomes recorded in one transaction.
const BATCH: usize = 1000;

/// Keys loaded at a time by the sweep.
const PAGE: usize = 500;

/// How often a stopping process looks whether shards can be handed over.
const HANDOVER: Duration = Duration::from_millis(20);

/// An event that waited for longer than this wasn't just on its way when the sweep found it.
const OVERLOOKED: Duration = Duration::from_secs(1);

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
        ensure!(self.lanes > 0, "lanes must be above 0");
        let leases = Leases::new(self.database.clone(), self.service, self.settings.ttl());
        let (outcomes, recorded) = crossbeam_channel::unbounded();
        let attempts = u32::try_from(self.worker.retry_delays_ms.len()).unwrap_or(u32::MAX).saturating_add(1);
        let engine = Arc::new(Engine {
            stream: self.stream,
            holder: leases.holder().into(),
            handler: self.handler,
            database: self.database.clone(),
            worker: self.worker.clone(),
            lanes: Mutex::new(Lanes::new(self.lanes, attempts)),
            pool: OnceLock::new(),
            outcomes,
            sweep: Signal::default(),
            stop,
        });
        let work = Arc::downgrade(&engine);
        let pool = Pool::new(self.lanes, move |task| {
            if let Some(engine) = work.upgrade() {
                engine.work(task);
            }
        });
        engine.pool.set(pool).unwrap_or_else(|_| unreachable!("it's set here only"));

        let queues = Queues::none();
        let finished = Stop::new();
        thread::scope(|scope| {
            spawn(scope, "recorder", || engine.record(&recorded, &finished))?;
            spawn(scope, "time-limit", || engine.guard(&finished))?;
            spawn(scope, "sweep", || engine.sweep(self.settings.sweep()))?;
            let sharer = spawn(scope, "leases", || engine.share(leases, &queues, self.settings.renew()))?;

            let intake = || Intake { engine: engine.clone() };
            let consumed = Worker {
                service: self.service,
                queues: queues.clone(),
                settings: self.worker.clone(),
                consuming: self.consuming.clone(),
                health: self.health.clone(),
                broker: self.broker.clone(),
                ledger: Arc::new(Ledger::new(self.database.clone())),
                database: self.database.probe(),
                handler: intake,
            }
            .run_until(engine.stop.clone());
            engine.stop.request();
            engine.sweep.give();
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
            log::error!("a thread died of a bug, whose panic was reported; the process ends");
            telemetry::flush();
            process::exit(EX_SOFTWARE);
        }
    }
}

/// Something to be done at once rather than at its time.
#[derive(Default)]
struct Signal {
    given: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    fn give(&self) {
        *self.given.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits for the signal, but not longer than `limit`; takes it, and says whether it was given.
    fn take(&self, limit: Duration) -> bool {
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut given, _) =
            self.changed.wait_timeout_while(given, limit, |given| !*given).unwrap_or_else(PoisonError::into_inner);
        mem::take(&mut *given)
    }
}

/// What is to be recorded.
enum Outcome<D> {
    /// An attempt begins that may kill the process.
    Begin(Task),
    /// The work is done.
    Done(Task, D),
    /// The work has failed.
    Failed(Task, Failure),
    /// The task isn't to be done here any more.
    Dropped(Task),
    /// The key is to be loaded again.
    Reload(Arc<str>),
}

/// How long to wait before the next attempt, if there is one.
enum Course {
    /// An attempt has failed.
    Retry(Duration),
    /// It was the last, or none would mend it.
    Park,
    /// None was made: something is away that every event needs.
    Wait(Duration),
}

/// A key that was taken in hand.
struct Woken {
    key: String,
    head: i64,
    /// When its next event was accepted.
    since: Option<DateTime<Utc>>,
}

impl From<&State> for Woken {
    fn from(state: &State) -> Self {
        let since = state.next.as_ref().map(|next| next.generated_at);
        Self { key: state.key.clone(), head: state.head, since }
    }
}

/// A failed event, and what follows.
struct FailedTask {
    task: Task,
    error: String,
    course: Course,
}

impl FailedTask {
    fn retry_after(&self) -> Option<Duration> {
        match self.course {
            Course::Retry(delay) | Course::Wait(delay) => Some(delay),
            Course::Park => None,
        }
    }

    fn row(&self) -> Failed<'_> {
        Failed {
            position: self.task.event.position(),
            error: &self.error,
            retry_after: self.retry_after(),
            counts: !matches!(self.course, Course::Wait(_)),
        }
    }

    fn emit(&self, stream: &str) {
        let Event { key, seq, attempts, deaths, .. } = &self.task.event;
        let (attempt, delay) = (attempts + deaths + 1, self.retry_after());
        emit(EventFailed { stream, key, seq: *seq, attempt, delay, error: &self.error });
    }
}

/// What is recorded in one transaction.
struct Batch<D> {
    begin: Vec<Task>,
    done: Vec<(Task, D)>,
    failed: Vec<FailedTask>,
    dropped: Vec<Task>,
    reload: Vec<Arc<str>>,
}

impl<D> Default for Batch<D> {
    fn default() -> Self {
        Self { begin: Vec::new(), done: Vec::new(), failed: Vec::new(), dropped: Vec::new(), reload: Vec::new() }
    }
}

impl<D> Batch<D> {
    fn add(&mut self, outcome: Outcome<D>, course: impl Fn(u32, &Failure) -> Course) {
        match outcome {
            Outcome::Begin(task) => self.begin.push(Task { on_record: true, ..task }),
            Outcome::Done(task, done) => self.done.push((task, done)),
            Outcome::Failed(task, failure) => {
                let course = course(task.event.attempts + task.event.deaths, &failure);
                self.failed.push(FailedTask { error: worker::reason(failure.error()), course, task });
            }
            Outcome::Dropped(task) => self.dropped.push(task),
            Outcome::Reload(key) => self.reload.push(key),
        }
    }
}

fn positions(tasks: &[Task]) -> Vec<Position<'_>> {
    tasks.iter().map(|task| task.event.position()).collect()
}

fn position((key, seq, revision): &Place) -> Position<'_> {
    Position { key, seq: *seq, revision: *revision }
}

fn age(since: DateTime<Utc>) -> Duration {
    (Utc::now() - since).to_std().unwrap_or_default()
}

/// Why a transaction didn't take place.
struct Refused {
    error: storage::Error,
    /// The handler's, if that's why.
    panic: Option<String>,
}

struct Engine<H: Handler> {
    stream: &'static str,
    holder: String,
    handler: H,
    database: Database,
    worker: worker::Settings,
    lanes: Mutex<Lanes>,
    pool: OnceLock<Pool<Task>>,
    outcomes: Sender<Outcome<H::Done>>,
    sweep: Signal,
    stop: Stop,
}

impl<H: Handler> Engine<H> {
    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn act(&self, actions: Actions) {
        let Actions { start, begin, park, reload } = actions;
        if let Some(pool) = self.pool.get() {
            pool.submit(start);
        }
        begin.into_iter().for_each(|task| self.report(Outcome::Begin(task)));
        reload.into_iter().for_each(|key| self.report(Outcome::Reload(key)));
        for task in park {
            let error = anyhow!("its process died while handling it ({} times)", task.event.deaths);
            self.report(Outcome::Failed(task, Failure::Permanent(error)));
        }
    }

    fn report(&self, outcome: Outcome<H::Done>) {
        // The recorder outlives everybody who reports; if it has died of a bug, the process ends.
        let _ = self.outcomes.send(outcome);
    }

    /// Works on an event, on a thread of the pool.
    fn work(&self, task: Task) {
        if !self.lanes().start(&task, Instant::now()) {
            if task.on_record {
                self.report(Outcome::Dropped(task));
            }
            return;
        }
        let worked = worker::catch(|| self.handler.work(&task.event))
            .unwrap_or_else(|panic| Err(Failure::Transient(anyhow!("its handler {panic}"))));
        self.lanes().worked(&task);
        self.report(match worked {
            Ok(done) => Outcome::Done(task, done),
            Err(failure) => Outcome::Failed(task, failure),
        });
    }

    /// Takes keys in hand that have no lane yet, and answers how they stand.
    fn wake<'a>(&self, keys: impl IntoIterator<Item = &'a str>) -> storage::Result<Vec<Woken>> {
        let reserved = self.lanes().reserve(keys);
        if reserved.is_empty() {
            return Ok(Vec::new());
        }
        let names: Vec<&str> = reserved.iter().map(|key| &**key).collect();
        match self.database.transaction(|conn| streams::load(conn, self.stream, &names)) {
            Ok(states) => {
                let woken = states.iter().map(Woken::from).collect();
                let actions = self.lanes().loaded(states);
                self.act(actions);
                Ok(woken)
            }
            Err(error) => {
                self.lanes().forget(&reserved);
                Err(error)
            }
        }
    }

    /// Records what is reported, many at a time, until all is finished.
    fn record(&self, outcomes: &Receiver<Outcome<H::Done>>, finished: &Stop) {
        loop {
            let first = match outcomes.recv_timeout(Duration::from_millis(100)) {
                Ok(first) => first,
                Err(RecvTimeoutError::Timeout) if !finished.is_requested() => continue,
                Err(_) => return,
            };
            let mut batch = Batch::default();
            for outcome in [first].into_iter().chain(outcomes.try_iter().take(BATCH - 1)) {
                batch.add(outcome, |attempts, failure| self.course(attempts, failure));
            }
            self.settle(batch);
        }
    }

    /// What is to be done about the failure of an event at which `attempts` have failed so far.
    fn course(&self, attempts: u32, failure: &Failure) -> Course {
        let delays = self.worker.retry_delays();
        match failure {
            Failure::Unavailable(_) => Course::Wait(Duration::from_millis(self.worker.unavailable_backoff_max_ms)),
            Failure::Permanent(_) => Course::Park,
            Failure::Transient(_) => match usize::try_from(attempts).ok().and_then(|index| delays.get(index)) {
                Some(delay) => Course::Retry(*delay),
                None => Course::Park,
            },
        }
    }

    /// Commits a batch, waiting for the database where it must; events whose effects are refused come one by one, so that
    /// each fails for itself.
    fn settle(&self, mut batch: Batch<H::Done>) {
        let mut away = self.worker.backoff();
        loop {
            match self.commit(&batch) {
                Ok(states) => {
                    if let Some(after) = away.reset() {
                        emit(DatabaseAvailable { after });
                    }
                    return self.go_on(batch, states);
                }
                Err(Refused { error: storage::Error::Unavailable(error), .. }) => {
                    let (delay, say) = away.failed();
                    if say {
                        emit(DatabaseUnavailable { error: &error, retry_in: Some(delay) });
                    }
                    thread::sleep(delay);
                }
                Err(refused) if batch.done.len() > 1 => {
                    let events = batch.done.len();
                    log::debug!("a batch of {events} events is divided: {:#}", anyhow::Error::new(refused.error));
                    let half = batch.done.split_off(batch.done.len() / 2);
                    self.settle(Batch { done: half, ..Batch::default() });
                }
                Err(Refused { error, panic }) => match batch.done.pop() {
                    Some((task, _)) => {
                        let failure = match panic {
                            Some(panic) => Failure::Transient(anyhow!("applying it {panic}")),
                            None => error.into(),
                        };
                        batch.add(Outcome::Failed(task, failure), |attempts, failure| self.course(attempts, failure));
                    }
                    None => {
                        let (delay, say) = away.failed();
                        if say {
                            log::error!("can't record how events fared: {:#}", anyhow::Error::new(error));
                        }
                        thread::sleep(delay);
                    }
                },
            }
        }
    }

    /// One transaction: what begins, what is done, what has failed; and how the keys stand that go on.
    fn commit(&self, batch: &Batch<H::Done>) -> Result<Vec<State>, Refused> {
        let (began, mut panic) = (Instant::now(), None);
        let done: Vec<_> = batch.done.iter().map(|(task, done)| (&task.event, done)).collect();
        let keys: Vec<&str> =
            done.iter().map(|(event, _)| &*event.key).chain(batch.reload.iter().map(|key| &**key)).collect();
        let committed = self.database.transaction(|conn| {
            if !batch.begin.is_empty() {
                streams::begin(conn, self.stream, &positions(&batch.begin))?;
            }
            if !batch.dropped.is_empty() {
                streams::take_back(conn, self.stream, &positions(&batch.dropped))?;
            }
            if !batch.failed.is_empty() {
                let failed: Vec<Failed<'_>> = batch.failed.iter().map(FailedTask::row).collect();
                streams::fail(conn, self.stream, &failed)?;
            }
            let won = if done.is_empty() {
                Vec::new()
            } else {
                let applied = worker::catch(|| apply(conn, self.stream, &self.holder, &self.handler, &done));
                applied.unwrap_or_else(|panicked| {
                    panic = Some(panicked);
                    Err(storage::Error::Conflict("the handler panicked"))
                })?
            };
            let states = if keys.is_empty() { Vec::new() } else { streams::load(conn, self.stream, &keys)? };
            Ok((states, won.into_iter().filter(|won| *won).count()))
        });
        let (states, applied) = committed.map_err(|error| Refused { error, panic })?;
        if !done.is_empty() {
            let oldest = done.iter().map(|(event, _)| event.generated_at).min();
            emit(EventsApplied {
                stream: self.stream,
                events: applied as u64,
                late: (done.len() - applied) as u64,
                duration: began.elapsed(),
                lag: oldest.map(age),
            });
        }
        Ok(states)
    }

    /// The batch is committed: the lanes go on.
    fn go_on(&self, batch: Batch<H::Done>, states: Vec<State>) {
        let mut states: BTreeMap<String, State> = states.into_iter().map(|state| (state.key.clone(), state)).collect();
        for failed in &batch.failed {
            failed.emit(self.stream);
        }
        let applied: Vec<_> = batch
            .done
            .into_iter()
            .filter_map(|(task, _)| states.remove(&*task.event.key).map(|state| (task, state)))
            .collect();
        let ended: Vec<_> = batch.failed.into_iter().map(|failed| failed.task).chain(batch.dropped).collect();
        let actions = {
            let mut lanes = self.lanes();
            let mut actions = lanes.applied(applied);
            actions.append(lanes.failed(&ended));
            actions.append(lanes.loaded(states.into_values()));
            actions.start.extend(batch.begin);
            if lanes.is_hungry() {
                self.sweep.give();
            }
            actions
        };
        self.act(actions);
    }

    /// Finds events that no message has brought, every `interval` and when it's told to.
    fn sweep(&self, interval: Duration) {
        let mut after = String::new();
        while !self.stop.is_requested() {
            self.sweep.take(interval);
            match self.sweep_once(&mut after) {
                Ok(()) => {}
                // The intake says so; it's due again next time.
                Err(error) => log::debug!("the sweep goes on later: {:#}", anyhow::Error::new(error)),
            }
        }
    }

    /// Goes round the keys with events that wait, as far as there is room for more of them; the next one goes on from there.
    fn sweep_once(&self, after: &mut String) -> storage::Result<()> {
        let owned = {
            let mut lanes = self.lanes();
            lanes.sweeping();
            lanes.owned().clone()
        };
        let held: Vec<i32> = owned.own.into_keys().collect();
        // What comes before the place where the last one stopped is looked at too.
        let mut rounds = if after.is_empty() { 1 } else { 2 };
        while rounds > 0 && !held.is_empty() && !self.stop.is_requested() {
            if self.lanes().free() == 0 {
                return Ok(());
            }
            let swept = self
                .database
                .transaction(|conn| streams::sweep(conn, self.stream, owned.shards, &held, after, PAGE as i64))?;
            let woken = self.wake(swept.keys.iter().map(String::as_str))?;
            let overlooked =
                woken.iter().filter(|woken| woken.since.is_some_and(|since| age(since) > OVERLOOKED)).count();
            if overlooked > 0 {
                emit(EventsSwept { stream: self.stream, keys: overlooked as u64 });
            }
            *after = swept.after.unwrap_or_default();
            rounds -= usize::from(after.is_empty());
        }
        Ok(())
    }

    /// Ends the process when an event is worked on for too long: a thread can't be ended alone.
    fn guard(&self, finished: &Stop) {
        let limit = Duration::from_millis(self.worker.time_limit_ms);
        while !finished.wait(Duration::from_millis(100)) {
            let overdue = self.lanes().overdue(limit, Instant::now());
            if overdue.is_empty() {
                continue;
            }
            if let Err(error) = self.database.transaction(|conn| self.overran(conn, &overdue, limit)) {
                log::error!("can't record that an event overran: {:#}", anyhow::Error::new(error));
            }
            for (key, seq, _) in &overdue {
                emit(EventOverran { stream: self.stream, key, seq: *seq, limit });
            }
            process::exit(EX_TEMPFAIL);
        }
    }

    /// Records that the process ends because of these events, and not because of others.
    fn overran(&self, conn: &mut PgConnection, overdue: &[Place], limit: Duration) -> storage::Result<()> {
        let failure = Failure::Transient(anyhow!("its handling ran past the time limit of {limit:?}"));
        let error = worker::reason(failure.error());
        let keys: Vec<&str> = overdue.iter().map(|(key, ..)| &**key).collect();
        let states = streams::load(conn, self.stream, &keys)?;
        let failed = |place| {
            let position = position(place);
            let state = states.iter().find(|state| state.key == position.key);
            // If this attempt is on record, it's one of those.
            let before = state.map_or(0, |state| state.attempts + state.deaths.saturating_sub(1));
            let retry_after = match self.course(before, &failure) {
                Course::Retry(delay) | Course::Wait(delay) => Some(delay),
                Course::Park => None,
            };
            Failed { position, error: &error, retry_after, counts: true }
        };
        streams::fail(conn, self.stream, &overdue.iter().map(failed).collect::<Vec<_>>())?;
        let on_record = self.lanes().on_record();
        let others = on_record.iter().filter(|place| !overdue.contains(place));
        streams::take_back(conn, self.stream, &others.map(position).collect::<Vec<_>>())
    }

    /// Keeps this process's share of the shards, until it's time to stop; then hands them over one by one, as soon as
    /// their events are through.
    fn share(&self, mut leases: Leases, queues: &Queues, interval: Duration) {
        let mut shards = Shards::default();
        let mut away = self.worker.backoff();
        while !self.stop.is_requested() {
            match self.share_once(&mut leases, &mut shards, queues) {
                Ok(()) => _ = away.reset(),
                Err(error) => {
                    if away.failed().1 {
                        let error = anyhow::Error::new(error);
                        log::warn!("can't renew the leases on shards, their events rest meanwhile: {error:#}");
                    }
                }
            }
            let next = Instant::now() + interval;
            while !shards.leaving.is_empty() && Instant::now() < next && !self.stop.is_requested() {
                self.hand_over(&mut leases, &mut shards.leaving);
                self.stop.wait(HANDOVER);
            }
            self.stop.wait(next.saturating_duration_since(Instant::now()));
        }

        shards.leaving = leases.held().clone();
        self.own(&shards, BTreeMap::new());
        let mut renewed = Instant::now();
        // While the database is away nothing can be handed over; the leases run out by themselves.
        let _ = leases.retire();
        loop {
            self.hand_over(&mut leases, &mut shards.leaving);
            if self.lanes().busy().is_empty() {
                break;
            }
            if renewed.elapsed() >= interval {
                let _ = leases.keep();
                renewed = Instant::now();
            }
            thread::sleep(HANDOVER);
        }
        if let Err(error) = leases.leave() {
            log::warn!("the leases on shards run out by themselves: {:#}", anyhow::Error::new(error));
        }
    }

    fn share_once(&self, leases: &mut Leases, shards: &mut Shards, queues: &Queues) -> storage::Result<()> {
        let layout = streams::layout(&mut *self.database.connection()?, self.stream)?;
        let resources: Vec<String> =
            (0..layout.shards.max(layout.queues)).map(|shard| shard_resource(self.stream, shard)).collect();
        let round = leases.round(&resources)?;
        let (gained, lost) = (!round.gained.is_empty(), !round.lost.is_empty());
        let taken_over: Vec<_> = round
            .gained
            .iter()
            .filter_map(|claimed| Some((self.shard(&claimed.resource)?, claimed.taken_over_at?)))
            .collect();
        let divided = shards.layout.is_some_and(|before| before.shards != layout.shards);
        if divided {
            // Whoever died may have had any key of what is a shard now.
            let latest = shards.took_over.values().max().copied();
            shards.took_over =
                latest.into_iter().flat_map(|at| (0..layout.shards).map(move |shard| (shard, at))).collect();
        }
        for claimed in &round.gained {
            if let Some(shard) = self.shard(&claimed.resource) {
                shards.took_over.remove(&shard);
            }
        }
        shards.took_over.extend(taken_over.iter().copied());
        let surplus: BTreeSet<String> = round.surplus.into_iter().collect();
        let leaving = surplus.difference(&shards.leaving).count();
        shards.leaving = surplus;
        shards.until = Some(round.until);
        shards.layout = Some(layout);

        let held: BTreeSet<i32> =
            leases.held().difference(&shards.leaving).filter_map(|resource| self.shard(resource)).collect();
        let own = held
            .iter()
            .filter(|shard| **shard < layout.shards)
            .map(|shard| (*shard, shards.took_over.get(shard).copied()))
            .collect();
        self.own(shards, own);
        let names: Vec<String> = held.iter().map(|shard| shard_queue(self.stream, *shard)).collect();
        // Fewer queues are news to those as well who had none of the others: they are not to be declared again.
        let consumed = (names, layout.queues);
        if consumed != shards.consumed {
            queues.set(consumed.0.clone(), Topology::stream(self.stream, layout.queues));
            shards.consumed = consumed;
        }
        if gained || divided {
            self.sweep.give();
        }
        if gained || lost || divided || leaving > 0 {
            emit(ShardsChanged {
                stream: self.stream,
                held: held.len() as u64,
                taken: (round.gained.len() - taken_over.len()) as u64,
                taken_over: taken_over.len() as u64,
                given_up: (round.lost.len() + leaving) as u64,
                members: round.members as u64,
            });
        }
        Ok(())
    }

    /// Tells the lanes what is this process's own.
    fn own(&self, shards: &Shards, own: BTreeMap<i32, Option<DateTime<Utc>>>) {
        let count = shards.layout.map_or(0, |layout| layout.shards);
        let actions = self.lanes().own(Owned { shards: count, own, until: shards.until });
        self.act(actions);
    }

    /// Gives back those of the leases on whose shards nothing is under way any more.
    fn hand_over(&self, leases: &mut Leases, leaving: &mut BTreeSet<String>) {
        let busy = self.lanes().busy();
        let free: Vec<String> = leaving
            .iter()
            .filter(|resource| self.shard(resource).is_none_or(|shard| !busy.contains(&shard)))
            .cloned()
            .collect();
        if !free.is_empty() && leases.release(&free).is_ok() {
            free.iter().for_each(|resource| _ = leaving.remove(resource));
        }
    }

    fn shard(&self, resource: &str) -> Option<i32> {
        resource.strip_prefix(self.stream)?.strip_prefix('/')?.parse().ok()
    }
}

/// What is known of the shards.
#[derive(Default)]
struct Shards {
    layout: Option<Layout>,
    until: Option<Instant>,
    /// When shards were taken from processes that had likely died.
    took_over: BTreeMap<i32, DateTime<Utc>>,
    /// Leases that are handed over as soon as nothing is under way there.
    leaving: BTreeSet<String>,
    /// The queues consumed, and how many there are in all.
    consumed: (Vec<String>, i32),
}

/// Takes messages in: each says that its key has an event, and has done its work when the key has a lane, or needs none.
struct Intake<H: Handler> {
    engine: Arc<Engine<H>>,
}

impl<H: Handler> BatchHandler for Intake<H> {
    type Message = AccountEvent;

    fn decode(&self, received: &Received) -> anyhow::Result<AccountEvent> {
        worker::kind(received, &[self.engine.stream])?;
        worker::json(received)
    }

    fn handle(&mut self, batch: &[Item<AccountEvent>], _: &mut Outgoing, _: &Step) -> Result<(), Failure> {
        let Engine { database, stream, .. } = &*self.engine;
        let mut newest = BTreeMap::<&str, i64>::new();
        let mut positive = true;
        for Item { message, .. } in batch {
            positive &= message.seq > 0;
            let newest = newest.entry(message.account_id.as_str()).or_default();
            *newest = message.seq.max(*newest);
        }
        let mut heads: BTreeMap<String, i64> =
            self.engine.wake(newest.keys().copied())?.into_iter().map(|woken| (woken.key, woken.head)).collect();
        let others: Vec<&str> = newest.keys().copied().filter(|key| !heads.contains_key(*key)).collect();
        if !others.is_empty() {
            heads.extend(streams::heads(&mut *database.connection()?, stream, &others)?);
        }
        let committed = newest.iter().all(|(key, seq)| heads.get(*key).is_some_and(|head| seq <= head));
        if committed && positive {
            Ok(())
        } else {
            Err(Failure::permanent("no such event is committed: events come in over HTTP"))
        }
    }
}
