//! Destinations that take no messages, rows that were refused, and what becomes of them.

use broker::{Destination, Reason};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// How often a message is offered that reaches no queue: the topology may be changing just now.
const TRIES: u32 = 5;

/// How long a destination that has refused something is left alone. Each further time twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// The same for one that doesn't answer: everybody waits with it whenever it's tried.
const FIRST_SILENT_WAIT: Duration = Duration::from_secs(5);
const LONGEST_SILENT_WAIT: Duration = Duration::from_secs(30);

/// After this long unseen, another relay has dealt with the row.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);

/// A destination whose rows wait. All of them: what one is refused for, the others would be refused for as well.
#[derive(Debug)]
struct Hold {
    /// The oldest row that was refused.
    from: i64,
    wait: Duration,
    longest: Duration,
    next: Instant,
}

struct Tries {
    times: u32,
    last: Instant,
}

/// A destination that is to be tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) destination: Destination,
    /// The row from which on.
    pub(crate) from: i64,
    /// Whether one row is enough, because it may not answer.
    pub(crate) one: bool,
}

/// What was refused. Every relay counts for itself.
#[derive(Default)]
pub(crate) struct Refusals {
    holds: HashMap<Destination, Hold>,
    tries: HashMap<i64, Tries>,
}

impl Refusals {
    /// Where messages wait.
    pub(crate) fn held(&self) -> impl Iterator<Item = &Destination> {
        self.holds.keys()
    }

    /// The destination whose turn it is to be tried again.
    pub(crate) fn due(&self, now: Instant) -> Option<Due> {
        let due = self.holds.iter().filter(|(_, hold)| hold.next <= now);
        due.min_by_key(|(_, hold)| hold.next).map(|(destination, hold)| Due {
            destination: destination.clone(),
            from: hold.from,
            one: hold.longest == LONGEST_SILENT_WAIT,
        })
    }

    /// Notes that a row was refused, and leaves its destination alone for now. If that was the last time, answers how often it
    /// was offered.
    pub(crate) fn refuse(&mut self, id: i64, destination: Destination, reason: &Reason, now: Instant) -> Option<u32> {
        let last = match reason {
            // It's the row's own fault.
            Reason::Invalid(_) => return Some(self.tries.remove(&id).map_or(0, |tries| tries.times) + 1),
            Reason::Returned { .. } => {
                let tries = self.tries.entry(id).or_insert(Tries { times: 0, last: now });
                tries.times += 1;
                tries.last = now;
                tries.times >= TRIES
            }
            // Only full.
            Reason::Nacked => false,
        };
        self.hold(id, destination, FIRST_WAIT, LONGEST_WAIT, now);
        if last { self.tries.remove(&id).map(|tries| tries.times) } else { None }
    }

    /// Notes that a row wasn't confirmed, though others' were.
    pub(crate) fn silent(&mut self, id: i64, destination: Destination, now: Instant) {
        self.hold(id, destination, FIRST_SILENT_WAIT, LONGEST_SILENT_WAIT, now);
    }

    /// The rows of one round have one time.
    fn hold(&mut self, id: i64, destination: Destination, first: Duration, longest: Duration, now: Instant) {
        let new = Hold { from: id, wait: Duration::ZERO, longest, next: now };
        let hold = self.holds.entry(destination).or_insert(new);
        hold.from = hold.from.min(id);
        if hold.next <= now || hold.longest != longest {
            hold.wait = (hold.wait * 2).clamp(first, longest);
            (hold.longest, hold.next) = (longest, now + hold.wait);
        }
    }

    /// Notes what came of trying a destination again: it's free if there was nothing, or something was taken and nothing refused.
    /// Returns from which row on its messages are to be taken with the others' then.
    pub(crate) fn tried(&mut self, due: &Due, tried: &Tried, now: Instant) -> Option<i64> {
        let hold = self.holds.get_mut(&due.destination)?;
        if tried.left > 0 || tried.set_aside > 0 {
            if tried.relayed > 0 || tried.set_aside > 0 {
                // It moves.
                hold.wait = FIRST_WAIT;
                hold.next = now + hold.wait;
            }
            None
        } else {
            self.holds.remove(&due.destination).map(|hold| hold.from)
        }
    }

    /// Forgets rows that were relayed, and those that nobody has seen for long.
    pub(crate) fn forget(&mut self, relayed: &[i64], now: Instant) {
        if self.tries.is_empty() {
            return;
        }
        relayed.iter().for_each(|id| _ = self.tries.remove(id));
        self.tries.retain(|_, tries| now < tries.last + FORGOTTEN_AFTER);
    }
}

