use crate::{GOODBYE, Round, SERVICE, topology::Destinations};
use broker::{Link, PublishError, Publisher, Reason};
use chrono::{DateTime, SecondsFormat, Utc};
use domain::{
    Envelope,
    log::{MessageId, proof::Epoch},
    topology::{Retention, Topology},
};
use process::Backoff;
use std::{
    collections::HashMap,
    fmt::Display,
    ops::Range,
    time::{Duration, Instant},
};
use storage::{
    Database, Floors, message_epochs,
    message_outbox::{self, Message, Published, Taken},
    partitions,
};
use telemetry::{BrokerLost, LogRelayed, PartitionAvailable, PartitionUnavailable, emit};

/// Bytes of text that are taken at a time, shared out among the partitions. Bounds memory, in which each is up to three times:
/// as a row, as a message, and on its way to the socket.
const BYTES: i64 = 4 << 20;

/// How long a partition that takes no messages is left alone.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// When it wasn't this relay's turn there for so long, nothing waits any more, or another relay sees to it.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

/// Moves accepted messages of the log to their partitions' streams.
pub struct LogRelay {
    database: Database,
    broker: broker::Settings,
    destinations: Destinations,
    /// One that declares nothing.
    publisher: Publisher,
    /// Whether everything was declared since the broker was lost or a partition took no messages.
    declared: bool,
    /// While it can't be.
    away: Backoff,
    batch: i64,
    /// What the messages' ids begin with, once it's known.
    token: Option<String>,
    /// What this relay proves its messages with.
    epoch: Epoch,
    /// The database's generation in which that is registered.
    registered: Option<u64>,
    /// The partitions that take no messages for now.
    unavailable: HashMap<i32, Unavailable>,
    /// Where looking for messages begins.
    floors: Floors,
    /// Whether the last round found something: then the next one doesn't ask first.
    busy: bool,
}

struct Unavailable {
    backoff: Backoff,
    since: DateTime<Utc>,
    /// When to try again.
    next: Instant,
    /// Whether the broker didn't let its stream be declared. Publishing to it might cost the connection.
    undeclared: bool,
}

/// What was taken of a partition.
struct Slice {
    partition: i32,
    /// The rows.
    ids: Vec<i64>,
    /// How many of the first of them somebody has removed by hand.
    passed: usize,
    /// Where the messages of those behind are among all that is published, up to the next one that was removed.
    envelopes: Range<usize>,
}

/// What became of a slice.
#[derive(Debug, PartialEq, Eq)]
struct SliceResult {
    partition: i32,
    /// How many of its rows are done with.
    done: usize,
    /// Which messages are published.
    published: Range<usize>,
    /// Why the next one isn't.
    failure: Option<String>,
}

/// What a round's transaction has come to.
enum Attempt {
    /// There's something to publish, and everything is to be declared first.
    Declare,
    /// There's something to take or to publish, and the database may be one that doesn't know this relay.
    Register,
    Made {
        outcomes: Vec<SliceResult>,
        /// When the oldest of the published messages was accepted.
        oldest: Option<DateTime<Utc>>,
        broker_away: bool,
    },
}

impl LogRelay {
    /// A relay of up to `batch` messages of each partition at a time. Whenever it connects, or a partition takes no messages, it
    /// declares what [`Relay`](crate::Relay) does.
    pub fn new(
        database: Database,
        broker: &broker::Settings,
        fleet: Topology,
        message_log: Retention,
        batch: i64,
    ) -> Self {
        let destinations = Destinations::new(fleet, message_log, database.clone());
        Self {
            epoch: Epoch::random(),
            registered: None,
            database,
            broker: broker.clone(),
            destinations,
            publisher: Publisher::new(broker, SERVICE).for_stream_queues(),
            declared: false,
            away: Backoff::new(FIRST_WAIT, LONGEST_WAIT),
            batch,
            token: None,
            unavailable: HashMap::new(),
            floors: Floors::default(),
            busy: false,
        }
    }

    /// The state of its connection, for other threads.
    #[must_use]
    pub fn link(&self) -> Link {
        self.publisher.link()
    }

