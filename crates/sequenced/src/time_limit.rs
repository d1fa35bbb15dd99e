//! Events that are worked on for too long.

use crate::{Handler, engine::Engine, lanes::Place};
use ::process::Stop;
use anyhow::anyhow;
use domain::Failure;
use std::{
    process,
    time::{Duration, Instant},
};
use storage::{
    PgConnection,
    streams::{self, Failed, Position},
};
use telemetry::{EventOverran, emit};

/// What sysexits.h calls a temporary failure: start me again.
const EX_TEMPFAIL: i32 = 75;

fn position((key, seq, revision): &Place) -> Position<'_> {
    Position { key, seq: *seq, revision: *revision }
}

impl<H: Handler> Engine<H> {
    /// Ends the process when an event is worked on for too long: a thread can't be ended alone.
    pub(crate) fn guard(&self, finished: &Stop) {
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
            let retry_after = self.course(before, &failure).delay();
            Failed { position, error: &error, retry_after, counts: true }
        };
        streams::fail(conn, self.stream, &overdue.iter().map(failed).collect::<Vec<_>>())?;
        let on_record = self.lanes().on_record();
        let others = on_record.iter().filter(|place| !overdue.contains(place));
        streams::take_back(conn, self.stream, &others.map(position).collect::<Vec<_>>())
    }
}
