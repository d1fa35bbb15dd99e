//! Keys of sequenced streams that are parked: how they stand, and what operators do about them.
//!
//! Whoever changes what is next for a key raises its cursor's revision: a worker that read it before can't move the cursor
//! any more. Nothing else is needed for the key to go on, because the workers' sweep finds every key that may.

use crate::{Error, Result, schema::stream_cursor, streams};
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{BigInt, Integer, Nullable, Text, Timestamptz},
};
use domain::stream::Payload;

/// A parked key.
#[derive(Clone, Debug, PartialEq, Eq, Queryable)]
pub struct Parked {
    /// The key.
    pub key: String,
    /// The last event that took effect: the next one is what it's parked for.
    pub cursor: i64,
    /// Attempts at the next event that failed.
    pub attempts: i32,
    /// Attempts at it whose process died.
    pub deaths: i32,
    /// Since when.
    pub parked_at: Option<DateTime<Utc>>,
    /// Why.
    pub last_error: Option<String>,
}

/// Parked keys of a stream, sorted: `limit` of those beyond `after` (the empty string is before all).
pub fn list(conn: &mut PgConnection, stream: &str, after: &str, limit: i64) -> Result<Vec<Parked>> {
    Ok(stream_cursor::table
        .filter(stream_cursor::stream.eq(stream).and(stream_cursor::parked_at.is_not_null()))
        .filter(stream_cursor::key.gt(after))
        .order(stream_cursor::key)
        .limit(limit)
        .select((
            stream_cursor::key,
            stream_cursor::seq,
            stream_cursor::attempts,
            stream_cursor::deaths,
            stream_cursor::parked_at,
            stream_cursor::last_error,
        ))
        .load(conn)?)
}

/// All parked keys of a stream, sorted.
pub fn keys(conn: &mut PgConnection, stream: &str) -> Result<Vec<String>> {
    Ok(stream_cursor::table
        .filter(stream_cursor::stream.eq(stream).and(stream_cursor::parked_at.is_not_null()))
        .order(stream_cursor::key)
        .select(stream_cursor::key)
        .load(conn)?)
}

/// How a key stands.
#[derive(Clone, PartialEq, Eq, QueryableByName)]
pub struct Standing {
    /// The newest sequence.
    #[diesel(sql_type = BigInt)]
    pub head: i64,
    /// The last event that took effect or was skipped.
    #[diesel(sql_type = BigInt)]
    pub cursor: i64,
    /// How often an operator has changed what is next.
    #[diesel(sql_type = Integer)]
    pub revision: i32,
    /// Attempts at the next event that failed.
    #[diesel(sql_type = Integer)]
    pub attempts: i32,
    /// Attempts at it that began on record and haven't ended.
    #[diesel(sql_type = Integer)]
    pub deaths: i32,
    /// When it's tried again.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub retry_at: Option<DateTime<Utc>>,
    /// Since when it has been parked.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub parked_at: Option<DateTime<Utc>>,
    /// Why the last attempt failed.
    #[diesel(sql_type = Nullable<Text>)]
    pub last_error: Option<String>,
    /// What is next, as JSON text; `None` if nothing is.
    #[diesel(sql_type = Nullable<Text>)]
    pub payload: Option<String>,
    /// When that was accepted.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub generated_at: Option<DateTime<Utc>>,
}

/// How the key stands, parked or not.
///
/// # Errors
/// [`Error::NotFound`] when there's no such key.
pub fn get(conn: &mut PgConnection, stream: &str, key: &str) -> Result<Standing> {
    sql_query(
        "SELECT h.seq AS head, c.seq AS cursor, c.revision, c.attempts, c.deaths, c.retry_at, c.parked_at, c.last_error,
                e.payload::text AS payload, e.generated_at
         FROM stream_cursor c
         JOIN stream_head h USING (stream, key)
         LEFT JOIN stream_event e ON e.stream = c.stream AND e.key = c.key AND e.seq = c.seq + 1
         WHERE c.stream = $1 AND c.key = $2",
    )
    .bind::<Text, _>(stream)
    .bind::<Text, _>(key)
    .get_result(conn)
    .optional()?
    .ok_or(Error::NotFound("key"))
}

/// What an operator did to a key.
#[derive(Clone, PartialEq, Eq, QueryableByName)]
pub struct Change {
    /// The event that was next.
    #[diesel(sql_type = BigInt)]
    pub seq: i64,
    /// `retry`, `skip` or `replace`.
    #[diesel(sql_type = Text)]
    pub action: String,
    /// Why the key was parked.
    #[diesel(sql_type = Nullable<Text>)]
    pub last_error: Option<String>,
    /// What was replaced, as JSON text.
    #[diesel(sql_type = Nullable<Text>)]
    pub payload: Option<String>,
    /// Who did it.
    #[diesel(sql_type = Text)]
    pub changed_by: String,
    /// When.
    #[diesel(sql_type = Timestamptz)]
    pub changed_at: DateTime<Utc>,
}

/// What operators have done to the key, the oldest first.
pub fn history(conn: &mut PgConnection, stream: &str, key: &str) -> Result<Vec<Change>> {
    Ok(sql_query(
        "SELECT seq, action, last_error, payload::text AS payload, changed_by, changed_at FROM stream_change
         WHERE stream = $1 AND key = $2 ORDER BY id",
    )
    .bind::<Text, _>(stream)
    .bind::<Text, _>(key)
    .load(conn)?)
}

