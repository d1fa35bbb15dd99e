//! Reading one partition for a group.

use crate::{
    Reading, SERVICE, Trimmed,
    intake::{self, Intake, Skipped, Taken},
    place::{self, Trouble},
    streams,
};
use broker::{Batch, Consumer, Delivery, Link, Survey};
use chrono::Utc;
use domain::{
    log::{Group, partition_queue, proof::Trust},
    topology::Retention,
};
use process::{Backoff, Stop};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use storage::{
    Database,
    consumer_offsets::{self, Passed, Position},
    message_epochs,
    messages::{self, NewMessage, NewSkipped},
    partitions,
};
use telemetry::{DatabaseAvailable, DatabaseUnavailable, MessageSkipped, MessagesRecorded, ReadingStopped, emit};

/// How often a reader looks whether it's to stop, while nothing comes.
const IDLE: Duration = Duration::from_millis(100);
/// How long the last message that was read may take to come again before its stream is looked at.
const ANCHOR_PATIENCE: Duration = Duration::from_secs(3);
/// How often a reader that can't go on looks whether the group's offset was reset.
const RESET_INTERVAL: Duration = Duration::from_secs(1);
/// How often it looks whether the stream is as it was.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// How long saying goodbye to the broker may take.
const GOODBYE: Duration = Duration::from_secs(2);

/// What the readers of a process have in common.
pub(crate) struct Shared {
    pub(crate) group: Group,
    pub(crate) holder: String,
    /// What the ids of this log's messages begin with.
    pub(crate) log: String,
    pub(crate) reading: Reading,
    pub(crate) retention: Retention,
    pub(crate) worker: worker::Settings,
    pub(crate) broker: broker::Settings,
    pub(crate) database: Database,
    /// Until when the leases are certain.
    pub(crate) until: Mutex<Instant>,
}

