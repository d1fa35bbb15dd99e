//! Finding events that no message has brought.

use crate::{engine::Engine, signal::Signal};
use std::{sync::Arc, time::Duration};
use storage::streams::{self, Due};
use telemetry::{ClockSetBack, EventsSwept, emit};

/// Keys loaded at a time by the sweep.
const PAGE: usize = 500;

/// How long the sweep waits for what another session holds.
const LOCK_WAIT: Duration = Duration::from_millis(250);

/// An event that waited for longer than this wasn't just on its way when the sweep found it.
const OVERLOOKED: Duration = Duration::from_secs(1);

/// Goes round the keys of this process's shards.
pub(crate) struct Sweep<D> {
    pub(crate) engine: Arc<Engine<D>>,
    /// How long a lease runs.
    pub(crate) ttl: Duration,
    /// The longest that a retry may have to wait.
    pub(crate) longest_wait: Duration,
    /// Given when there's something to do before its time.
    pub(crate) signal: Arc<Signal>,
}

impl<D> Sweep<D> {
    /// Finds events that no message has brought, every `interval` and when it's told to.
    pub(crate) fn run(self, interval: Duration) {
        let mut after = String::new();
        while !self.engine.stop.is_requested() {
            self.signal.take(interval);
            match self.sweep_once(&mut after) {
                Ok(()) => {}
                // The intake says so; it's due again next time.
                Err(error) => log::debug!("the sweep pauses: {:#}", anyhow::Error::new(error)),
            }
        }
    }

    /// Takes up keys whose time for a retry has come, as far as there is room for more of them: the longest due come first.
    fn sweep_due(&self) -> storage::Result<()> {
        let Engine { stream, database, .. } = &*self.engine;
        let hastened = database
            .transaction_unheld(self.ttl, LOCK_WAIT, |conn| streams::hasten(conn, stream, self.longest_wait))?;
        if hastened > 0 {
            emit(ClockSetBack { of: stream, leases: 0, members: 0, waits: hastened as u64 });
        }
        let mut last: Option<Due> = None;
        while !self.engine.stop.is_requested() && self.engine.lanes.lock().has_room() {
            let mut conn = database.connection()?;
            let due = streams::due(&mut conn, stream, last.as_ref(), PAGE as i64)?;
            drop(conn);
            self.engine.wake(due.iter().map(|due| due.key.as_str()))?;
            if due.len() < PAGE {
                return Ok(());
            }
            last = due.into_iter().last();
        }
        Ok(())
    }

    /// Goes round the keys with events that wait, as far as there is room for more of them; the next one goes on from there.
    fn sweep_once(&self, after: &mut String) -> storage::Result<()> {
        let owned = {
            let mut lanes = self.engine.lanes.lock();
            lanes.sweeping();
            lanes.owned().clone()
        };
        let held: Vec<i32> = owned.own.into_keys().collect();
        if held.is_empty() {
            return Ok(());
        }
        self.sweep_due()?;
        let Engine { stream, database, .. } = &*self.engine;
        // What comes before the place where the last one stopped is looked at too.
        let mut rounds = if after.is_empty() { 1 } else { 2 };
        while rounds > 0 && !self.engine.stop.is_requested() {
            if !self.engine.lanes.lock().has_room() {
                return Ok(());
            }
            let swept =
                database.transaction(|conn| streams::sweep(conn, stream, owned.shards, &held, after, PAGE as i64))?;
            if !swept.resting.is_empty() {
                // Those that another session holds are looked at again next time.
                database.transaction_unheld(self.ttl, LOCK_WAIT, |conn| streams::rest(conn, stream, &swept.resting))?;
            }
            let woken = self.engine.wake(swept.keys.iter().map(String::as_str))?;
            let overlooked = woken.iter().filter(|woken| woken.waited() > OVERLOOKED).count();
            if overlooked > 0 {
                emit(EventsSwept { stream, keys: overlooked as u64 });
            }
            *after = swept.after.unwrap_or_default();
            rounds -= usize::from(after.is_empty());
        }
        Ok(())
    }
}
