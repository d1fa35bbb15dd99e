//! What a worker has to find at the broker.

use crate::Queues;
use broker::{Error, LeftOut, Refused, Session};
use domain::topology::Topology;
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What a worker needs, and what is wrong with it.
pub(crate) struct Needs {
    fleet: Topology,
    queues: Queues,
    publishes_to: &'static [&'static str],
    left_out: LeftOut,
    trouble: Mutex<Trouble>,
}

#[derive(Default)]
struct Trouble {
    /// Of the queues that are to be consumed those that aren't as they must be, or don't answer, with what is wrong.
    queues: BTreeMap<String, String>,
    /// What is wrong with what messages are sent on to.
    onward: Option<String>,
}

impl Needs {
    pub(crate) fn new(fleet: Topology, queues: Queues, publishes_to: &'static [&'static str]) -> Self {
        Self { fleet, queues, publishes_to, left_out: LeftOut::default(), trouble: Mutex::default() }
    }

    /// The queues that aren't consumed for now.
    pub(crate) fn left_out(&self) -> LeftOut {
        self.left_out.clone()
    }

    /// Declares what this worker needs, and nothing else: what is wrong elsewhere is no reason to stop. Of several queues that it
    /// consumes it leaves those out that aren't as they must be.
    ///
    /// # Errors
    /// The first refusal that nothing can be done without.
    pub(crate) fn declare(&self, session: &mut Session) -> Result<(), Error> {
        let consumed = self.queues.names();
        let own = self.queues.topology().map_err(|failure| Error::Lost {
            doing: "asking what queues there are",
            source: failure.error().to_string().into(),
        })?;
        // All of its own, also what others consume just now: a queue that is there before it's needed has settled by then.
        let part = self.fleet.part(&consumed, self.publishes_to);
        let needed = |refused: &Refused| part.queues.iter().any(|queue| refused.is_queue && queue.name == refused.name);
        let refused = broker::declare_each(session, &part.clone().and(own))?;
        let (mut unusable, mut last) = (BTreeMap::new(), None);
        for refused in refused {
            if refused.is_queue && consumed.contains(&refused.name) {
                unusable.insert(refused.name, refused.error.to_string());
                last = Some(refused.error);
            } else if needed(&refused)
                || self.publishes_to.contains(&&*refused.name)
                || self.fleet.is_for_failures(&refused.name)
            {
                return Err(refused.error);
            } else {
                log::warn!("not this service's, left as it is: {}", refused.error);
            }
        }
        // What there is to be consumed besides goes on.
        let all = consumed.iter().all(|queue| unusable.contains_key(queue));
        self.left_out.set_wrong(unusable.keys().cloned().collect());
        for queue in self.left_out.silent().into_iter().filter(|queue| consumed.contains(queue)) {
            let why = format!("queue `{queue}` does not answer; see `fleetctl topology show`");
            unusable.entry(queue).or_insert(why);
        }
        let news = unusable.iter().filter(|(queue, _)| !self.leaves_out(queue));
        news.for_each(|(queue, why)| log::error!(queue = queue.as_str(); "doesn't consume a queue: {why}"));
        self.trouble().queues = unusable;
        last.filter(|_| all).map_or(Ok(()), Err)
    }

    /// Notes what is wrong, or isn't any more, with what messages are sent on to.
    pub(crate) fn note_onward(&self, trouble: Option<String>) {
        self.trouble().onward = trouble;
    }

    /// Whether this queue isn't as it must be, or doesn't answer.
    pub(crate) fn leaves_out(&self, queue: &str) -> bool {
        self.trouble().queues.contains_key(queue)
    }

    /// What is wrong.
    pub(crate) fn all_trouble(&self) -> Option<String> {
        let trouble = self.trouble();
        let all: Vec<_> = trouble.queues.values().chain(&trouble.onward).map(String::as_str).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    fn trouble(&self) -> MutexGuard<'_, Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
