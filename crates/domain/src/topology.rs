//! The broker's exchanges, queues and bindings, as data. Whoever starts first declares them; declaring again changes
//! nothing.

use crate::{
    log::{partition_queue, partition_routing_key},
    stream::{shard_queue, shard_routing_key},
};
use serde::Deserialize;
use std::{fmt::Write as _, time::Duration};

/// Names of exchanges.
pub mod exchange {
    /// Follower imports.
    pub const ADD_FOLLOWERS: &str = "add_followers";
    /// Tweets to be fanned out.
    pub const PUBLISH_TWEET: &str = "publish_tweet";
    /// Feeds to be written.
    pub const UPDATE_FEED: &str = "update_feed";
    /// Notifications, by channel.
    pub const SEND_NOTIFICATION: &str = "send_notification";
    /// Account events, by shard.
    pub const ACCOUNT_EVENT: &str = crate::stream::ACCOUNT_EVENT;
    /// The message log, by partition.
    pub const MESSAGE: &str = crate::log::MESSAGE;
    /// Messages that were set aside.
    pub const DEAD_LETTER: &str = "dead_letter";
    /// Messages that have waited for their next attempt.
    pub const RETURN: &str = "return";
}

/// Names of queues.
pub mod queue {
    /// Follower imports.
    pub const ADD_FOLLOWERS: &str = "add_followers";
    /// Tweets to be fanned out.
    pub const PUBLISH_TWEET: &str = "publish_tweet";
    /// How many queues share the work of [`super::exchange::UPDATE_FEED`].
    pub const UPDATE_FEED_COUNT: usize = 10;
    /// Notifications by e-mail.
    pub const SEND_NOTIFICATION_EMAIL: &str = "send_notification.email";
    /// Notifications by SMS.
    pub const SEND_NOTIFICATION_SMS: &str = "send_notification.sms";
    /// Messages that were set aside.
    pub const DEAD_LETTER: &str = "dead_letter";
    /// Messages that have waited for their next attempt, to be brought back to the queue that their routing key names.
    pub const RETURN: &str = "return";

    /// The queues of [`super::exchange::UPDATE_FEED`] in sorted order. Zero-padded names, bound in this order, keep the
    /// consistent-hash exchange's mapping as steady over restarts as it gets.
    pub fn update_feed() -> Vec<String> {
        (0..UPDATE_FEED_COUNT).map(|n| format!("update_feed.{n:02}")).collect()
    }
}

/// Deliveries of one message after which the broker itself gives up. Far above the worker's own attempts, which decide:
/// a crash loop counts against innocent neighbours too. Always explicit: 4.x silently takes 20, and -1 loses messages
/// on 3.10.
pub const DELIVERY_LIMIT: i32 = 1000;

/// How an exchange routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExchangeKind {
    /// By the exact routing key.
    Direct,
    /// To every bound queue.
    Fanout,
    /// By pattern.
    Topic,
    /// By the hash of the routing key; needs the plugin `rabbitmq_consistent_hash_exchange`.
    ConsistentHash,
}

impl ExchangeKind {
    /// The name that AMQP knows it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Fanout => "fanout",
            Self::Topic => "topic",
            Self::ConsistentHash => "x-consistent-hash",
        }
    }
}

/// A durable exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Its name.
    pub name: String,
    /// How it routes.
    pub kind: ExchangeKind,
}

/// How much of the message log is kept, per partition. The broker removes whole segments, from the oldest, and never the
/// one that it's writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retention {
    /// Bytes at most.
    pub max_bytes: u64,
    /// Seconds at most.
    pub max_age_s: u64,
    /// Bytes of a segment.
    pub segment_bytes: u64,
}

