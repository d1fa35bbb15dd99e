use crate::{
    Received,
    header::{DIED_IN, SET_ASIDE},
};
use broker::header::{DEATH_QUEUE, DEATH_REASON, DEATH_TIME};
use chrono::{DateTime, SecondsFormat, Utc};
use domain::envelope::{
    header::{ATTEMPTS, ERROR, FAILED_AT},
    identifies,
};
use std::collections::BTreeMap;

/// What is known about the end of a message in the queue `dead_letter`, whether a worker set it aside, the broker, or
/// another program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// The queue that it died in.
    pub queue: String,
    /// Why.
    pub error: String,
    /// How many attempts at handling it are known to have failed.
    pub attempts: u32,
    /// When, if anybody says.
    pub failed_at: Option<DateTime<Utc>>,
    /// Which setting aside it is, if a worker's: another one, though of the same message, has another id.
    pub set_aside: Option<String>,
}

impl Death {
    /// The end of this dead letter.
    pub fn of(received: &Received) -> Self {
        let header = |name| received.headers.get(name).map(String::as_str);
        let time = |name| header(name).and_then(|text| DateTime::parse_from_rfc3339(text).ok());
        // Another program may have put anything there.
        let named = |name: &Option<&str>| name.is_some_and(identifies);
        let queue =
            [header(DIED_IN), header(DEATH_QUEUE), Some(&received.routing_key)].into_iter().find(named).flatten();
        // Whoever set it aside last is the one to ask: a worker leaves nothing of what the broker says.
        let error = match (header(ERROR), header(DEATH_REASON)) {
            (Some(error), _) => error.to_owned(),
            (None, Some(reason)) => format!("the broker gave it up: {reason}"),
            (None, None) => "another program published it as a dead letter, without a reason".to_owned(),
        };
        Self {
            queue: queue.unwrap_or(&received.queue).to_owned(),
            error,
            attempts: header(ATTEMPTS).and_then(|text| text.parse().ok()).unwrap_or(0),
            failed_at: time(FAILED_AT).or(time(DEATH_TIME)).map(Into::into),
            set_aside: header(SET_ASIDE).filter(|id| identifies(id)).map(Into::into),
        }
    }

    pub(crate) fn write(self, headers: &mut BTreeMap<String, String>) {
        headers.extend([
            (ATTEMPTS.into(), self.attempts.to_string()),
            (ERROR.into(), self.error),
            (DIED_IN.into(), self.queue),
        ]);
        headers.extend(self.failed_at.map(|at| (FAILED_AT.into(), at.to_rfc3339_opts(SecondsFormat::Millis, true))));
        headers.extend(self.set_aside.map(|id| (SET_ASIDE.into(), id)));
    }
}
