//! What becomes of an event, to be recorded, and what follows from a failure.

use crate::lanes::Task;
use domain::Failure;
use std::{sync::Arc, time::Duration};

/// What is to be recorded.
pub(crate) enum Outcome<D> {
    /// An attempt begins that may kill the process.
    Begin(Task),
    /// The work is done.
    Done(Task, D),
    /// The work has failed.
    Failed(Task, Failure),
    /// The task isn't to be done here any more.
    Dropped(Task),
    /// The key is to be loaded again.
    Reload(Arc<str>),
}

/// How long to wait before the next attempt, if there is one.
pub(crate) enum Course {
    /// An attempt has failed.
    Retry(Duration),
    /// It was the last, or none would mend it.
    Park,
    /// None was made: something is away that every event needs.
    Wait(Duration),
}

impl Course {
    /// What is to be done about the failure of an event at which `attempts` have failed so far.
    pub(crate) fn of(failure: &Failure, attempts: u32, settings: &worker::Settings) -> Self {
        match failure {
            Failure::Unavailable(_) | Failure::Busy(_) => {
                Self::Wait(Duration::from_millis(settings.unavailable_backoff_max_ms))
            }
            Failure::Permanent(_) => Self::Park,
            Failure::Transient(_) => {
                let delay = settings.retry_delays().into_iter().nth(usize::try_from(attempts).unwrap_or(usize::MAX));
                delay.map_or(Self::Park, Self::Retry)
            }
        }
    }

    /// How long the event waits; `None` where its key is parked.
    pub(crate) fn delay(&self) -> Option<Duration> {
        match self {
            Self::Retry(delay) | Self::Wait(delay) => Some(*delay),
            Self::Park => None,
        }
    }
}
