//! Table `outbox`: messages that follow from committed changes, on their way to the broker.

use crate::{Result, schema::outbox};
use chrono::{DateTime, Utc};
use diesel::{PgConnection, prelude::*};
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

/// Commits the messages with whatever else the transaction does; the relay publishes them then.
///
/// # Errors
/// The database's.
pub fn push(conn: &mut PgConnection, envelopes: &[Envelope]) -> Result<()> {
    let rows: Vec<_> = envelopes
        .iter()
        .map(|envelope| {
            (
                outbox::exchange.eq(&envelope.exchange),
                outbox::routing_key.eq(&envelope.routing_key),
                outbox::kind.eq(&envelope.kind),
                outbox::message_id.eq(&envelope.message_id),
                outbox::correlation_id.eq(&envelope.correlation_id),
                outbox::headers.eq(headers_to_json(&envelope.headers)),
                outbox::body.eq(&envelope.body),
            )
        })
        .collect();
    // The protocol counts a statement's parameters in 16 bits.
    for rows in rows.chunks(5000) {
        diesel::insert_into(outbox::table).values(rows).execute(conn)?;
    }
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
