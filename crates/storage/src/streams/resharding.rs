//! Changing how a stream is divided while it runs: see [`streams::Layout`].

use crate::{Error, Result, locks, schema::stream, streams, streams::Layout};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Text},
};
use domain::topology::Topology;
use std::time::Duration;

/// The exchange and the queues of every stream there is. How many queues that is is told here alone, so whoever declares
/// them looks each time.
pub fn topology(conn: &mut PgConnection) -> Result<Topology> {
    let streams: Vec<(String, i32)> =
        stream::table.order(stream::stream_).select((stream::stream_, stream::queues)).load(conn)?;
    let topologies = streams.into_iter().map(|(name, queues)| Topology::stream(&name, queues));
    Ok(topologies.fold(Topology::default(), Topology::and))
}

/// Runs `work` while no other session does so for the same stream; `None` if one is at it. The lock is the
/// connection's: what `work` does by it, it does under the lock.
pub fn alone<T>(conn: &mut PgConnection, name: &str, work: impl FnOnce(&mut PgConnection) -> T) -> Result<Option<T>> {
    let key = locks::resharding(name);
    if !diesel::select(locks::pg_try_advisory_lock(key)).get_result::<bool>(conn)? {
        return Ok(None);
    }
    let result = work(conn);
    // If it fails, the session has ended, and its locks with it.
    let _ = sql_query("SELECT pg_advisory_unlock($1)").bind::<BigInt, _>(key).execute(conn);
    Ok(Some(result))
}

/// [`streams::divide`], in a transaction of its own, unless those who are appending aren't done within `limit`: so long
/// at most do others wait that want to append. Returns whether it did.
///
/// # Errors
/// As for [`streams::divide`].
pub fn divide_within(conn: &mut PgConnection, name: &str, layout: Layout, limit: Duration) -> Result<bool> {
    let divided = conn.transaction(|conn| {
        sql_query(format!("SET LOCAL statement_timeout = {}", limit.as_millis().max(1))).execute(conn)?;
        streams::divide(conn, name, layout)
    });
    match divided {
        Err(Error::TooSlow(_) | Error::Locked(_)) => Ok(false),
        divided => divided.map(|()| true),
    }
}

/// How many messages that are to go to these queues wait for the relay: by the stream's exchange with one of the routing
/// keys, or straight to a queue, as a replayed dead letter does.
pub fn unrelayed(conn: &mut PgConnection, name: &str, routing_keys: &[String], queues: &[String]) -> Result<i64> {
    let count: crate::Count = sql_query(
        "SELECT count(*) AS n FROM outbox
         WHERE (exchange = $1 AND routing_key = ANY ($2)) OR (exchange = '' AND routing_key = ANY ($3))",
    )
    .bind::<Text, _>(name)
    .bind::<Array<Text>, _>(routing_keys)
    .bind::<Array<Text>, _>(queues)
    .get_result(conn)?;
    Ok(count.n)
}