    /// Whether messages wait for a partition that takes none.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.waiting().next().is_some()
    }

    /// Which partitions take no messages, and since when, in words for a health check.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        let mut waiting: Vec<_> = self.waiting().collect();
        waiting.sort_unstable_by_key(|(partition, _)| **partition);
        let name = |(partition, unavailable): (&i32, &Unavailable)| {
            let since = unavailable.since.to_rfc3339_opts(SecondsFormat::Secs, true);
            format!("partition {partition} of the message log takes no messages since {since}")
        };
        let named: Vec<_> = waiting.into_iter().map(name).collect();
        (!named.is_empty()).then(|| named.join("; "))
    }

    /// The partitions that take no messages, as far as others haven't published there since.
    fn waiting(&self) -> impl Iterator<Item = (&i32, &Unavailable)> {
        self.unavailable.iter().filter(|(_, unavailable)| unavailable.next.elapsed() < FORGOTTEN_AFTER)
    }

    /// Looks without asking first, next time: there's something.
    pub fn expect(&mut self) {
        self.busy = true;
    }

    /// Publishes what the transaction before has taken of each partition that no other relay has in hand, deletes what is
    /// confirmed, and takes the next, in one transaction. A relay that dies or freezes gives its partitions back, and others
    /// publish the same messages with the same sequences.
    ///
    /// # Errors
    /// The database's. Then what was taken is still to be published.
    pub fn round(&mut self) -> storage::Result<Round> {
        let began = Instant::now();
        if !self.busy || self.floors.is_due(began) {
            let mut conn = self.database.connection()?;
            if !message_outbox::look(&mut conn, &mut self.floors, began)? {
                self.busy = false;
                return Ok(Round::Idle);
            }
        }
        let Self { database, publisher, declared, batch, token, unavailable, epoch, registered, floors, .. } = self;
        let confirm_timeout = Duration::from_millis(self.broker.confirm_timeout_ms);
        let attempt = database.transaction(|conn| {
            let mut taken = message_outbox::taken_above(conn, floors)?;
            taken.retain(|taken| unavailable.get(&taken.partition).is_none_or(|partition| partition.next <= began));
            if taken.is_empty() {
                return Ok(Attempt::Made { outcomes: Vec::new(), oldest: None, broker_away: false });
            }
            // Before anything is taken, too: sequences that are given from then on have a proof.
            if *registered != Some(database.generation()) {
                return Ok(Attempt::Register);
            }
            let log = match token {
                Some(token) => token,
                None => token.insert(partitions::token(conn)?),
            };
            let mut envelopes = Vec::new();
            let slices: Vec<_> = taken.into_iter().map(|taken| Slice::new(taken, log, epoch, &mut envelopes)).collect();
            let is_declared =
                |slice: &Slice| unavailable.get(&slice.partition).is_none_or(|partition| !partition.undeclared);
            if !(envelopes.is_empty() || *declared && slices.iter().all(is_declared)) {
                return Ok(Attempt::Declare);
            }
            // Once: what is published again after a lost connection is another run, and says so.
            let published = publisher.publish_once(&envelopes, Instant::now() + confirm_timeout);
            let (failures, cause) = match published {
                Ok(()) => (Vec::new(), None),
                Err(PublishError::Refused { refused }) => {
                    (refused.into_iter().map(|(at, why)| (at, Some(why))).collect(), None)
                }
                Err(PublishError::Unavailable { unconfirmed, source }) => {
                    (unconfirmed.into_iter().map(|at| (at, None)).collect(), Some(source))
                }
            };
            let outcomes: Vec<_> = slices.iter().map(|slice| slice.outcome(&failures)).collect();
            let broker_away = cause.is_some_and(|cause| !is_partitions_own(&cause, &outcomes));

            let done = slices.iter().zip(&outcomes).map(|(slice, outcome)| {
                let (confirmed, left) = slice.ids.split_at(outcome.done);
                Published { partition: slice.partition, confirmed, left }
            });
            let bytes = BYTES / i64::try_from(slices.len()).unwrap_or(BYTES);
            message_outbox::advance_above(conn, floors, &done.collect::<Vec<_>>(), *batch, bytes)?;

            let published = outcomes.iter().flat_map(|outcome| &envelopes[outcome.published.clone()]);
            let oldest = published.map(|envelope| envelope.created_at).min();
            Ok(Attempt::Made { outcomes, oldest, broker_away })
        })?;

        let (outcomes, oldest, broker_away) = match attempt {
            Attempt::Declare => return Ok(self.declare()),
            Attempt::Register => {
                self.register()?;
                return self.round();
            }
            Attempt::Made { outcomes, oldest, broker_away } => (outcomes, oldest, broker_away),
        };
        if let Some(oldest) = oldest {
            let messages = outcomes.iter().map(|outcome| outcome.published.len() as u64).sum();
            let lag = (Utc::now() - oldest).to_std().unwrap_or_default();
            emit(LogRelayed { messages, duration: began.elapsed(), lag });
        }
        if broker_away {
            self.declared = self.publisher.link().is_connected();
            self.busy = true;
            return Ok(Round::BrokerAway);
        }
        // A partition without a failure has moved: messages are published, or the next are taken.
        let idle = outcomes.iter().all(|outcome| outcome.done == 0 && outcome.failure.is_some());
        self.note(outcomes);
        self.busy = !idle;
        Ok(if idle { Round::Idle } else { Round::Relayed })
    }

    /// Registers the epoch, which is committed before anything is published in it. Once for each connection that was lost: behind
    /// the next one there may be a database that has lost it.
    fn register(&mut self) -> storage::Result<()> {
        let generation = self.database.transaction(|conn| {
            let generation = self.database.generation();
            message_epochs::register(conn, &self.epoch)?;
            Ok(generation)
        })?;
        self.registered = Some(generation);
        Ok(())
    }

    /// Declares everything before it's published to, apart from any transaction.
    fn declare(&mut self) -> Round {
        let refused = match self.destinations.declare_at(&self.broker) {
            Ok(refused) => refused,
            Err(error) => {
                let (retry_in, say) = self.away.failed();
                if say {
                    let error = anyhow::Error::new(error);
                    emit(BrokerLost { purpose: "declare", error: &format_args!("{error:#}"), retry_in });
                }
                return Round::BrokerAway;
            }
        };
        self.away.reset();
        self.declared = true;
        for (partition, unavailable) in &mut self.unavailable {
            unavailable.undeclared &= refused.contains_key(partition);
        }
        for (partition, error) in refused {
            self.leave_alone(partition, &error, true);
        }
        Round::Relayed
    }

    /// Notes which partitions take messages. Where one doesn't, its stream or binding may have been deleted.
    fn note(&mut self, outcomes: Vec<SliceResult>) {
        for SliceResult { partition, published, failure, .. } in outcomes {
            if let Some(failure) = failure {
                self.leave_alone(partition, &failure, false);
                self.declared = false;
            } else if !published.is_empty()
                && let Some(mut unavailable) = self.unavailable.remove(&partition)
            {
                emit(PartitionAvailable { partition, after: unavailable.backoff.reset().unwrap_or_default() });
            }
        }
    }

    /// Publishes nothing to a partition for a while.
    fn leave_alone(&mut self, partition: i32, error: &dyn Display, undeclared: bool) {
        let new = || Unavailable {
            backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT),
            since: Utc::now(),
            next: Instant::now(),
            undeclared: false,
        };
        let unavailable = self.unavailable.entry(partition).or_insert_with(new);
        let (retry_in, say) = unavailable.backoff.failed();
        if say || undeclared && !unavailable.undeclared {
            emit(PartitionUnavailable { partition, error, retry_in });
        }
        unavailable.next = Instant::now() + retry_in;
        unavailable.undeclared = undeclared;
    }

    /// Says goodbye to the broker.
    pub fn close(self) {
        self.publisher.close(Instant::now() + GOODBYE);
    }
}

