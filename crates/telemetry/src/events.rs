//! What happens in the fleet.
//!
//! Events of a batch log at `info` and events of a single message that went well at `debug`, so that the cost is per batch.
//! No event has room for an e-mail address, a phone number or a tweet's text; whoever makes an `error` keeps them out of it.

use std::fmt::Display;
use std::time::Duration;

use crate::Event;
use crate::metrics::{self, millis};

/// A worker's consumer has started.
#[derive(Clone, Copy, Debug)]
pub struct WorkerStarted<'a> {
    /// The queue.
    pub queue: &'a str,
    /// Messages that the broker sends ahead.
    pub prefetch: u64,
}

impl Event for WorkerStarted<'_> {
    fn emit(self) {
        log::info!(queue = self.queue, prefetch = self.prefetch; "started consuming");
    }
}

/// A worker's consumer has stopped, with nothing in hand.
#[derive(Clone, Copy, Debug)]
pub struct WorkerStopped<'a> {
    /// The queue.
    pub queue: &'a str,
    /// Messages handled since the start.
    pub handled: u64,
}

impl Event for WorkerStopped<'_> {
    fn emit(self) {
        log::info!(queue = self.queue, handled = self.handled; "stopped consuming");
    }
}

/// A batch has come in.
#[derive(Clone, Copy, Debug)]
pub struct BatchReceived<'a> {
    /// The queue.
    pub queue: &'a str,
    /// Messages in the batch.
    pub messages: u64,
}

impl Event for BatchReceived<'_> {
    fn emit(self) {
        log::debug!(queue = self.queue, messages = self.messages; "received a batch");
        metrics::QUEUE_RECEIVED.add(self.queue, self.messages);
        metrics::QUEUE_BATCH_SIZE.size(self.queue, self.messages);
    }
}

/// A batch's effect is committed, what followed from it confirmed, and its messages acked.
#[derive(Clone, Copy, Debug)]
pub struct BatchHandled<'a> {
    /// The queue.
    pub queue: &'a str,
    /// Messages handled: not those that were retried or dead-lettered.
    pub messages: u64,
    /// From the batch's being complete to the ack.
    pub duration: Duration,
    /// The age of the oldest message, where one says when it was published.
    pub lag: Option<Duration>,
}

impl Event for BatchHandled<'_> {
    fn emit(self) {
        log::info!(
            queue = self.queue, messages = self.messages, duration_ms = millis(self.duration),
            lag_ms = self.lag.map(millis);
            "handled a batch"
        );
        metrics::QUEUE_HANDLED.add(self.queue, self.messages);
        metrics::QUEUE_HANDLING_MS.time(self.queue, self.duration);
        if let Some(lag) = self.lag {
            metrics::QUEUE_LAG_MS.time(self.queue, lag);
        }
        if let Some(n) = self.queue.strip_prefix("update_feed.").and_then(|n| n.parse::<u32>().ok()) {
            metrics::UPDATE_FEED.add(&n.to_string(), self.messages);
        }
    }
}

/// One message was handled. At `debug`, and without a metric: [`BatchHandled`] counts it.
#[derive(Clone, Copy, Debug)]
pub struct MessageHandled<'a> {
    /// The queue.
    pub queue: &'a str,
    /// The message's id.
    pub message_id: Option<&'a str>,
    /// The correlation id of the request that it follows from.
    pub correlation_id: Option<&'a str>,
}

impl Event for MessageHandled<'_> {
    fn emit(self) {
        log::debug!(
            queue = self.queue, message_id = self.message_id, correlation_id = self.correlation_id;
            "handled a message"
        );
    }
}

/// A message failed and will be tried again.
#[derive(Clone, Copy)]
pub struct MessageRetried<'a> {
    /// The queue.
    pub queue: &'a str,
    /// The message's id.
    pub message_id: Option<&'a str>,
    /// The correlation id of the request that it follows from.
    pub correlation_id: Option<&'a str>,
    /// Attempts so far, from 1.
    pub attempt: u32,
    /// How long it waits.
    pub delay: Duration,
    /// Why it failed.
    pub error: &'a dyn Display,
}

impl Event for MessageRetried<'_> {
    fn emit(self) {
        log::warn!(
            queue = self.queue, message_id = self.message_id, correlation_id = self.correlation_id,
            attempt = self.attempt, delay_ms = millis(self.delay), error:% = self.error;
            "a message failed and will be retried"
        );
        metrics::QUEUE_RETRIED.add(self.queue, 1);
    }
}

