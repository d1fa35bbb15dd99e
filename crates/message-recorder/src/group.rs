//! A group's beginning.

use broker::Survey;
use domain::log::{Group, partition_queue};
use serde::Deserialize;
use storage::{Database, consumer_offsets, partitions};

/// Where a new group begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// With the first messages that there are
    First,
    /// With the next messages that come
    Next,
}

/// Gives a new group its offsets, one for each partition that there is now. A partition that is added later begins at its
/// beginning: what comes there is new to every group. A group that has its offsets keeps them.
pub(crate) fn found(
    database: &Database,
    survey: impl FnOnce() -> Result<Survey, broker::Error>,
    group: &Group,
    from: Start,
) -> anyhow::Result<()> {
    let partitions = {
        let mut conn = database.connection()?;
        if consumer_offsets::exists(&mut conn, group)? {
            return Ok(());
        }
        partitions::count(&mut conn)?
    };
    let mut survey = survey()?;
    let mut place = |partition| -> Result<_, broker::Error> {
        let stream = partition_queue(partition);
        let offset = match from {
            Start::First => survey.first(&stream)?,
            Start::Next => survey.newest(&stream)?.map(|newest| newest + 1),
        };
        Ok((partition, offset.unwrap_or(0)))
    };
    let places = (0..partitions).map(&mut place).collect::<Result<Vec<_>, _>>()?;
    // Of two members that do this at once, one has its way in everything: the other's rows are all there already.
    database.transaction(|conn| consumer_offsets::create(conn, group, &places))?;
    log::info!(group = group.as_str(), offsets:? = places; "the group is new");
    Ok(())
}
