//! Events that are worked on for too long.

use crate::{Handler, engine::Engine, lanes::Place};
use ::process::Stop;
use anyhow::anyhow;
use domain::Failure;
use std::{
    process, thread,
    time::{Duration, Instant},
};
use storage::{
    PgConnection,
    streams::{self, Change, Failed},
};
use telemetry::{EventOverran, emit};

/// What sysexits.h calls a temporary failure: start me again.
const EX_TEMPFAIL: i32 = 75;

/// How often to try again to record it while another session holds a row, and after how long each time.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(100);

impl<H: Handler> Engine<H> {
    /// Ends the process when an event is worked on for too long: a thread can't be ended alone.
    pub(crate) fn guard(&self, finished: &Stop) {
        let limit = Duration::from_millis(self.worker.time_limit_ms);
        while !finished.wait(Duration::from_millis(100)) {
            let overdue = self.lanes().overdue(limit, Instant::now());
            if overdue.is_empty() {
                continue;
            }
            for _ in 0..TRIES {
                match self.database.transaction(|conn| self.overran(conn, &overdue, limit)) {
                    // What is on record isn't so again.
                    Ok(false) => thread::sleep(PAUSE),
                    Ok(true) => break,
                    Err(error) => {
                        log::error!("can't record that an event overran: {:#}", anyhow::Error::new(error));
                        break;
                    }
                }
            }
            for Place { key, seq, .. } in &overdue {
                emit(EventOverran { stream: self.stream, key, seq: *seq, limit });
            }
            process::exit(EX_TEMPFAIL);
        }
    }

    /// Records that the process ends because of these events, and not because of others; returns whether no row was held by
    /// another session.
    fn overran(&self, conn: &mut PgConnection, overdue: &[Place], limit: Duration) -> storage::Result<bool> {
        let failure = Failure::Transient(anyhow!("its handling ran past the time limit of {limit:?}"));
        let error = worker::reason(failure.error());
        let failed = |place| {
            let retry_after = self.course(Place::tried(place), &failure).delay();
            Failed { attempt: Place::attempt(place), error: &error, retry_after, counts: true }
        };
        let failed: Vec<Failed<'_>> = overdue.iter().map(failed).collect();
        let mut changes = streams::fail(conn, self.stream, &failed)?;
        let on_record = self.lanes().on_record();
        let others = on_record.iter().filter(|place| !overdue.contains(place));
        changes.extend(streams::take_back(conn, self.stream, &others.map(Place::attempt).collect::<Vec<_>>())?);
        Ok(!changes.contains(&Change::Busy))
    }
}