/// A message was given up.
#[derive(Clone, Copy)]
pub struct MessageDeadLettered<'a> {
    /// The queue.
    pub queue: &'a str,
    /// The message's id.
    pub message_id: Option<&'a str>,
    /// The correlation id of the request that it follows from.
    pub correlation_id: Option<&'a str>,
    /// Attempts made.
    pub attempts: u32,
    /// Why it was given up.
    pub error: &'a dyn Display,
}

impl Event for MessageDeadLettered<'_> {
    fn emit(self) {
        log::error!(
            queue = self.queue, message_id = self.message_id, correlation_id = self.correlation_id,
            attempts = self.attempts, error:% = self.error;
            "dead-lettered a message"
        );
        metrics::QUEUE_DEAD_LETTERED.add(self.queue, 1);
    }
}

/// Messages came again after a consumer was lost with them: one of them may have ended it, so each runs alone.
#[derive(Clone, Copy, Debug)]
pub struct MessagesSuspected<'a> {
    /// The queue.
    pub queue: &'a str,
    /// Messages marked as redelivered.
    pub messages: u64,
}

impl Event for MessagesSuspected<'_> {
    fn emit(self) {
        log::info!(queue = self.queue, messages = self.messages; "messages that may have ended a process are handled one at a time");
    }
}

/// A handler ran past its time limit, so the process ends. Sends the metrics as well, since nothing else will.
#[derive(Clone, Copy, Debug)]
pub struct TimeLimitExceeded<'a> {
    /// The queue.
    pub queue: &'a str,
    /// The message's id, if it ran alone.
    pub message_id: Option<&'a str>,
    /// The correlation id of the request that it follows from.
    pub correlation_id: Option<&'a str>,
    /// The limit.
    pub limit: Duration,
}

impl Event for TimeLimitExceeded<'_> {
    fn emit(self) {
        log::error!(
            queue = self.queue, message_id = self.message_id, correlation_id = self.correlation_id,
            limit_ms = millis(self.limit);
            "a handler exceeded its time limit; the process exits"
        );
        crate::flush();
    }
}

/// The database can't be used for now.
#[derive(Clone, Copy)]
pub struct DatabaseUnavailable<'a> {
    /// Why.
    pub error: &'a dyn Display,
    /// When it is tried again; `None` where the caller is told instead.
    pub retry_in: Option<Duration>,
}

impl Event for DatabaseUnavailable<'_> {
    fn emit(self) {
        log::warn!(error:% = self.error, retry_in_ms = self.retry_in.map(millis); "the database is unavailable");
        metrics::DATABASE_UNAVAILABLE.add("", 1);
    }
}

/// The database answers again.
#[derive(Clone, Copy, Debug)]
pub struct DatabaseAvailable {
    /// How long it was away.
    pub after: Duration,
}

impl Event for DatabaseAvailable {
    fn emit(self) {
        log::info!(after_ms = millis(self.after); "the database is available again");
    }
}

/// A connection to the broker was made.
#[derive(Clone, Copy, Debug)]
pub struct BrokerConnected<'a> {
    /// What it is for: `publish`, `consume`.
    pub purpose: &'a str,
    /// Whether there was one before.
    pub again: bool,
}

impl Event for BrokerConnected<'_> {
    fn emit(self) {
        log::info!(purpose = self.purpose, again = self.again; "connected to the broker");
        metrics::BROKER_RECONNECTED.add("", u64::from(self.again));
    }
}

/// A connection to the broker was lost, or couldn't be made.
#[derive(Clone, Copy)]
pub struct BrokerLost<'a> {
    /// What it is for: `publish`, `consume`.
    pub purpose: &'a str,
    /// Why.
    pub error: &'a dyn Display,
    /// When it is tried again.
    pub retry_in: Duration,
}

impl Event for BrokerLost<'_> {
    fn emit(self) {
        log::warn!(
            purpose = self.purpose, error:% = self.error, retry_in_ms = millis(self.retry_in);
            "no connection to the broker"
        );
    }
}

/// The broker has blocked a connection, being short of memory or disk.
#[derive(Clone, Copy, Debug)]
pub struct BrokerBlocked<'a> {
    /// The broker's reason.
    pub reason: &'a str,
}

impl Event for BrokerBlocked<'_> {
    fn emit(self) {
        log::warn!(reason = self.reason; "the broker has blocked publishing");
        metrics::BROKER_BLOCKED.add("", 1);
    }
}

