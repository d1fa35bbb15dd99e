//! Every metric that the fleet sends, in one place.

use crate::statsd;
use cadence::{Counted as _, Timed as _};
use std::time::Duration;

/// A metric, or a family of them with a `<part>` in the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// The name without the prefix. A part in angle brackets stands for one component made of letters, digits, `-` and `_`.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// What it says.
    pub help: &'static str,
}

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A sum; statsd's `c`.
    Counter,
    /// A distribution of durations in milliseconds; statsd's `ms`.
    Timer,
    /// A distribution of sizes. It is sent as statsd's `ms` too: Graphite's statsd knows no other distribution.
    Histogram,
}

macro_rules! metrics {
    ($($constant:ident: $kind:ident $name:literal $help:literal)*) => {
        $(
            #[doc = concat!("`", $name, "`: ", $help, ".")]
            pub const $constant: Metric = Metric { name: $name, kind: Kind::$kind, help: $help };
        )*

        /// Every metric.
        pub const ALL: &[Metric] = &[$($constant),*];
    };
}

metrics! {
    QUEUE_RECEIVED: Counter "queue.<queue>.received" "messages received from the queue"
    QUEUE_HANDLED: Counter "queue.<queue>.handled" "messages whose effect is committed"
    QUEUE_RETRIED: Counter "queue.<queue>.retried" "messages sent to wait for another attempt"
    QUEUE_DEAD_LETTERED: Counter "queue.<queue>.dead_lettered" "messages given up"
    QUEUE_BATCH_SIZE: Histogram "queue.<queue>.batch_size" "messages in a batch"
    QUEUE_HANDLING_MS: Timer "queue.<queue>.handling_ms" "time to handle a batch, confirms and ack included"
    QUEUE_LAG_MS: Timer "queue.<queue>.lag_ms" "age of a batch's oldest message when its effect is committed"
    UPDATE_FEED: Counter "update_feed_<n>" "messages handled from the queue update_feed.<n>"
    OUTBOX_RELAYED: Counter "outbox.relayed" "outbox rows published and confirmed"
    OUTBOX_BATCH_SIZE: Histogram "outbox.batch_size" "outbox rows taken at once"
    OUTBOX_LAG_MS: Timer "outbox.lag_ms" "age of a batch's oldest outbox row when it is confirmed"
    MESSAGE_LOG_RELAYED: Counter "message_log.relayed" "messages of the log published and confirmed"
    MESSAGE_LOG_BATCH_SIZE: Histogram "message_log.batch_size" "messages of the log published at once"
    MESSAGE_LOG_LAG_MS: Timer "message_log.lag_ms" "age of a batch's oldest message of the log when it is confirmed"
    MESSAGE_LOG_UNAVAILABLE: Counter "message_log.unavailable" "times that a partition of the log took no messages"
    GROUP_RECORDED: Counter "group.<group>.recorded" "messages of the log that the consumer group recorded"
    GROUP_REPEATED: Counter "group.<group>.repeated" "messages that the group met again, or before their time, and passed over"
    GROUP_SKIPPED: Counter "group.<group>.skipped" "things that the group found in the log that are no messages"
    GROUP_MISSING: Counter "group.<group>.missing" "messages that the broker confirmed and lost"
    GROUP_BATCH_SIZE: Histogram "group.<group>.batch_size" "messages recorded in one transaction"
    GROUP_LAG_MS: Timer "group.<group>.lag_ms" "age of a transaction's oldest message when it is recorded"
    GROUP_STOPPED: Counter "group.<group>.stopped" "times that a partition waited for an operator to reset the group's offset"
    GROUP_TAKEN_OVER: Counter "group.<group>.taken_over" "partitions taken from members that had died or frozen"
    HTTP_REQUESTS: Counter "http.requests.<class>" "answers by class of their status: 2xx, 4xx, 5xx"
    HTTP_DURATION_MS: Timer "http.duration_ms" "time from a request to its answer"
    DATABASE_UNAVAILABLE: Counter "database.unavailable" "times that the database was found unavailable"
    BROKER_RECONNECTED: Counter "broker.reconnected" "connections to the broker made again"
    BROKER_BLOCKED: Counter "broker.blocked" "times that the broker blocked a connection, being short of memory or disk"
    BROKER_REFUSING: Counter "broker.refusing" "times that a queue was found to have taken no messages for long; again every 30 s"
    IMPORT_CREATED: Counter "import.created" "users created by follower imports"
    IMPORT_SKIPPED: Counter "import.skipped" "logins that follower imports found taken"
    STREAM_APPLIED: Counter "stream.<stream>.applied" "events of the stream that took effect"
    STREAM_LATE: Counter "stream.<stream>.late" "events that had taken effect elsewhere meanwhile"
    STREAM_BATCH_SIZE: Histogram "stream.<stream>.batch_size" "events that took effect in one transaction"
    STREAM_LAG_MS: Timer "stream.<stream>.lag_ms" "age of a transaction's oldest event when it has taken effect"
    STREAM_RETRIED: Counter "stream.<stream>.retried" "failed events that wait for another attempt"
    STREAM_PARKED: Counter "stream.<stream>.parked" "keys parked for an operator"
    STREAM_SWEPT: Counter "stream.<stream>.swept" "keys that went on because of the sweep, not of a message"
    STREAM_PUT_OFF: Counter "stream.<stream>.put_off" "times that an event was put off because another session holds its row"
    CLOCK_SET_BACK: Counter "clock.<of>.shortened" "leases, members and waits of a service or a stream that lasted for too long"
    STREAM_TAKEN_OVER: Counter "stream.<stream>.taken_over" "shards taken from processes that had died or frozen"
    ERASURE_ROWS: Counter "erasure.rows" "rows of deleted users and tweets that were removed or cleared"
    SWEEP_REMOVED: Counter "sweep.removed" "feed rows removed that no reader could see any more"
    ORDER_ERROR: Counter "order_error" "messages of the ordering lab whose time wasn't later than that of the one before"
    VALUE_ERROR: Counter "value_error" "balances of the ordering lab that weren't what their producer expected"
    CONSUMER_ERROR: Counter "consumer_error" "messages of the ordering lab whose user's row was made by another consumer"
    PROCESSED_VERSION: Counter "processed_version.<n>" "messages of version n that the ordering lab has processed"
}