/// What a queue does with messages that it gives up or whose time is over, and thereby of which kind it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// Keep them until they're acknowledged; after [`DELIVERY_LIMIT`] deliveries to the exchange `dead_letter`, under
    /// the queue's own name.
    DeadLetter,
    /// After this delay, to the exchange `return`, under the routing key that they came with.
    ReturnAfter(Duration),
    /// Keep them whatever happens.
    Never,
    /// Lose them after so many deliveries beyond the first. The fleet has no such queue: the lab shows why.
    LoseAfter(i32),
    /// Keep them to be read by many, again and again: a stream.
    Retain(Retention),
}

/// A durable queue: a quorum queue, or a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// Where its messages end.
    pub expiry: Expiry,
}

/// A queue bound to an exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The exchange.
    pub exchange: String,
    /// The queue.
    pub queue: String,
    /// The routing key; for a consistent-hash exchange the weight.
    pub routing_key: String,
}

/// Everything to be declared, in the order in which it's declared: exchanges, queues, bindings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// The exchanges.
    pub exchanges: Vec<Exchange>,
    /// The queues.
    pub queues: Vec<Queue>,
    /// The bindings.
    pub bindings: Vec<Binding>,
}

impl Topology {
    /// The fleet's own, with one exchange and queue for each delay that failed messages wait.
    pub fn fleet(retry_delays: &[Duration]) -> Self {
        let mut topology = Self::default();
        topology.exchange(exchange::DEAD_LETTER, ExchangeKind::Fanout);
        topology.queue(queue::DEAD_LETTER, Expiry::Never);
        topology.bind(exchange::DEAD_LETTER, queue::DEAD_LETTER, "");
        topology.exchange(exchange::RETURN, ExchangeKind::Fanout);
        topology.queue(queue::RETURN, Expiry::Never);
        topology.bind(exchange::RETURN, queue::RETURN, "");
        for delay in retry_delays {
            let name = retry_name(*delay);
            topology.exchange(&name, ExchangeKind::Fanout);
            topology.queue(&name, Expiry::ReturnAfter(*delay));
            topology.bind(&name, &name, "");
        }
        for (name, queue) in
            [(exchange::ADD_FOLLOWERS, queue::ADD_FOLLOWERS), (exchange::PUBLISH_TWEET, queue::PUBLISH_TWEET)]
        {
            topology.exchange(name, ExchangeKind::Direct);
            topology.queue(queue, Expiry::DeadLetter);
            topology.bind(name, queue, name);
            // Other programs publish without a key.
            topology.bind(name, queue, "");
        }
        topology.exchange(exchange::UPDATE_FEED, ExchangeKind::ConsistentHash);
        for name in queue::update_feed() {
            topology.queue(&name, Expiry::DeadLetter);
            topology.bind(exchange::UPDATE_FEED, &name, "1");
        }
        topology.exchange(exchange::SEND_NOTIFICATION, ExchangeKind::Topic);
        for (queue, key) in [(queue::SEND_NOTIFICATION_EMAIL, "email"), (queue::SEND_NOTIFICATION_SMS, "phone")] {
            topology.queue(queue, Expiry::DeadLetter);
            topology.bind(exchange::SEND_NOTIFICATION, queue, key);
        }
        topology
    }

    /// The exchange of a sequenced stream, and the queues of its first shards. How many there are is in the database.
    pub fn stream(stream: &str, queues: i32) -> Self {
        let mut topology = Self::default();
        topology.exchange(stream, ExchangeKind::Direct);
        for shard in 0..queues {
            let queue = shard_queue(stream, shard);
            topology.queue(&queue, Expiry::DeadLetter);
            topology.bind(stream, &queue, &shard_routing_key(shard));
        }
        topology
    }

    /// The exchange of the message log, and the streams of its first partitions. How many there are is in the database.
    pub fn log(partitions: i32, retention: Retention) -> Self {
        let mut topology = Self::default();
        topology.exchange(exchange::MESSAGE, ExchangeKind::Direct);
        for partition in 0..partitions {
            let stream = partition_queue(partition);
            topology.queue(&stream, Expiry::Retain(retention));
            topology.bind(exchange::MESSAGE, &stream, &partition_routing_key(partition));
        }
        topology
    }

