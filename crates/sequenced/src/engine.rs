//! What the threads of a process share, and what follows from a change of the lanes.

use crate::{
    Handler,
    lanes::{Actions, Lanes, Task},
    pool::Pool,
    recorder::Outcome,
    sweep::Signal,
};
use anyhow::anyhow;
use chrono::{DateTime, Utc};
use crossbeam_channel::Sender;
use domain::Failure;
use process::Stop;
use std::{
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};
use storage::{
    Database,
    streams::{self, State},
};

/// What they share.
pub(crate) struct Engine<H: Handler> {
    pub(crate) stream: &'static str,
    /// This process's name, in leases and in what it applies.
    pub(crate) holder: String,
    pub(crate) handler: H,
    pub(crate) database: Database,
    /// How long a lease runs.
    pub(crate) ttl: Duration,
    pub(crate) worker: worker::Settings,
    pub(crate) lanes: Mutex<Lanes>,
    pub(crate) pool: OnceLock<Pool<Task>>,
    /// To the recorder.
    pub(crate) outcomes: Sender<Outcome<H::Done>>,
    /// Given when the sweep has something to do before its time.
    pub(crate) sweep: Signal,
    pub(crate) stop: Stop,
}

/// The time since then.
pub(crate) fn age(since: DateTime<Utc>) -> Duration {
    (Utc::now() - since).to_std().unwrap_or_default()
}

/// A key that was taken in hand.
pub(crate) struct Woken {
    pub(crate) key: String,
    pub(crate) head: i64,
    /// When its next event was accepted.
    since: Option<DateTime<Utc>>,
}

impl Woken {
    /// How long its next event has waited.
    pub(crate) fn waited(&self) -> Duration {
        self.since.map(age).unwrap_or_default()
    }
}

impl From<&State> for Woken {
    fn from(state: &State) -> Self {
        let since = state.next.as_ref().map(|next| next.generated_at);
        Self { key: state.key.clone(), head: state.head, since }
    }
}

impl<H: Handler> Engine<H> {
    pub(crate) fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn act(&self, actions: Actions) {
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

    pub(crate) fn report(&self, outcome: Outcome<H::Done>) {
        // The recorder outlives everybody who reports; if it has died of a bug, the process ends.
        let _ = self.outcomes.send(outcome);
    }

    /// Works on an event, on a thread of the pool.
    pub(crate) fn work(&self, task: Task) {
        if !self.lanes().start(&task, Instant::now()) {
            if task.on_record {
                self.report(Outcome::Dropped(task));
            }
            return;
        }
        let worked = process::catch(|| self.handler.work(&task.event))
            .unwrap_or_else(|panic| Err(Failure::Transient(anyhow!("its handler {panic}"))));
        self.lanes().worked(&task);
        self.report(match worked {
            Ok(done) => Outcome::Done(task, done),
            Err(failure) => Outcome::Failed(task, failure),
        });
    }

    /// Takes keys in hand that have no lane yet, and answers how they stand.
    pub(crate) fn wake<'a>(&self, keys: impl IntoIterator<Item = &'a str>) -> storage::Result<Vec<Woken>> {
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
}
