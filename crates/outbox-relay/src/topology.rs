//! What is published to.

use crate::{GOODBYE, SERVICE};
use broker::{Publisher, Session};
use domain::topology::{Retention, Topology};
use std::time::Instant;
use storage::{Database, partitions, resharding};

/// The exchanges and queues that are declared on every new connection, since a broker may come back empty.
#[derive(Clone)]
pub(crate) struct Destinations {
    pub(crate) fleet: Topology,
    pub(crate) message_log: Retention,
    pub(crate) database: Database,
}

impl Destinations {
    /// Declares the fleet's topology, and as many queues of each sequenced stream and partitions of the message log as the
    /// database says just now: whoever changes their number may have taken some away, or added some, since the last time.
    ///
    /// # Errors
    /// The broker's; a database that is away is a lost connection too.
    pub(crate) fn declare(&self, session: &mut Session) -> Result<(), broker::Error> {
        broker::declare(session, &self.fleet)?;
        let told = self.database.connection().and_then(|mut conn| {
            Ok(resharding::topology(&mut conn)?.and(partitions::topology(&mut conn, self.message_log)?))
        });
        let told = told.map_err(|error| broker::Error::Lost {
            doing: "asking the database how many queues and partitions there are",
            source: error.into(),
        })?;
        broker::declare(session, &told)
    }

    /// The same on a connection of its own.
    ///
    /// # Errors
    /// The same.
    pub(crate) fn declare_at(&self, broker: &broker::Settings) -> Result<(), broker::Error> {
        let mut session = Session::open(broker, SERVICE)?;
        self.declare(&mut session)?;
        session.close(Instant::now() + GOODBYE);
        Ok(())
    }

    /// A publisher that declares them whenever it connects.
    pub(crate) fn publisher(&self, broker: &broker::Settings) -> Publisher {
        let destinations = self.clone();
        Publisher::new(broker, SERVICE).on_connect(move |session| destinations.declare(session))
    }
}
