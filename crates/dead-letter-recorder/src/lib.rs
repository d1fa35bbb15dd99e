#![doc = include_str!("../README.md")]

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

    /// Anything can be recorded, so nothing is refused. What carries no message id is recorded at least once.
    fn decode(&self, received: &Received) -> anyhow::Result<DedupKey> {
        let queue = Death::of(received).queue;
        let replay: u32 = received.headers.get(header::REPLAY).and_then(|count| count.parse().ok()).unwrap_or(0);
        Ok(DedupKey(match &received.message_id {
            Some(id) => format!("{queue}/{id}/{replay}"),
            None => format!("{queue}//{}", Uuid::new_v4()),
        }))
    }

    fn handle(&mut self, batch: &[Item<DedupKey>], _: &mut Outgoing, _: &Step) -> Result<(), Failure> {
        let letters: Vec<_> = batch.iter().map(letter).collect();
        self.database.transaction(|conn| dead_letters::record(conn, &letters))?;
        Ok(())
    }
}

fn letter(Item { message: DedupKey(dedup_key), received }: &Item<DedupKey>) -> NewDeadLetter {
    let Death { queue, error, attempts, failed_at } = Death::of(received);
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
        failed_at,
    }
}
