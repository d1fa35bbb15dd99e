//! Events that may have killed a process: whose turn it is among them.

use super::Task;
use crate::Event;
use std::{cmp::Reverse, mem};

/// Suspects of having killed a process, by how often they were there when one died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Suspicion {
    /// Perhaps there once, unrecorded: side by side.
    Crowd,
    /// There once: some of them side by side, so that a few dozen deaths at the most find one in a thousand lanes.
    Group,
    /// There again, or once more would be too often: alone among suspects, so that nobody else is parked for a death that
    /// it causes.
    Alone,
}

impl Suspicion {
    /// Of an event that is parked after `limit` attempts.
    fn of(event: &Event, limit: u32) -> Self {
        let last = event.attempts.saturating_add(event.deaths).saturating_add(1) >= limit;
        match event.deaths {
            2.. => Self::Alone,
            _ if last => Self::Alone,
            1 => Self::Group,
            0 => Self::Crowd,
        }
    }
}

/// Those that wait for their turn.
#[derive(Debug)]
pub(super) struct Suspects {
    waiting: Vec<Task>,
    /// Attempts after which a key is parked.
    attempts: u32,
    /// How many of those that were there once go side by side.
    group: usize,
}

impl Suspects {
    /// None yet, of a process that works on `limit` events side by side and parks a key after so many attempts.
    pub(super) fn new(limit: usize, attempts: u32) -> Self {
        Self { waiting: Vec::new(), attempts, group: (limit >> 5).max(1) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether processes have died of the event as often as it may fail.
    pub(super) fn is_convicted(&self, event: &Event) -> bool {
        event.deaths > 0 && event.attempts.saturating_add(event.deaths) >= self.attempts
    }

    pub(super) fn hold_back(&mut self, task: Task) {
        self.waiting.push(task);
    }

    /// Takes those that are to be done elsewhere by now.
    pub(super) fn take_gone(&mut self, is_own: impl Fn(&Task) -> bool) -> Vec<Task> {
        self.waiting.extract_if(.., |task| !is_own(task)).collect()
    }

    /// Lets those go whose turn it is beside those at large. Those that have to be alone come first: while one of them is at
    /// large or waits for others to end, nobody else goes.
    pub(super) fn release(&mut self, at_large: impl Iterator<Item = Suspicion>) -> Vec<(Task, Suspicion)> {
        let (mut crowd, mut group, mut alone) = (0, 0, 0);
        for suspicion in at_large {
            match suspicion {
                Suspicion::Crowd => crowd += 1,
                Suspicion::Group => group += 1,
                Suspicion::Alone => alone += 1,
            }
        }
        let (attempts, group_limit) = (self.attempts, self.group);
        let suspicion = |task: &Task| Suspicion::of(&task.event, attempts);
        self.waiting.sort_by_key(|task| Reverse((suspicion(task), task.event.deaths)));
        let has_its_turn = |task: &mut Task| match suspicion(task) {
            Suspicion::Alone => mem::replace(&mut alone, 1) + group + crowd == 0,
            _ if alone > 0 => false,
            Suspicion::Group if group >= group_limit => false,
            Suspicion::Group => {
                group += 1;
                true
            }
            Suspicion::Crowd => {
                crowd += 1;
                true
            }
        };
        let going: Vec<Task> = self.waiting.extract_if(.., has_its_turn).collect();
        let with_suspicion = |task: Task| {
            let suspicion = suspicion(&task);
            (task, suspicion)
        };
        going.into_iter().map(with_suspicion).collect()
    }
}
