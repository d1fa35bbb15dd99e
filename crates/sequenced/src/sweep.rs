//! Finding events that no message has brought.

use crate::{Handler, engine::Engine};
use std::{
    mem,
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};
use storage::streams::{self, Due};
use telemetry::{ClockSetBack, EventsSwept, emit};

/// Keys loaded at a time by the sweep.
const PAGE: usize = 500;

/// How long the sweep waits for what another session holds.
const LOCK_WAIT: Duration = Duration::from_millis(250);

/// An event that waited for longer than this wasn't just on its way when the sweep found it.
const OVERLOOKED: Duration = Duration::from_secs(1);

/// Something to be done at once rather than at its time.
#[derive(Default)]
pub(crate) struct Signal {
    given: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    pub(crate) fn give(&self) {
        *self.given.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits for the signal, but not longer than `limit`; takes it, and says whether it was given.
    pub(crate) fn take(&self, limit: Duration) -> bool {
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut given, _) =
            self.changed.wait_timeout_while(given, limit, |given| !*given).unwrap_or_else(PoisonError::into_inner);
        mem::take(&mut *given)
    }
}

impl<H: Handler> Engine<H> {
    /// Finds events that no message has brought, every `interval` and when it's told to.
    pub(crate) fn sweep(&self, interval: Duration) {
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

    /// Takes up keys whose time for a retry has come, as far as there is room for more of them: the longest due come first.
    fn sweep_due(&self) -> storage::Result<()> {
        let delays = self.worker.retry_delays_ms.iter().chain([&self.worker.unavailable_backoff_max_ms]);
        let longest = Duration::from_millis(delays.copied().max().unwrap_or(0));
        let hastened = self
            .database
            .transaction_unheld(self.ttl, LOCK_WAIT, |conn| streams::hasten(conn, self.stream, longest))?;
        if hastened > 0 {
            emit(ClockSetBack { of: self.stream, leases: 0, members: 0, waits: hastened as u64 });
        }
        let mut last: Option<Due> = None;
        while !self.stop.is_requested() && self.lanes().has_room() {
            let mut conn = self.database.connection()?;
            let due = streams::due(&mut conn, self.stream, last.as_ref(), PAGE as i64)?;
            drop(conn);
            self.wake(due.iter().map(|due| due.key.as_str()))?;
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
            let mut lanes = self.lanes();
            lanes.sweeping();
            lanes.owned().clone()
        };
        let held: Vec<i32> = owned.own.into_keys().collect();
        if held.is_empty() {
            return Ok(());
        }
        self.sweep_due()?;
        // What comes before the place where the last one stopped is looked at too.
        let mut rounds = if after.is_empty() { 1 } else { 2 };
        while rounds > 0 && !self.stop.is_requested() {
            if !self.lanes().has_room() {
                return Ok(());
            }
            let swept = self
                .database
                .transaction(|conn| streams::sweep(conn, self.stream, owned.shards, &held, after, PAGE as i64))?;
            if !swept.resting.is_empty() {
                // Those that another session holds are looked at again next time.
                self.database
                    .transaction_unheld(self.ttl, LOCK_WAIT, |conn| streams::rest(conn, self.stream, &swept.resting))?;
            }
            let woken = self.wake(swept.keys.iter().map(String::as_str))?;
            let overlooked = woken.iter().filter(|woken| woken.waited() > OVERLOOKED).count();
            if overlooked > 0 {
                emit(EventsSwept { stream: self.stream, keys: overlooked as u64 });
            }
            *after = swept.after.unwrap_or_default();
            rounds -= usize::from(after.is_empty());
        }
        Ok(())
    }
}
