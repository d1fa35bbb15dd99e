use crate::{GOODBYE, refusals::Refusals, topology::Destinations};
use broker::{PublishError, Publisher, Reason};
use chrono::Utc;
use domain::{
    Envelope,
    topology::{Retention, Topology},
};
use std::time::{Duration, Instant};
use storage::{
    Database,
    dead_letters::{self, NewDeadLetter},
    outbox,
};
use telemetry::{MessageDeadLettered, OutboxRelayed, emit};

/// Moves committed rows to the broker.
pub struct Relay {
    database: Database,
    publisher: Publisher,
    confirm_timeout: Duration,
    batch: i64,
    refusals: Refusals,
}

/// How a round went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// There was nothing to do.
    Idle,
    /// Rows have gone: there may be more.
    Relayed,
    /// The broker didn't confirm everything in time; what it didn't is given back.
    BrokerAway,
}

/// What becomes of a row.
enum Fate {
    Relayed,
    Stays,
    Dies { of: Reason, times: u32 },
}

impl Relay {
    /// A relay of `batch` rows at a time. Whenever it connects it declares the fleet's topology, the streams' queues and the
    /// message log's partitions, since a broker may come back empty.
    pub fn new(
        database: Database,
        broker: &broker::Settings,
        fleet: Topology,
        message_log: Retention,
        batch: i64,
    ) -> Self {
        let publisher = Destinations { fleet, message_log, database: database.clone() }.publisher(broker);
        let confirm_timeout = Duration::from_millis(broker.confirm_timeout_ms);
        Self { database, publisher, confirm_timeout, batch, refusals: Refusals::default() }
    }

    /// Takes rows, publishes them, deletes those that are confirmed and sets aside those that never will be, in one
    /// transaction: a relay that dies or freezes gives its rows back, and others publish them again.
    ///
    /// # Errors
    /// The database's. Then the rows that were taken are still there.
    pub fn round(&mut self) -> storage::Result<Round> {
        let began = Instant::now();
        let Self { database, publisher, confirm_timeout, batch, refusals } = self;
        let mut broker_away = false;
        let (relayed, dead, oldest) = database.transaction(|conn| {
            let mut rows = outbox::take(conn, *batch)?;
            rows.retain(|row| !refusals.is_on_hold(row.id, Instant::now()));
            let (ids, envelopes): (Vec<i64>, Vec<Envelope>) =
                rows.into_iter().map(|row| (row.id, row.envelope)).unzip();
            if ids.is_empty() {
                return Ok((ids, Vec::new(), None));
            }
            let published = publisher.publish_all(&envelopes, Instant::now() + *confirm_timeout);
            broker_away = matches!(published, Err(PublishError::Unavailable { .. }));
            let fates = fates(&ids, published, refusals);

            let (mut relayed, mut dead, mut oldest) = (Vec::new(), Vec::new(), None);
            for ((id, envelope), fate) in ids.into_iter().zip(envelopes).zip(fates) {
                match fate {
                    Fate::Relayed => {
                        oldest = oldest.into_iter().chain([envelope.created_at]).min();
                        relayed.push(id);
                    }
                    Fate::Stays => {}
                    Fate::Dies { of, times } => dead.push((id, dead_letter(id, envelope, &of, times))),
                }
            }
            let (dead_ids, dead): (Vec<i64>, Vec<NewDeadLetter>) = dead.into_iter().unzip();
            if !dead.is_empty() {
                dead_letters::record(conn, &dead)?;
                outbox::delete(conn, &dead_ids)?;
            }
            outbox::delete(conn, &relayed)?;
            Ok((relayed, dead, oldest))
        })?;

        refusals.forget(&relayed, Instant::now());
        if let Some(oldest) = oldest {
            let lag = (Utc::now() - oldest).to_std().unwrap_or_default();
            emit(OutboxRelayed { messages: relayed.len() as u64, duration: began.elapsed(), lag });
        }
        for letter in &dead {
            emit(MessageDeadLettered {
                queue: "outbox",
                message_id: letter.message_id.as_deref(),
                correlation_id: letter.correlation_id.as_deref(),
                attempts: letter.attempts,
                error: &letter.error,
            });
        }
        Ok(match (broker_away, relayed.is_empty() && dead.is_empty()) {
            (true, _) => Round::BrokerAway,
            (false, true) => Round::Idle,
            (false, false) => Round::Relayed,
        })
    }

    /// Says goodbye to the broker.
    pub fn close(self) {
        self.publisher.close(Instant::now() + GOODBYE);
    }
}

/// What becomes of each of the rows with these ids, in the same order.
fn fates(ids: &[i64], published: Result<(), PublishError>, refusals: &mut Refusals) -> Vec<Fate> {
    let mut fates: Vec<_> = ids.iter().map(|_| Fate::Relayed).collect();
    match published {
        Ok(()) => {}
        Err(PublishError::Unavailable { unconfirmed, .. }) => {
            unconfirmed.into_iter().for_each(|index| fates[index] = Fate::Stays);
        }
        Err(PublishError::Refused { refused }) => {
            let now = Instant::now();
            for (index, reason) in refused {
                fates[index] = match refusals.refuse(ids[index], &reason, now) {
                    Some(times) => Fate::Dies { of: reason, times },
                    None => Fate::Stays,
                };
            }
        }
    }
    fates
}

fn dead_letter(id: i64, envelope: Envelope, reason: &Reason, attempts: u32) -> NewDeadLetter {
    NewDeadLetter {
        dedup_key: format!("outbox/{id}"),
        queue: String::new(),
        message_id: Some(envelope.message_id),
        kind: envelope.kind,
        correlation_id: envelope.correlation_id,
        exchange: envelope.exchange,
        routing_key: envelope.routing_key,
        headers: envelope.headers,
        error: reason.to_string(),
        attempts,
        body: envelope.body,
        failed_at: Utc::now(),
    }
}
