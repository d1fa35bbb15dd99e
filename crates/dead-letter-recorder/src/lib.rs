#![doc = include_str!("../README.md")]

use chrono::Utc;
use domain::{
    Failure,
    envelope::header,
    topology::{exchange, queue},
};
use process::Program;
use serde::Deserialize;
use service::Service;
use storage::{
    Database,
    dead_letters::{self, NewDeadLetter},
};
use uuid::Uuid;
use worker::{BatchHandler, Consuming, Death, Item, Outgoing, Received, Step};

/// The service's name.
pub const SERVICE: &str = "dead-letter-recorder";

/// The service as a program.
pub const PROGRAM: Program =
    Program::new(SERVICE, "Records dead letters in the table dead_letter, for an operator to replay or drop.", run);

/// The sections of the settings that are this service's own.
#[derive(Deserialize)]
struct Settings {
    dead_letter_recorder: Consuming,
}

/// Runs the service until it's told to stop.
///
/// # Errors
/// When the settings can't be used.
pub fn run() -> anyhow::Result<()> {
    let (service, Settings { dead_letter_recorder }) = Service::begin(SERVICE)?;
    service.consume(vec![queue::DEAD_LETTER.into()], dead_letter_recorder, Recorder::new)
}

/// The handler.
pub struct Recorder {
    database: Database,
}

impl Recorder {
    /// Into this database.
    pub fn new(database: Database) -> Self {
        Self { database }
    }
}

/// What makes a dead letter the same when it comes again.
pub struct DedupKey(String);

impl BatchHandler for Recorder {
    type Message = DedupKey;

    /// Anything can be recorded, so nothing is refused.
    fn decode(&self, received: &Received) -> anyhow::Result<DedupKey> {
        Ok(DedupKey(identity(received).unwrap_or_else(Uuid::new_v4).to_string()))
    }

    fn handle(&mut self, batch: &[Item<DedupKey>], _: &mut Outgoing, _: &Step) -> Result<(), Failure> {
        let letters: Vec<_> = batch.iter().map(letter).collect();
        self.database.transaction(|conn| dead_letters::record(conn, &letters))?;
        Ok(())
    }
}

/// What a dead letter has in common with itself alone, however often it's delivered: everything that its end is told by, and
/// its content. A worker gives each setting aside an id of its own. The broker and other programs don't: of theirs a message
/// id and a time of death are asked for, since without either two that are alike may be meant twice.
fn identity(received: &Received) -> Option<Uuid> {
    let Death { queue, failed_at, set_aside, .. } = Death::of(received);
    if set_aside.is_none() && (received.message_id.is_none() || failed_at.is_none()) {
        return None;
    }
    let failed_at_ms = failed_at.map(|at| at.timestamp_millis().to_string());
    let texts = [
        set_aside.as_deref(),
        received.message_id.as_deref(),
        failed_at_ms.as_deref(),
        received.headers.get(header::REPLAY).map(String::as_str),
        received.kind.as_deref(),
        Some(&*queue),
    ];
    let mut all = Vec::with_capacity(received.body.len() + 1024);
    for text in texts {
        // With its length, so that no two lists of texts make the same bytes.
        let bytes = text.unwrap_or_default().as_bytes();
        all.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
        all.extend_from_slice(bytes);
    }
    all.extend_from_slice(&received.body);
    Some(Uuid::new_v5(&Uuid::NAMESPACE_OID, &all))
}

fn letter(Item { message: DedupKey(dedup_key), received }: &Item<DedupKey>) -> NewDeadLetter {
    let Death { queue, error, attempts, failed_at, .. } = Death::of(received);
    // What the broker set aside itself doesn't tell where it was published to, only in which queue it was.
    let (exchange, routing_key) = match &*received.exchange {
        exchange::DEAD_LETTER => (String::new(), queue.clone()),
        exchange => (exchange.to_owned(), received.routing_key.clone()),
    };
    NewDeadLetter {
        dedup_key: dedup_key.clone(),
        queue,
        message_id: received.message_id.clone(),
        kind: received.kind.clone(),
        correlation_id: received.correlation_id.clone(),
        exchange,
        routing_key,
        headers: received.own_headers(),
        error,
        attempts,
        body: received.body.clone(),
        failed_at: failed_at.unwrap_or_else(Utc::now),
    }
}