/// The broker accepts messages again.
#[derive(Clone, Copy, Debug)]
pub struct BrokerUnblocked;

impl Event for BrokerUnblocked {
    fn emit(self) {
        log::info!("the broker has unblocked publishing");
    }
}

/// Messages for a destination have been refused, or not confirmed, for more than a moment: its queue is full, say. They are
/// published again on a new channel, because RabbitMQ may go on refusing on the old one for ever.
#[derive(Clone, Copy, Debug)]
pub struct DestinationRefusing<'a> {
    /// The exchange.
    pub exchange: &'a str,
    /// The routing key.
    pub routing_key: &'a str,
    /// For how long.
    pub since: Duration,
}

impl Event for DestinationRefusing<'_> {
    fn emit(self) {
        log::warn!(
            exchange = self.exchange, routing_key = self.routing_key, since_ms = millis(self.since);
            "a queue takes no messages; retrying on a new channel"
        );
        metrics::BROKER_REFUSING.add("", 1);
    }
}

/// Messages for a destination are taken again.
#[derive(Clone, Copy, Debug)]
pub struct DestinationAccepting<'a> {
    /// The exchange.
    pub exchange: &'a str,
    /// The routing key.
    pub routing_key: &'a str,
    /// How long they weren't.
    pub after: Duration,
}

impl Event for DestinationAccepting<'_> {
    fn emit(self) {
        log::info!(
            exchange = self.exchange, routing_key = self.routing_key, after_ms = millis(self.after);
            "a queue takes messages again"
        );
    }
}

/// The gateway has answered a request.
#[derive(Clone, Copy, Debug)]
pub struct RequestServed<'a> {
    /// The method.
    pub method: &'a str,
    /// The route's template, `/api/v1/user/{id}`: never the path or the query string, which may hold personal data.
    pub route: &'a str,
    /// The answer's status.
    pub status: u16,
    /// From the request to its answer.
    pub duration: Duration,
    /// The request's correlation id.
    pub correlation_id: &'a str,
}

impl Event for RequestServed<'_> {
    fn emit(self) {
        log::info!(
            method = self.method, route = self.route, status = self.status, duration_ms = millis(self.duration),
            correlation_id = self.correlation_id;
            "answered a request"
        );
        let class = match self.status / 100 {
            1 => "1xx",
            2 => "2xx",
            3 => "3xx",
            4 => "4xx",
            _ => "5xx",
        };
        metrics::HTTP_REQUESTS.add(class, 1);
        metrics::HTTP_DURATION_MS.time("", self.duration);
    }
}

/// Outbox rows were published, confirmed and deleted.
#[derive(Clone, Copy, Debug)]
pub struct OutboxRelayed {
    /// How many.
    pub messages: u64,
    /// From taking the rows to the commit.
    pub duration: Duration,
    /// The age of the oldest row.
    pub lag: Duration,
}

impl Event for OutboxRelayed {
    fn emit(self) {
        log::info!(
            messages = self.messages, duration_ms = millis(self.duration), lag_ms = millis(self.lag);
            "relayed outbox rows"
        );
        metrics::OUTBOX_RELAYED.add("", self.messages);
        metrics::OUTBOX_BATCH_SIZE.size("", self.messages);
        metrics::OUTBOX_LAG_MS.time("", self.lag);
    }
}

/// Messages of the log were published to their partitions' streams, confirmed and deleted.
#[derive(Clone, Copy, Debug)]
pub struct LogRelayed {
    /// How many.
    pub messages: u64,
    /// From loading them to the commit.
    pub duration: Duration,
    /// The age of the oldest.
    pub lag: Duration,
}

impl Event for LogRelayed {
    fn emit(self) {
        log::info!(
            messages = self.messages, duration_ms = millis(self.duration), lag_ms = millis(self.lag);
            "relayed messages of the log"
        );
        metrics::MESSAGE_LOG_RELAYED.add("", self.messages);
        metrics::MESSAGE_LOG_BATCH_SIZE.size("", self.messages);
        metrics::MESSAGE_LOG_LAG_MS.time("", self.lag);
    }
}

/// A partition of the message log takes no messages, which wait for it.
#[derive(Clone, Copy)]
pub struct PartitionUnavailable<'a> {
    /// The partition.
    pub partition: i32,
    /// Why.
    pub error: &'a dyn Display,
    /// When it is tried again.
    pub retry_in: Duration,
}

