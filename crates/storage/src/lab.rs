//! What the ordering lab puts into the fleet's tables for a while, and takes out again.

use crate::{
    Result,
    schema::{attempt, dead_letter, lease, member, stream, stream_change, stream_cursor, stream_event, stream_head},
    streams::Layout,
};
use diesel::{PgConnection, prelude::*, sql_query, sql_types::Text};

/// Makes a stream.
///
/// # Errors
/// The database's, such as that there is one of that name.
pub fn make_stream(conn: &mut PgConnection, name: &str, layout: Layout) -> Result<()> {
    diesel::insert_into(stream::table)
        .values((stream::stream_.eq(name), stream::shards.eq(layout.shards), stream::queues.eq(layout.queues)))
        .execute(conn)?;
    Ok(())
}

/// Removes a stream with its events, the leases on its shards and the members of the service that worked on it. To be run
/// in a transaction, when nobody works on it any more.
///
/// # Errors
/// The database's.
pub fn remove_stream(conn: &mut PgConnection, name: &str, service: &str) -> Result<()> {
    sql_query("DELETE FROM outbox WHERE exchange = $1").bind::<Text, _>(name).execute(conn)?;
    diesel::delete(stream_event::table.filter(stream_event::stream.eq(name))).execute(conn)?;
    diesel::delete(stream_cursor::table.filter(stream_cursor::stream.eq(name))).execute(conn)?;
    diesel::delete(stream_head::table.filter(stream_head::stream.eq(name))).execute(conn)?;
    diesel::delete(stream_change::table.filter(stream_change::stream.eq(name))).execute(conn)?;
    diesel::delete(lease::table.filter(lease::resource.like(format!("{name}/%")))).execute(conn)?;
    diesel::delete(member::table.filter(member::service.eq(service))).execute(conn)?;
    diesel::delete(stream::table.find(name)).execute(conn)?;
    Ok(())
}

/// How many events of a stream haven't taken effect.
///
/// # Errors
/// The database's.
pub fn waiting(conn: &mut PgConnection, name: &str) -> Result<i64> {
    let waiting =
        stream_event::table.filter(stream_event::stream.eq(name)).filter(stream_event::processed_at.is_null());
    Ok(waiting.count().get_result(conn)?)
}

/// Removes what was recorded of the messages of a queue that failed.
///
/// # Errors
/// The database's.
pub fn remove_failures(conn: &mut PgConnection, queue: &str) -> Result<()> {
    diesel::delete(dead_letter::table.filter(dead_letter::queue.eq(queue))).execute(conn)?;
    diesel::delete(attempt::table.filter(attempt::queue.eq(queue))).execute(conn)?;
    Ok(())
}