impl Metric {
    /// Whether a name, without the prefix, is this metric's.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        let Some((before, after)) = self.around() else { return self.name == name };
        name.strip_prefix(before)
            .and_then(|rest| rest.strip_suffix(after))
            .is_some_and(|part| !part.is_empty() && part.chars().all(is_plain))
    }

    /// What is before and after the `<part>`.
    fn around(&self) -> Option<(&'static str, &'static str)> {
        let (before, rest) = self.name.split_once('<')?;
        Some((before, rest.split_once('>')?.1))
    }

    fn name_for(&self, part: &str) -> String {
        match self.around() {
            Some((before, after)) => format!("{before}{}{after}", part.replace(|c| !is_plain(c), "_")),
            None => self.name.to_owned(),
        }
    }

    /// Adds to a counter.
    pub(crate) fn add(&self, part: &str, count: u64) {
        if let Some(client) = statsd::client().filter(|_| count > 0) {
            // What can't be sent is lost: a metric isn't worth a worker's time.
            let _ = client.count(&self.name_for(part), count);
        }
    }

    /// Records a size.
    pub(crate) fn size(&self, part: &str, size: u64) {
        if let Some(client) = statsd::client() {
            let _ = client.time(&self.name_for(part), size);
        }
    }

    /// Records a duration.
    pub(crate) fn time(&self, part: &str, duration: Duration) {
        self.size(part, millis(duration));
    }
}

fn is_plain(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '_' | '-')
}

/// Whole milliseconds.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