impl Event for PartitionUnavailable<'_> {
    fn emit(self) {
        log::warn!(
            partition = self.partition, error:% = self.error, retry_in_ms = millis(self.retry_in);
            "a partition of the message log takes no messages"
        );
        metrics::MESSAGE_LOG_UNAVAILABLE.add("", 1);
    }
}

/// A partition of the message log takes messages again.
#[derive(Clone, Copy, Debug)]
pub struct PartitionAvailable {
    /// The partition.
    pub partition: i32,
    /// How long it took none.
    pub after: Duration,
}

impl Event for PartitionAvailable {
    fn emit(self) {
        log::info!(
            partition = self.partition, after_ms = millis(self.after);
            "a partition of the message log takes messages again"
        );
    }
}

/// A consumer group has recorded messages of the log.
#[derive(Clone, Copy, Debug)]
pub struct MessagesRecorded<'a> {
    /// The group.
    pub group: &'a str,
    /// The partition.
    pub partition: i32,
    /// How many.
    pub messages: u64,
    /// Messages that had been recorded before, or come once more.
    pub repeated: u64,
    /// Messages that will never come: the broker confirmed them and has lost them since.
    pub missing: u64,
    /// How long the transaction took.
    pub duration: Duration,
    /// The age of the oldest, where it says when it was accepted.
    pub lag: Option<Duration>,
}

impl Event for MessagesRecorded<'_> {
    fn emit(self) {
        log::debug!(
            group = self.group, partition = self.partition, messages = self.messages, repeated = self.repeated,
            duration_ms = millis(self.duration), lag_ms = self.lag.map(millis);
            "recorded messages"
        );
        if self.missing > 0 {
            log::error!(
                group = self.group, partition = self.partition, messages = self.missing;
                "the broker lost messages that it had confirmed"
            );
        }
        metrics::GROUP_RECORDED.add(self.group, self.messages);
        metrics::GROUP_REPEATED.add(self.group, self.repeated);
        metrics::GROUP_MISSING.add(self.group, self.missing);
        metrics::GROUP_BATCH_SIZE.size(self.group, self.messages);
        if let Some(lag) = self.lag {
            metrics::GROUP_LAG_MS.time(self.group, lag);
        }
    }
}

/// A consumer group has met something in a partition that is no message of the log.
#[derive(Clone, Copy)]
pub struct MessageSkipped<'a> {
    /// The group.
    pub group: &'a str,
    /// The partition.
    pub partition: i32,
    /// Its place there.
    pub offset: i64,
    /// What is wrong with it.
    pub reason: &'a dyn Display,
}

impl Event for MessageSkipped<'_> {
    fn emit(self) {
        log::warn!(
            group = self.group, partition = self.partition, offset = self.offset, reason:% = self.reason;
            "skipped a record that is no message"
        );
        metrics::GROUP_SKIPPED.add(self.group, 1);
    }
}

/// A consumer group can't go on with a partition until an operator says where.
#[derive(Clone, Copy)]
pub struct ReadingStopped<'a> {
    /// The group.
    pub group: &'a str,
    /// The partition.
    pub partition: i32,
    /// Why.
    pub reason: &'a dyn Display,
}

impl Event for ReadingStopped<'_> {
    fn emit(self) {
        log::error!(
            group = self.group, partition = self.partition, reason:% = self.reason;
            "stopped reading a partition until the group's offset is reset"
        );
        metrics::GROUP_STOPPED.add(self.group, 1);
    }
}

/// Which partitions a member of a consumer group reads has changed.
#[derive(Clone, Copy, Debug)]
pub struct PartitionsChanged<'a> {
    /// The group.
    pub group: &'a str,
    /// How many it reads now.
    pub held: u64,
    /// Taken that were free.
    pub taken: u64,
    /// Taken from members that had likely died.
    pub taken_over: u64,
    /// Given up, or lost to others.
    pub given_up: u64,
    /// Members of the group.
    pub members: u64,
}

impl Event for PartitionsChanged<'_> {
    fn emit(self) {
        log::info!(
            group = self.group, held = self.held, taken = self.taken, taken_over = self.taken_over,
            given_up = self.given_up, members = self.members;
            "the partitions of this process have changed"
        );
        metrics::GROUP_TAKEN_OVER.add(self.group, self.taken_over);
    }
}