/// A parked key to be changed, by whom.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    /// The stream.
    pub stream: &'a str,
    /// The key.
    pub key: &'a str,
    /// The event that has to be next, if that matters.
    pub seq: Option<i64>,
    /// Who changes it.
    pub by: &'a str,
}

/// Has the next event tried again, with its attempts counted afresh; answers which that is. To be run in a transaction.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::Conflict`] when the key isn't parked, or another event is next.
pub fn retry(conn: &mut PgConnection, order: &Order<'_>) -> Result<i64> {
    let (seq, last_error) = lock(conn, order)?;
    unpark(conn, order, seq - 1)?;
    record(conn, order, seq, "retry", last_error.as_deref(), None)?;
    Ok(seq)
}

/// Has the key go on behind its next event, which stays without effect; answers which that is. To be run in a
/// transaction.
///
/// # Errors
/// As for [`retry`].
pub fn skip(conn: &mut PgConnection, order: &Order<'_>) -> Result<i64> {
    let (seq, last_error) = lock(conn, order)?;
    let skipped = sql_query(
        "UPDATE stream_event SET processed_at = clock_timestamp(), worker = $4, outcome = 'skipped'
         WHERE stream = $1 AND key = $2 AND seq = $3 AND processed_at IS NULL",
    )
    .bind::<Text, _>(order.stream)
    .bind::<Text, _>(order.key)
    .bind::<BigInt, _>(seq)
    .bind::<Text, _>(order.by)
    .execute(conn)?;
    if skipped == 0 {
        return Err(NOTHING_NEXT);
    }
    unpark(conn, order, seq)?;
    record(conn, order, seq, "skip", last_error.as_deref(), None)?;
    Ok(seq)
}

/// Puts another payload in the place of the next event's, which is kept in the history, and has that tried; answers
/// which event it is. To be run in a transaction.
///
/// # Errors
/// As for [`retry`].
pub fn replace(conn: &mut PgConnection, order: &Order<'_>, payload: &Payload) -> Result<i64> {
    #[derive(QueryableByName)]
    struct Old {
        #[diesel(sql_type = Text)]
        payload: String,
    }
    let (seq, last_error) = lock(conn, order)?;
    let old: Old = sql_query(
        "WITH old AS (SELECT payload::text AS payload FROM stream_event
                      WHERE stream = $1 AND key = $2 AND seq = $3 AND processed_at IS NULL)
         UPDATE stream_event SET payload = $4::json FROM old WHERE stream = $1 AND key = $2 AND seq = $3
         RETURNING old.payload",
    )
    .bind::<Text, _>(order.stream)
    .bind::<Text, _>(order.key)
    .bind::<BigInt, _>(seq)
    .bind::<Text, _>(payload.as_str())
    .get_result(conn)
    .optional()?
    .ok_or(NOTHING_NEXT)?;
    unpark(conn, order, seq - 1)?;
    record(conn, order, seq, "replace", last_error.as_deref(), Some(&old.payload))?;
    Ok(seq)
}

/// The tables contradict each other; the audit says more.
const NOTHING_NEXT: Error = Error::Conflict("it's parked, but has no waiting event");

/// Locks the key's cursor; answers its next event, and why it's parked.
fn lock(conn: &mut PgConnection, order: &Order<'_>) -> Result<(i64, Option<String>)> {
    type Locked = (i64, Option<DateTime<Utc>>, Option<String>);
    let (cursor, parked_at, last_error): Locked = stream_cursor::table
        .find((order.stream, order.key))
        .select((stream_cursor::seq, stream_cursor::parked_at, stream_cursor::last_error))
        .for_update()
        .first(conn)
        .optional()?
        .ok_or(Error::NotFound("key"))?;
    let next = cursor + 1;
    match (parked_at, order.seq) {
        (None, _) => Err(Error::Conflict("it isn't parked")),
        (_, Some(seq)) if seq != next => Err(Error::Conflict("another event is next by now")),
        _ => Ok((next, last_error)),
    }
}

fn unpark(conn: &mut PgConnection, order: &Order<'_>, cursor: i64) -> Result<()> {
    diesel::update(stream_cursor::table.find((order.stream, order.key)))
        .set((
            stream_cursor::seq.eq(cursor),
            stream_cursor::revision.eq(stream_cursor::revision + 1),
            stream_cursor::attempts.eq(0),
            stream_cursor::deaths.eq(0),
            stream_cursor::retry_at.eq(None::<DateTime<Utc>>),
            stream_cursor::parked_at.eq(None::<DateTime<Utc>>),
            stream_cursor::last_error.eq(None::<String>),
        ))
        .execute(conn)?;
    streams::rouse(conn, order.stream, &[order.key])
}

fn record(
    conn: &mut PgConnection,
    order: &Order<'_>,
    seq: i64,
    action: &str,
    last_error: Option<&str>,
    payload: Option<&str>,
) -> Result<()> {
    sql_query(
        "INSERT INTO stream_change (stream, key, seq, action, last_error, payload, changed_by)
         VALUES ($1, $2, $3, $4, $5, $6::json, $7)",
    )
    .bind::<Text, _>(order.stream)
    .bind::<Text, _>(order.key)
    .bind::<BigInt, _>(seq)
    .bind::<Text, _>(action)
    .bind::<Nullable<Text>, _>(last_error)
    .bind::<Nullable<Text>, _>(payload)
    .bind::<Text, _>(order.by)
    .execute(conn)?;
    Ok(())
}