/// Whether messages weren't confirmed because of their partitions alone: others were, all of them.
fn is_partitions_own(cause: &broker::Error, outcomes: &[SliceResult]) -> bool {
    let is_through = |outcome: &SliceResult| outcome.failure.is_none() && !outcome.published.is_empty();
    matches!(cause, broker::Error::TimedOut { .. }) && outcomes.iter().any(is_through)
}

impl Slice {
    /// Appends what is to be published of a partition to `envelopes`.
    fn new(taken: Taken, log: &str, epoch: &Epoch, envelopes: &mut Vec<Envelope>) -> Self {
        let Taken { partition, first_seq, messages } = taken;
        let ids = messages.iter().map(|(id, _)| *id).collect();
        let passed = messages.iter().take_while(|(_, message)| message.is_none()).count();
        let (begin, mut run) = (envelopes.len(), None);
        let there = (first_seq..).zip(messages).skip(passed).map_while(|(seq, (_, message))| {
            let Message { body, correlation_id } = message?;
            let envelope = body.envelope(&MessageId { log, partition, seq }, *run.get_or_insert(seq), epoch);
            Some(Envelope { correlation_id, ..envelope })
        });
        envelopes.extend(there);
        Self { partition, ids, passed, envelopes: begin..envelopes.len() }
    }