/// One step of a follower import was committed.
#[derive(Clone, Copy)]
pub struct ImportProgressed<'a> {
    /// The import.
    pub import_id: &'a dyn Display,
    /// The correlation id of the request that asked for it.
    pub correlation_id: Option<&'a str>,
    /// Followers asked for in all.
    pub requested: u64,
    /// Followers done in all, created or skipped.
    pub done: u64,
    /// Users that this step created.
    pub created: u64,
    /// Logins that this step found taken.
    pub skipped: u64,
}

impl Event for ImportProgressed<'_> {
    fn emit(self) {
        log::info!(
            import_id:% = self.import_id, correlation_id = self.correlation_id, requested = self.requested,
            done = self.done, created = self.created, skipped = self.skipped;
            "imported followers"
        );
        metrics::IMPORT_CREATED.add("", self.created);
        metrics::IMPORT_SKIPPED.add("", self.skipped);
    }
}

/// A sweep has removed feed rows that no reader could see any more.
#[derive(Clone, Copy, Debug)]
pub struct SweepDone {
    /// Rows removed.
    pub removed: u64,
    /// How long it took.
    pub duration: Duration,
}

impl Event for SweepDone {
    fn emit(self) {
        log::info!(removed = self.removed, duration_ms = millis(self.duration); "swept feed rows");
        metrics::SWEEP_REMOVED.add("", self.removed);
    }
}

/// The sweep has taken away what was kept of a deleted user, or a page of it.
#[derive(Clone, Copy, Debug)]
pub struct UserErased {
    /// Rows removed or cleared.
    pub rows: u64,
    /// Whether nothing is left.
    pub done: bool,
}

impl Event for UserErased {
    fn emit(self) {
        log::info!(rows = self.rows, done = self.done; "erased what was kept of a deleted user");
        metrics::ERASURE_ROWS.add("", self.rows);
    }
}

/// The sweep has taken away the texts of deleted tweets.
#[derive(Clone, Copy, Debug)]
pub struct TweetsErased {
    /// How many.
    pub texts: u64,
}

impl Event for TweetsErased {
    fn emit(self) {
        log::info!(texts = self.texts; "erased the texts of deleted tweets");
        metrics::ERASURE_ROWS.add("", self.texts);
    }
}

/// Events of a sequenced stream have taken effect.
#[derive(Clone, Copy, Debug)]
pub struct EventsApplied<'a> {
    /// The stream.
    pub stream: &'a str,
    /// How many.
    pub events: u64,
    /// Events whose effect somebody else had had meanwhile: they changed nothing.
    pub late: u64,
    /// How long the transaction took.
    pub duration: Duration,
    /// The age of the oldest.
    pub lag: Option<Duration>,
}

impl Event for EventsApplied<'_> {
    fn emit(self) {
        log::debug!(
            stream = self.stream, events = self.events, late = self.late, duration_ms = millis(self.duration),
            lag_ms = self.lag.map(millis);
            "events took effect"
        );
        metrics::STREAM_APPLIED.add(self.stream, self.events);
        metrics::STREAM_LATE.add(self.stream, self.late);
        metrics::STREAM_BATCH_SIZE.size(self.stream, self.events);
        if let Some(lag) = self.lag {
            metrics::STREAM_LAG_MS.time(self.stream, lag);
        }
    }
}

/// An event failed. Its key waits for the next attempt, or is parked; other keys go on.
#[derive(Clone, Copy)]
pub struct EventFailed<'a> {
    /// The stream.
    pub stream: &'a str,
    /// The key.
    pub key: &'a str,
    /// The event's place.
    pub seq: i64,
    /// Attempts so far, from 1.
    pub attempt: u32,
    /// How long it waits; `None` where the key is parked.
    pub delay: Option<Duration>,
    /// Why.
    pub error: &'a dyn Display,
}

impl Event for EventFailed<'_> {
    fn emit(self) {
        match self.delay {
            Some(delay) => {
                log::warn!(
                    stream = self.stream, key = self.key, seq = self.seq, attempt = self.attempt,
                    delay_ms = millis(delay), error:% = self.error;
                    "an event failed and will be retried"
                );
                metrics::STREAM_RETRIED.add(self.stream, 1);
            }
            None => {
                log::error!(
                    stream = self.stream, key = self.key, seq = self.seq, attempt = self.attempt,
                    error:% = self.error;
                    "parked a key: its next event waits for an operator"
                );
                metrics::STREAM_PARKED.add(self.stream, 1);
            }
        }
    }
}

/// An event's handling ran past its time limit, so the process ends. Sends the metrics as well, since nothing else will.
#[derive(Clone, Copy, Debug)]
pub struct EventOverran<'a> {
    /// The stream.
    pub stream: &'a str,
    /// The key.
    pub key: &'a str,
    /// The event's place.
    pub seq: i64,
    /// The limit.
    pub limit: Duration,
}

