//! Committed rows reach the broker, whatever happens on the way.

use broker::{Delivery, Session, Ticket};
use domain::{
    Envelope,
    stream::{ACCOUNT_EVENT, AccountId, Payload, key_hash, shard, shard_queue},
    topology::{Topology, exchange, queue},
};
use outbox_relay::{LogRelay, Relay, Round};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::TcpStream,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};
use storage::{
    Database, dead_letters, outbox,
    sleeper::{Sleeper, Table},
    streams::{self, Layout},
};
use test_support::{
    PrivateRabbitmq, TestDatabase, TestVhost, broker_settings, drain as drain_all, eventually, eventually_within,
    free_ports, log_retention, sql,
};
use worker::Received;

/// A bound against hanging.
const PATIENCE: Duration = Duration::from_secs(120);

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
    // The good ones don't wait until the others are given up: five at a time, all are taken in three rounds, and after as many
    // nothing is given up yet that may be routed later.
    for _ in 0..3 {
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
    relay_until(&mut relay, &database, 0);
    let arrived = drain(vhost.url(), queue::PUBLISH_TWEET);
    assert_eq!(ids(&arrived), BTreeSet::from(["unbound"]));
    assert_eq!(arrived[0].headers["x-replay"], "1");
}

/// A message to another exchange than [`message`]'s.
fn import(id: &str) -> Envelope {
    let mut envelope = Envelope::new(exchange::ADD_FOLLOWERS, queue::ADD_FOLLOWERS, b"{}".to_vec());
    envelope.message_id = id.to_owned();
    envelope
}

/// Relays until this many rows wait.
#[track_caller]
fn relay_until(relay: &mut Relay, database: &TestDatabase, rows: i64) {
    eventually_within(PATIENCE, "the others are relayed", || {
        relay.round().expect("the database answers");
        (waiting(database) == rows).then_some(())
    });
}

#[test]
fn a_queue_that_was_full_for_long_gets_its_rows_once_it_takes_some() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    let mut relay = relay(&database, vhost.url(), 100);
    commit(database.database(), &[message("first")]);
    relay_all(&mut relay);
    vhost.limit(queue::PUBLISH_TWEET, 1);
    let (link, mut rows) = (relay.link(), 0);
    eventually_within(PATIENCE, "it goes on for long, and is told", || {
        // The server takes a moment to know of the limit.
        if waiting(&database) < 5 {
            commit(database.database(), &[message(&format!("m{rows}"))]);
            rows += 1;
        }
        relay.round().expect("the database answers");
        link.trouble()
    });
    assert!(waiting(&database) >= 4);
    vhost.no_limit(queue::PUBLISH_TWEET);
    relay_until(&mut relay, &database, 0);
    assert_eq!(link.trouble(), None);
    let arrived = drain(vhost.url(), queue::PUBLISH_TWEET);
    assert_eq!(ids(&arrived).len(), rows + 1);
}

#[test]
fn however_many_rows_wait_for_a_full_queue_the_others_go_on() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    let mut relay = relay(&database, vhost.url(), 10);
    commit(database.database(), &[message("first"), import("i0")]);
    relay_all(&mut relay);
    vhost.limit(queue::PUBLISH_TWEET, 1);
    let rows: Vec<_> = (0..500).map(|n| message(&format!("m{n}"))).collect();
    commit(database.database(), &rows);
    commit(database.database(), &[import("i1")]);
    eventually_within(PATIENCE, "the import has arrived", || {
        relay.round().expect("the database answers");
        (database.count("SELECT count(*) AS n FROM outbox WHERE exchange = 'add_followers'") == 0).then_some(())
    });
    // And again and again, of which none waits for the full queue.
    for n in 2..20 {
        commit(database.database(), &[import(&format!("i{n}"))]);
        let before = waiting(&database);
        eventually_within(PATIENCE, "the next has arrived", || {
            relay.round().expect("the database answers");
            (database.count("SELECT count(*) AS n FROM outbox WHERE exchange = 'add_followers'") == 0).then_some(())
        });
        assert!(before >= 480, "{before} rows wait");
    }
    assert_eq!(drain(vhost.url(), queue::ADD_FOLLOWERS).len(), 20);
    vhost.no_limit(queue::PUBLISH_TWEET);
    relay_until(&mut relay, &database, 0);
    assert_eq!(ids(&drain(vhost.url(), queue::PUBLISH_TWEET)).len(), 501);
}

