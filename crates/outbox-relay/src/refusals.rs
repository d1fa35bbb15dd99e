//! Rows that the broker has refused, and what becomes of them.

use broker::Reason;
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// How often a message is offered that reaches no queue: the topology may be changing just now.
const TRIES: u32 = 5;

const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// After this long unseen, another relay has dealt with the row.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);

struct Refused {
    times: u32,
    next: Instant,
}

/// The refused rows, by id. Every relay counts for itself.
#[derive(Default)]
pub(crate) struct Refusals(HashMap<i64, Refused>);

impl Refusals {
    /// Whether the row is to be left alone for now.
    pub(crate) fn is_on_hold(&self, id: i64, now: Instant) -> bool {
        self.0.get(&id).is_some_and(|refused| now < refused.next)
    }

    /// Notes a refusal. If it was the last, answers how many there were, and forgets the row.
    pub(crate) fn refuse(&mut self, id: i64, reason: &Reason, now: Instant) -> Option<u32> {
        let refused = self.0.entry(id).or_insert(Refused { times: 0, next: now });
        refused.times = refused.times.saturating_add(1);
        let wait = FIRST_WAIT.saturating_mul(1 << (refused.times - 1).min(10)).min(LONGEST_WAIT);
        refused.next = now + wait;
        let last = match reason {
            Reason::Invalid(_) => true,
            Reason::Returned { .. } => refused.times >= TRIES,
            // Only full.
            Reason::Nacked => false,
        };
        if last { self.0.remove(&id).map(|refused| refused.times) } else { None }
    }

    /// Forgets rows that were relayed, and those that nobody has seen for long.
    pub(crate) fn forget(&mut self, relayed: &[i64], now: Instant) {
        relayed.iter().for_each(|id| _ = self.0.remove(id));
        self.0.retain(|_, refused| now < refused.next + FORGOTTEN_AFTER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn returned() -> Reason {
        Reason::Returned { code: 312, text: "NO_ROUTE".into() }
    }

    #[test]
    fn what_reaches_no_queue_is_tried_five_times_ever_more_seldom() {
        let mut refusals = Refusals::default();
        let (mut now, mut waits) = (Instant::now(), Vec::new());
        let times = loop {
            if let Some(times) = refusals.refuse(1, &returned(), now) {
                break times;
            }
            let begin = now;
            while refusals.is_on_hold(1, now) {
                now += Duration::from_millis(100);
            }
            waits.push((now - begin).as_millis());
        };
        assert_eq!((times, &waits[..]), (5, &[200, 400, 800, 1600][..]));
        assert!(!refusals.is_on_hold(1, now), "forgotten");
    }

    #[test]
    fn what_can_never_be_sent_is_final_and_a_full_queue_never_is() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        assert_eq!(refusals.refuse(1, &Reason::Invalid("too long".into()), now), Some(1));
        for _ in 0..100 {
            assert_eq!(refusals.refuse(2, &Reason::Nacked, now), None);
        }
        assert!(refusals.is_on_hold(2, now + LONGEST_WAIT - Duration::from_millis(1)));
        assert!(!refusals.is_on_hold(2, now + LONGEST_WAIT));
    }

    #[test]
    fn rows_are_forgotten_when_they_are_relayed_here_or_elsewhere() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for id in [1, 2] {
            refusals.refuse(id, &returned(), now);
        }
        refusals.forget(&[1], now);
        assert!(!refusals.is_on_hold(1, now) && refusals.is_on_hold(2, now));
        refusals.forget(&[], now + 2 * FORGOTTEN_AFTER);
        assert!(refusals.0.is_empty());
    }
}
