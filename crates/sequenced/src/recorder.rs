//! Recording what becomes of events, many at a time.

use crate::{
    Event, Handler,
    engine::{Engine, age},
    handler::apply,
    lanes::Task,
    outcome::{Course, Outcome},
    signal::Signal,
};
use anyhow::anyhow;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use domain::Failure;
use process::Stop;
use std::{
    collections::BTreeMap,
    mem,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use storage::streams::{self, Attempt, Change, Failed, State};
use telemetry::{DatabaseAvailable, DatabaseUnavailable, EventFailed, EventsApplied, EventsPutOff, emit};

/// The most outcomes recorded in one transaction.
const BATCH: usize = 1000;

/// How long a transaction waits for what another session holds, apart from cursors: it doesn't wait for those at all.
const LOCK_WAIT: Duration = Duration::from_millis(250);

/// How long to wait for an outcome before looking whether all is finished.
const IDLE: Duration = Duration::from_millis(100);

/// A failed event, and what follows.
struct FailedTask {
    task: Task,
    error: String,
    course: Course,
}

impl FailedTask {
    fn row(&self) -> Failed<'_> {
        Failed {
            attempt: self.task.attempt(),
            error: &self.error,
            retry_after: self.course.delay(),
            counts: !matches!(self.course, Course::Wait(_)),
        }
    }

    fn emit(&self, stream: &str) {
        let Event { key, seq, attempts, deaths, .. } = &self.task.event;
        let (attempt, delay) = (attempts + deaths + 1, self.course.delay());
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

    /// How many outcomes it has.
    fn len(&self) -> usize {
        self.tasks().count() + self.reload.len()
    }

    fn tasks(&self) -> impl Iterator<Item = &Task> {
        let done = self.done.iter().map(|(task, _)| task);
        let failed = self.failed.iter().map(|failed| &failed.task);
        self.begin.iter().chain(done).chain(failed).chain(&self.dropped)
    }

    /// Parts of it, so that it's found which is the one that can't be recorded now.
    fn divided(mut self) -> Vec<Self> {
        let parts = if self.len() > self.done.len() {
            let done = mem::take(&mut self.done);
            [self, Self { done, ..Self::default() }]
        } else {
            let half = self.done.split_off(self.done.len() / 2);
            [self, Self { done: half, ..Self::default() }]
        };
        parts.into_iter().filter(|part| part.len() > 0).collect()
    }

    /// What another session holds the cursor of.
    fn take_busy(&mut self, changes: &Changes) -> Self {
        Self {
            begin: take(&mut self.begin, &changes.begin, Change::Busy),
            done: take(&mut self.done, &changes.done, Change::Busy),
            failed: take(&mut self.failed, &changes.failed, Change::Busy),
            dropped: take(&mut self.dropped, &changes.dropped, Change::Busy),
            reload: Vec::new(),
        }
    }

    /// What is to be done elsewhere by now.
    fn take_lost(&mut self, is_own: impl Fn(&Task) -> bool) -> Vec<Task> {
        let mut lost: Vec<Task> = self.begin.extract_if(.., |task| !is_own(task)).collect();
        lost.extend(self.done.extract_if(.., |(task, _)| !is_own(task)).map(|(task, _)| task));
        lost.extend(self.failed.extract_if(.., |failed| !is_own(&failed.task)).map(|failed| failed.task));
        lost.extend(self.dropped.extract_if(.., |task| !is_own(task)));
        lost
    }
}

/// Takes those that this became of.
fn take<T>(items: &mut Vec<T>, changes: &[Change], which: Change) -> Vec<T> {
    let mut changes = changes.iter();
    items.extract_if(.., |_| changes.next() == Some(&which)).collect()
}

/// What became of a batch's parts, in their order.
#[derive(Default)]
struct Changes {
    begin: Vec<Change>,
    done: Vec<Change>,
    failed: Vec<Change>,
    dropped: Vec<Change>,
}

/// What can't be recorded just now: another session holds a row, or the server is slow over it.
struct PutOff<D> {
    batch: Batch<D>,
    since: Instant,
    due: Instant,
    tries: u32,
}

impl<D> PutOff<D> {
    /// Of what hasn't been tried yet.
    fn new(batch: Batch<D>) -> Self {
        let now = Instant::now();
        Self { batch, since: now, due: now, tries: 0 }
    }

    /// To be tried again after a while, which grows: what has taken long doesn't keep others waiting for most of the time.
    fn later(&self, batch: Batch<D>, took: Duration) -> Self {
        let pause = Duration::from_millis(10 << self.tries.min(7));
        let due = Instant::now() + pause.max(4 * took);
        Self { batch, since: self.since, due, tries: self.tries.saturating_add(1) }
    }

    /// Its parts, to be tried at once, or itself later.
    fn divided(mut self, took: Duration) -> Vec<Self> {
        let mut parts = mem::take(&mut self.batch).divided();
        match parts.pop() {
            Some(only) if parts.is_empty() => vec![self.later(only, took)],
            last => {
                let now = Instant::now();
                let part = |batch| Self { batch, due: now, ..self };
                parts.into_iter().chain(last).map(part).collect()
            }
        }
    }
}

/// Why a transaction didn't take place.
struct Refused {
    error: storage::Error,
    /// The handler's, if that's why.
    panic: Option<String>,
}

/// Whether it's nobody's fault and may pass: another session holds a row, or the server is slow.
fn is_busy(error: &storage::Error) -> bool {
    use storage::Error::{Contention, Locked, TooSlow};
    matches!(error, Locked(_) | TooSlow(_) | Contention(_))
}

/// Commits what the lanes have done.
pub(crate) struct Recorder<H: Handler> {
    pub(crate) engine: Arc<Engine<H::Done>>,
    pub(crate) handler: Arc<H>,
    /// This process's name, in what it applies.
    pub(crate) holder: String,
    /// How long a lease runs.
    pub(crate) ttl: Duration,
    pub(crate) settings: worker::Settings,
    /// What is reported.
    pub(crate) outcomes: Receiver<Outcome<H::Done>>,
    /// Given when there's room for what the sweep was turned away with.
    pub(crate) sweep: Arc<Signal>,
}

impl<H: Handler> Recorder<H> {
    /// Records what is reported, many at a time, until all is finished.
    pub(crate) fn run(self, finished: &Stop) {
        let outcomes = &self.outcomes;
        let (mut put_off, mut said) = (Vec::<PutOff<H::Done>>::new(), None);
        loop {
            let due = put_off.iter().map(|put_off| put_off.due).min();
            let patience = due.map_or(IDLE, |due| due.saturating_duration_since(Instant::now()).min(IDLE));
            match outcomes.recv_timeout(patience) {
                Ok(first) => {
                    let mut batch = Batch::default();
                    for outcome in [first].into_iter().chain(outcomes.try_iter().take(BATCH - 1)) {
                        batch.add(outcome, |attempts, failure| self.course(attempts, failure));
                    }
                    put_off.extend(self.settle(PutOff::new(batch)));
                }
                Err(RecvTimeoutError::Timeout) if !finished.is_requested() || !put_off.is_empty() => {}
                Err(_) => return,
            }
            // One of them for each batch of new outcomes, which wait for no more than that.
            let now = Instant::now();
            let first = put_off.iter().enumerate().filter(|(_, put_off)| put_off.due <= now);
            if let Some((index, _)) = first.min_by_key(|(_, put_off)| put_off.due) {
                let mut again = put_off.swap_remove(index);
                self.let_go(&mut again.batch);
                let again = self.settle(again);
                again.iter().for_each(|put_off| self.tell(put_off, &mut said));
                put_off.extend(again);
            }
        }
    }

    /// Leaves to others what is theirs by now: a shard isn't kept for a row that somebody holds.
    fn let_go(&self, batch: &mut Batch<H::Done>) {
        self.engine.change(|lanes| {
            let lost = batch.take_lost(|task| lanes.is_own(task));
            lanes.failed(&lost)
        });
    }

    /// Tells that something waits.
    fn tell(&self, PutOff { batch, since, .. }: &PutOff<H::Done>, said: &mut Option<Instant>) {
        const SAY_AFTER: Duration = Duration::from_secs(1);
        const SAY_EVERY: Duration = Duration::from_secs(30);
        let Some(first) = batch.tasks().next() else { return };
        let waited = since.elapsed();
        let say = waited >= SAY_AFTER && said.is_none_or(|said| said.elapsed() >= SAY_EVERY);
        if say {
            *said = Some(Instant::now());
        }
        emit(EventsPutOff {
            stream: self.engine.stream,
            events: batch.len() as u64,
            key: &first.event.key,
            waited,
            say,
        });
    }

    fn course(&self, attempts: u32, failure: &Failure) -> Course {
        Course::of(failure, attempts, &self.settings)
    }

    /// Commits a batch, waiting for the database where it must; events whose effects are refused come one by one, so that
    /// each fails for itself. Returns what can't be recorded just now.
    fn settle(&self, mut work: PutOff<H::Done>) -> Vec<PutOff<H::Done>> {
        let (mut away, mut put_off) = (self.settings.backoff(), Vec::new());
        loop {
            let began = Instant::now();
            let batch = &mut work.batch;
            if batch.len() == 0 {
                return put_off;
            }
            match self.commit(batch) {
                Ok((changes, states)) => {
                    if let Some(after) = away.reset() {
                        emit(DatabaseAvailable { after });
                    }
                    let mut settled = mem::take(batch);
                    let busy = settled.take_busy(&changes);
                    if busy.len() > 0 {
                        put_off.push(work.later(busy, began.elapsed()));
                    }
                    self.go_on(settled, &changes, states);
                    return put_off;
                }
                Err(Refused { error: storage::Error::Unavailable(error), .. }) => {
                    let (delay, say) = away.failed();
                    if say {
                        emit(DatabaseUnavailable { error: &error, retry_in: Some(delay) });
                    }
                    thread::sleep(delay);
                }
                Err(refused) if is_busy(&refused.error) => {
                    log::debug!("put off: {:#}", anyhow::Error::new(refused.error));
                    put_off.extend(work.divided(began.elapsed()));
                    return put_off;
                }
                Err(refused) if batch.done.len() > 1 => {
                    let events = batch.done.len();
                    log::debug!("a batch of {events} events is divided: {:#}", anyhow::Error::new(refused.error));
                    let half = batch.done.split_off(batch.done.len() / 2);
                    put_off.extend(self.settle(PutOff::new(Batch { done: half, ..Batch::default() })));
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
                            log::error!("can't record what became of events: {:#}", anyhow::Error::new(error));
                        }
                        thread::sleep(delay);
                    }
                },
            }
        }
    }

    /// One transaction: what begins, what is done, what has failed. Returns what became of each, and how the keys stand that
    /// go on.
    fn commit(&self, batch: &Batch<H::Done>) -> Result<(Changes, Vec<State>), Refused> {
        let (began, mut panic) = (Instant::now(), None);
        let Engine { stream, database, .. } = &*self.engine;
        let done: Vec<_> = batch.done.iter().map(|(task, done)| (&task.event, done)).collect();
        let keys: Vec<&str> = {
            let lanes = self.engine.lanes.lock();
            let more = batch.done.iter().filter(|(task, _)| lanes.expects_more(task)).map(|(task, _)| &*task.event.key);
            more.chain(batch.reload.iter().map(|key| &**key)).collect()
        };
        // A process that freezes in here is soon taken for dead, and its successor needs the rows.
        let committed = database.transaction_unheld(self.ttl, LOCK_WAIT, |conn| {
            let mut changes = Changes::default();
            if !batch.begin.is_empty() {
                let attempts: Vec<Attempt<'_>> = batch.begin.iter().map(|task| task.event.attempt()).collect();
                changes.begin = streams::begin(conn, stream, &attempts)?;
            }
            if !batch.dropped.is_empty() {
                let attempts: Vec<Attempt<'_>> = batch.dropped.iter().map(Task::attempt).collect();
                changes.dropped = streams::take_back(conn, stream, &attempts)?;
            }
            if !batch.failed.is_empty() {
                let failed: Vec<Failed<'_>> = batch.failed.iter().map(FailedTask::row).collect();
                changes.failed = streams::fail(conn, stream, &failed)?;
            }
            if !done.is_empty() {
                let applied = process::catch(|| apply(conn, stream, &self.holder, &*self.handler, &done));
                changes.done = applied.unwrap_or_else(|panicked| {
                    panic = Some(panicked);
                    Err(storage::Error::Conflict("the handler panicked"))
                })?;
            }
            let states = if keys.is_empty() { Vec::new() } else { streams::load(conn, stream, &keys)? };
            Ok((changes, states))
        });
        let (changes, states) = committed.map_err(|error| Refused { error, panic })?;
        if !done.is_empty() {
            let became = |which| changes.done.iter().filter(|change| **change == which).count() as u64;
            let oldest = done.iter().map(|(event, _)| event.generated_at).min();
            emit(EventsApplied {
                stream,
                events: became(Change::Made),
                late: became(Change::Late),
                duration: began.elapsed(),
                lag: oldest.map(age),
            });
        }
        Ok((changes, states))
    }

    /// The batch is committed: the lanes go on.
    fn go_on(&self, mut batch: Batch<H::Done>, changes: &Changes, states: Vec<State>) {
        // Somebody else has begun with it, or is through. If it's still next, the sweep finds it.
        let known: Vec<Change> = changes.begin.iter().copied().filter(|change| *change != Change::Busy).collect();
        let late = take(&mut batch.begin, &known, Change::Late);
        let mut states: BTreeMap<String, State> = states.into_iter().map(|state| (state.key.clone(), state)).collect();
        for failed in &batch.failed {
            failed.emit(self.engine.stream);
        }
        let (mut applied, mut finished) = (Vec::new(), Vec::new());
        for (task, _) in batch.done {
            match states.remove(&*task.event.key) {
                Some(state) => applied.push((task, state)),
                None => finished.push(task),
            }
        }
        let ended: Vec<_> =
            batch.failed.into_iter().map(|failed| failed.task).chain(batch.dropped).chain(late).collect();
        self.engine.change(|lanes| {
            let mut actions = lanes.applied(applied);
            actions.append(lanes.finished(finished));
            actions.append(lanes.failed(&ended));
            actions.append(lanes.loaded(states.into_values()));
            actions.start.extend(batch.begin);
            if lanes.is_hungry() {
                self.sweep.give();
            }
            actions
        });
    }
}