#[test]
fn however_many_rows_reach_no_queue_the_others_go_on_and_each_of_them_has_its_tries() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    let mut relay = relay(&database, vhost.url(), 10);
    let unbound = |n: i32| {
        let mut envelope = message(&format!("unbound {n}"));
        envelope.routing_key = "nobody".into();
        envelope
    };
    commit(database.database(), &(0..25).map(unbound).collect::<Vec<_>>());
    commit(database.database(), &[message("m0")]);
    let mut rounds = 0;
    eventually_within(PATIENCE, "the other has arrived", || {
        relay.round().expect("the database answers");
        rounds += 1;
        (database.count("SELECT count(*) AS n FROM outbox WHERE routing_key <> 'nobody'") == 0).then_some(())
    });
    assert!(rounds <= 3 && waiting(&database) == 25, "{rounds} rounds");
    relay_until(&mut relay, &database, 0);
    let mut conn = database.database().connection().expect("a connection");
    let letters = dead_letters::list(&mut conn, Some("waiting"), None, i64::MAX, 100).expect("the dead letters");
    assert!(letters.len() == 25 && letters.iter().all(|letter| letter.attempts == 5));
}

#[test]
fn a_row_that_is_committed_late_with_a_low_id_is_relayed() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    let mut relay = relay(&database, vhost.url(), 10);
    let (begun, has_begun) = mpsc::channel();
    let (go_on, goes_on) = mpsc::channel();
    thread::scope(|scope| {
        let database = &database;
        scope.spawn(move || {
            database.database().transaction(|conn| {
                outbox::push(conn, &[message("late")])?;
                begun.send(()).expect("the test waits");
                goes_on.recv().expect("the test goes on");
                Ok(())
            })
        });
        has_begun.recv().expect("a row is inserted");
        // For as long as it takes to be sure of what nobody can insert below any more.
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(3) {
            commit(database.database(), &[message("m")]);
            relay_all(&mut relay);
        }
        go_on.send(()).expect("the other thread waits");
        eventually_within(PATIENCE, "it's committed", || (waiting(database) == 1).then_some(()));
        assert_eq!(relay.round().expect("the database answers"), Round::Relayed);
    });
    assert!(ids(&drain(vhost.url(), queue::PUBLISH_TWEET)).contains("late"));
}

/// How many pages of a table and its indexes have been read or found in memory, by sessions that have told.
fn pages(database: &TestDatabase, table: &str) -> i64 {
    database.execute("SELECT pg_stat_force_next_flush()");
    database.count(&format!(
        "SELECT (heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit)::bigint AS n
         FROM pg_statio_user_tables WHERE relname = '{table}'"
    ))
}

#[test]
fn looking_costs_no_more_when_dead_rows_stay() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    // A session that sees the rows keeps them in the table, whoever deletes them.
    let mut old = database.database().connection().expect("a connection");
    sql::execute(&mut old, "BEGIN ISOLATION LEVEL REPEATABLE READ").expect("it begins");
    sql::execute(&mut old, "SELECT 1").expect("it has a snapshot");
    let rows: Vec<_> = (0..20_000).map(|n| message(&format!("m{n}"))).collect();
    commit(database.database(), &rows);
    database.execute("DELETE FROM outbox");
    database.execute(
        "INSERT INTO message_outbox (partition, id, text)
         SELECT i % 4, nextval('message_outbox_id'), 'text' FROM generate_series(1, 20000) i",
    );
    database.execute("DELETE FROM message_outbox");

    let mut relay = relay(&database, vhost.url(), 10);
    let settings = broker_settings(vhost.url());
    let mut log = LogRelay::new(database.database().clone(), &settings, Topology::fleet(&[]), log_retention(), 10);
    let mut look = |times| {
        for _ in 0..times {
            assert_eq!(relay.round().expect("the database answers"), Round::Idle);
            assert_eq!(log.round().expect("the database answers"), Round::Idle);
        }
    };
    eventually_within(PATIENCE, "it's known where open rows begin", || {
        look(1);
        let before = ["outbox", "message_outbox"].map(|table| pages(&database, table));
        look(20);
        let after = ["outbox", "message_outbox"].map(|table| pages(&database, table));
        // Some pages of the index each time; all of them are thousands.
        (0..2).all(|table| after[table] - before[table] < 20 * 40).then_some(())
    });
}

