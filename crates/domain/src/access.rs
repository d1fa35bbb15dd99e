//! What each service may do at the broker, as patterns of names: RabbitMQ gives every user three. They follow from the topology: a
//! service declares what it consumes and what it publishes to, with the queues that are bound to that.

use crate::{
    log::MESSAGE,
    stream::ACCOUNT_EVENT,
    topology::{Retention, Topology, exchange, queue},
};
use std::collections::BTreeSet;

/// What a service does at the broker.
struct Access {
    service: &'static str,
    /// The exchanges from whose queues it consumes.
    consumes_from: &'static [&'static str],
    /// Of these queues, its own; all, where there's none.
    only: Option<&'static str>,
    publishes_to: &'static [&'static str],
    /// Whether its failed messages wait and come back, or are set aside.
    retries: bool,
}

const fn worker(service: &'static str, consumes_from: &'static [&'static str]) -> Access {
    Access { service, consumes_from, only: None, publishes_to: &[], retries: true }
}

/// Every service that has any business there.
const SERVICES: [Access; 9] = [
    Access {
        service: "outbox-relay",
        consumes_from: &[],
        only: None,
        publishes_to: &[
            exchange::ADD_FOLLOWERS,
            exchange::PUBLISH_TWEET,
            exchange::UPDATE_FEED,
            exchange::SEND_NOTIFICATION,
            exchange::ACCOUNT_EVENT,
            exchange::MESSAGE,
        ],
        // What an operator replays goes to its queue.
        retries: true,
    },
    worker("dead-letter-recorder", &[exchange::DEAD_LETTER]),
    worker("follower-importer", &[exchange::ADD_FOLLOWERS]),
    Access { publishes_to: &[exchange::UPDATE_FEED], ..worker("feed-fanout", &[exchange::PUBLISH_TWEET]) },
    Access { publishes_to: &[exchange::SEND_NOTIFICATION], ..worker("feed-updater", &[exchange::UPDATE_FEED]) },
    Access { only: Some(queue::SEND_NOTIFICATION_EMAIL), ..worker("email-notifier", &[exchange::SEND_NOTIFICATION]) },
    Access { only: Some(queue::SEND_NOTIFICATION_SMS), ..worker("sms-notifier", &[exchange::SEND_NOTIFICATION]) },
    worker("event-processor", &[exchange::ACCOUNT_EVENT]),
    Access { retries: false, ..worker("message-recorder", &[exchange::MESSAGE]) },
];

/// Regular expressions of names, as RabbitMQ wants them. Exchanges and queues aren't told apart there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// What it may declare, and delete.
    pub configure: String,
    /// Exchanges that it may publish to, and queues that it may bind.
    pub write: String,
    /// Queues that it may consume, and exchanges that it may bind queues to.
    pub read: String,
}

impl Permissions {
    /// For a service; `None` for one that has no business at the broker.
    pub fn of(service: &str) -> Option<Self> {
        let access = SERVICES.iter().find(|access| access.service == service)?;
        let retention = Retention { max_bytes: 1, max_age_s: 1, segment_bytes: 1 };
        let fleet = Topology::fleet(&[]).and(Topology::stream(ACCOUNT_EVENT, 1)).and(Topology::log(1, retention));
        let is_consumed = |exchange: &str, queue: &str| {
            access.consumes_from.contains(&exchange) && access.only.is_none_or(|only| only == queue)
        };
        let consumed = fleet.bindings.iter().filter(|binding| is_consumed(&binding.exchange, &binding.queue));
        let consumed: Vec<_> = consumed.map(|binding| binding.queue.clone()).collect();
        let part = fleet.part(&consumed, access.publishes_to);
        let exchanges = part.exchanges.iter().map(|exchange| &exchange.name);
        let needed = |name: &&String| access.retries || !fleet.is_for_failures(name);
        let names = exchanges.chain(part.queues.iter().map(|queue| &queue.name)).filter(needed);
        let mut patterns: BTreeSet<_> = names.map(|name| pattern(name)).collect();
        if access.retries {
            // Whatever the delays are.
            patterns.insert(r"wait\.[0-9]+(ms|s|m)".into());
        }
        let own = any_of(&patterns);
        // Failed messages come back to their queue by way of the default exchange.
        let write = if access.retries {
            patterns.insert(r"amq\.default".into());
            any_of(&patterns)
        } else {
            own.clone()
        };
        Some(Self { configure: own.clone(), write, read: own })
    }
}

fn any_of(patterns: &BTreeSet<String>) -> String {
    format!("^({})$", patterns.iter().map(String::as_str).collect::<Vec<_>>().join("|"))
}

/// A name's; of shards, partitions and the queues of `update_feed`, that of all.
fn pattern(name: &str) -> String {
    for (exchange, number) in [(ACCOUNT_EVENT, r"s[0-9]+"), (MESSAGE, r"p[0-9]+"), (exchange::UPDATE_FEED, r"[0-9]+")] {
        if name.strip_prefix(exchange).is_some_and(|rest| rest.starts_with('.')) {
            return format!(r"{exchange}\.{number}");
        }
    }
    name.replace('.', r"\.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_but_the_gateway_has_its_permissions() {
        let services = include_str!("../../../deploy/services").lines().filter(|line| !line.starts_with('#'));
        let without: Vec<_> = services.clone().filter(|service| Permissions::of(service).is_none()).collect();
        assert_eq!(without, ["api-gateway"]);
        assert_eq!(services.count(), SERVICES.len() + 1);
    }

    #[test]
    fn a_service_may_what_it_declares_and_publishes_to_and_nothing_else() {
        let permissions = Permissions::of("email-notifier").unwrap();
        let own = r"^(dead_letter|return|send_notification|send_notification\.email|wait\.[0-9]+(ms|s|m))$";
        assert_eq!((&*permissions.configure, &*permissions.read), (own, own));
        assert_eq!(permissions.write, own.replace("^(", r"^(amq\.default|"));
        let permissions = Permissions::of("message-recorder").unwrap();
        assert_eq!(
            (&*permissions.configure, &*permissions.write),
            (r"^(message|message\.p[0-9]+)$", r"^(message|message\.p[0-9]+)$")
        );
        let permissions = Permissions::of("feed-fanout").unwrap();
        assert_eq!(
            permissions.read,
            r"^(dead_letter|publish_tweet|return|update_feed|update_feed\.[0-9]+|wait\.[0-9]+(ms|s|m))$"
        );
    }
}
