//! The lab's own tables, and what it puts into the fleet's for a while and takes out again.

use diesel::{
    PgConnection,
    connection::SimpleConnection as _,
    prelude::*,
    sql_query,
    sql_types::{BigInt, Integer, Text},
};
use storage::{Result, admin, streams::Layout};

/// Below every key of the fleet's own.
const LOCK: i64 = i64::MIN;

/// Makes the lab's tables, unless they are there.
pub(crate) fn make(conn: &mut PgConnection) -> Result<()> {
    admin::alone(conn, LOCK, |conn| Ok(conn.batch_execute(include_str!("../schema.sql"))?))
}

/// Makes a stream.
pub(crate) fn make_stream(conn: &mut PgConnection, name: &str, layout: Layout) -> Result<()> {
    sql_query("INSERT INTO stream (stream, shards, queues) VALUES ($1, $2, $3)")
        .bind::<Text, _>(name)
        .bind::<Integer, _>(layout.shards)
        .bind::<Integer, _>(layout.queues)
        .execute(conn)?;
    Ok(())
}

/// Removes a stream with its events, the leases on its shards and the members of the service that worked on it. To be run
/// in a transaction, when nobody works on it any more.
pub(crate) fn remove_stream(conn: &mut PgConnection, name: &str, service: &str) -> Result<()> {
    for (table, column) in [
        ("outbox", "exchange"),
        ("stream_event", "stream"),
        ("stream_cursor", "stream"),
        ("stream_head", "stream"),
        ("stream_change", "stream"),
        ("stream", "stream"),
    ] {
        sql_query(format!("DELETE FROM {table} WHERE {column} = $1")).bind::<Text, _>(name).execute(conn)?;
    }
    sql_query("DELETE FROM lease WHERE starts_with(resource, $1 || '/')").bind::<Text, _>(name).execute(conn)?;
    sql_query("DELETE FROM member WHERE service = $1").bind::<Text, _>(service).execute(conn)?;
    Ok(())
}

/// How many events of a stream haven't taken effect.
pub(crate) fn waiting(conn: &mut PgConnection, name: &str) -> Result<i64> {
    #[derive(QueryableByName)]
    struct Count {
        #[diesel(sql_type = BigInt)]
        n: i64,
    }
    let count = sql_query("SELECT count(*) AS n FROM stream_event WHERE stream = $1 AND processed_at IS NULL");
    Ok(count.bind::<Text, _>(name).get_result::<Count>(conn)?.n)
}

/// Removes what was recorded of the messages of a queue that failed.
pub(crate) fn remove_failures(conn: &mut PgConnection, queue: &str) -> Result<()> {
    for table in ["dead_letter", "attempt"] {
        sql_query(format!("DELETE FROM {table} WHERE queue = $1")).bind::<Text, _>(queue).execute(conn)?;
    }
    Ok(())
}
