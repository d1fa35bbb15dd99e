//! What is published to.

use crate::{GOODBYE, SERVICE};
use broker::{Publisher, Session};
use domain::{
    Envelope,
    topology::{Retention, Topology},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use storage::{Database, partitions, resharding};

/// The exchanges and queues that are declared on every new connection, since a broker may come back empty.
#[derive(Clone)]
pub(crate) struct Destinations {
    pub(crate) fleet: Topology,
    pub(crate) message_log: Retention,
    pub(crate) database: Database,
    known: Arc<Mutex<Known>>,
}

/// How long to leave something alone that isn't as it must be before looking at it again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// What is known of exchanges and queues, but for the message log's.
#[derive(Default)]
struct Known {
    topology: Topology,
    /// Those that aren't as they must be.
    refused: Vec<broker::Refused>,
    /// When to look again; none if there's no reason to.
    look_at: Option<Instant>,
}

/// Partitions whose streams the broker doesn't let be declared, each with why.
pub(crate) type Refused = BTreeMap<i32, broker::Error>;

impl Destinations {
    pub(crate) fn new(fleet: Topology, message_log: Retention, database: Database) -> Self {
        Self { fleet, message_log, database, known: Arc::default() }
    }

    /// Declares the fleet's topology, and as many queues of each sequenced stream and partitions of the message log as the
    /// database says just now: whoever changes their number may have taken some away, or added some, since the last time.
    /// What can't be declared keeps nobody from the others.
    ///
    /// # Errors
    /// The broker's; a database that is away is a lost connection too.
    pub(crate) fn declare(&self, session: &mut Session) -> Result<Refused, broker::Error> {
        let told = self.database.connection().and_then(|mut conn| {
            Ok((resharding::topology(&mut conn)?, partitions::topology(&mut conn, self.message_log)?))
        });
        let (streams, log) = told.map_err(|error| broker::Error::Lost {
            doing: "asking the database how many queues and partitions there are",
            source: error.into(),
        })?;
        let topology = self.fleet.clone().and(streams);
        let refused = broker::declare_each(session, &topology)?;
        self.known().note(topology, refused);
        let mut refused = Refused::new();
        match broker::declare(session, &log) {
            Err(error) if !error.is_lost() => {
                for (partition, topology) in (0..).zip(one_by_one(log)) {
                    match broker::declare(session, &topology) {
                        Err(error) if !error.is_lost() => _ = refused.insert(partition, error),
                        declared => declared?,
                    }
                }
            }
            declared => declared?,
        }
        Ok(refused)
    }

    /// The same on a connection of its own.
    ///
    /// # Errors
    /// The same.
    pub(crate) fn declare_at(&self, broker: &broker::Settings) -> Result<Refused, broker::Error> {
        let mut session = Session::open(broker, SERVICE)?;
        let refused = self.declare(&mut session)?;
        session.close(Instant::now() + GOODBYE);
        Ok(refused)
    }

    /// Whether this message would go to something that isn't as it must be: its row waits.
    pub(crate) fn refuse(&self, envelope: &Envelope) -> bool {
        let Known { topology, refused, .. } = &*self.known();
        let is_refused = |is_queue, name: &str| refused.iter().any(|r| r.is_queue == is_queue && r.name == name);
        !refused.is_empty()
            && (is_refused(false, &envelope.exchange)
                || topology.routes(&envelope.exchange, &envelope.routing_key).any(|queue| is_refused(true, queue)))
    }

    /// Something has reached no queue: it may have been deleted since it was declared.
    pub(crate) fn doubt(&self) {
        self.known().look_at = Some(Instant::now());
    }

    /// Declares everything again, if there's a reason to.
    pub(crate) fn look_again(&self, broker: &broker::Settings) {
        if self.known().look_at.take_if(|at| *at <= Instant::now()).is_some()
            && let Err(error) = self.declare_at(broker)
        {
            log::warn!("can't check exchanges and queues: {error}");
            self.known().look_at = Some(Instant::now() + LOOK_AGAIN);
        }
    }

    /// What isn't as it must be.
    pub(crate) fn trouble(&self) -> Option<String> {
        let all: Vec<_> = self.known().refused.iter().map(|refused| refused.error.to_string()).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A publisher that declares them whenever it connects.
    pub(crate) fn publisher(self, broker: &broker::Settings) -> Publisher {
        // Who publishes to a partition finds out that it was refused.
        Publisher::new(broker, SERVICE).on_connect(move |session| self.declare(session).map(drop))
    }
}

impl Known {
    fn note(&mut self, topology: Topology, refused: Vec<broker::Refused>) {
        let was_known = |new: &broker::Refused| self.refused.iter().any(|old| old.name == new.name);
        for broker::Refused { error, .. } in refused.iter().filter(|new| !was_known(new)) {
            log::error!("not publishing there until it is fixed: {error}");
        }
        if refused.is_empty() && !self.refused.is_empty() {
            log::info!("all exchanges and queues are declared correctly again");
        }
        let look_at = (!refused.is_empty()).then(|| Instant::now() + LOOK_AGAIN);
        *self = Self { topology, refused, look_at };
    }
}

/// Each queue of a topology by itself.
fn one_by_one(Topology { exchanges, queues, bindings }: Topology) -> impl Iterator<Item = Topology> {
    queues.into_iter().map(move |queue| Topology {
        exchanges: exchanges.clone(),
        bindings: bindings.iter().filter(|binding| binding.queue == queue.name).cloned().collect(),
        queues: vec![queue],
    })
}