#[test]
fn a_relay_that_sleeps_is_called_by_whoever_inserts() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    let asleep = "SELECT count(*) AS n FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'
                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let mut sleepers = [Table::Outbox, Table::MessageOutbox].map(|table| {
        let database = Database::open(&database.settings(), "test").expect("a usable URL");
        Sleeper::new(database, table)
    });
    drop(vhost);
    // Somebody is about to commit.
    database
        .database()
        .transaction(|conn| {
            outbox::push(conn, &[message("m0")])?;
            assert!(!sleepers[0].fall_asleep()? && !sleepers[0].is_asleep());
            Ok(())
        })
        .expect("it's committed");
    let [outbox, log] = &mut sleepers;
    assert!(outbox.fall_asleep().unwrap() && log.fall_asleep().unwrap());
    assert_eq!(database.count(asleep), 2);
    let mut other = Sleeper::new(Database::open(&database.settings(), "test").expect("a usable URL"), Table::Outbox);
    assert!(other.fall_asleep().unwrap(), "one that sleeps keeps none from sleeping");
    assert!(!outbox.is_called() && !log.is_called() && !other.is_called());
    commit(database.database(), &[message("m1")]);
    eventually("both are called", || (outbox.is_called() && other.is_called()).then_some(()));
    assert!(!log.is_called());
    outbox.wake();
    assert_eq!(database.count(asleep), 1);
    other.wake();
    log.wake();
    assert_eq!(database.count(asleep), 0);
}

/// The service as a process, killed with the value.
struct Process(Child);