    /// What became of it, if these of the published messages failed: ascending, each with why, where the broker has refused it.
    /// What is behind a message that failed is published again after it, so it counts as failed too.
    fn outcome(&self, failures: &[(usize, Option<Reason>)]) -> SliceResult {
        let Range { start, end } = self.envelopes;
        let first = failures.iter().find(|(at, _)| self.envelopes.contains(at));
        let published = start..first.map_or(end, |(at, _)| *at);
        let why = |(_, reason): &(usize, Option<Reason>)| match reason {
            Some(reason) => reason.to_string(),
            None => "the broker doesn't confirm its messages".into(),
        };
        SliceResult {
            partition: self.partition,
            done: self.passed + published.len(),
            published,
            failure: first.map(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::log::LogMessage;

    /// Rows 100, 101, … of partition 7, the first of which has sequence 31; `false` stands for one that was removed.
    fn slice(rows: &[bool], before: usize) -> (Slice, Vec<(String, i64)>) {
        let message = |there: &bool| {
            there.then(|| Message {
                body: LogMessage { text: "text".into(), key: None, accepted_at: None, run: None },
                correlation_id: Some("request".into()),
            })
        };
        let messages = (100..).zip(rows.iter().map(message)).collect();
        let mut envelopes = vec![Envelope::new("", "", Vec::new()); before];
        let slice =
            Slice::new(Taken { partition: 7, first_seq: 31, messages }, "log", &Epoch::random(), &mut envelopes);
        assert_eq!(slice.envelopes.end, envelopes.len());
        let of_slice = envelopes.drain(slice.envelopes.clone());
        let told = of_slice.map(|envelope| {
            assert_eq!(envelope.correlation_id.as_deref(), Some("request"));
            let message: LogMessage = serde_json::from_slice(&envelope.body).unwrap();
            (envelope.message_id, message.run.unwrap())
        });
        (slice, told.collect())
    }

    fn ids(seqs: &[i64], run: i64) -> Vec<(String, i64)> {
        seqs.iter().map(|seq| (format!("log/07/{seq}"), run)).collect()
    }

    #[test]
    fn messages_say_their_sequence_and_where_their_run_began() {
        assert_eq!(slice(&[true, true, true], 5).1, ids(&[31, 32, 33], 31));
        assert_eq!(slice(&[], 5).1, []);
    }

    #[test]
    fn rows_that_were_removed_by_hand_stand_before_a_run_never_in_it() {
        let (slice_of, told) = slice(&[false, false, true, true, false, true], 0);
        assert_eq!(told, ids(&[33, 34], 33));
        assert_eq!(slice_of.outcome(&[]).done, 4);
        let (slice_of, told) = slice(&[false, false], 0);
        assert_eq!((told, slice_of.outcome(&[]).done), (vec![], 2));
    }

    #[test]
    fn what_is_behind_a_failure_counts_as_failed() {
        let (slice, _) = slice(&[false, true, true, true], 10);
        let outcome = |failures: &[(usize, Option<Reason>)]| {
            let SliceResult { done, published, failure, .. } = slice.outcome(failures);
            (done, published, failure)
        };
        let nacked = || Some(Reason::Nacked);
        assert_eq!(outcome(&[]), (4, 10..13, None));
        assert_eq!(outcome(&[(9, nacked()), (13, nacked())]), (4, 10..13, None), "others' failures");
        let why = Some(Reason::Nacked.to_string());
        assert_eq!(outcome(&[(9, None), (11, nacked()), (12, None)]), (2, 10..11, why));
        let why = Some("the broker doesn't confirm its messages".to_owned());
        assert_eq!(outcome(&[(10, None), (12, nacked())]), (1, 10..10, why));
    }

    #[test]
    fn a_partition_is_to_blame_where_another_one_was_confirmed_in_the_same_time() {
        let outcome = |published, failed: bool| SliceResult {
            partition: 0,
            done: 0,
            published: 0..published,
            failure: failed.then(|| "why".into()),
        };
        let in_time = || broker::Error::TimedOut { doing: "publishing", after: Duration::ZERO };
        let lost = broker::Error::Blocked("memory".into());
        assert!(is_partitions_own(&in_time(), &[outcome(3, true), outcome(3, false)]));
        assert!(
            !is_partitions_own(&in_time(), &[outcome(3, true), outcome(0, false)]),
            "nothing of it to be confirmed"
        );
        assert!(!is_partitions_own(&lost, &[outcome(3, true), outcome(3, false)]));
    }
}
