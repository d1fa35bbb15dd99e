//! Against a RabbitMQ node of their own, one after another: what goes wrong with a broker, and that nothing is lost by it.

mod node;

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use amiquip::{AmqpValue, Connection, FieldTable, QueueDeclareOptions};
use broker::{
    Acked, Consumer, Delivery, Error, PublishError, Publisher, Reason, Session, Settings, StreamOffset, header,
};
use domain::{
    Envelope,
    envelope::identifies,
    log::{MESSAGE, partition_queue, partition_routing_key},
    topology::{Binding, Exchange, ExchangeKind, Expiry, Queue, Topology},
};

use test_support::{eventually_within as eventually, log_retention};

use node::node;

/// A bound against hanging.
const SOON: Duration = Duration::from_secs(60);
/// The same for what is to end at once, or within a few seconds, and hangs for twice as long at least where it goes wrong.
const NO_HANG: Duration = Duration::from_secs(10);
const LINGER: Duration = Duration::from_millis(50);
const IDLE: Duration = Duration::from_millis(300);

fn within(limit: Duration) -> Instant {
    Instant::now() + limit
}

/// Runs something that mustn't hang.
#[track_caller]
fn bounded<T>(what: &str, limit: Duration, work: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let result = work();
    assert!(started.elapsed() < limit, "{what} took {:?}", started.elapsed());
    result
}

/// A topology of queues that keep their messages.
fn queues(names: &[&str]) -> Topology {
    let queues = names.iter().map(|&name| Queue { name: name.into(), expiry: Expiry::Never }).collect();
    Topology { queues, ..Topology::default() }
}

fn declare(settings: &Settings, topology: &Topology) {
    let mut session = Session::open(settings, "declaring").unwrap();
    broker::declare(&mut session, topology).unwrap();
    session.close(within(SOON));
}

fn depth(settings: &Settings, queue: &str) -> u32 {
    let mut session = Session::open(settings, "looking").unwrap();
    broker::depths(&mut session, &[queue.into()]).unwrap()[0].messages
}

/// Messages to a queue by way of the default exchange, each with its number as body.
fn numbered(queue: &str, numbers: std::ops::Range<usize>) -> Vec<Envelope> {
    numbers.map(|number| Envelope::new("", queue, number.to_string().into_bytes())).collect()
}

fn number(delivery: &Delivery) -> usize {
    String::from_utf8(delivery.body.clone()).unwrap().parse().unwrap()
}

/// Consumes until there are so many deliveries.
#[track_caller]
fn take(consumer: &mut Consumer, count: usize) -> Vec<Delivery> {
    let mut deliveries = Vec::new();
    eventually(SOON, "enough messages come", || {
        deliveries.extend(consumer.next_batch(count - deliveries.len(), LINGER, IDLE).unwrap());
        (deliveries.len() == count).then_some(())
    });
    deliveries
}

/// Consumes and acknowledges until every number has come, and returns how many came twice.
#[track_caller]
fn consume_all(consumer: &mut Consumer, numbers: usize) -> usize {
    let mut missing: HashSet<_> = (0..numbers).collect();
    let mut duplicates = 0;
    eventually(SOON, "every confirmed message arrives", || {
        let batch = consumer.next_batch(500, LINGER, IDLE).unwrap();
        for delivery in &batch.deliveries {
            duplicates += usize::from(!missing.remove(&number(delivery)));
        }
        consumer.ack(batch);
        missing.is_empty().then_some(())
    });
    duplicates
}

/// Something done with the AMQP client itself, which this crate doesn't offer.
fn with_client<T>(settings: &Settings, work: impl FnOnce(&amiquip::Channel) -> amiquip::Result<T>) -> T {
    let mut connection = Connection::insecure_open(settings.url.expose()).unwrap();
    let channel = connection.open_channel(None).unwrap();
    let result = work(&channel).unwrap();
    channel.close().unwrap();
    connection.close().unwrap();
    result
}

/// Publishes batches of ten in a thread, until told to stop. Returns how many messages were confirmed.
struct Publishing {
    stop: Arc<AtomicUsize>,
    confirmed: Arc<AtomicUsize>,
    thread: thread::JoinHandle<()>,
}

impl Publishing {
    fn start(settings: &Settings, queue: &'static str) -> Self {
        let (stop, confirmed) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let (stopping, counting) = (Arc::clone(&stop), Arc::clone(&confirmed));
        let mut publisher = Publisher::new(settings, "publishing");
        let thread = thread::spawn(move || {
            let mut next = 0;
            while stopping.load(Ordering::Relaxed) == 0 {
                publisher.publish_all(&numbered(queue, next..next + 10), within(5 * SOON)).unwrap();
                next += 10;
                counting.store(next, Ordering::Relaxed);
            }
        });
        Self { stop, confirmed, thread }
    }

    /// Waits until so many more messages are confirmed.
    #[track_caller]
    fn await_more(&self, count: usize) {
        let before = self.confirmed.load(Ordering::Relaxed);
        eventually(2 * SOON, "publishing goes on", || {
            (self.confirmed.load(Ordering::Relaxed) >= before + count).then_some(())
        });
    }

