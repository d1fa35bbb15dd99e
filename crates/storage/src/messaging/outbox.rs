//! Table `outbox`: messages that follow from committed changes, on their way to the broker.

use crate::{Floors, Result, floors::Given, schema::outbox};
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    dsl::sql,
    expression::SqlLiteral,
    prelude::*,
    sql_query,
    sql_types::{Array, Binary, Jsonb, Nullable, Text},
};
use domain::Envelope;
use std::{collections::BTreeMap, time::Instant};

/// The table is all one.
const PART: i32 = 0;

/// A message that waits for the relay.
#[derive(Debug)]
pub struct Row {
    /// The row's id.
    pub id: i64,
    /// The message.
    pub envelope: Envelope,
}

pub(crate) fn headers_to_json(headers: &BTreeMap<String, String>) -> serde_json::Value {
    headers.iter().map(|(name, value)| (name.clone(), value.as_str().into())).collect::<serde_json::Map<_, _>>().into()
}

pub(crate) fn headers_from_json(headers: &serde_json::Value) -> BTreeMap<String, String> {
    let object = headers.as_object().into_iter().flatten();
    object.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

fn column<'a, T>(envelopes: &'a [Envelope], value: impl Fn(&'a Envelope) -> T) -> Vec<T> {
    envelopes.iter().map(value).collect()
}

/// Commits the messages with whatever else the transaction does; the relay publishes them then.
pub fn push(conn: &mut PgConnection, envelopes: &[Envelope]) -> Result<()> {
    if envelopes.is_empty() {
        return Ok(());
    }
    // A column is one parameter: a bulk costs one short statement, and ids grow in the order of the messages.
    sql_query(
        "INSERT INTO outbox (exchange, routing_key, kind, message_id, correlation_id, headers, body)
         SELECT exchange, routing_key, kind, message_id, correlation_id, headers, body
         FROM unnest($1, $2, $3, $4, $5, $6, $7) WITH ORDINALITY
              AS new (exchange, routing_key, kind, message_id, correlation_id, headers, body, place) ORDER BY place",
    )
    .bind::<Array<Text>, _>(column(envelopes, |envelope| envelope.exchange.as_str()))
    .bind::<Array<Text>, _>(column(envelopes, |envelope| envelope.routing_key.as_str()))
    .bind::<Array<Nullable<Text>>, _>(column(envelopes, |envelope| envelope.kind.as_deref()))
    .bind::<Array<Text>, _>(column(envelopes, |envelope| envelope.message_id.as_str()))
    .bind::<Array<Nullable<Text>>, _>(column(envelopes, |envelope| envelope.correlation_id.as_deref()))
    .bind::<Array<Jsonb>, _>(column(envelopes, |envelope| headers_to_json(&envelope.headers)))
    .bind::<Array<Binary>, _>(column(envelopes, |envelope| envelope.body.as_slice()))
    .execute(conn)?;
    Ok(())
}

type Columns = (i64, String, String, Option<String>, String, Option<String>, serde_json::Value, Vec<u8>, DateTime<Utc>);

/// Where messages are published to that aren't to be taken for now.
#[derive(Clone, Copy, Debug)]
pub struct Destination<'a> {
    /// The exchange.
    pub exchange: &'a str,
    /// The routing key.
    pub routing_key: &'a str,
}

impl Destination<'_> {
    /// As [`of_row`] has it.
    fn as_text(&self) -> String {
        format!("{}:{}{}", self.exchange.chars().count(), self.exchange, self.routing_key)
    }
}

/// A row's destination as one text, which no other destination has.
fn of_row() -> SqlLiteral<Text> {
    sql::<Text>("(length(exchange) || ':' || exchange || routing_key)")
}

/// Whether there are messages for others than these. Notes in `floors` from where on to look next time.
pub fn look(conn: &mut PgConnection, floors: &mut Floors, except: &[Destination<'_>], now: Instant) -> Result<bool> {
    if floors.is_due(now) {
        floors.note(now, Given::by("outbox_id_seq", conn)?);
    }
    // In the order of the ids, or the planner would take a small table for one that is read through.
    let open = outbox::table.select(outbox::id).filter(outbox::id.gt(floors.of(PART))).order(outbox::id).limit(1);
    let first = if except.is_empty() {
        open.first(conn)
    } else {
        let except: Vec<_> = except.iter().map(Destination::as_text).collect();
        open.filter(of_row().ne_all(except)).first(conn)
    };
    let first: Option<i64> = first.optional()?;
    floors.found(PART, first);
    Ok(first.is_some())
}

/// The oldest `limit` messages that no other relay has in hand, kept from the others to the end of the transaction.
pub fn take(conn: &mut PgConnection, limit: i64) -> Result<Vec<Row>> {
    take_except(conn, &Floors::default(), &[], limit)
}

/// The same of those above the floor, for others than these.
pub fn take_except(
    conn: &mut PgConnection,
    floors: &Floors,
    except: &[Destination<'_>],
    limit: i64,
) -> Result<Vec<Row>> {
    let oldest = outbox::table.filter(outbox::id.gt(floors.of(PART))).order(outbox::id).limit(limit);
    let rows: Vec<Columns> = if except.is_empty() {
        oldest.for_update().skip_locked().load(conn)?
    } else {
        let except: Vec<_> = except.iter().map(Destination::as_text).collect();
        oldest.filter(of_row().ne_all(except)).for_update().skip_locked().load(conn)?
    };
    Ok(rows.into_iter().map(row).collect())
}

/// The same of one destination's, from the message of this id on.
pub fn take_for(conn: &mut PgConnection, destination: Destination<'_>, from: i64, limit: i64) -> Result<Vec<Row>> {
    // However many the planner expects: the first are near, where those that were refused are.
    sql_query("SET LOCAL enable_sort = off").execute(conn)?;
    let rows: Vec<Columns> = outbox::table
        .filter(outbox::id.ge(from))
        .filter(of_row().eq(destination.as_text()))
        .order(outbox::id)
        .limit(limit)
        .for_update()
        .skip_locked()
        .load(conn)?;
    Ok(rows.into_iter().map(row).collect())
}

fn row(columns: Columns) -> Row {
    let (id, exchange, routing_key, kind, message_id, correlation_id, headers, body, created_at) = columns;
    let headers = headers_from_json(&headers);
    Row {
        id,
        envelope: Envelope { exchange, routing_key, kind, message_id, correlation_id, headers, created_at, body },
    }
}

/// Removes messages that the broker has confirmed.
pub fn delete(conn: &mut PgConnection, ids: &[i64]) -> Result<()> {
    diesel::delete(outbox::table.filter(outbox::id.eq_any(ids))).execute(conn)?;
    Ok(())
}

/// Looks from there next time: messages from this one on are to be taken again.
pub fn look_from(floors: &mut Floors, id: i64) {
    floors.lower(PART, id);
}

/// How many messages wait.
pub fn count(conn: &mut PgConnection) -> Result<i64> {
    Ok(outbox::table.count().get_result(conn)?)
}