    /// Both of them.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.exchanges.extend(other.exchanges);
        self.queues.extend(other.queues);
        self.bindings.extend(other.bindings);
        self
    }

    /// What there has to be to consume these queues and to publish to these exchanges: beside them, every queue that is bound to
    /// one of the exchanges, and where failed messages go. With the exchanges, too, that messages come to these queues by.
    #[must_use]
    pub fn part(&self, consumed: &[String], published_to: &[&str]) -> Self {
        let sends_to = |exchange: &str| published_to.contains(&exchange) || self.is_for_failures(exchange);
        let is_meant = |b: &&Binding| consumed.contains(&b.queue) || sends_to(&b.exchange);
        let bindings: Vec<_> = self.bindings.iter().filter(is_meant).cloned().collect();
        let has_part = |exchange: &&Exchange| {
            sends_to(&exchange.name) || bindings.iter().any(|binding| binding.exchange == exchange.name)
        };
        let is_meant = |queue: &&Queue| {
            consumed.contains(&queue.name) || bindings.iter().any(|binding| binding.queue == queue.name)
        };
        Self {
            exchanges: self.exchanges.iter().filter(has_part).cloned().collect(),
            queues: self.queues.iter().filter(is_meant).cloned().collect(),
            bindings,
        }
    }

    /// Whether failed messages go there: to wait, to come back, or to be set aside.
    pub fn is_for_failures(&self, exchange: &str) -> bool {
        let waits = |queue: &Queue| matches!(queue.expiry, Expiry::ReturnAfter(_)) && queue.name == exchange;
        [exchange::DEAD_LETTER, exchange::RETURN].contains(&exchange) || self.queues.iter().any(waits)
    }

    /// The queues that a message may go to which is published to this exchange with this routing key.
    pub fn routes<'a>(&'a self, exchange: &'a str, routing_key: &'a str) -> impl Iterator<Item = &'a str> {
        let kind = self.exchanges.iter().find(|known| known.name == exchange).map(|known| known.kind);
        // The fleet binds by no pattern.
        let any_key = matches!(kind, Some(ExchangeKind::Fanout | ExchangeKind::ConsistentHash));
        let bound = self
            .bindings
            .iter()
            .filter(move |binding| binding.exchange == exchange && (any_key || binding.routing_key == routing_key));
        let named = exchange.is_empty().then_some(routing_key);
        bound.map(|binding| &*binding.queue).chain(named)
    }

    fn exchange(&mut self, name: &str, kind: ExchangeKind) {
        self.exchanges.push(Exchange { name: name.into(), kind });
    }

    fn queue(&mut self, name: &str, expiry: Expiry) {
        self.queues.push(Queue { name: name.into(), expiry });
    }

    fn bind(&mut self, exchange: &str, queue: &str, routing_key: &str) {
        self.bindings.push(Binding { exchange: exchange.into(), queue: queue.into(), routing_key: routing_key.into() });
    }

    /// The whole as a Markdown table, a line for each binding.
    pub fn to_markdown(&self) -> String {
        let mut text =
            String::from("| exchange | type | routing key | queue | its messages end |\n|---|---|---|---|---|\n");
        for binding in &self.bindings {
            let exchange = self.exchanges.iter().find(|exchange| exchange.name == binding.exchange);
            let queue = self.queues.iter().find(|queue| queue.name == binding.queue);
            let (Some(exchange), Some(queue)) = (exchange, queue) else {
                unreachable!("`bind` follows the declaration of both ends")
            };
            let end = match &queue.expiry {
                Expiry::DeadLetter => format!("acknowledged, or in `{}`", exchange::DEAD_LETTER),
                Expiry::ReturnAfter(delay) => {
                    format!("after {} ms, in `{}`", delay.as_millis(), queue::RETURN)
                }
                Expiry::Never if queue.name == queue::RETURN => {
                    "brought back to the queue that their routing key names".into()
                }
                Expiry::Never => "acknowledged".into(),
                Expiry::Retain(Retention { max_bytes, max_age_s, .. }) => {
                    format!("a stream: after {max_age_s} s, or beyond {max_bytes} bytes")
                }
                Expiry::LoseAfter(deliveries) => format!("acknowledged, or lost after {deliveries} further deliveries"),
            };
            let key = match exchange.kind {
                ExchangeKind::Fanout => "any".into(),
                ExchangeKind::ConsistentHash => format!("hashed, weight {}", binding.routing_key),
                ExchangeKind::Direct | ExchangeKind::Topic => format!("`{}`", binding.routing_key),
            };
            writeln!(text, "| `{}` | {} | {key} | `{}` | {end} |", exchange.name, exchange.kind.as_str(), queue.name)
                .expect("writing to a string can't fail");
        }
        text
    }
}