    fn stop(self) -> usize {
        self.stop.store(1, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.confirmed.load(Ordering::Relaxed)
    }
}

// --- Without disruption

#[test]
fn the_fleets_topology_is_declared_and_declaring_it_again_changes_nothing() {
    let node = node();
    let settings = node.settings();
    let topology = Topology::fleet(&[Duration::from_secs(1), Duration::from_secs(600)]);
    declare(&settings, &topology);
    Publisher::new(&settings, "test").publish_all(&numbered("publish_tweet", 0..1), within(SOON)).unwrap();
    declare(&settings, &topology);

    let names: Vec<_> = topology.queues.iter().map(|queue| queue.name.clone()).collect();
    let mut session = Session::open(&settings, "test").unwrap();
    // A queue that can't answer at once counts as empty.
    let depths = eventually(SOON, "the message is counted", || {
        let depths = broker::depths(&mut session, &names).unwrap();
        depths.iter().any(|depth| depth.messages > 0).then_some(depths)
    });
    for (depth, name) in depths.iter().zip(&names) {
        assert_eq!((&depth.name, depth.consumers), (name, 0));
        assert_eq!(depth.messages, u32::from(name == "publish_tweet"), "{name}");
    }
}

#[test]
fn a_queue_that_exists_with_other_arguments_is_named_and_so_is_one_that_does_not_exist() {
    let node = node();
    let settings = node.settings();
    declare(&settings, &queues(&["conflict"]));
    let mut session = Session::open(&settings, "test").unwrap();

    let mut other = queues(&["conflict"]);
    other.queues[0].expiry = Expiry::DeadLetter;
    let error = broker::declare(&mut session, &other).unwrap_err();
    assert!(matches!(&error, Error::Conflict { what, .. } if what == "queue `conflict`"), "{error:?}");
    assert!(!error.is_lost());

    let error = broker::depths(&mut session, &["conflict".into(), "nowhere".into()]).unwrap_err();
    assert!(matches!(&error, Error::MissingQueue { queue } if queue == "nowhere"), "{error:?}");
    let error = Consumer::new(&settings, "test", vec!["nowhere".into()], 10).next_batch(1, LINGER, IDLE).unwrap_err();
    assert!(matches!(&error, Error::MissingQueue { queue } if queue == "nowhere"), "{error:?}");

    // The refusals have cost the session nothing.
    assert_eq!(broker::depths(&mut session, &["conflict".into()]).unwrap()[0].messages, 0);
}

#[test]
fn queues_are_unbound_and_deleted_as_often_as_one_likes() {
    let node = node();
    let settings = node.settings();
    let topology = Topology::stream("sequenced", 3);
    declare(&settings, &topology);
    let route = |shard: usize| Envelope::new("sequenced", &topology.bindings[shard].routing_key, Vec::new());
    let mut publisher = Publisher::new(&settings, "test");
    publisher.publish_all(&[route(0), route(2), route(2)], within(SOON)).unwrap();

    let names: Vec<_> = topology.queues.iter().map(|queue| queue.name.clone()).collect();
    let mut session = Session::open(&settings, "test").unwrap();
    for _ in 0..2 {
        broker::unbind(&mut session, &topology.bindings[1..]).unwrap();
    }
    let refused = publisher.publish_all(&[route(0), route(1), route(2)], within(SOON)).unwrap_err();
    let PublishError::Refused { refused } = refused else { panic!("{refused}") };
    assert_eq!(refused.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [1, 2]);

    let full = |session: &mut Session| {
        let there = broker::existing(session, &names).unwrap();
        there.into_iter().map(|queue| (queue.name, queue.messages)).collect::<Vec<_>>()
    };
    let [first, second, third] = ["s000", "s001", "s002"].map(|shard| format!("sequenced.{shard}"));
    let await_full = |session: &mut Session, expected: &[(String, u32)]| {
        // A queue that can't answer at once counts as empty.
        eventually(SOON, "all queues are counted", || (full(session) == expected).then_some(()));
    };
    await_full(&mut session, &[(first.clone(), 2), (second, 0), (third, 2)]);
    assert_eq!(broker::delete_queues(&mut session, &names[1..]).unwrap(), 2);
    assert_eq!(broker::delete_queues(&mut session, &names[1..]).unwrap(), 0, "they are gone");
    broker::unbind(&mut session, &topology.bindings[1..]).unwrap();
    await_full(&mut session, &[(first, 2)]);
}

#[test]
fn a_missing_plugin_is_told_with_the_way_to_enable_it() {
    let node = node();
    let exchange = Exchange { name: "hashed".into(), kind: ExchangeKind::ConsistentHash };
    let topology = Topology { exchanges: vec![exchange], ..Topology::default() };
    let mut session = Session::open(&node.settings(), "test").unwrap();
    node.eval("rabbit_registry:unregister(exchange, <<\"x-consistent-hash\">>)");
    let error = broker::declare(&mut session, &topology).unwrap_err();
    node.eval("rabbit_registry:register(exchange, <<\"x-consistent-hash\">>, rabbit_exchange_type_consistent_hash)");
    assert!(matches!(&error, Error::MissingPlugin { exchange } if exchange == "hashed"), "{error:?}");
    assert!(error.to_string().contains("rabbitmq-plugins enable"), "{error}");
    declare(&node.settings(), &topology);
}

#[test]
fn a_message_arrives_as_it_was_published() {
    let node = node();
    let settings = node.settings();
    declare(&settings, &queues(&["faithful"]));
    let mut envelope = Envelope::new("", "faithful", vec![0, 159, 146, 150]);
    envelope.kind = Some("update_feed.chunk".into());
    envelope.correlation_id = Some("a request".into());
    envelope.headers = BTreeMap::from([("x-attempts".into(), "3".into()), ("x-error".into(), "e".repeat(60_000))]);
    Publisher::new(&settings, "test").publish_all(std::slice::from_ref(&envelope), within(SOON)).unwrap();

    let mut consumer = Consumer::new(&settings, "test", vec!["faithful".into()], 10);
    let [delivery] = &take(&mut consumer, 1)[..] else { unreachable!() };
    assert_eq!(&*delivery.queue, "faithful");
    assert!(!delivery.redelivered);
    assert_eq!((&*delivery.exchange, &*delivery.routing_key), ("", "faithful"));
    assert_eq!(delivery.kind, envelope.kind);
    assert_eq!(delivery.message_id.as_ref(), Some(&envelope.message_id));
    assert_eq!(delivery.correlation_id, envelope.correlation_id);
    assert_eq!(delivery.timestamp.unwrap().timestamp(), envelope.created_at.timestamp());
    assert_eq!(delivery.body, envelope.body);
    let mut headers = delivery.headers.clone();
    let published_at: i64 = headers.remove("x-published-at-ms").unwrap().parse().unwrap();
    assert!(published_at >= envelope.created_at.timestamp_millis());
    assert_eq!(headers, envelope.headers);
}

#[test]
fn failed_messages_wait_and_then_say_where_they_are_to_return_to() {
    let node = node();
    let settings = node.settings();
    let delay = Duration::from_millis(300);
    declare(&settings, &Topology::fleet(&[delay]));
    let started = Instant::now();
    let envelope = Envelope::new("wait.300ms", "patient", vec![]);
    Publisher::new(&settings, "test").publish_all(&[envelope], within(SOON)).unwrap();

    let mut consumer = Consumer::new(&settings, "test", vec!["return".into()], 10);
    let deliveries = take(&mut consumer, 1);
    let [delivery] = &deliveries[..] else { unreachable!() };
    assert_eq!(delivery.routing_key, "patient");
    assert!(started.elapsed() >= delay, "came after {:?}", started.elapsed());
    assert_eq!(delivery.headers[header::DEATH_REASON], "expired");
    assert_eq!(delivery.headers[header::DEATH_QUEUE], "wait.300ms");
    assert!(delivery.headers[header::DEATH_TIME].ends_with('Z'));
    assert_eq!(consumer.ack(deliveries), Acked { sent: 1, stale: 0 });
    consumer.close(within(SOON));
}

#[test]
fn what_the_broker_gives_up_says_why_in_the_dead_letter_queue() {
    let node = node();
    let settings = node.settings();
    let mut topology = Topology::fleet(&[]);
    topology.queues.push(Queue { name: "given_up".into(), expiry: Expiry::DeadLetter });
    declare(&settings, &topology);
    Publisher::new(&settings, "test").publish_all(&numbered("given_up", 7..8), within(SOON)).unwrap();
    with_client(&settings, |channel| {
        eventually(SOON, "the message can be rejected", || {
            let got = channel.basic_get("given_up", false).unwrap()?;
            got.delivery.reject(channel, false).unwrap();
            Some(())
        });
        Ok(())
    });

    let mut consumer = Consumer::new(&settings, "test", vec!["dead_letter".into()], 10);
    let deliveries = take(&mut consumer, 1);
    let delivery = &deliveries[0];
    assert_eq!(number(delivery), 7);
    assert_eq!(delivery.routing_key, "given_up");
    assert_eq!(delivery.headers[header::DEATH_REASON], "rejected");
    assert_eq!(delivery.headers[header::DEATH_QUEUE], "given_up");
    assert_eq!(consumer.ack(deliveries), Acked { sent: 1, stale: 0 });
    consumer.close(within(SOON));
}

#[test]
fn more_messages_than_the_window_holds_arrive_once_and_in_order() {
    let node = node();
    let settings = node.settings();
    declare(&settings, &queues(&["ordered"]));
    let mut publisher = Publisher::new(&settings, "test");
    // Calls follow each other on one connection, so that tags go on counting.
    publisher.publish_all(&numbered("ordered", 0..1000), within(SOON)).unwrap();
    publisher.publish_all(&[], within(SOON)).unwrap();
    publisher.publish_all(&numbered("ordered", 1000..1500), within(SOON)).unwrap();
    publisher.close(within(SOON));

    let mut consumer = Consumer::new(&settings, "test", vec!["ordered".into()], 100);
    // The broker sends no more ahead than it was told to.
    take(&mut consumer, 100);
    assert!(consumer.next_batch(1000, LINGER, IDLE).unwrap().deliveries.is_empty());
    consumer.close(within(SOON));

    let mut consumer = Consumer::new(&settings, "test", vec!["ordered".into()], 100);
    let mut next = 0;
    while next < 1500 {
        let batch = consumer.next_batch(70, LINGER, SOON).unwrap();
        assert!(!batch.deliveries.is_empty(), "{next} of 1500 came");
        assert!(batch.deliveries.len() <= 70);
        for delivery in &batch.deliveries {
            assert_eq!(number(delivery), next);
            next += 1;
        }
        let count = batch.deliveries.len();
        assert_eq!(consumer.ack(batch), Acked { sent: count, stale: 0 });
    }
    assert!(consumer.next_batch(70, LINGER, IDLE).unwrap().deliveries.is_empty());
    eventually(SOON, "the acknowledgements take effect", || (node.left_in("ordered") == 0).then_some(()));
}

#[test]
fn deliveries_of_several_queues_are_settled_in_any_order_and_the_rest_goes_back_in_order() {
    let node = node();
    let settings = node.settings();
    let names = ["several.a", "several.b", "several.c"];
    declare(&settings, &queues(&names));
    let mut publisher = Publisher::new(&settings, "test");
    for name in names {
        publisher.publish_all(&numbered(name, 0..300), within(SOON)).unwrap();
    }

    let mut consumer = Consumer::new(&settings, "test", names.map(Into::into).into(), 300);
    let held = take(&mut consumer, 900);
    for name in names {
        let numbers: Vec<_> = held.iter().filter(|delivery| &*delivery.queue == name).map(number).collect();
        assert_eq!(numbers, (0..300).collect::<Vec<_>>(), "{name}");
    }
    // Every third in one go, from the last to the first; of the others every second one by one; the rest never.
    let (thirds, others): (Vec<_>, Vec<_>) = held.into_iter().partition(|delivery| number(delivery).is_multiple_of(3));
    assert_eq!(consumer.ack(thirds.into_iter().rev()), Acked { sent: 300, stale: 0 });
    let (evens, kept): (Vec<_>, Vec<_>) = others.into_iter().partition(|delivery| number(delivery).is_multiple_of(2));
    for delivery in evens {
        assert_eq!(consumer.ack([delivery]), Acked { sent: 1, stale: 0 });
    }
    assert_eq!(kept.len(), 300);
    // The broker works off such a burst behind the connection's back, and forgets what is left when that ends.
    eventually(SOON, "the acknowledgements take effect", || {
        let queues = node.eval(
            "length([queue || [{messages_unacknowledged, 100}] <- \
             rabbit_amqqueue:info_all(<<\"/\">>, [messages_unacknowledged])])",
        );
        (queues == "3").then_some(())
    });
    consumer.close(within(SOON));

    let mut consumer = Consumer::new(&settings, "test", names.map(Into::into).into(), 300);
    let mut again = BTreeMap::<_, Vec<_>>::new();
    eventually(SOON, "what wasn't acknowledged comes again", || {
        for delivery in consumer.next_batch(50, LINGER, IDLE).unwrap() {
            assert!(delivery.redelivered);
            again.entry(delivery.queue.clone()).or_default().push(number(&delivery));
        }
        (again.values().map(Vec::len).sum::<usize>() >= 300).then_some(())
    });
    let expected: Vec<_> = (0..300).filter(|number| number % 3 != 0 && number % 2 != 0).collect();
    for name in names {
        assert_eq!(again[name], expected, "{name}");
    }
    assert!(consumer.next_batch(1, LINGER, IDLE).unwrap().deliveries.is_empty(), "acknowledged messages came again");
}

#[test]
fn a_name_that_is_not_utf8_costs_neither_the_connection_nor_its_neighbours() {
    let node = node();
    let settings = node.settings();
    declare(
        &settings,
        &Topology {
            exchanges: vec![Exchange { name: "strange".into(), kind: ExchangeKind::Fanout }],
            bindings: vec![Binding { exchange: "strange".into(), queue: "strange".into(), routing_key: "".into() }],
            ..queues(&["strange"])
        },
    );
    let mut publisher = Publisher::new(&settings, "test");
    publisher.publish_all(&numbered("strange", 0..1), within(SOON)).unwrap();
    node.eval(
        "{ok, X} = rabbit_exchange:lookup(rabbit_misc:r(<<\"/\">>, exchange, <<\"strange\">>)), \
         rabbit_basic:publish(X, <<\"key\",255,254>>, [{message_id, <<\"id\",128>>}, {type, <<\"kind\",192>>}, \
         {headers, [{<<\"bad\">>, longstr, <<255>>}]}], <<\"1\">>)",
    );
    publisher.publish_all(&numbered("strange", 2..3), within(SOON)).unwrap();

    let mut consumer = Consumer::new(&settings, "test", vec!["strange".into()], 10);
    let mut deliveries = take(&mut consumer, 3);
    deliveries.sort_by_key(number);
    assert!(deliveries.iter().all(|delivery| !delivery.redelivered));
    let [_, strange, _] = &deliveries[..] else { panic!("{deliveries:?}") };
    assert_eq!(strange.routing_key, "key\u{1a}\u{1a}");
    assert_eq!(strange.message_id.as_deref(), Some("id\u{1a}"));
    assert!(!identifies("id\u{1a}"), "two ids could have become this one");
    assert_eq!(strange.kind.as_deref(), Some("kind\u{1a}"));
    assert_eq!(consumer.ack(deliveries), Acked { sent: 3, stale: 0 });
    consumer.close(within(SOON));
}

// --- Refusals

#[test]
fn a_message_that_reaches_no_queue_is_refused_and_the_others_are_confirmed() {
    let node = node();
    let settings = node.settings();
    declare(&settings, &queues(&["routed"]));
    let mut envelopes = numbered("routed", 0..200);
    for index in [0, 70, 199] {
        envelopes[index].routing_key = "unrouted".into();
    }
    // An exchange that isn't there makes the broker close the channel.
    envelopes[120].exchange = "no_such_exchange".into();
    let result = Publisher::new(&settings, "test").publish_all(&envelopes, within(SOON));
    let Err(PublishError::Refused { refused }) = result else { panic!("{result:?}") };
    let codes: Vec<_> = refused
        .iter()
        .map(|(index, reason)| match reason {
            Reason::Returned { code, .. } => (*index, *code),
            other => panic!("{index}: {other:?}"),
        })
        .collect();
    assert_eq!(codes, [(0, 312), (70, 312), (120, 404), (199, 312)]);

    let mut consumer = Consumer::new(&settings, "test", vec!["routed".into()], 500);
    // Those that were on their way when the channel was closed came twice.
    let others: HashSet<_> = (0..200).filter(|number| ![0, 70, 120, 199].contains(number)).collect();
    let mut arrived = HashSet::new();
    eventually(SOON, "all others arrive", || {
        arrived.extend(consumer.next_batch(500, LINGER, IDLE).unwrap().deliveries.iter().map(number));
        (arrived == others).then_some(())
    });
}

#[test]
fn a_full_queue_refuses_what_it_does_not_take() {
    let node = node();
    let settings = node.settings();
    let mut arguments = FieldTable::new();
    arguments.insert("x-max-length".into(), AmqpValue::LongInt(5));
    arguments.insert("x-overflow".into(), AmqpValue::LongString("reject-publish".into()));
    with_client(&settings, |channel| {
        channel.queue_declare("full", QueueDeclareOptions { durable: true, arguments, ..Default::default() }).map(drop)
    });
    let mut publisher = Publisher::new(&settings, "test");
    let result = publisher.publish_all(&numbered("full", 0..20), within(SOON));
    let Err(PublishError::Refused { refused }) = result else { panic!("{result:?}") };
    assert!(refused.iter().all(|(_, reason)| *reason == Reason::Nacked), "{refused:?}");
    // Exactly what wasn't refused is in the queue.
    let refused: HashSet<_> = refused.into_iter().map(|(index, _)| index).collect();
    let taken: HashSet<_> = (0..20).filter(|index| !refused.contains(index)).collect();
    let mut consumer = Consumer::new(&settings, "test", vec!["full".into()], 100);
    let deliveries = take(&mut consumer, taken.len());
    assert_eq!(deliveries.iter().map(number).collect::<HashSet<_>>(), taken);
    assert!(consumer.next_batch(1, LINGER, IDLE).unwrap().deliveries.is_empty());
    consumer.ack(deliveries);
    // The caller tries again, and now there's room.
    eventually(SOON, "the queue takes more", || publisher.publish_all(&numbered("full", 0..1), within(SOON)).ok());
}

#[test]
fn what_the_broker_would_not_understand_is_never_sent() {
    let node = node();
    let settings = node.settings();
    declare(&settings, &queues(&["valid"]));
    let long = "l".repeat(256);
    let mut envelopes = numbered("valid", 0..7);
    envelopes[0].routing_key = long.clone();
    envelopes[1].message_id = long.clone();
    envelopes[2].kind = Some(long.clone());
    envelopes[3].headers.insert(long, String::new());
    envelopes[4].headers.insert("x-error".into(), "e".repeat(200_000));
    envelopes[5].body = vec![b' '; settings.window_bytes + 1];
    let result = Publisher::new(&settings, "test").publish_all(&envelopes, within(SOON));
    let Err(PublishError::Refused { refused }) = result else { panic!("{result:?}") };
    assert!(refused.iter().all(|(_, reason)| matches!(reason, Reason::Invalid(_))), "{refused:?}");
    assert_eq!(refused.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    eventually(SOON, "the valid one arrives", || (depth(&settings, "valid") == 1).then_some(()));

    // The largest that are valid are understood.
    let mut largest = Envelope::new("", "valid", vec![b' '; settings.window_bytes]);
    largest.message_id = "i".repeat(255);
    largest.headers.insert("h".repeat(255), "v".repeat(65_000));
    Publisher::new(&settings, "test").publish_all(&[largest], within(SOON)).unwrap();
}

#[test]
fn a_broker_that_cannot_be_reached_or_will_not_let_in_is_told_without_the_password() {
    let node = node();
    // Longer than the broker takes to cut the connection of somebody whom it doesn't let in.
    let settings = |url: &str| Settings { url: url.into(), connect_timeout_ms: 10_000, ..node.settings() };
    let url = node.settings().url.expose().to_owned();
    let cases = [
        // Nobody listens on port 1.
        ("amqp://guest:hunter2@127.0.0.1:1/".to_owned(), "Connection refused"),
        ("amqp://guest:hunter2@no-such-host.invalid/".to_owned(), "looking up its host"),
        (url.replace("guest:guest", "guest:hunter2"), "wrong user or password"),
        (url.replace("%2f", "hunter3"), "vhost hunter3 not found"),
    ];
    for (url, wanted) in cases {
        let mut publisher = Publisher::new(&settings(&url), "test");
        let deadline = within(Duration::from_millis(500));
        let result = bounded("publishing", SOON, || publisher.publish_all(&numbered("queue", 0..2), deadline));
        let Err(PublishError::Unavailable { unconfirmed, source }) = result else { panic!("{result:?}") };
        assert_eq!(unconfirmed, [0, 1]);
        assert!(source.is_lost(), "{source:?}");
        let text = format!("{source:?} {source} {:?}", std::error::Error::source(&source).map(ToString::to_string));
        assert!(text.contains(wanted), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
    let result = Session::open(&settings("amqp://guest:hunter2@host/a/b"), "test").map(drop);
    assert!(matches!(&result, Err(error @ Error::Url(_)) if !error.is_lost()), "{result:?}");
}

#[test]
fn a_broker_without_heartbeats_is_refused() {
    let node = node();
    node.eval("application:set_env(rabbit, heartbeat, 0)");
    let result = Session::open(&node.settings(), "test").map(drop);
    node.eval("application:set_env(rabbit, heartbeat, 60)");
    assert!(matches!(result, Err(Error::NoHeartbeat)), "{result:?}");
    assert!(Session::open(&node.settings(), "test").is_ok());
}

// --- Connecting

#[test]
fn connecting_takes_nothing_of_the_time_for_which_a_delivery_is_awaited() {
    let node = node();
    let settings = node.settings();
    declare(&settings, &queues(&["unhurried"]));
    let consumer = || Consumer::new(&settings, "test", vec!["unhurried".into()], 10);
    // As a broker that is busy: it takes as long over connecting as the consumer waits for a delivery.
    let mut slow = consumer().on_connect(|_| {
        thread::sleep(IDLE);
        Ok(())
    });
    let started = Instant::now();
    assert!(slow.next_batch(1, LINGER, IDLE).unwrap().deliveries.is_empty());
    assert!(slow.connected() && started.elapsed() >= 2 * IDLE, "waited {:?}", started.elapsed());
    // Whoever wouldn't wait at all is connected all the same.
    let mut hasty = consumer();
    hasty.next_batch(1, Duration::ZERO, Duration::ZERO).unwrap();
    assert!(hasty.connected());
}

// --- Lost connections

#[test]
fn connections_that_the_broker_closes_lose_nothing() {
    let node = node();
    let settings = node.settings();
    declare(&settings, &queues(&["closed"]));
    let connects = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&connects);
    let mut consumer =
        Consumer::new(&settings, "the consumer", vec!["closed".into()], 1000).on_connect(move |session| {
            counting.fetch_add(1, Ordering::Relaxed);
            broker::declare(session, &queues(&["closed"]))
        });
    let publishing = Publishing::start(&settings, "closed");
    publishing.await_more(100);

    // In hand when the connection goes.
    let held = eventually(SOON, "messages come", || {
        let batch = consumer.next_batch(50, LINGER, IDLE).unwrap();
        (!batch.deliveries.is_empty()).then_some(batch)
    });
    assert!(consumer.link().is_connected());
    let names = node.eval(
        "[binary_to_atom(Name) || [{_, Properties}] <- rabbit_networking:connection_info_all([client_properties]), \
         {<<\"connection_name\">>, longstr, Name} <- Properties]",
    );
    assert!(names.contains("'the consumer'") && names.contains("publishing"), "{names}");

    for _ in 0..2 {
        node.eval("rabbit_networking:close_all_connections(<<\"test\">>)");
        publishing.await_more(200);
    }
    let confirmed = publishing.stop();

    // The connection that the held messages came by is gone, so their tags mean other messages, if any.
    let again = eventually(SOON, "messages come again", || {
        let batch = consumer.next_batch(50, LINGER, IDLE).unwrap();
        batch.deliveries.iter().any(|delivery| delivery.redelivered).then_some(batch)
    });
    let stale = held.deliveries.len();
    assert_eq!(consumer.ack(held), Acked { sent: 0, stale });
    // Nothing of this batch is acknowledged either, so all of it has to come once more.
    drop(again);
    consumer.close(within(SOON));
    assert!(connects.load(Ordering::Relaxed) >= 2);

    let mut consumer = Consumer::new(&settings, "test", vec!["closed".into()], 1000);
    consume_all(&mut consumer, confirmed);
}

#[test]
fn publishing_once_ends_with_its_connection_and_tells_what_was_not_confirmed() {
    let node = node();
    let settings = node.settings();
    declare(&settings, &queues(&["once"]));
    let mut publisher = Publisher::new(&settings, "test");
    publisher.publish_once(&numbered("once", 0..10), within(SOON)).unwrap();
    node.eval("rabbit_networking:close_all_connections(<<\"test\">>)");
    let lost = publisher.publish_once(&numbered("once", 10..20), within(SOON)).unwrap_err();
    let PublishError::Unavailable { unconfirmed, .. } = lost else { panic!("{lost:?}") };
    assert_eq!(unconfirmed, (0..10).collect::<Vec<_>>());
    publisher.publish_once(&numbered("once", 10..20), within(SOON)).unwrap();
    let mut nowhere = numbered("once", 20..21);
    nowhere[0].exchange = "nowhere".into();
    let refused = publisher.publish_once(&nowhere, within(SOON)).unwrap_err();
    assert!(matches!(refused, PublishError::Refused { .. }), "{refused:?}");
    let mut consumer = Consumer::new(&settings, "test", vec!["once".into()], 100);
    assert_eq!(take(&mut consumer, 20).iter().map(number).collect::<Vec<_>>(), (0..20).collect::<Vec<_>>());
}

#[test]
fn a_delivery_that_is_held_for_longer_than_the_broker_allows_comes_again() {
    let node = node();
    let settings = node.settings();
    declare(&settings, &queues(&["held"]));
    Publisher::new(&settings, "test").publish_all(&numbered("held", 0..1), within(SOON)).unwrap();
    node.eval("[application:set_env(rabbit, Key, 500) || Key <- [consumer_timeout, channel_tick_interval]]");
    let mut consumer = Consumer::new(&settings, "test", vec!["held".into()], 10);
    let held = take(&mut consumer, 1);
    // The broker closes the channel, which is no reason to give up.
    let again = take(&mut consumer, 1);
    node.eval(
        "[application:set_env(rabbit, consumer_timeout, 1800000), \
         application:set_env(rabbit, channel_tick_interval, 60000)]",
    );
    assert!(again[0].redelivered);
    assert_eq!(consumer.ack(held), Acked { sent: 0, stale: 1 });
}

#[test]
fn a_queue_that_is_deleted_is_declared_again_by_the_hook() {
    let node = node();
    let settings = node.settings();
    let hook = |session: &mut Session| broker::declare(session, &queues(&["deleted"]));
    let mut consumer = Consumer::new(&settings, "test", vec!["deleted".into()], 10).on_connect(hook);
    let mut publisher = Publisher::new(&settings, "test").on_connect(hook);
    assert!(consumer.next_batch(10, LINGER, IDLE).unwrap().deliveries.is_empty());
    assert!(consumer.connected());
    with_client(&settings, |channel| channel.queue_delete("deleted", Default::default()));
    eventually(SOON, "the consumer notices", || {
        consumer.next_batch(10, LINGER, IDLE).unwrap();
        broker::depths(&mut Session::open(&settings, "looking").unwrap(), &["deleted".into()]).ok()
    });
    publisher.publish_all(&numbered("deleted", 0..10), within(SOON)).unwrap();
    assert_eq!(consume_all(&mut consumer, 10), 0);
}

#[test]
fn a_queue_that_never_confirms_keeps_nobody_from_the_others() {
    let node = node();
    let settings = node.settings();
    declare(&settings, &queues(&["silent", "answering"]));
    let tell = |what: &str| {
        node.eval(&format!(
            "{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"silent\">>)), \
             sys:{what}(amqqueue:get_pid(Queue))"
        ))
    };
    let mut publisher = Publisher::new(&settings, "test");
    publisher.publish_all(&numbered("silent", 0..1), within(SOON)).unwrap();
    tell("suspend");
    let link = publisher.link();
    // Each time nearly as many as the window holds: if they stayed in it, nothing would go in the end.
    for _ in 0..3 {
        let silent = settings.window_messages - 10;
        let both = [numbered("answering", 0..10), numbered("silent", 0..silent)].concat();
        let result = publisher.publish_all(&both, within(Duration::from_secs(2)));
        let Err(PublishError::Unavailable { unconfirmed, source }) = result else { panic!("{result:?}") };
        assert_eq!(unconfirmed, (10..10 + silent).collect::<Vec<_>>());
        assert!(matches!(source, Error::TimedOut { .. }), "{source:?}");
        let refused: Vec<_> = link.refused().into_iter().map(|(destination, _)| destination.routing_key).collect();
        assert_eq!((refused, link.is_connected()), (vec!["silent".to_owned()], true));
    }
    tell("resume");
    eventually(SOON, "it answers again", || publisher.publish_all(&numbered("silent", 0..1), within(SOON)).ok());
    assert_eq!(link.refused(), []);
}

#[test]
fn what_was_confirmed_is_in_its_stream_also_when_the_streams_writer_was_started_anew() {
    const STREAMS: usize = 3;
    let node = node();
    let settings = Settings { window_messages: 1024, ..node.settings() };
    declare(&settings, &Topology::log(STREAMS as i32, log_retention()));
    let mut publisher = Publisher::new(&settings, "test").for_stream_queues();
    let confirmed = AtomicUsize::new(0);
    thread::scope(|scope| {
        let killing = scope.spawn(|| {
            for _ in 0..10 {
                let before = confirmed.load(Ordering::Relaxed);
                eventually(2 * SOON, "publishing goes on", || {
                    (confirmed.load(Ordering::Relaxed) > before + 3000).then_some(())
                });
                node.eval(
                    "[exit(amqqueue:get_pid(Queue), kill) || Queue <- rabbit_amqqueue:list(<<\"/\">>), \
                     amqqueue:get_type(Queue) =:= rabbit_stream_queue]",
                );
            }
        });
        while !killing.is_finished() {
            let next = confirmed.load(Ordering::Relaxed);
            let messages: Vec<_> = (next..next + 300)
                .map(|number| {
                    let key = partition_routing_key((number % STREAMS) as i32);
                    Envelope::new(MESSAGE, key, number.to_string().into_bytes())
                })
                .collect();
            publisher.publish_all(&messages, within(5 * SOON)).unwrap();
            confirmed.store(next + 300, Ordering::Relaxed);
        }
    });
    let mut missing: HashSet<_> = (0..confirmed.load(Ordering::Relaxed)).collect();
    for partition in 0..STREAMS {
        let stream = partition_queue(partition as i32);
        let mut reader = Consumer::of_stream_queue(&settings, "test", &stream, 1000, StreamOffset::First);
        let mut last_came = Instant::now();
        while missing.iter().any(|number| number % STREAMS == partition) {
            for delivery in reader.next_batch(1000, Duration::ZERO, IDLE).unwrap() {
                last_came = Instant::now();
                missing.remove(&number(&delivery));
            }
            let (count, first) = (missing.len(), missing.iter().min());
            assert!(last_came.elapsed() < SOON, "{count} messages in this and later streams: {first:?} …");
        }
    }
}

#[test]
fn a_killed_broker_loses_nothing_that_it_confirmed() {
    let mut node = node();
    let settings = node.settings();
    declare(&settings, &queues(&["killed"]));
    let mut consumer = Consumer::new(&settings, "test", vec!["killed".into()], 1000);
    // RabbitMQ writes down where a new queue's messages are only half a second later.
    node.write_down();
    let publishing = Publishing::start(&settings, "killed");
    publishing.await_more(500);
    let in_hand = consumer.next_batch(100, LINGER, SOON).unwrap();
    assert!(!in_hand.deliveries.is_empty());
    node.kill();
    // Without a broker nothing fails and nothing hangs.
    eventually(SOON, "the consumer notices", || {
        bounded("waiting for a batch", SOON / 2, || consumer.next_batch(10, LINGER, IDLE).unwrap());
        (!consumer.connected() && !consumer.link().is_connected()).then_some(())
    });
    let stale = in_hand.deliveries.len();
    assert_eq!(consumer.ack(in_hand), Acked { sent: 0, stale });
    node.start();
    publishing.await_more(500);
    let confirmed = publishing.stop();
    consume_all(&mut consumer, confirmed);
}

#[test]
fn a_frozen_broker_hangs_nobody_and_loses_nothing() {
    let node = node();
    let patient = node.settings();
    declare(&patient, &queues(&["frozen"]));
    // By heartbeats nobody would be freed in time.
    let slow = Settings { confirm_timeout_ms: 2000, heartbeat_s: 60, ..patient.clone() };
    let settings = Settings { connect_timeout_ms: 1000, confirm_timeout_ms: 2000, heartbeat_s: 10, ..patient };
    let mut session = Session::open(&slow, "test").unwrap();
    let mut publisher = Publisher::new(&settings, "test");
    let mut closing = Publisher::new(&slow, "test");
    let mut dropped = Publisher::new(&slow, "test");
    for publisher in [&mut publisher, &mut closing, &mut dropped] {
        publisher.publish_all(&numbered("frozen", 0..1), within(SOON)).unwrap();
    }
    let consumer = |settings| Consumer::new(settings, "test", vec!["frozen".into()], 2);
    let [mut consumer, mut dropped_consumer, mut closing_consumer] = [&settings, &slow, &slow].map(consumer);
    let publishing = Publishing::start(&settings, "frozen");
    publishing.await_more(50);
    let in_hand = take(&mut consumer, 1);
    // One of the three with the number 0, which the count of confirmed messages knows once.
    let done = take(&mut consumer, 1);
    for consumer in [&mut dropped_consumer, &mut closing_consumer] {
        take(consumer, 1);
    }

    let frozen = node.freeze();
    let a_second = Duration::from_secs(1);
    bounded("acknowledging", NO_HANG, || consumer.ack(done));
    bounded("dropping a publisher", NO_HANG, || drop(dropped));
    bounded("dropping a consumer", NO_HANG, || drop(dropped_consumer));
    let result = bounded("publishing", NO_HANG, || publisher.publish_all(&numbered("frozen", 0..10), within(a_second)));
    assert!(matches!(result, Err(PublishError::Unavailable { .. })), "{result:?}");
    let batch = bounded("waiting for a batch", NO_HANG, || consumer.next_batch(1, LINGER, a_second).unwrap());
    assert!(batch.deliveries.is_empty());
    bounded("closing a publisher", NO_HANG, || closing.close(within(a_second)));
    bounded("closing a consumer", NO_HANG, || closing_consumer.close(within(a_second)));
    let result = bounded("connecting", NO_HANG, || Session::open(&settings, "test"));
    assert!(result.is_err_and(|error| error.is_lost()));
    let result = bounded("a call", NO_HANG, || broker::depths(&mut session, &["frozen".into()]));
    assert!(result.is_err_and(|error| error.is_lost()));
    // By heartbeats, or for want of confirms.
    eventually(SOON, "the loss is noticed", || {
        consumer.next_batch(1, LINGER, IDLE).unwrap();
        let _ = publisher.publish_all(&numbered("frozen", 0..10), within(IDLE));
        (!consumer.connected() && !publisher.link().is_connected()).then_some(())
    });
    drop(frozen);

    publishing.await_more(50);
    let confirmed = publishing.stop();
    let stale = in_hand.len();
    assert_eq!(consumer.ack(in_hand), Acked { sent: 0, stale });
    let mut consumer = Consumer::new(&slow, "test", vec!["frozen".into()], 1000);
    consume_all(&mut consumer, confirmed);
}

#[test]
fn a_broker_short_of_memory_is_waited_for_and_consuming_goes_on() {
    let node = node();
    let settings = Settings { window_messages: 16, confirm_timeout_ms: 2000, ..node.settings() };
    declare(&settings, &queues(&["starved", "fed", "probed"]));
    let mut publisher = Publisher::new(&settings, "test");
    let mut dropped = Publisher::new(&settings, "test");
    let mut gives_up = Publisher::new(&settings, "test");
    publisher.publish_all(&numbered("fed", 0..100), within(SOON)).unwrap();
    for publisher in [&mut dropped, &mut gives_up] {
        publisher.publish_all(&numbered("fed", 0..1), within(SOON)).unwrap();
    }
    let mut consumer = Consumer::new(&settings, "test", vec!["fed".into()], 10);
    assert!(!consumer.next_batch(1, LINGER, SOON).unwrap().deliveries.is_empty());

    let starved = node.starve();
    let a_second = Duration::from_secs(1);
    let link = publisher.link();
    // Raising the alarm takes the broker a moment.
    eventually(SOON, "publishing is blocked", || {
        let _ = publisher.publish_all(&numbered("probed", 0..1), within(IDLE));
        link.is_blocked().then_some(())
    });
    for _ in 0..3 {
        let result =
            bounded("publishing", NO_HANG, || publisher.publish_all(&numbered("starved", 0..1000), within(a_second)));
        let Err(PublishError::Unavailable { unconfirmed, source }) = result else { panic!("{result:?}") };
        assert_eq!(unconfirmed.len(), 1000);
        assert!(matches!(source, Error::Blocked(_)) && source.is_lost(), "{source:?}");
        assert!(link.is_blocked() && link.is_connected());
    }
    let _ = dropped.publish_all(&numbered("starved", 0..1), within(a_second));
    let _ = gives_up.publish_all(&numbered("probed", 0..1), within(a_second));
    let trouble = gives_up.link().trouble().expect("a reason");
    assert!(trouble.contains("short of memory or disk"), "{trouble}");
    bounded("dropping", NO_HANG, || drop(dropped));
    // Acknowledging isn't blocked: the broker sends more than it sends ahead.
    consume_all(&mut consumer, 100);
    // A call waits as long as it may, longer than the confirm timeout.
    let waiting = thread::spawn(move || publisher.publish_all(&numbered("starved", 1000..1100), within(SOON * 2)));
    thread::sleep(Duration::from_millis(settings.confirm_timeout_ms) + a_second);
    assert!(link.is_blocked() && !waiting.is_finished());
    drop(starved);
    waiting.join().unwrap().unwrap();
    assert!(!link.is_blocked());
    eventually(SOON, "that is told also of a publisher that publishes nothing", || {
        gives_up.link().trouble().is_none().then_some(())
    });
    // The first attempt sent one window, the others nothing: they would only have sent it again.
    let depth = node.left_in("starved");
    assert!((100..=100 + 16 + 1).contains(&depth), "{depth} messages");
}
