use std::{collections::BTreeMap, fmt, mem, sync::Arc};

use amiquip::{AmqpValue, FieldTable};
use chrono::{DateTime, SecondsFormat, Utc};

/// A message as a queue handed it out.
pub struct Delivery {
    /// What settles it: give it to [`Consumer::ack`](crate::Consumer::ack), once.
    pub ticket: Ticket,
    /// The queue.
    pub queue: Arc<str>,
    /// Whether it has been handed out before: whoever had it may have died of it.
    pub redelivered: bool,
    /// The exchange that it was published to.
    pub exchange: String,
    /// Its routing key.
    pub routing_key: String,
    /// The AMQP `type`.
    pub kind: Option<String>,
    /// The AMQP message id.
    pub message_id: Option<String>,
    /// The AMQP correlation id.
    pub correlation_id: Option<String>,
    /// Headers that are strings, numbers, booleans or times, as text, but for [`Self::offset`]. If the broker set the message
    /// aside, what it says last about that is in [`header::DEATH_REASON`], [`header::DEATH_QUEUE`] and
    /// [`header::DEATH_TIME`] (RFC 3339).
    ///
    /// [`header::DEATH_REASON`]: crate::header::DEATH_REASON
    /// [`header::DEATH_QUEUE`]: crate::header::DEATH_QUEUE
    /// [`header::DEATH_TIME`]: crate::header::DEATH_TIME
    pub headers: BTreeMap<String, String>,
    /// Its place in the stream that it was read from.
    pub offset: Option<i64>,
    /// When it was published, to the second, if the publisher said so.
    pub timestamp: Option<DateTime<Utc>>,
    /// The body.
    pub body: Vec<u8>,
}

impl Delivery {
    /// Takes everything out of the client's delivery but what acknowledging needs.
    pub(crate) fn take(delivery: &mut amiquip::Delivery, queue: &Arc<str>, epoch: u64) -> Self {
        let properties = mem::take(&mut delivery.properties);
        Self {
            ticket: Ticket { epoch, tag: delivery.delivery_tag() },
            queue: Arc::clone(queue),
            redelivered: delivery.redelivered,
            exchange: mem::take(&mut delivery.exchange),
            routing_key: mem::take(&mut delivery.routing_key),
            kind: properties.type_().clone(),
            message_id: properties.message_id().clone(),
            correlation_id: properties.correlation_id().clone(),
            offset: properties.headers().as_ref().and_then(offset),
            headers: properties.headers().as_ref().map(flatten).unwrap_or_default(),
            timestamp: properties.timestamp().and_then(from_seconds),
            body: mem::take(&mut delivery.body),
        }
    }
}

/// Of a delivery, its place in the stream; of a consumer, where to begin.
pub(crate) const OFFSET: &str = "x-stream-offset";

pub(crate) fn offset(table: &FieldTable) -> Option<i64> {
    match table.get(OFFSET)? {
        AmqpValue::LongLongInt(offset) => Some(*offset),
        _ => None,
    }
}

/// Headers as text. Of the broker's list of deaths, the latest of which comes first, that one.
fn flatten(table: &FieldTable) -> BTreeMap<String, String> {
    const DEATHS: &str = "x-death";
    let text = |(name, value): (&String, &AmqpValue)| Some((name.clone(), as_text(value)?));
    let mut headers: BTreeMap<_, _> = table.iter().filter(|(name, _)| *name != OFFSET).filter_map(text).collect();
    if let Some(AmqpValue::FieldArray(deaths)) = table.get(DEATHS)
        && let Some(AmqpValue::FieldTable(death)) = deaths.first()
    {
        for (name, key) in
            [(header::DEATH_REASON, "reason"), (header::DEATH_QUEUE, "queue"), (header::DEATH_TIME, "time")]
        {
            if let Some(value) = death.get(key).and_then(as_text) {
                headers.insert(name.into(), value);
            }
        }
    }
    headers
}

fn as_text(value: &AmqpValue) -> Option<String> {
    Some(match value {
        AmqpValue::LongString(text) => text.clone(),
        AmqpValue::Boolean(value) => value.to_string(),
        AmqpValue::ShortShortInt(value) => value.to_string(),
        AmqpValue::ShortShortUInt(value) => value.to_string(),
        AmqpValue::ShortInt(value) => value.to_string(),
        AmqpValue::ShortUInt(value) => value.to_string(),
        AmqpValue::LongInt(value) => value.to_string(),
        AmqpValue::LongUInt(value) => value.to_string(),
        AmqpValue::LongLongInt(value) => value.to_string(),
        AmqpValue::Float(value) => value.to_string(),
        AmqpValue::Double(value) => value.to_string(),
        AmqpValue::Timestamp(value) => from_seconds(*value)?.to_rfc3339_opts(SecondsFormat::Secs, true),
        AmqpValue::DecimalValue(_)
        | AmqpValue::FieldArray(_)
        | AmqpValue::FieldTable(_)
        | AmqpValue::ByteArray(_)
        | AmqpValue::Void => return None,
    })
}

fn from_seconds(seconds: u64) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp(seconds.try_into().ok()?, 0)
}

// The body holds texts of users, which stay out of logs.
impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("queue", &self.queue)
            .field("offset", &self.offset)
            .field("redelivered", &self.redelivered)
            .field("routing_key", &self.routing_key)
            .field("kind", &self.kind)
            .field("message_id", &self.message_id)
            .field("correlation_id", &self.correlation_id)
            .field("headers", &self.headers)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// The right to settle one delivery on the connection that it came by.
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket {
    pub(crate) epoch: u64,
    pub(crate) tag: u64,
}

impl From<Delivery> for Ticket {
    fn from(delivery: Delivery) -> Self {
        delivery.ticket
    }
}

/// Names of the headers that say why the broker set a message aside.
pub mod header {
    /// `rejected`, `expired`, `maxlen` or `delivery_limit`.
    pub const DEATH_REASON: &str = "x-death.reason";
    /// The queue that it died in.
    pub const DEATH_QUEUE: &str = "x-death.queue";
    /// When, RFC 3339.
    pub const DEATH_TIME: &str = "x-death.time";
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table<const N: usize>(entries: [(&str, AmqpValue); N]) -> FieldTable {
        entries.into_iter().map(|(name, value)| (name.into(), value)).collect()
    }

    fn text(text: &str) -> AmqpValue {
        AmqpValue::LongString(text.into())
    }

    #[test]
    fn headers_come_as_text_and_the_latest_death_is_told() {
        let death = |reason, queue, time| {
            AmqpValue::FieldTable(table([
                ("reason", text(reason)),
                ("queue", text(queue)),
                ("time", AmqpValue::Timestamp(time)),
                ("count", AmqpValue::LongLongInt(1)),
            ]))
        };
        let headers = flatten(&table([
            ("text", text("a")),
            ("number", AmqpValue::LongInt(-7)),
            ("truth", AmqpValue::Boolean(true)),
            ("bytes", AmqpValue::ByteArray(vec![1])),
            ("nothing", AmqpValue::Void),
            (
                "x-death",
                AmqpValue::FieldArray(vec![
                    death("delivery_limit", "publish_tweet", 1_700_000_000),
                    death("expired", "retry.1s", 1_600_000_000),
                ]),
            ),
        ]));
        let expected = [
            ("number", "-7"),
            ("text", "a"),
            ("truth", "true"),
            (header::DEATH_QUEUE, "publish_tweet"),
            (header::DEATH_REASON, "delivery_limit"),
            (header::DEATH_TIME, "2023-11-14T22:13:20Z"),
        ];
        assert_eq!(headers, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    }
}