impl Event for EventOverran<'_> {
    fn emit(self) {
        log::error!(
            stream = self.stream, key = self.key, seq = self.seq, limit_ms = millis(self.limit);
            "an event exceeded its time limit; the process exits"
        );
        crate::flush();
    }
}

/// The sweep has found events that no message had brought.
#[derive(Clone, Copy, Debug)]
pub struct EventsSwept<'a> {
    /// The stream.
    pub stream: &'a str,
    /// Keys that go on because of it.
    pub keys: u64,
}

impl Event for EventsSwept<'_> {
    fn emit(self) {
        log::debug!(stream = self.stream, keys = self.keys; "the sweep found waiting events");
        metrics::STREAM_SWEPT.add(self.stream, self.keys);
    }
}

/// Another session holds rows that events need: they were put off, and no attempt was counted.
#[derive(Clone, Copy)]
pub struct EventsPutOff<'a> {
    /// The stream.
    pub stream: &'a str,
    /// How many.
    pub events: u64,
    /// One of their keys.
    pub key: &'a str,
    /// How long they have waited.
    pub waited: Duration,
    /// Whether that is worth a line of its own.
    pub say: bool,
}

impl Event for EventsPutOff<'_> {
    fn emit(self) {
        if self.say {
            log::warn!(
                stream = self.stream, events = self.events, key = self.key, waited_ms = millis(self.waited);
                "events wait for rows locked by another session"
            );
        }
        metrics::STREAM_PUT_OFF.add(self.stream, self.events);
    }
}

/// Leases, members or waits lasted for longer than they may, and were shortened: the clock was set back.
#[derive(Clone, Copy, Debug)]
pub struct ClockSetBack<'a> {
    /// What it was found by: a service or a stream.
    pub of: &'a str,
    /// Leases.
    pub leases: u64,
    /// Members.
    pub members: u64,
    /// Keys that waited for another attempt.
    pub waits: u64,
}

impl Event for ClockSetBack<'_> {
    fn emit(self) {
        log::warn!(
            of = self.of, leases = self.leases, members = self.members, waits = self.waits;
            "the database's clock went back; times too far ahead were shortened"
        );
        metrics::CLOCK_SET_BACK.add(self.of, self.leases + self.members + self.waits);
    }
}

/// The shards that this process works on have changed.
#[derive(Clone, Copy, Debug)]
pub struct ShardsChanged<'a> {
    /// The stream.
    pub stream: &'a str,
    /// How many it has now.
    pub held: u64,
    /// Taken that were free.
    pub taken: u64,
    /// Taken from a process that hadn't renewed its lease.
    pub taken_over: u64,
    /// Given back, or lost.
    pub given_up: u64,
    /// Processes that share them.
    pub members: u64,
}

impl Event for ShardsChanged<'_> {
    fn emit(self) {
        log::info!(
            stream = self.stream, held = self.held, taken = self.taken, taken_over = self.taken_over,
            given_up = self.given_up, members = self.members;
            "the shards of this process have changed"
        );
        metrics::STREAM_TAKEN_OVER.add(self.stream, self.taken_over);
    }
}

/// A consumer of the ordering lab has given a message its effect. At `debug`, as everything about a single message that
/// went well; the errors are what the lab is there to see, and no failure.
#[derive(Clone, Copy, Debug)]
pub struct BalanceChanged {
    /// The consumer.
    pub consumer: i32,
    /// The user.
    pub user: i64,
    /// The message's version.
    pub version: i32,
    /// Whether its time wasn't later than that of the one before.
    pub order_error: bool,
    /// Whether the balance isn't what the producer expected.
    pub value_error: bool,
    /// Whether the user's row was made by another consumer.
    pub consumer_error: bool,
}

impl Event for BalanceChanged {
    fn emit(self) {
        log::debug!(
            consumer = self.consumer, user = self.user, version = self.version, order_error = self.order_error,
            value_error = self.value_error, consumer_error = self.consumer_error;
            "changed a balance"
        );
        metrics::ORDER_ERROR.add("", self.order_error.into());
        metrics::VALUE_ERROR.add("", self.value_error.into());
        metrics::CONSUMER_ERROR.add("", self.consumer_error.into());
        metrics::PROCESSED_VERSION.add(&self.version.to_string(), 1);
    }
}
