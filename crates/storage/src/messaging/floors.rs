//! Where looking for open rows of a table begins.
//!
//! Rows that are deleted stay in the table and its index for as long as any session of the database server may still see them,
//! maybe for hours, and whoever looks for the oldest rows passes over all of them. So a relay keeps in mind below
//! which id nothing is open, and nothing can come: ids are given out in order, but not committed in order.
//!
//! That is so for the newest id that was given out at some time, once each transaction has ended that had a number then:
//! whoever inserts has its number before its rows have theirs (by the trigger `wake_relay`).

use crate::Result;
use diesel::{PgConnection, prelude::*, sql_query, sql_types::BigInt};
use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

/// How often to note what was given out.
const NOTE_EVERY: Duration = Duration::from_millis(500);

/// How often to begin at the very first row all the same, in case somebody inserts with triggers switched off.
const BEGIN_ANEW_EVERY: Duration = Duration::from_secs(60);

/// What was given out, and which transactions are under way.
#[derive(Clone, Copy, Debug, QueryableByName)]
pub(crate) struct Given {
    /// The newest id.
    #[diesel(sql_type = BigInt)]
    newest: i64,
    /// The oldest transaction that is under way, or the next one.
    #[diesel(sql_type = BigInt)]
    oldest_open: i64,
    /// The next transaction.
    #[diesel(sql_type = BigInt)]
    next: i64,
}

impl Given {
    /// By this sequence.
    pub(crate) fn by(sequence: &str, conn: &mut PgConnection) -> Result<Self> {
        Ok(sql_query(format!(
            "SELECT last_value - (NOT is_called)::integer AS newest, pg_snapshot_xmin(now)::text::bigint AS oldest_open,
                    pg_snapshot_xmax(now)::text::bigint AS next
             FROM {sequence}, pg_current_snapshot() now"
        ))
        .get_result(conn)?)
    }
}

/// The floors of a table's parts: all open rows are above them.
#[derive(Debug)]
pub struct Floors {
    by_part: HashMap<i32, i64>,
    /// Nothing can come below.
    settled: i64,
    /// What was given out at some time, and the transaction before which all must have ended.
    notes: VecDeque<(i64, i64)>,
    /// What was given out when it was noted last. The snapshot is a moment older.
    given: Option<i64>,
    noted: Option<Instant>,
    began: Instant,
}

impl Default for Floors {
    fn default() -> Self {
        Self {
            by_part: HashMap::new(),
            settled: 0,
            notes: VecDeque::new(),
            given: None,
            noted: None,
            began: Instant::now(),
        }
    }
}

impl Floors {
    /// The part's.
    pub fn of(&self, part: i32) -> i64 {
        self.by_part.get(&part).copied().unwrap_or(0)
    }

    /// All that aren't 0: the parts, and their floors.
    pub(crate) fn all(&self) -> (Vec<i32>, Vec<i64>) {
        self.by_part.iter().unzip()
    }

    /// Whether it's time to note what was given out.
    pub fn is_due(&self, now: Instant) -> bool {
        self.noted.is_none_or(|noted| now.duration_since(noted) >= NOTE_EVERY)
    }

    /// Notes what was given out. To be followed by a look at what is open.
    pub(crate) fn note(&mut self, now: Instant, given: Given) {
        self.noted = Some(now);
        // The database was restored, say.
        if given.newest < self.settled {
            *self = Self { noted: self.noted, ..Self::default() };
        }
        if let Some(before) = self.given.replace(given.newest)
            && self.notes.back().is_none_or(|(newest, _)| *newest < before)
        {
            self.notes.push_back((before, given.next));
        }
        while let Some((newest, next)) = self.notes.front()
            && *next <= given.oldest_open
        {
            self.settled = *newest;
            self.notes.pop_front();
        }
        if now.duration_since(self.began) >= BEGIN_ANEW_EVERY {
            self.began = now;
            self.by_part.clear();
        }
    }

    /// Notes the first open row that a look from the part's floor has found.
    pub(crate) fn found(&mut self, part: i32, first: Option<i64>) {
        self.by_part.insert(part, first.map_or(self.settled, |first| self.settled.min(first - 1)));
    }

    /// Looks from there next time, if the floor is above.
    pub fn lower(&mut self, part: i32, id: i64) {
        self.by_part.entry(part).and_modify(|floor| *floor = id.saturating_sub(1).min(*floor));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(newest: i64, oldest_open: i64, next: i64) -> Given {
        Given { newest, oldest_open, next }
    }

    #[test]
    fn a_floor_rises_once_every_transaction_that_may_insert_below_it_has_ended() {
        let (mut floors, now) = (Floors::default(), Instant::now());
        let mut look = |given, first| {
            floors.note(now, given);
            floors.found(0, first);
            floors.of(0)
        };
        assert_eq!(look(given(100, 7, 9), None), 0);
        // The transactions up to 11 may insert up to 100.
        assert_eq!(look(given(150, 7, 12), None), 0);
        assert_eq!(look(given(150, 11, 20), None), 0);
        assert_eq!(look(given(150, 12, 20), None), 100);
        assert_eq!(look(given(150, 20, 30), Some(131)), 130);
        assert_eq!(look(given(150, 30, 30), None), 150);
    }

    #[test]
    fn a_floor_falls_for_what_is_to_be_looked_at_again_and_with_the_sequence() {
        let (mut floors, now) = (Floors::default(), Instant::now());
        for _ in 0..3 {
            floors.note(now, given(100, 5, 5));
            floors.found(3, None);
        }
        assert_eq!((floors.of(3), floors.of(4)), (100, 0));
        floors.lower(3, 200);
        floors.lower(4, 20);
        assert_eq!((floors.of(3), floors.of(4)), (100, 0));
        floors.lower(3, 20);
        assert_eq!(floors.of(3), 19);
        floors.note(now, given(50, 5, 5));
        assert_eq!(floors.of(3), 0);
    }

    #[test]
    fn now_and_then_a_look_begins_at_the_first_row() {
        let (mut floors, now) = (Floors::default(), Instant::now());
        for _ in 0..3 {
            floors.note(now, given(100, 5, 5));
            floors.found(0, None);
        }
        assert_eq!(floors.of(0), 100);
        floors.note(now + BEGIN_ANEW_EVERY, given(100, 5, 5));
        assert_eq!(floors.of(0), 0);
    }
}