impl Process {
    fn start(database: &TestDatabase, url: &str, health: u16) -> Self {
        let child = Command::new("setpriv")
            // However the test ends.
            .args(["--pdeathsig", "KILL", "--", env!("CARGO_BIN_EXE_outbox-relay")])
            .env("MURMURATION__DATABASE__URL", database.url())
            .env("MURMURATION__BROKER__URL", url)
            .env("MURMURATION__BROKER__HEARTBEAT_S", "60")
            .env("MURMURATION__BROKER__CONFIRM_TIMEOUT_MS", "2000")
            .env("MURMURATION__BROKER__CONNECT_TIMEOUT_MS", "30000")
            .env("MURMURATION__HEALTH__PORT", health.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        Self(child.expect("the binary starts"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().expect("it can be killed");
        self.0.wait().expect("it ends");
    }
}

/// What a health check answers.
fn ready(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.write_all(b"GET /health/ready HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

#[test]
fn a_relay_whose_messages_the_broker_has_blocked_says_that_and_one_that_sleeps_goes_on_when_it_is_called() {
    let mut rabbitmq = PrivateRabbitmq::new();
    rabbitmq.start();
    let database = TestDatabase::new();
    let [port] = free_ports();
    let _process = Process::start(&database, &rabbitmq.url(), port);
    let is_ready = || ready(port).is_some_and(|answer| answer.starts_with("HTTP/1.0 200")).then_some(());
    eventually_within(PATIENCE, "it is ready", is_ready);
    let asleep = "SELECT count(*) AS n FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'
                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    for n in 0..3 {
        eventually_within(PATIENCE, "both loops sleep", || (database.count(asleep) == 2).then_some(()));
        commit(database.database(), &[message(&format!("m{n}"))]);
        eventually_within(PATIENCE, "it is relayed", || (waiting(&database) == 0).then_some(()));
    }

    rabbitmq.eval("vm_memory_monitor:set_vm_memory_high_watermark(0.0001)");
    commit(database.database(), &[message("blocked")]);
    eventually_within(PATIENCE, "it says so", || {
        // The alarm may come a moment later than the first row.
        if waiting(&database) == 0 {
            commit(database.database(), &[message("blocked")]);
        }
        ready(port)?.contains("short of memory or disk").then_some(())
    });
    // However often it's tried again.
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        let answer = ready(port).expect("an answer");
        assert!(answer.contains("short of memory or disk") && !answer.contains("not connected"), "{answer}");
    }
    rabbitmq.eval("vm_memory_monitor:set_vm_memory_high_watermark(0.4)");
    eventually_within(PATIENCE, "all is relayed", || (waiting(&database) == 0).then_some(()));
    eventually_within(PATIENCE, "it is ready", is_ready);
}

#[test]
fn what_is_not_as_it_must_be_at_the_broker_keeps_its_own_rows_and_no_others() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    vhost.declare_classic(queue::SEND_NOTIFICATION_SMS);
    vhost.declare_exchange(exchange::ADD_FOLLOWERS, "topic");
    let to = |exchange: &str, key: &str, id: &str| Envelope {
        message_id: id.to_owned(),
        ..Envelope::new(exchange, key, b"{}".to_vec())
    };
    let held = [
        to(exchange::SEND_NOTIFICATION, "phone", "sms"),
        to("", queue::SEND_NOTIFICATION_SMS, "replayed sms"),
        to(exchange::ADD_FOLLOWERS, exchange::ADD_FOLLOWERS, "import"),
    ];
    let mut relay = relay(&database, vhost.url(), 100);
    commit(database.database(), &[message("first")]);
    relay_all(&mut relay);
    commit(database.database(), &held);
    commit(database.database(), &[message("second"), to(exchange::SEND_NOTIFICATION, "email", "email")]);
    relay_all(&mut relay);
    assert_eq!(ids(&drain(vhost.url(), queue::PUBLISH_TWEET)), BTreeSet::from(["first", "second"]));
    assert_eq!(ids(&drain(vhost.url(), queue::SEND_NOTIFICATION_EMAIL)), BTreeSet::from(["email"]));
    assert_eq!(waiting(&database), 3);

    let mut session = Session::open(&broker_settings(vhost.url()), "test").expect("a session");
    broker::delete_queues(&mut session, &[queue::SEND_NOTIFICATION_SMS.into()]).expect("it's deleted");
    broker::delete_exchanges(&mut session, &[exchange::ADD_FOLLOWERS.into()]).expect("it's deleted");
    eventually("they go once all is as it must be", || {
        relay.round().expect("the database answers");
        (waiting(&database) == 0).then_some(())
    });
    assert_eq!(ids(&drain(vhost.url(), queue::SEND_NOTIFICATION_SMS)), BTreeSet::from(["sms", "replayed sms"]));
    assert_eq!(ids(&drain(vhost.url(), queue::ADD_FOLLOWERS)), BTreeSet::from(["import"]));
    assert_eq!(database.count("SELECT count(*) AS n FROM dead_letter"), 0);
}

#[test]
fn a_queue_that_is_deleted_while_the_relay_runs_is_declared_again_and_nothing_is_set_aside() {
    let (vhost, database) = (TestVhost::new(), TestDatabase::new());
    let mut relay = relay(&database, vhost.url(), 100);
    commit(database.database(), &[message("first")]);
    relay_all(&mut relay);
    let mut session = Session::open(&broker_settings(vhost.url()), "test").expect("a session");
    broker::delete_queues(&mut session, &[queue::PUBLISH_TWEET.into()]).expect("it's deleted");
    commit(database.database(), &[message("second")]);
    eventually("it goes", || {
        relay.round().expect("the database answers");
        (waiting(&database) == 0).then_some(())
    });
    assert_eq!(ids(&drain(vhost.url(), queue::PUBLISH_TWEET)), BTreeSet::from(["second"]));
    assert_eq!(database.count("SELECT count(*) AS n FROM dead_letter"), 0);
}
