//! Events that are worked on for too long.

use crate::{engine::Engine, lanes::Place, outcome::Course};
use ::process::Stop;
use anyhow::anyhow;
use domain::Failure;
use std::{
    process,
    sync::Arc,
    thread,
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

/// Ends the process when an event is worked on for too long: a thread can't be ended alone.
pub(crate) struct TimeLimit<D> {
    pub(crate) engine: Arc<Engine<D>>,
    pub(crate) settings: worker::Settings,
}

impl<D> TimeLimit<D> {
    /// Looks at what is worked on until all is finished.
    pub(crate) fn run(self, finished: &Stop) {
        let Engine { stream, database, lanes, .. } = &*self.engine;
        let limit = Duration::from_millis(self.settings.time_limit_ms);
        while !finished.wait(Duration::from_millis(100)) {
            let overdue = lanes.lock().overdue(limit, Instant::now());
            if overdue.is_empty() {
                continue;
            }
            for _ in 0..TRIES {
                match database.transaction(|conn| self.overran(conn, &overdue, limit)) {
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
                emit(EventOverran { stream, key, seq: *seq, limit });
            }
            process::exit(EX_TEMPFAIL);
        }
    }

    /// Records that the process ends because of these events, and not because of others; returns whether no row was held by
    /// another session.
    fn overran(&self, conn: &mut PgConnection, overdue: &[Place], limit: Duration) -> storage::Result<bool> {
        let stream = self.engine.stream;
        let failure = Failure::Transient(anyhow!("its handling ran past the time limit of {limit:?}"));
        let error = worker::reason(failure.error());
        let failed = overdue.iter().map(|place| {
            let retry_after = Course::of(&failure, place.tried(), &self.settings).delay();
            Failed { attempt: place.attempt(), error: &error, retry_after, counts: true }
        });
        let mut changes = streams::fail(conn, stream, &failed.collect::<Vec<_>>())?;
        let on_record = self.engine.lanes.lock().on_record();
        let others = on_record.iter().filter(|place| !overdue.contains(place));
        changes.extend(streams::take_back(conn, stream, &others.map(Place::attempt).collect::<Vec<_>>())?);
        Ok(!changes.contains(&Change::Busy))
    }
}
