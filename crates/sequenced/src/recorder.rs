//! Recording what becomes of events, many at a time.

use crate::{
    Event, Handler,
    engine::{Engine, age},
    handler::apply,
    lanes::Task,
};
use anyhow::anyhow;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use domain::Failure;
use process::Stop;
use std::{
    collections::BTreeMap,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use storage::streams::{self, Failed, Position, State};
use telemetry::{DatabaseAvailable, DatabaseUnavailable, EventFailed, EventsApplied, emit};

/// The most outcomes recorded in one transaction.
const BATCH: usize = 1000;

/// What is to be recorded.
pub(crate) enum Outcome<D> {
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
pub(crate) enum Course {
    /// An attempt has failed.
    Retry(Duration),
    /// It was the last, or none would mend it.
    Park,
    /// None was made: something is away that every event needs.
    Wait(Duration),
}

impl Course {
    /// How long the event waits; `None` where its key is parked.
    pub(crate) fn delay(&self) -> Option<Duration> {
        match self {
            Self::Retry(delay) | Self::Wait(delay) => Some(*delay),
            Self::Park => None,
        }
    }
}

/// A failed event, and what follows.
struct FailedTask {
    task: Task,
    error: String,
    course: Course,
}

impl FailedTask {
    fn row(&self) -> Failed<'_> {
        Failed {
            position: self.task.event.position(),
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
}

/// Why a transaction didn't take place.
struct Refused {
    error: storage::Error,
    /// The handler's, if that's why.
    panic: Option<String>,
}

fn positions(tasks: &[Task]) -> Vec<Position<'_>> {
    tasks.iter().map(|task| task.event.position()).collect()
}

impl<H: Handler> Engine<H> {
    /// Records what is reported, many at a time, until all is finished.
    pub(crate) fn record(&self, outcomes: &Receiver<Outcome<H::Done>>, finished: &Stop) {
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
    pub(crate) fn course(&self, attempts: u32, failure: &Failure) -> Course {
        let delays = self.worker.retry_delays();
        match failure {
            Failure::Unavailable(_) | Failure::Busy(_) => {
                Course::Wait(Duration::from_millis(self.worker.unavailable_backoff_max_ms))
            }
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
        let keys: Vec<&str> = {
            let lanes = self.lanes();
            let more = batch.done.iter().filter(|(task, _)| lanes.expects_more(task)).map(|(task, _)| &*task.event.key);
            more.chain(batch.reload.iter().map(|key| &**key)).collect()
        };
        // A process that freezes in here is soon taken for dead, and its successor needs the rows.
        let committed = self.database.transaction_within(self.ttl, |conn| {
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
                let applied = process::catch(|| apply(conn, self.stream, &self.holder, &self.handler, &done));
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
        let (mut applied, mut finished) = (Vec::new(), Vec::new());
        for (task, _) in batch.done {
            match states.remove(&*task.event.key) {
                Some(state) => applied.push((task, state)),
                None => finished.push(task),
            }
        }
        let ended: Vec<_> = batch.failed.into_iter().map(|failed| failed.task).chain(batch.dropped).collect();
        let actions = {
            let mut lanes = self.lanes();
            let mut actions = lanes.applied(applied);
            actions.append(lanes.finished(finished));
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
}
