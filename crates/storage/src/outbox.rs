//! Table `outbox`: messages that follow from committed changes, on their way to the broker.

use crate::{Result, schema::outbox};
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{Array, Binary, Jsonb, Nullable, Text},
};
use domain::Envelope;
use std::collections::BTreeMap;

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
///
/// # Errors
/// The database's.
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

/// The oldest `limit` messages that no other relay has in hand, kept from the others to the end of the transaction.
///
/// # Errors
/// The database's.
pub fn take(conn: &mut PgConnection, limit: i64) -> Result<Vec<Row>> {
    let rows: Vec<Columns> = outbox::table.order(outbox::id).limit(limit).for_update().skip_locked().load(conn)?;
    Ok(rows
        .into_iter()
        .map(|(id, exchange, routing_key, kind, message_id, correlation_id, headers, body, created_at)| Row {
            id,
            envelope: Envelope {
                exchange,
                routing_key,
                kind,
                message_id,
                correlation_id,
                headers: headers_from_json(&headers),
                created_at,
                body,
            },
        })
        .collect())
}

/// Removes messages that the broker has confirmed.
///
/// # Errors
/// The database's.
pub fn delete(conn: &mut PgConnection, ids: &[i64]) -> Result<()> {
    diesel::delete(outbox::table.filter(outbox::id.eq_any(ids))).execute(conn)?;
    Ok(())
}

/// How many messages wait.
///
/// # Errors
/// The database's.
pub fn count(conn: &mut PgConnection) -> Result<i64> {
    Ok(outbox::table.count().get_result(conn)?)
}
