use chrono::{DateTime, Utc};
use domain::{Failure, stream::StreamKey};
use std::{fmt, sync::Arc};
use storage::{
    PgConnection,
    streams::{self, Attempt, Change, Position, State},
};

/// An event that is next for its key.
#[derive(Clone)]
pub struct Event {
    /// The key.
    pub key: Arc<str>,
    /// Its place among the key's events, from 1.
    pub seq: i64,
    /// Which of the operator's changes it has seen.
    pub revision: i32,
    /// What happened, as JSON text.
    pub payload: String,
    /// When it was accepted.
    pub generated_at: DateTime<Utc>,
    /// Attempts at it that failed.
    pub attempts: u32,
    /// Attempts at it that began on record and whose process has died.
    pub deaths: u32,
}

impl Event {
    /// What is next for a key that stands so, if it may go on now.
    pub fn next(state: State) -> Option<Self> {
        let runnable = !state.parked && state.wait.is_zero();
        let State { key, revision, attempts, deaths, next, .. } = state;
        next.filter(|_| runnable).map(|next| Self {
            key: key.into(),
            seq: next.seq,
            revision,
            payload: next.payload,
            generated_at: next.generated_at,
            attempts,
            deaths,
        })
    }

    /// Where it is.
    pub fn position(&self) -> Position<'_> {
        Position { key: &self.key, seq: self.seq, revision: self.revision }
    }

    /// The attempts at it, as they were when it was loaded.
    pub fn attempt(&self) -> Attempt<'_> {
        Attempt { position: self.position(), attempts: self.attempts, deaths: self.deaths }
    }
}

// The payload holds what users wrote, which stays out of logs.
impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, seq, revision, .. } = self;
        f.debug_struct("Event").field("key", key).field("seq", seq).field("revision", revision).finish_non_exhaustive()
    }
}

/// A service's business: what its events do.
pub trait Handler: Send + Sync + 'static {
    /// What the stream's events belong to.
    type Key: StreamKey;

    /// What the work leaves for the transaction.
    type Done: Send;

    /// The slow part, on a thread of the key's own, with no transaction open. The events of a key come one after another,
    /// each when the one before has taken effect. May run more than once for an event, and on rare occasions (a process
    /// that froze) for one that has taken effect meanwhile.
    ///
    /// # Errors
    /// See [`Failure`]: transient ones are repeated after growing delays and then park the key, permanent ones park it at
    /// once, and unavailability is waited for.
    fn work(&self, event: &Event) -> Result<Self::Done, Failure>;

    /// The effects of events of different keys, all or none of them, in the transaction that moves their cursors. Each
    /// takes place once.
    ///
    /// # Errors
    /// The database's. The events then come one by one, so that each fails for itself.
    fn apply(&self, conn: &mut PgConnection, worker: &str, done: &[(&Event, &Self::Done)]) -> storage::Result<()>;
}

/// Gives events of different keys their effects, where they are still next and nobody holds their cursors; returns what became
/// of each. To be run in a transaction.
///
/// # Errors
/// The database's, and those of [`Handler::apply`].
pub fn apply<H: Handler>(
    conn: &mut PgConnection,
    stream: &str,
    worker: &str,
    handler: &H,
    done: &[(&Event, &H::Done)],
) -> storage::Result<Vec<Change>> {
    let positions: Vec<_> = done.iter().map(|(event, _)| event.position()).collect();
    let changes = streams::advance(conn, stream, &positions, worker)?;
    let moved = |(_, change): &(_, &Change)| **change == Change::Made;
    let winners: Vec<_> = done.iter().zip(&changes).filter(moved).map(|(done, _)| *done).collect();
    if !winners.is_empty() {
        handler.apply(conn, worker, &winners)?;
    }
    Ok(changes)
}
