//! Tables `message_partition` and `message_log`: how the message log is divided, and what tells it from others.

use crate::{
    Count, Result,
    schema::{message_log, message_partition},
};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{BigInt, Integer},
};
use domain::topology::{Retention, Topology};

/// How many partitions there are.
pub fn count(conn: &mut PgConnection) -> Result<i32> {
    let count: i64 = message_partition::table.count().get_result(conn)?;
    Ok(i32::try_from(count).unwrap_or(i32::MAX))
}

/// The log's exchange and streams. How many those are is told here alone, so whoever declares them looks each time.
pub fn topology(conn: &mut PgConnection, retention: Retention) -> Result<Topology> {
    Ok(Topology::log(count(conn)?, retention))
}

/// Makes it so many partitions, unless there are more. Their streams must be there already.
pub fn extend_to(conn: &mut PgConnection, partitions: i32) -> Result<()> {
    sql_query("INSERT INTO message_partition (partition) SELECT generate_series(0, $1 - 1) ON CONFLICT DO NOTHING")
        .bind::<Integer, _>(partitions)
        .execute(conn)?;
    Ok(())
}

/// What the ids of this log's messages begin with.
pub fn token(conn: &mut PgConnection) -> Result<String> {
    Ok(message_log::table.select(message_log::token).first(conn)?)
}

/// Up to which sequence a partition's messages are trusted without a proof; `None` while all are.
pub fn unproven_upto(conn: &mut PgConnection, partition: i32) -> Result<Option<i64>> {
    let upto =
        message_partition::table.find(partition).select(message_partition::unproven_upto).first(conn).optional()?;
    Ok(upto.unwrap_or(Some(0)))
}

/// How many of these sequences, both ends included, no message has or will get: the database has become another one there.
pub fn unused_among(conn: &mut PgConnection, partition: i32, lowest: i64, highest: i64) -> Result<i64> {
    let count: Count = sql_query("SELECT message_unused_among($1, $2, $3) AS n")
        .bind::<Integer, _>(partition)
        .bind::<BigInt, _>(lowest)
        .bind::<BigInt, _>(highest)
        .get_result(conn)?;
    Ok(count.n)
}

/// A partition, as far as accepting and publishing goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, QueryableByName)]
pub struct Partition {
    /// Its number.
    #[diesel(sql_type = Integer)]
    pub partition: i32,
    /// The newest sequence that was given to a message.
    #[diesel(sql_type = BigInt)]
    pub seq: i64,
    /// Messages that were accepted, and aren't known to be in the stream.
    #[diesel(sql_type = BigInt)]
    pub waiting: i64,
}

/// All partitions, in their order.
pub fn list(conn: &mut PgConnection) -> Result<Vec<Partition>> {
    Ok(sql_query(
        "SELECT partition, seq, (SELECT count(*) FROM message_outbox o WHERE o.partition = p.partition) AS waiting
         FROM message_partition p ORDER BY partition",
    )
    .load(conn)?)
}
