//! Table `dead_letter`: messages that were set aside, until an operator replays or drops them.

use crate::{
    Error, Result,
    outbox::{self, headers_from_json, headers_to_json},
    schema::dead_letter,
};
use chrono::{DateTime, Utc};
use diesel::{PgConnection, prelude::*};
use domain::{Envelope, envelope::header};
use std::collections::BTreeMap;

/// A message that was set aside.
#[derive(Clone, Queryable, Selectable)]
#[diesel(table_name = dead_letter, check_for_backend(diesel::pg::Pg))]
pub struct DeadLetter {
    /// The row's id.
    pub id: i64,
    /// The queue that it died in; empty for one that the relay couldn't publish.
    pub queue: String,
    /// The AMQP message id.
    pub message_id: Option<String>,
    /// The AMQP type.
    pub kind: Option<String>,
    /// The request that it follows from.
    pub correlation_id: Option<String>,
    /// Where it was published to.
    pub exchange: String,
    /// With which routing key.
    pub routing_key: String,
    /// Its string headers, a JSON object.
    pub headers: serde_json::Value,
    /// Why it was set aside.
    pub error: String,
    /// How many attempts there were.
    pub attempts: i32,
    /// Its body.
    pub body: Vec<u8>,
    /// When the last attempt failed.
    pub failed_at: DateTime<Utc>,
    /// `waiting`, `replayed` or `dropped`.
    pub state: String,
    /// When it was replayed or dropped.
    pub settled_at: Option<DateTime<Utc>>,
    /// By whom.
    pub settled_by: Option<String>,
}

/// A message to be set aside.
pub struct NewDeadLetter {
    /// The same key again is the same dead letter.
    pub dedup_key: String,
    /// The queue that it died in; empty for one that the relay couldn't publish.
    pub queue: String,
    /// The AMQP message id.
    pub message_id: Option<String>,
    /// The AMQP type.
    pub kind: Option<String>,
    /// The request that it follows from.
    pub correlation_id: Option<String>,
    /// Where it was published to.
    pub exchange: String,
    /// With which routing key.
    pub routing_key: String,
    /// Its string headers.
    pub headers: BTreeMap<String, String>,
    /// Why it's set aside.
    pub error: String,
    /// How many attempts there were.
    pub attempts: u32,
    /// Its body.
    pub body: Vec<u8>,
    /// When the last attempt failed.
    pub failed_at: DateTime<Utc>,
}

/// Postgres text holds any character but NUL, and a message by somebody else may hold that too.
fn printable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// Keeps the messages; those that are there already stay as they are. Returns how many are new.
pub fn record(conn: &mut PgConnection, letters: &[NewDeadLetter]) -> Result<usize> {
    let rows: Vec<_> = letters
        .iter()
        .map(|letter| {
            let headers = letter.headers.iter().map(|(name, value)| (printable(name), printable(value))).collect();
            (
                dead_letter::dedup_key.eq(printable(&letter.dedup_key)),
                dead_letter::queue.eq(printable(&letter.queue)),
                dead_letter::message_id.eq(letter.message_id.as_deref().map(printable)),
                dead_letter::kind.eq(letter.kind.as_deref().map(printable)),
                dead_letter::correlation_id.eq(letter.correlation_id.as_deref().map(printable)),
                dead_letter::exchange.eq(printable(&letter.exchange)),
                dead_letter::routing_key.eq(printable(&letter.routing_key)),
                dead_letter::headers.eq(headers_to_json(&headers)),
                dead_letter::error.eq(printable(&letter.error)),
                dead_letter::attempts.eq(i32::try_from(letter.attempts).unwrap_or(i32::MAX)),
                dead_letter::body.eq(&letter.body),
                dead_letter::failed_at.eq(letter.failed_at),
            )
        })
        .collect();
    Ok(diesel::insert_into(dead_letter::table)
        .values(rows)
        .on_conflict(dead_letter::dedup_key)
        .do_nothing()
        .execute(conn)?)
}