impl Shared {
    fn is_certain(&self) -> bool {
        Instant::now() < *self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a reader is doing, for others to see.
#[derive(Default)]
pub(crate) struct State {
    trouble: Mutex<Option<Trouble>>,
    /// Why the database takes nothing.
    refusal: Mutex<Option<String>>,
    /// Why the broker refuses to let it read.
    refused: Mutex<Option<String>>,
}

impl State {
    pub(crate) fn refused(&self) -> Option<String> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn refuse(&self, why: Option<String>) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    pub(crate) fn trouble(&self) -> Option<Trouble> {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn refusal(&self) -> Option<String> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_refusal(&self, refusal: Option<String>) {
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = refusal;
    }
}

/// One partition's reader.
pub(crate) struct Reader {
    shared: Arc<Shared>,
    partition: i32,
    stream: String,
    stop: Stop,
    state: Arc<State>,
    consumer: Consumer,
    away: Backoff,
    trust: Trust,
}

/// How reading begins on a connection.
#[derive(Default)]
struct Arrival {
    /// The connection, as far as it's known; another one begins anew.
    epoch: Option<u64>,
    /// Since when the last message that was read is awaited.
    anchor_since: Option<Instant>,
}

/// Why a passage ends.
enum End {
    /// The group is elsewhere now: begin anew.
    Moved,
    Trouble(Trouble),
    Storage(storage::Error),
    Broker(broker::Error),
}

impl From<storage::Error> for End {
    fn from(error: storage::Error) -> Self {
        Self::Storage(error)
    }
}

impl From<broker::Error> for End {
    fn from(error: broker::Error) -> Self {
        Self::Broker(error)
    }
}

impl Reader {
    pub(crate) fn new(shared: Arc<Shared>, partition: i32, stop: Stop, state: Arc<State>) -> Self {
        let stream = partition_queue(partition);
        let (database, retention, needed) = (shared.database.clone(), shared.retention, stream.clone());
        let start = place::start(&Position::placed(0, None));
        let consumer = Consumer::of_stream_queue(&shared.broker, SERVICE, &stream, shared.reading.prefetch, start)
            .on_connect(move |session| streams::declare(session, &database, retention, Some(&needed)));
        let away = shared.worker.backoff();
        let trust = Trust::new(&shared.log, partition);
        Self { shared, partition, stream, stop, state, consumer, away, trust }
    }

    /// The state of its connection.
    pub(crate) fn link(&self) -> Link {
        self.consumer.link()
    }

    /// Reads until asked to stop.
    pub(crate) fn run(mut self) {
        let mut position = Position::placed(0, None);
        while let Err(end) = self.passage(&mut position) {
            // Whatever came in between, nothing is in hand.
            if self.stop.is_requested() {
                break;
            }
            match end {
                End::Moved => log::info!(
                    group = self.shared.group.as_str(), partition = self.partition;
                    "the group was moved elsewhere meanwhile"
                ),
                End::Trouble(trouble) => self.stay(&position, trouble),
                End::Storage(error) => self.wait(&error.into()),
                End::Broker(error) => {
                    self.state.refuse((!error.is_lost()).then(|| error.to_string()));
                    self.wait(&error.into());
                }
            }
        }
        self.consumer.close(Instant::now() + GOODBYE);
    }

    fn wait(&mut self, error: &anyhow::Error) {
        let (delay, say) = self.away.failed();
        if say && matches!(error.downcast_ref(), Some(storage::Error::Unavailable(_))) {
            emit(DatabaseUnavailable { error: &format_args!("{error:#}"), retry_in: Some(delay) });
        } else if say {
            log::warn!(partition = self.partition; "reading pauses: {error:#}");
        }
        self.stop.wait(delay);
    }

    fn note(&self, trouble: Option<Trouble>) {
        *self.state.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// Goes on where the settings say so, or waits until the group's offset is reset. Looks now and then whether the stream is
    /// as it was.
    fn stay(&mut self, position: &Position, trouble: Trouble) {
        let group = self.shared.group.as_str();
        if let (Trouble::Trimmed { first, .. }, Trimmed::First) = (trouble, self.shared.reading.trimmed) {
            log::warn!(group, partition = self.partition; "{trouble}: continuing there");
            let to = Position::placed(first, position.seq);
            let moved = self.shared.database.transaction_within(self.shared.reading.ttl(), |conn| {
                let from = position.next_offset;
                consumer_offsets::advance(conn, &self.shared.group, self.partition, from, &to, Passed::default())
            });
            if let Err(error) = moved {
                self.wait(&error.into());
            }
            return;
        }
        if self.state.trouble() != Some(trouble) {
            emit(ReadingStopped { group, partition: self.partition, reason: &trouble });
            self.note(Some(trouble));
        }
        let until = Instant::now() + LOOK_AGAIN;
        while !self.stop.wait(RESET_INTERVAL) && Instant::now() < until {
            match self.position() {
                Ok(now) if now == *position => {}
                Ok(_) => break,
                Err(error) => self.wait(&error.into()),
            }
        }
    }

    /// Reads on from where the group is, until asked to stop.
    fn passage(&mut self, position: &mut Position) -> Result<(), End> {
        *position = self.position()?;
        self.trust.trust_unproven(self.unproven_upto()?);
        if !place::is_anchored(position) {
            self.look(position)?;
            self.note(None);
        }
        self.consumer.read_from(&self.stream, place::start(position));
        let mut arrival = Arrival::default();
        while !self.stop.is_requested() {
            self.step(position, &mut arrival)?;
        }
        Ok(())
    }

    /// Looks at the stream's ends.
    fn look(&self, position: &Position) -> Result<(), End> {
        let mut survey = Survey::open(&self.shared.broker, SERVICE)?;
        let Shared { database, retention, .. } = &*self.shared;
        // Says what is wrong with a queue of this name that is no stream.
        streams::declare(survey.session(), database, *retention, Some(&self.stream))?;
        let trouble = place::look(&mut survey, &self.stream, position)?;
        trouble.map_or(Ok(()), |trouble| Err(End::Trouble(trouble)))
    }

    /// Where the group is. A partition that is new to it begins at its beginning.
    fn position(&mut self) -> storage::Result<Position> {
        let (group, partition) = (&self.shared.group, self.partition);
        let mut conn = self.shared.database.connection()?;
        if let Some(position) = consumer_offsets::position(&mut conn, group, partition)? {
            return Ok(position);
        }
        consumer_offsets::create(&mut conn, group, &[(partition, 0)])?;
        consumer_offsets::position(&mut conn, group, partition)?.ok_or(storage::Error::NotFound("position"))
    }

    fn unproven_upto(&self) -> storage::Result<Option<i64>> {
        partitions::unproven_upto(&mut *self.shared.database.connection()?, self.partition)
    }

    /// Looks the epochs up that it doesn't know, if these messages are of any. They are registered before anything is published
    /// in them.
    fn learn(&mut self, deliveries: &[Delivery]) -> storage::Result<()> {
        let messages = deliveries.iter().map(|delivery| (delivery.message_id.as_deref(), &*delivery.body));
        let unknown = self.trust.unknown(messages);
        if unknown.is_empty() {
            return Ok(());
        }
        let epochs = message_epochs::find(&mut *self.shared.database.connection()?, &unknown)?;
        epochs.iter().for_each(|epoch| self.trust.trust(epoch));
        // The first one ends the time of messages without a proof.
        self.trust.trust_unproven(self.unproven_upto()?);
        Ok(())
    }

    /// Takes a batch and records it.
    fn step(&mut self, position: &mut Position, arrival: &mut Arrival) -> Result<(), End> {
        let reading = &self.shared.reading;
        let Batch { deliveries, epoch } = self.consumer.next_batch(reading.batch, reading.linger(), IDLE)?;
        if !self.consumer.connected() {
            return Ok(());
        }
        self.state.refuse(None);
        if arrival.epoch != Some(epoch) {
            *arrival = Arrival { epoch: Some(epoch), anchor_since: place::is_anchored(position).then(Instant::now) };
        }
        if let Some(since) = arrival.anchor_since {
            if let Some(first) = deliveries.first() {
                self.learn(&deliveries)?;
                place::check(&self.trust, position, first).map_err(End::Trouble)?;
                arrival.anchor_since = None;
                self.note(None);
            } else if since.elapsed() > ANCHOR_PATIENCE {
                self.look(position)?;
                arrival.anchor_since = Some(Instant::now());
            }
        }
        if !deliveries.is_empty() {
            self.learn(&deliveries)?;
            self.take(position, &deliveries)?;
            self.consumer.resume_at(place::start(position));
        }
        Ok(())
    }

    /// Records what came. What the database refuses is divided until it's one message.
    fn take(&mut self, position: &mut Position, deliveries: &[Delivery]) -> Result<(), End> {
        let (mut rest, mut size) = (deliveries, deliveries.len());
        while !rest.is_empty() {
            let (part, behind) = rest.split_at(size.min(rest.len()));
            let intake = intake::sort(&self.trust, position, part, None);
            if intake.position.next_offset > position.next_offset {
                *position = match self.record(position, intake) {
                    Err(End::Storage(storage::Error::Query(_))) if part.len() > 1 => {
                        size = part.len() / 2;
                        continue;
                    }
                    Err(End::Storage(storage::Error::Query(refusal))) => {
                        self.set_aside(position, part, &refusal.to_string())?
                    }
                    recorded => recorded?,
                };
                self.state.note_refusal(None);
            }
            (rest, size) = (behind, 2 * size);
        }
        Ok(())
    }

    /// Sets a message aside that the database has refused: if it takes another one in its place. Else it's not the message's
    /// fault, and nothing is passed over.
    fn set_aside(&mut self, from: &Position, one: &[Delivery], refusal: &str) -> Result<Position, End> {
        let intake = intake::sort(&self.trust, from, one, Some(refusal));
        let set_aside = self.record(from, intake);
        if let Err(End::Storage(storage::Error::Query(error))) = &set_aside {
            let offset = from.next_offset;
            let refusal = format!("the database refuses whatever is to be recorded at offset {offset}: {error}");
            self.state.note_refusal(Some(refusal));
        }
        set_aside
    }

    /// Records what came, and moves the group on with it; answers where it is then.
    fn record(&mut self, from: &Position, mut intake: Intake<'_>) -> Result<Position, End> {
        // Somebody else may be at it already. It would only get in that one's way: the offset keeps it from doing harm.
        while !self.shared.is_certain() && !self.stop.wait(IDLE) {}
        let began = Instant::now();
        let Shared { group, holder, reading, database, .. } = &*self.shared;
        let partition = self.partition;
        let moved = database.transaction_within(reading.ttl(), |conn| {
            let recorded = messages::recorded_ids(conn, group, partition, &intake.foreign_ids())?;
            intake.pass_over(recorded);
            let Intake { taken, skipped, gaps, position, .. } = &intake;
            let mut passed = intake.passed;
            for (lowest, highest) in gaps {
                passed.missing -= partitions::unused_among(conn, partition, *lowest, *highest)?;
            }
            if !consumer_offsets::advance(conn, group, partition, from.next_offset, position, passed)? {
                return Ok(None);
            }
            let taken = taken.iter().map(|taken| new_message(group, partition, holder, taken));
            messages::record(conn, &taken.collect::<Vec<_>>())?;
            for refused in skipped.iter().filter(|skipped| skipped.is_refused()) {
                messages::try_out(conn, group, partition, refused.offset, holder)?;
            }
            let reasons: Vec<_> = skipped.iter().map(Skipped::full_reason).collect();
            let skipped = skipped.iter().zip(&reasons).map(|(skipped, reason)| NewSkipped {
                group: group.as_str(),
                partition,
                offset: skipped.offset,
                message_id: skipped.message_id,
                reason,
                body: skipped.body,
            });
            messages::skip(conn, &skipped.collect::<Vec<_>>())?;
            Ok(Some(passed))
        })?;
        let Some(passed) = moved else { return Err(End::Moved) };
        if let Some(after) = self.away.reset() {
            emit(DatabaseAvailable { after });
        }
        let Intake { taken, skipped, position, .. } = intake;
        for skipped in &skipped {
            let (offset, reason) = (skipped.offset, &skipped.reason);
            emit(MessageSkipped { group: self.shared.group.as_str(), partition, offset, reason });
        }
        let oldest = taken.iter().filter_map(|taken| taken.message.accepted_at).min();
        let unsigned = |count: i64| count.unsigned_abs();
        emit(MessagesRecorded {
            group: self.shared.group.as_str(),
            partition,
            messages: taken.len() as u64,
            repeated: unsigned(passed.repeated),
            missing: unsigned(passed.missing),
            duration: began.elapsed(),
            lag: oldest.and_then(|oldest| (Utc::now() - oldest).to_std().ok()),
        });
        Ok(position)
    }
}

fn new_message<'a>(group: &'a Group, partition: i32, holder: &'a str, taken: &'a Taken<'_>) -> NewMessage<'a> {
    NewMessage {
        group: group.as_str(),
        partition,
        offset: taken.offset,
        seq: taken.seq,
        message_id: taken.message_id,
        key: taken.message.key.as_deref(),
        text: &taken.message.text,
        accepted_at: taken.message.accepted_at,
        recorded_by: holder,
    }
}
