//! What rows are published to.

use broker::Session;
use domain::topology::Topology;
use storage::{Database, resharding};

/// Declares the fleet's topology, and as many queues of each stream as the database says just now: whoever changes their
/// number may have taken some away since the last time.
///
/// # Errors
/// The broker's; a database that is away is a lost connection too.
pub(crate) fn declare(session: &mut Session, fleet: &Topology, database: &Database) -> Result<(), broker::Error> {
    broker::declare(session, fleet)?;
    let streams = database.connection().and_then(|mut conn| resharding::topology(&mut conn));
    let streams = streams.map_err(|error| broker::Error::Lost {
        doing: "asking the database how many queues the streams have",
        source: error.into(),
    })?;
    broker::declare(session, &streams)
}
