//! The streams that the log's partitions are.

use broker::Session;
use domain::topology::Retention;
use storage::{Database, partitions};

/// Declares the log's exchange and as many streams as the database says just now. What is refused beside the stream that is
/// `needed` is the others' business.
///
/// # Errors
/// The broker's; a database that is away is a lost connection too.
pub(crate) fn declare(
    session: &mut Session,
    database: &Database,
    retention: Retention,
    needed: Option<&str>,
) -> Result<(), broker::Error> {
    let topology = database.connection().and_then(|mut conn| partitions::topology(&mut conn, retention));
    let topology = topology.map_err(|error| broker::Error::Lost {
        doing: "asking the database how many partitions there are",
        source: error.into(),
    })?;
    let refused = broker::declare_each(session, &topology)?;
    let needed = refused.into_iter().find(|refused| refused.is_queue && needed == Some(&*refused.name));
    needed.map_or(Ok(()), |refused| Err(refused.error))
}
