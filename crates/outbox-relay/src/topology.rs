//! What is published to.

use crate::{GOODBYE, SERVICE};
use broker::{Publisher, Session};
use domain::topology::{Retention, Topology};
use std::{collections::BTreeMap, time::Instant};
use storage::{Database, partitions, resharding};

/// The exchanges and queues that are declared on every new connection, since a broker may come back empty.
#[derive(Clone)]
pub(crate) struct Destinations {
    pub(crate) fleet: Topology,
    pub(crate) message_log: Retention,
    pub(crate) database: Database,
}

/// Partitions whose streams the broker doesn't let be declared, each with why.
pub(crate) type Refused = BTreeMap<i32, broker::Error>;

impl Destinations {
    /// Declares the fleet's topology, and as many queues of each sequenced stream and partitions of the message log as the
    /// database says just now: whoever changes their number may have taken some away, or added some, since the last time.
    /// A partition that can't be declared keeps nobody from the others.
    ///
    /// # Errors
    /// The broker's; a database that is away is a lost connection too.
    pub(crate) fn declare(&self, session: &mut Session) -> Result<Refused, broker::Error> {
        broker::declare(session, &self.fleet)?;
        let told = self.database.connection().and_then(|mut conn| {
            Ok((resharding::topology(&mut conn)?, partitions::topology(&mut conn, self.message_log)?))
        });
        let (streams, log) = told.map_err(|error| broker::Error::Lost {
            doing: "asking the database how many queues and partitions there are",
            source: error.into(),
        })?;
        broker::declare(session, &streams)?;
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

    /// A publisher that declares them whenever it connects.
    pub(crate) fn publisher(self, broker: &broker::Settings) -> Publisher {
        // Who publishes to a partition finds out that it was refused.
        Publisher::new(broker, SERVICE).on_connect(move |session| self.declare(session).map(drop))
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
