use crate::{
    GOODBYE,
    refusals::{Refusals, Tried},
    topology::Destinations,
};
use broker::{Destination, Link, PublishError, Publisher, Reason};
use chrono::{DateTime, Utc};
use domain::{
    Envelope,
    topology::{Retention, Topology},
};
use std::{
    collections::HashSet,
    time::{Duration, Instant},
};
use storage::{
    Database, Floors, PgConnection,
    dead_letters::{self, NewDeadLetter},
    outbox::{self, Row},
};
use telemetry::{MessageDeadLettered, OutboxRelayed, emit};

/// Moves committed rows to the broker.
pub struct Relay {
    database: Database,
    broker: broker::Settings,
    destinations: Destinations,
    publisher: Publisher,
    confirm_timeout: Duration,
    batch: i64,
    refusals: Refusals,
    /// Where looking begins.
    floors: Floors,
    /// Whether the last round found something: then the next one doesn't ask first.
    busy: bool,
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

/// What a round's transaction has done.
#[derive(Default)]
struct Done {
    relayed: Vec<i64>,
    dead: Vec<NewDeadLetter>,
    /// When the oldest of the relayed rows was written.
    oldest: Option<DateTime<Utc>>,
    broker_away: bool,
    /// What came of trying a destination again.
    tried: Option<Tried>,
}

/// How long a destination is waited for that may not answer: nothing else is published meanwhile.
const TRYING: Duration = Duration::from_secs(1);

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
        Self::to(Destinations::new(fleet, message_log, database.clone()), database, broker, batch)
    }

    pub(crate) fn to(destinations: Destinations, database: Database, broker: &broker::Settings, batch: i64) -> Self {
        Self {
            database,
            broker: broker.clone(),
            publisher: destinations.clone().publisher(broker),
            destinations,
            confirm_timeout: Duration::from_millis(broker.confirm_timeout_ms),
            batch,
            refusals: Refusals::default(),
            floors: Floors::default(),
            busy: false,
        }
    }

    /// The state of its connection, for other threads.
    #[must_use]
    pub fn link(&self) -> Link {
        self.publisher.link()
    }

    /// Whether rows wait for a destination that takes none.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.refusals.held().next().is_some()
    }

    /// Looks without asking first, next time: there's something.
    pub fn expect(&mut self) {
        self.busy = true;
    }

    /// Takes rows, publishes them, deletes those that are confirmed and sets aside those that never will be, in one
    /// transaction: a relay that dies or freezes gives its rows back, and others publish them again. Rows for a destination that
    /// takes none wait apart, and keep nobody from the others.
    ///
    /// # Errors
    /// The database's. Then the rows that were taken are still there.
    pub fn round(&mut self) -> storage::Result<Round> {
        let began = Instant::now();
        self.destinations.look_again(&self.broker);
        let held: Vec<_> = self.refusals.held().cloned().collect();
        let except: Vec<_> = held.iter().map(row_destination).collect();
        let due = self.refusals.due(began);
        if !self.busy || self.floors.is_due(began) {
            let mut conn = self.database.connection()?;
            if !outbox::look(&mut conn, &mut self.floors, &except, began)? && due.is_none() {
                self.busy = false;
                return Ok(Round::Idle);
            }
        }
        let Self { database, destinations, publisher, confirm_timeout, batch, refusals, floors, .. } = self;
        let done = database.transaction(|conn| {
            let mut done = Done::default();
            let rows = outbox::take_except(conn, floors, &except, *batch)?;
            relay(conn, destinations, publisher, *confirm_timeout, refusals, rows, &mut done)?;
            if let Some(due) = due.as_ref().filter(|_| !done.broker_away) {
                let limit = if due.one { 1 } else { *batch };
                let rows = outbox::take_for(conn, row_destination(&due.destination), due.from, limit)?;
                let tried =
                    relay(conn, destinations, publisher, TRYING.min(*confirm_timeout), refusals, rows, &mut done)?;
                done.tried = Some(tried);
            }
            Ok(done)
        })?;

        let Done { relayed, dead, oldest, broker_away, tried } = done;
        let now = Instant::now();
        if let (Some(due), Some(tried)) = (due, tried)
            && let Some(from) = refusals.tried(&due, &tried, now)
        {
            outbox::look_from(floors, from);
        }
        refusals.forget(&relayed, now);
        self.busy = !(relayed.is_empty() && dead.is_empty());
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
        Ok(match (broker_away, self.busy) {
            (true, _) => Round::BrokerAway,
            (false, false) => Round::Idle,
            (false, true) => Round::Relayed,
        })
    }

    /// Says goodbye to the broker.
    pub fn close(self) {
        self.publisher.close(Instant::now() + GOODBYE);
    }
}