/// Messages in this state (`None`: in any), the newest first, `limit` of those with ids below `before`.
pub fn list(
    conn: &mut PgConnection,
    state: Option<&str>,
    queue: Option<&str>,
    before: i64,
    limit: i64,
) -> Result<Vec<DeadLetter>> {
    let mut query = dead_letter::table
        .filter(dead_letter::id.lt(before))
        .order(dead_letter::id.desc())
        .limit(limit)
        .select(DeadLetter::as_select())
        .into_boxed();
    if let Some(state) = state {
        query = query.filter(dead_letter::state.eq(state.to_owned()));
    }
    if let Some(queue) = queue {
        query = query.filter(dead_letter::queue.eq(queue.to_owned()));
    }
    Ok(query.load(conn)?)
}

/// The ids of all messages that wait for an operator, of one queue or (`None`) of all, the oldest first.
pub fn waiting_ids(conn: &mut PgConnection, queue: Option<&str>) -> Result<Vec<i64>> {
    let mut query = dead_letter::table
        .filter(dead_letter::state.eq("waiting"))
        .order(dead_letter::id)
        .select(dead_letter::id)
        .into_boxed();
    if let Some(queue) = queue {
        query = query.filter(dead_letter::queue.eq(queue.to_owned()));
    }
    Ok(query.load(conn)?)
}

/// How many messages wait for an operator.
pub fn count_waiting(conn: &mut PgConnection) -> Result<i64> {
    Ok(dead_letter::table.filter(dead_letter::state.eq("waiting")).count().get_result(conn)?)
}

/// The message with this id.
///
/// # Errors
/// [`Error::NotFound`].
pub fn get(conn: &mut PgConnection, id: i64) -> Result<DeadLetter> {
    dead_letter::table
        .find(id)
        .select(DeadLetter::as_select())
        .first(conn)
        .optional()?
        .ok_or(Error::NotFound("dead letter"))
}

/// Sends the message once more, by way of the outbox, to the queue that it died in alone, with its attempts counted
/// afresh. To be run in a transaction.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::Conflict`] when it was replayed or dropped before.
pub fn replay(conn: &mut PgConnection, id: i64, by: &str) -> Result<()> {
    let letter = settle(conn, id, "replayed", by)?;
    let mut headers = headers_from_json(&letter.headers);
    let replays: u32 = headers.get(header::REPLAY).and_then(|count| count.parse().ok()).unwrap_or(0);
    headers.retain(|name, _| ![header::ATTEMPTS, header::ERROR, header::FAILED_AT].contains(&name.as_str()));
    headers.insert(header::REPLAY.into(), (replays + 1).to_string());
    // The default exchange routes to the queue that the key names.
    let (exchange, routing_key) = match letter.queue.as_str() {
        "" => (letter.exchange, letter.routing_key),
        _ => (String::new(), letter.queue),
    };
    let mut envelope = Envelope::new(exchange, routing_key, letter.body);
    envelope.kind = letter.kind;
    envelope.correlation_id = letter.correlation_id;
    envelope.headers = headers;
    // Its own id, because effects may be keyed by it.
    if let Some(message_id) = letter.message_id {
        envelope.message_id = message_id;
    }
    outbox::push(conn, &[envelope])
}

/// Gives the message up.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::Conflict`] when it was replayed or dropped before.
pub fn discard(conn: &mut PgConnection, id: i64, by: &str) -> Result<()> {
    settle(conn, id, "dropped", by).map(drop)
}

fn settle(conn: &mut PgConnection, id: i64, state: &str, by: &str) -> Result<DeadLetter> {
    let letter = diesel::update(dead_letter::table.find(id).filter(dead_letter::state.eq("waiting")))
        .set((
            dead_letter::state.eq(state),
            dead_letter::settled_at.eq(diesel::dsl::now),
            dead_letter::settled_by.eq(by),
        ))
        .returning(DeadLetter::as_returning())
        .get_result(conn)
        .optional()?;
    match letter {
        Some(letter) => Ok(letter),
        None => get(conn, id).and(Err(Error::Conflict("it was replayed or dropped before"))),
    }
}
