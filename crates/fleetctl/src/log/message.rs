//! Reading a partition's stream, and showing what is in it.

use crate::output::{hex, short, time, visible};
use broker::{Consumer, Delivery, Settings, StreamOffset};
use chrono::{DateTime, Utc};
use domain::log::{LogMessage, partition_queue, proof::Trust};
use serde::Serialize;
use std::time::Duration;
use storage::{Database, message_epochs, partitions};

/// How much of a text is shown, in characters, where it isn't asked for in full.
pub(super) const WIDTH: usize = 80;

/// Something in a stream.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Message {
    partition: i32,
    pub(super) offset: i64,
    message_id: Option<String>,
    /// Its place among the partition's messages that came in over HTTP; null for another program's, whatever its id looks like.
    seq: Option<i64>,
    /// When the gateway accepted it; null for another program's.
    accepted_at: Option<DateTime<Utc>>,
    /// When it was published, to the second, as far as its publisher says; the relay says when it was accepted instead.
    published_at: Option<DateTime<Utc>>,
    key: Option<String>,
    /// Null where it's no message of the log.
    text: Option<String>,
    /// Why it's none, and its body, as UTF-8 or in hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body_hex: Option<String>,
}

impl Message {
    fn new(trust: &Trust, partition: i32, offset: i64, delivery: Delivery) -> Self {
        let seq = trust.sequence(delivery.message_id.as_deref(), &delivery.body, 0).map(|own| own.seq);
        let mut message = Self {
            partition,
            offset,
            seq,
            accepted_at: None,
            published_at: delivery.timestamp,
            key: None,
            text: None,
            problem: None,
            body: None,
            body_hex: None,
            message_id: None,
        };
        match LogMessage::decode(delivery.kind.as_deref(), &delivery.body) {
            Ok(LogMessage { text, key, accepted_at, .. }) => {
                message.text = Some(text);
                message.key = key;
                message.accepted_at = accepted_at;
            }
            Err(problem) => {
                message.problem = Some(problem.0);
                match String::from_utf8(delivery.body) {
                    Ok(text) => message.body = Some(text),
                    Err(error) => message.body_hex = Some(hex(error.as_bytes(), "")),
                }
            }
        }
        message.message_id = delivery.message_id;
        message
    }

    pub(super) fn time(&self) -> String {
        self.accepted_at.or(self.published_at).map_or_else(|| "-".into(), time)
    }

    pub(super) fn id(&self) -> String {
        short(self.message_id.as_deref().unwrap_or("-"), WIDTH)
    }

    pub(super) fn key(&self) -> String {
        short(self.key.as_deref().unwrap_or("-"), WIDTH)
    }

    /// What it says, in full or cut; of what is no message, why, and its body.
    pub(super) fn text(&self, full: bool) -> String {
        let body = [&self.text, &self.body, &self.body_hex].into_iter().flatten().next();
        let body = body.map(String::as_str).unwrap_or_default();
        let body = if full { visible(body) } else { short(body, WIDTH) };
        match &self.problem {
            Some(problem) => format!("(no message: {}) {body}", visible(problem)),
            None => body,
        }
    }

    /// On one line.
    pub(super) fn line(&self, full: bool) -> String {
        let Self { partition, offset, .. } = self;
        format!("{partition}/{offset}  {}  {}  {}  {}", self.time(), self.id(), self.key(), self.text(full))
    }
}

/// Reads a partition's stream, over lost connections.
pub(super) struct Reader {
    database: Database,
    trust: Trust,
    partition: i32,
    consumer: Consumer,
    /// The offset that is next, or one before it.
    pub(super) next: i64,
}

impl Reader {
    /// A reader from this offset on, of the partition of the log whose ids begin like this.
    pub(super) fn new(database: &Database, broker: &Settings, log: &str, partition: i32, from: i64) -> Self {
        const PREFETCH: u16 = 100;
        let stream = partition_queue(partition);
        let consumer = Consumer::of_stream_queue(broker, "fleetctl", &stream, PREFETCH, StreamOffset::At(from));
        Self { database: database.clone(), trust: Trust::new(log, partition), partition, consumer, next: from }
    }

    /// Up to `max` messages: none if none comes in time, or the connection is lost.
    pub(super) fn read(&mut self, max: usize, wait: Duration) -> anyhow::Result<Vec<Message>> {
        let mut messages = Vec::new();
        let batch = self.consumer.next_batch(max, Duration::ZERO, wait)?;
        self.learn(&batch.deliveries)?;
        for delivery in batch {
            let Some(offset) = delivery.offset.filter(|offset| *offset >= self.next) else { continue };
            self.next = offset + 1;
            messages.push(Message::new(&self.trust, self.partition, offset, delivery));
        }
        self.consumer.resume_at(StreamOffset::At(self.next));
        Ok(messages)
    }

    /// Looks the epochs up that it doesn't know.
    fn learn(&mut self, deliveries: &[Delivery]) -> storage::Result<()> {
        let messages = deliveries.iter().map(|delivery| (delivery.message_id.as_deref(), &*delivery.body));
        let unknown = self.trust.unknown(messages);
        if !deliveries.is_empty() && (!unknown.is_empty() || !self.trust.knows_any()) {
            let mut conn = self.database.connection()?;
            message_epochs::find(&mut conn, &unknown)?.iter().for_each(|epoch| self.trust.trust(epoch));
            self.trust.trust_unproven(partitions::unproven_upto(&mut conn, self.partition)?);
        }
        Ok(())
    }
}
