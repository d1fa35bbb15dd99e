//! What is in hand, and what follows when that changes: events go to the pool and to the recorder.

use crate::{
    lanes::{Actions, Lanes, Task},
    outcome::Outcome,
    pool::Pool,
};
use anyhow::anyhow;
use chrono::{DateTime, Utc};
use crossbeam_channel::Sender;
use domain::Failure;
use process::Stop;
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use storage::{
    Database,
    streams::{self, State},
};

/// The lanes, which the threads of a process share.
#[derive(Clone)]
pub(crate) struct SharedLanes(Arc<Mutex<Lanes>>);

impl SharedLanes {
    pub(crate) fn new(lanes: Lanes) -> Self {
        Self(Arc::new(Mutex::new(lanes)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Lanes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the threads that take keys in hand have in common.
pub(crate) struct Engine<D> {
    pub(crate) stream: &'static str,
    pub(crate) database: Database,
    pub(crate) lanes: SharedLanes,
    pub(crate) pool: Pool<Task>,
    /// To the recorder.
    pub(crate) outcomes: Sender<Outcome<D>>,
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

impl<D> Engine<D> {
    /// Changes the lanes, and does what follows from that.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Lanes) -> Actions) {
        let Actions { start, begin, park, reload } = change(&mut self.lanes.lock());
        self.pool.submit(start);
        begin.into_iter().for_each(|task| self.report(Outcome::Begin(task)));
        reload.into_iter().for_each(|key| self.report(Outcome::Reload(key)));
        for task in park {
            let error = anyhow!("its process died while handling it ({} times)", task.event.deaths);
            self.report(Outcome::Failed(task, Failure::Permanent(error)));
        }
    }

    fn report(&self, outcome: Outcome<D>) {
        // The recorder outlives everybody who reports; if it has died of a bug, the process ends.
        let _ = self.outcomes.send(outcome);
    }

    /// Takes keys in hand that have no lane yet, and returns how they stand.
    pub(crate) fn wake<'a>(&self, keys: impl IntoIterator<Item = &'a str>) -> storage::Result<Vec<Woken>> {
        let reserved = self.lanes.lock().reserve(keys);
        if reserved.is_empty() {
            return Ok(Vec::new());
        }
        let names: Vec<&str> = reserved.iter().map(|key| &**key).collect();
        match self.database.transaction(|conn| streams::load(conn, self.stream, &names)) {
            Ok(states) => {
                let woken = states.iter().map(Woken::from).collect();
                self.change(|lanes| lanes.loaded(states));
                Ok(woken)
            }
            Err(error) => {
                self.lanes.lock().forget(&reserved);
                Err(error)
            }
        }
    }
}