fn row_destination(destination: &Destination) -> outbox::Destination<'_> {
    outbox::Destination { exchange: &destination.exchange, routing_key: &destination.routing_key }
}

/// Publishes rows that were taken, and removes those that are done with.
fn relay(
    conn: &mut PgConnection,
    destinations: &Destinations,
    publisher: &mut Publisher,
    timeout: Duration,
    refusals: &mut Refusals,
    rows: Vec<Row>,
    done: &mut Done,
) -> storage::Result<Tried> {
    let (wrong, rows): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| destinations.refuse(&row.envelope));
    for row in &wrong {
        // As if it were full: what is wrong there is put right some time.
        refusals.refuse(row.id, Destination::of(&row.envelope), &Reason::Nacked, Instant::now());
    }
    let (ids, envelopes): (Vec<i64>, Vec<Envelope>) = rows.into_iter().map(|row| (row.id, row.envelope)).unzip();
    if ids.is_empty() {
        return Ok(Tried { left: wrong.len(), ..Tried::default() });
    }
    let published = publisher.publish_all(&envelopes, Instant::now() + timeout);
    if reached_nothing(&published) {
        destinations.doubt();
    }
    let (fates, broker_away) = fates(&ids, &envelopes, published, refusals);
    done.broker_away |= broker_away;

    let (mut relayed, mut dead) = (Vec::new(), Vec::new());
    let count = ids.len();
    for ((id, envelope), fate) in ids.into_iter().zip(envelopes).zip(fates) {
        match fate {
            Fate::Relayed => {
                done.oldest = done.oldest.into_iter().chain([envelope.created_at]).min();
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
    if !relayed.is_empty() {
        outbox::delete(conn, &relayed)?;
    }
    let left = wrong.len() + count - relayed.len() - dead.len();
    let tried = Tried { relayed: relayed.len(), set_aside: dead.len(), left };
    done.relayed.extend(relayed);
    done.dead.extend(dead);
    Ok(tried)
}

/// Whether some messages reached no queue.
fn reached_nothing(published: &Result<(), PublishError>) -> bool {
    let is_returned = |(_, reason): &(usize, Reason)| matches!(reason, Reason::Returned { .. });
    matches!(published, Err(PublishError::Refused { refused }) if refused.iter().any(is_returned))
}

/// What becomes of each of the rows with these ids, in the same order, and whether the broker is away.
fn fates(
    ids: &[i64],
    envelopes: &[Envelope],
    published: Result<(), PublishError>,
    refusals: &mut Refusals,
) -> (Vec<Fate>, bool) {
    let mut fates: Vec<_> = ids.iter().map(|_| Fate::Relayed).collect();
    let now = Instant::now();
    match published {
        Ok(()) => (fates, false),
        Err(PublishError::Unavailable { unconfirmed, source }) => {
            unconfirmed.iter().for_each(|&index| fates[index] = Fate::Stays);
            let confirmed = fates.iter().zip(envelopes).filter(|(fate, _)| matches!(fate, Fate::Relayed));
            let answering: HashSet<_> = confirmed.map(|(_, envelope)| Destination::of(envelope)).collect();
            let held: HashSet<_> = refusals.held().cloned().collect();
            let mut others = true;
            for index in unconfirmed {
                // A queue's own fault, if another one answers, or if it's known for it. Else the broker is slow, or away.
                let destination = Destination::of(&envelopes[index]);
                let silent = !answering.is_empty() && !answering.contains(&destination) || held.contains(&destination);
                if silent && matches!(source, broker::Error::TimedOut { .. }) {
                    refusals.silent(ids[index], destination, now);
                    others = false;
                }
            }
            (fates, others)
        }
        Err(PublishError::Refused { refused }) => {
            for (index, reason) in refused {
                fates[index] = match refusals.refuse(ids[index], Destination::of(&envelopes[index]), &reason, now) {
                    Some(times) => Fate::Dies { of: reason, times },
                    None => Fate::Stays,
                };
            }
            (fates, false)
        }
    }
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
