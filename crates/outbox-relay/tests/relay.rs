//! Committed rows reach the broker, whatever happens on the way.

use broker::{Delivery, Session, Ticket};
use domain::{
    Envelope,
    stream::{ACCOUNT_EVENT, AccountId, Payload, key_hash, shard, shard_queue},
    topology::{Topology, exchange, queue},
};
use outbox_relay::{Relay, Round};
use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
    time::Duration,
};
use storage::{
    Database, dead_letters, outbox,
    streams::{self, Layout},
};
use test_support::{
    TestDatabase, TestVhost, broker_settings, drain as drain_all, eventually, eventually_within, log_retention,
};
use worker::Received;

fn relay(database: &TestDatabase, url: &str, batch: i64) -> Relay {
    Relay::new(database.database().clone(), &broker_settings(url), Topology::fleet(&[]), log_retention(), batch)
}

fn message(id: &str) -> Envelope {
    let mut envelope = Envelope::new(exchange::PUBLISH_TWEET, queue::PUBLISH_TWEET, b"{}".to_vec());
    envelope.message_id = id.to_owned();
    envelope
}

fn commit(database: &Database, envelopes: &[Envelope]) {
    database.transaction(|conn| outbox::push(conn, envelopes)).expect("the rows are committed");
}

fn waiting(database: &TestDatabase) -> i64 {
    database.count("SELECT count(*) AS n FROM outbox")
}

/// Relays until there's nothing left to be done.
fn relay_all(relay: &mut Relay) {
    while relay.round().expect("the database answers") != Round::Idle {}
}

/// Takes everything out of a queue.
fn drain(url: &str, queue: &str) -> Vec<Received> {
    drain_all(&broker_settings(url), &[queue.to_owned()], open)
}

/// Parts a delivery from what acknowledges it.
fn open(delivery: Delivery) -> (Ticket, Received) {
    let mut received = Received::new(&delivery.queue, delivery.body);
    received.exchange = delivery.exchange;
    received.routing_key = delivery.routing_key;
    received.kind = delivery.kind;
    received.message_id = delivery.message_id;
    received.correlation_id = delivery.correlation_id;
    received.headers = delivery.headers;
    (delivery.ticket, received)
}

fn ids(received: &[Received]) -> BTreeSet<&str> {
    received.iter().filter_map(|received| received.message_id.as_deref()).collect()
}

#[test]
fn a_committed_message_arrives_as_it_was_written() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    let mut envelope = message("m1");
    envelope.kind = Some("publish_tweet".into());
    envelope.correlation_id = Some("c1".into());
    envelope.headers = BTreeMap::from([("x-replay".into(), "2".into())]);
    envelope.body = br#"{"id":1}"#.to_vec();
    commit(database.database(), &[envelope]);
    let uncommitted = database.database().transaction(|conn| {
        outbox::push(conn, &[message("never")])?;
        Err::<(), _>(storage::Error::Conflict("rolled back"))
    });
    assert!(uncommitted.is_err());

    let mut relay = relay(&database, vhost.url(), 100);
    assert_eq!(relay.round().unwrap(), Round::Relayed);
    assert_eq!(relay.round().unwrap(), Round::Idle);
    assert_eq!(waiting(&database), 0);
    let arrived = drain(vhost.url(), queue::PUBLISH_TWEET);
    let [delivery] = &arrived[..] else { panic!("one message, not {arrived:?}") };
    assert_eq!((delivery.kind.as_deref(), delivery.message_id.as_deref()), (Some("publish_tweet"), Some("m1")));
    assert_eq!((delivery.correlation_id.as_deref(), &*delivery.headers["x-replay"]), (Some("c1"), "2"));
    assert_eq!(delivery.body, br#"{"id":1}"#);
}

#[test]
fn relays_side_by_side_publish_every_row_once() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    let all: Vec<_> = (0..2000).map(|n| message(&format!("m{n}"))).collect();
    commit(database.database(), &all);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut relay = relay(&database, vhost.url(), 50);
                while waiting(&database) > 0 {
                    relay.round().expect("the database answers");
                }
            });
        }
    });
    let arrived = drain(vhost.url(), queue::PUBLISH_TWEET);
    assert_eq!((arrived.len(), ids(&arrived).len()), (2000, 2000));
}

#[test]
fn while_the_broker_is_away_the_rows_stay_for_whoever_reaches_it() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    commit(database.database(), &[message("m1"), message("m2")]);
    // Nobody listens there.
    let mut settings = broker_settings("amqp://guest:guest@127.0.0.1:1");
    settings.confirm_timeout_ms = 500;
    let mut cut_off = Relay::new(database.database().clone(), &settings, Topology::fleet(&[]), log_retention(), 100);
    assert_eq!(cut_off.round().unwrap(), Round::BrokerAway);
    assert_eq!(waiting(&database), 2);
    relay_all(&mut relay(&database, vhost.url(), 100));
    assert_eq!(ids(&drain(vhost.url(), queue::PUBLISH_TWEET)), BTreeSet::from(["m1", "m2"]));
    assert_eq!(cut_off.round().unwrap(), Round::Idle);
}