/// What became of the rows with which a destination was tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tried {
    pub(crate) relayed: usize,
    pub(crate) set_aside: usize,
    pub(crate) left: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn returned() -> Reason {
        Reason::Returned { code: 312, text: "NO_ROUTE".into() }
    }

    fn to(routing_key: &str) -> Destination {
        Destination { exchange: "exchange".into(), routing_key: routing_key.into() }
    }

    /// How long until the destination is due.
    fn wait(refusals: &Refusals, now: Instant) -> u128 {
        let mut later = now;
        while refusals.due(later).is_none() {
            later += Duration::from_millis(100);
        }
        (later - now).as_millis()
    }

    #[test]
    fn what_reaches_no_queue_is_tried_five_times_ever_more_seldom() {
        let mut refusals = Refusals::default();
        let (mut now, mut waits) = (Instant::now(), Vec::new());
        let times = loop {
            if let Some(times) = refusals.refuse(1, to("a"), &returned(), now) {
                break times;
            }
            waits.push(wait(&refusals, now));
            now += Duration::from_millis(*waits.last().unwrap() as u64);
        };
        assert_eq!((times, &waits[..]), (5, &[200, 400, 800, 1600][..]));
        assert!(refusals.tries.is_empty(), "forgotten");
    }

    #[test]
    fn what_can_never_be_sent_is_final_and_holds_nobody_and_a_full_queue_never_is() {
        let (mut refusals, mut now) = (Refusals::default(), Instant::now());
        assert_eq!(refusals.refuse(1, to("a"), &Reason::Invalid("too long".into()), now), Some(1));
        assert_eq!(refusals.held().count(), 0);
        for _ in 0..100 {
            assert_eq!(refusals.refuse(2, to("a"), &Reason::Nacked, now), None);
            now += LONGEST_WAIT;
        }
        assert_eq!(refusals.refuse(2, to("a"), &Reason::Nacked, now), None);
        assert_eq!(refusals.due(now + LONGEST_WAIT - Duration::from_millis(1)), None);
        assert!(refusals.due(now + LONGEST_WAIT).is_some());
    }

    #[test]
    fn a_destination_waits_once_for_all_its_rows_and_from_the_oldest_on() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for (id, key) in [(7, "a"), (5, "a"), (9, "a"), (6, "b")] {
            refusals.refuse(id, to(key), &Reason::Nacked, now);
        }
        assert_eq!(wait(&refusals, now), 200);
        let mut held: Vec<_> = refusals.held().cloned().collect();
        held.sort();
        assert_eq!(held, [to("a"), to("b")]);
        let later = now + FIRST_WAIT;
        let mut due: Vec<_> = std::iter::from_fn(|| {
            let due = refusals.due(later)?;
            refusals.refuse(due.from, due.destination.clone(), &Reason::Nacked, later);
            Some((due.destination, due.from))
        })
        .collect();
        due.sort();
        assert_eq!(due, [(to("a"), 5), (to("b"), 6)]);
        assert_eq!(wait(&refusals, later), 400);
    }

    #[test]
    fn a_destination_is_free_once_nothing_is_refused_and_waits_shortly_while_it_moves() {
        let (mut refusals, mut now) = (Refusals::default(), Instant::now());
        for _ in 0..4 {
            refusals.refuse(5, to("a"), &Reason::Nacked, now);
            now += LONGEST_WAIT;
        }
        let due = refusals.due(now).unwrap();
        let tried = |relayed, set_aside, left| Tried { relayed, set_aside, left };
        refusals.refuse(5, to("a"), &Reason::Nacked, now);
        assert_eq!(refusals.tried(&due, &tried(0, 0, 1), now), None);
        assert!(wait(&refusals, now) > 1000);
        assert_eq!(refusals.tried(&due, &tried(3, 0, 1), now), None);
        assert_eq!(wait(&refusals, now), 200);
        assert_eq!(refusals.tried(&due, &tried(0, 3, 0), now), None, "who is behind them?");
        assert_eq!(refusals.tried(&due, &tried(3, 0, 0), now), Some(5));
        assert_eq!(refusals.held().count(), 0);
    }

    #[test]
    fn one_row_tries_what_does_not_answer_and_seldom() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        refusals.silent(5, to("a"), now);
        assert_eq!(wait(&refusals, now), 5000);
        let due = refusals.due(now + FIRST_SILENT_WAIT).unwrap();
        assert_eq!(due, Due { destination: to("a"), from: 5, one: true });
        assert_eq!(refusals.tried(&due, &Tried::default(), now), Some(5), "nothing is left of it");
    }

    #[test]
    fn rows_are_forgotten_when_they_are_relayed_here_or_elsewhere() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for id in [1, 2] {
            refusals.refuse(id, to("a"), &returned(), now);
        }
        refusals.forget(&[1], now);
        assert!(refusals.tries.keys().eq([&2]));
        refusals.forget(&[], now + 2 * FORGOTTEN_AFTER);
        assert!(refusals.tries.is_empty());
    }
}
