//! Finding events that no message has brought.

use crate::{Handler, engine::Engine};
use std::{
    mem,
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};
use storage::streams;
use telemetry::{EventsSwept, emit};

/// Keys loaded at a time by the sweep.
const PAGE: usize = 500;

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
            if !self.lanes().has_room() {
                return Ok(());
            }
            let swept = self
                .database
                .transaction(|conn| streams::sweep(conn, self.stream, owned.shards, &held, after, PAGE as i64))?;
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