#[test]
fn a_streams_queues_are_declared_as_the_database_says_whenever_the_relay_connects() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    let key = AccountId::parse("a").expect("an id");
    let append = || {
        let events = [(key.clone(), Payload::parse("1").expect("JSON"))];
        database.database().transaction(|conn| streams::append(conn, ACCOUNT_EVENT, &events, None)).expect("accepted");
    };
    let divide = |shards, queues| {
        let layout = Layout { shards, queues };
        database.database().transaction(|conn| streams::divide(conn, ACCOUNT_EVENT, layout)).expect("it's divided");
    };
    let queue_of = |shards| shard_queue(ACCOUNT_EVENT, shard(key_hash(key.as_str()), shards));
    let declared = || {
        let names: Vec<_> = (0..100).map(|shard| shard_queue(ACCOUNT_EVENT, shard)).collect();
        let mut session = Session::open(&broker_settings(vhost.url()), "test").expect("a session");
        broker::existing(&mut session, &names).expect("the broker answers").len()
    };
    let mut relay = relay(&database, vhost.url(), 100);
    append();
    relay_all(&mut relay);
    assert_eq!(declared(), 16);
    assert_eq!(drain(vhost.url(), &queue_of(16)).len(), 1);

    divide(97, 97);
    eventually("its connection is closed by the server", || (vhost.close_connections() > 0).then_some(()));
    append();
    relay_all(&mut relay);
    assert_eq!(declared(), 97);
    let arrived = drain(vhost.url(), &queue_of(97));
    assert_eq!(ids(&arrived), BTreeSet::from(["account_event/a/2"]));

    // Queues that were taken away don't come back.
    let names: Vec<_> = (10..97).map(|shard| shard_queue(ACCOUNT_EVENT, shard)).collect();
    let mut session = Session::open(&broker_settings(vhost.url()), "test").expect("a session");
    divide(10, 10);
    broker::delete_queues(&mut session, &names).expect("they are deleted");
    eventually("its connection is closed by the server", || (vhost.close_connections() > 0).then_some(()));
    append();
    relay_all(&mut relay);
    assert_eq!(declared(), 10);
    assert_eq!(drain(vhost.url(), &queue_of(10)).len(), 1);
}

#[test]
fn closed_connections_lose_nothing() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    let all: Vec<_> = (0..400).map(|n| message(&format!("m{n}"))).collect();
    commit(database.database(), &all);
    let mut relay = relay(&database, vhost.url(), 100);
    for _ in 0..3 {
        assert_eq!(relay.round().unwrap(), Round::Relayed);
        eventually("its connection is closed by the server", || (vhost.close_connections() > 0).then_some(()));
    }
    relay_all(&mut relay);
    assert_eq!(waiting(&database), 0);
    assert_eq!(ids(&drain(vhost.url(), queue::PUBLISH_TWEET)).len(), 400);
}

#[test]
fn what_can_never_be_published_is_set_aside_with_its_reason_and_the_rest_goes_on() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    let mut too_long = message("too long");
    too_long.routing_key = "x".repeat(300);
    too_long.correlation_id = Some("c1".into());
    let mut no_exchange = message("no exchange");
    no_exchange.exchange = "nowhere".into();
    let mut unbound = message("unbound");
    unbound.routing_key = "nobody".into();
    let good: Vec<_> = (0..10).map(|n| message(&format!("m{n}"))).collect();
    commit(database.database(), &[&[too_long, no_exchange, unbound], &good[..]].concat());

    let mut relay = relay(&database, vhost.url(), 5);
    // The good ones don't wait until the others are given up: five at a time, all are taken in four rounds, and after as many
    // nothing is given up yet that may be routed later.
    for _ in 0..4 {
        assert_eq!(relay.round().expect("the database answers"), Round::Relayed);
    }
    assert_eq!(waiting(&database), 2);
    assert_eq!(ids(&drain(vhost.url(), queue::PUBLISH_TWEET)).len(), 10);
    eventually_within(Duration::from_secs(120), "the others are given up", || {
        relay.round().expect("the database answers");
        (waiting(&database) == 0).then_some(())
    });

    let mut conn = database.database().connection().expect("a connection");
    let mut letters = dead_letters::list(&mut conn, Some("waiting"), None, i64::MAX, 10).expect("the dead letters");
    letters.sort_by(|one, other| one.message_id.cmp(&other.message_id));
    let told: Vec<_> = letters
        .iter()
        .map(|letter| (letter.message_id.as_deref().unwrap_or_default(), &*letter.exchange, letter.attempts))
        .collect();
    let exchange = exchange::PUBLISH_TWEET;
    assert_eq!(told, [("no exchange", "nowhere", 5), ("too long", exchange, 1), ("unbound", exchange, 5)]);
    for (letter, reason) in
        letters.iter().zip(["it can't be routed: 404", "its routing key has 300 bytes", "it can't be routed: 312"])
    {
        assert!(letter.error.starts_with(reason), "{}", letter.error);
    }
    assert_eq!((&*letters[1].queue, letters[1].correlation_id.as_deref()), ("", Some("c1")));

    // Once its queue is there, a replay goes the same way.
    let mut session = Session::open(&broker_settings(vhost.url()), "test").expect("a session");
    let mut topology = Topology::fleet(&[]);
    topology.bindings.retain(|binding| binding.exchange == exchange);
    topology.bindings[0].routing_key = "nobody".into();
    topology.exchanges.retain(|declared| declared.name == exchange);
    topology.queues.retain(|declared| declared.name == queue::PUBLISH_TWEET);
    broker::declare(&mut session, &topology).expect("it's bound");
    database.database().transaction(|conn| dead_letters::replay(conn, letters[2].id, "test")).expect("it's replayed");
    relay_all(&mut relay);
    let arrived = drain(vhost.url(), queue::PUBLISH_TWEET);
    assert_eq!(ids(&arrived), BTreeSet::from(["unbound"]));
    assert_eq!(arrived[0].headers["x-replay"], "1");
}