/// The name of the exchange (and its queue) for failed messages that wait so long: `wait.1s`, `wait.10m`, `wait.250ms`.
pub fn retry_name(delay: Duration) -> String {
    format!("wait.{}", short(delay))
}

/// What an earlier version had in place of [`retry_name`]: its messages went back to their queues by themselves, which those whose
/// queue was gone or full kept all others from.
pub fn earlier_retry_name(delay: Duration) -> String {
    format!("retry.{}", short(delay))
}

fn short(delay: Duration) -> String {
    let ms = delay.as_millis();
    match ms {
        _ if ms > 0 && ms.is_multiple_of(60_000) => format!("{}m", ms / 60_000),
        _ if ms > 0 && ms.is_multiple_of(1000) => format!("{}s", ms / 1000),
        _ => format!("{ms}ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_exchanges_are_named_by_their_delay() {
        let names = [1, 1000, 10_000, 60_000, 600_000, 90_000].map(|ms| retry_name(Duration::from_millis(ms)));
        assert_eq!(names, ["wait.1ms", "wait.1s", "wait.10s", "wait.1m", "wait.10m", "wait.90s"]);
    }

    #[test]
    fn a_part_is_what_a_service_needs_and_no_more() {
        fn names<T>(all: &[T], name: fn(&T) -> &String) -> Vec<&str> {
            all.iter().map(|one| name(one).as_str()).collect()
        }
        let whole = Topology::fleet(&[Duration::from_secs(1)]);
        let part = whole.part(&["publish_tweet".into()], &["send_notification"]);
        let exchanges = names(&part.exchanges, |exchange| &exchange.name);
        assert_eq!(exchanges, ["dead_letter", "return", "wait.1s", "publish_tweet", "send_notification"]);
        let queues = names(&part.queues, |queue| &queue.name);
        let notified = ["send_notification.email", "send_notification.sms"];
        assert_eq!(queues, [&["dead_letter", "return", "wait.1s", "publish_tweet"][..], &notified].concat());
    }

    #[test]
    fn a_message_goes_where_it_is_routed() {
        let fleet = Topology::fleet(&[]);
        let routes = |exchange, key| fleet.routes(exchange, key).collect::<Vec<_>>();
        assert_eq!(routes("send_notification", "phone"), ["send_notification.sms"]);
        assert_eq!(routes("publish_tweet", ""), ["publish_tweet"]);
        assert_eq!(routes("publish_tweet", "other"), [""; 0]);
        assert_eq!(routes("update_feed", "17").len(), 10);
        assert_eq!(routes("", "update_feed.03"), ["update_feed.03"]);
        assert_eq!(routes("nowhere", ""), [""; 0]);
    }

    #[test]
    fn hashed_queues_are_bound_in_sorted_order() {
        let names = queue::update_feed();
        assert!(names.is_sorted());
        let bound: Vec<_> = Topology::fleet(&[])
            .bindings
            .into_iter()
            .filter(|binding| binding.exchange == exchange::UPDATE_FEED)
            .map(|binding| binding.queue)
            .collect();
        assert_eq!(bound, names);
    }
}
