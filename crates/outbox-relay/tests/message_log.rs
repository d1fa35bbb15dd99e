//! Accepted messages reach their partitions' streams in order, and a reader sees each once, whatever happens on the way.

use broker::{Consumer, Delivery, Session, Settings, StreamOffset};
use chrono::Utc;
use domain::{
    Envelope,
    log::{Arrival, LogMessage, MESSAGE, MessageId, Watermark, partition_queue},
    stream::key_hash,
    topology::{Expiry, Queue, Topology, exchange, queue},
};
use outbox_relay::{LogRelay, Relay, Round};
use process::Stop;
use std::{
    collections::BTreeMap,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use storage::{
    Database,
    message_outbox::{self, New},
    outbox,
    partitions::{self, Partition},
};
use test_support::{PrivateRabbitmq, TestDatabase, TestVhost, broker_settings, eventually_within, log_retention, sql};

/// Long enough for a broker that comes back on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long nothing comes of a stream whose end is reached.
const A_MOMENT: Duration = Duration::from_millis(500);

/// Not chosen, and no key.
const ANY: New<'_> = New { text: "any", key: None, partition: None, count: None };

/// A message log of four partitions, and the broker to which it's published.
struct Stage {
    database: TestDatabase,
    broker: Settings,
    /// What the ids begin with.
    token: String,
    /// Where it's one of its own on the shared broker.
    vhost: Option<TestVhost>,
}

/// A message as it stands in a stream.
#[derive(Debug)]
struct Read {
    seq: i64,
    run: i64,
    key: Option<String>,
    text: String,
}

impl Stage {
    fn new() -> Self {
        let vhost = TestVhost::new();
        let stage = Self::at(vhost.url());
        Self { vhost: Some(vhost), ..stage }
    }

    fn at(url: &str) -> Self {
        let database = TestDatabase::new();
        let token = partitions::token(&mut database.database().connection().unwrap()).unwrap();
        Self { database, broker: broker_settings(url), token, vhost: None }
    }

    /// A relay with connections of its own.
    fn relay(&self, batch: i64) -> LogRelay {
        let database = Database::open(&self.database.settings(), "test").unwrap();
        LogRelay::new(database, &self.broker, Topology::fleet(&[]), log_retention(), batch)
    }

    fn append(&self, new: &New<'_>) {
        let mut conn = self.database.database().connection().unwrap();
        let appended = message_outbox::append(&mut conn, new, Some("request")).unwrap();
        assert_eq!(i64::try_from(appended), Ok(new.count.unwrap_or(1)));
    }

    fn append_to(&self, partition: i32, text: &str) {
        self.append(&New { text, partition: Some(partition), ..ANY });
    }

    fn partitions(&self) -> Vec<Partition> {
        partitions::list(&mut self.database.database().connection().unwrap()).unwrap()
    }

    fn waiting(&self) -> i64 {
        self.partitions().iter().map(|partition| partition.waiting).sum()
    }

    /// Relays until nothing waits.
    #[track_caller]
    fn relay_all(&self, relay: &mut LogRelay) {
        eventually_within(PATIENCE, "everything is relayed", || {
            while relay.round().expect("the database answers") == Round::Relayed {}
            (self.waiting() == 0).then_some(())
        });
    }

    /// A reader of a partition's stream, from its first message on.
    fn reader(&self, partition: i32) -> impl FnMut() -> Vec<Read> {
        let stream = partition_queue(partition);
        let mut consumer = Consumer::of_stream_queue(&self.broker, "test", &stream, 1000, StreamOffset::First);
        move || {
            let batch = consumer.next_batch(1000, Duration::ZERO, A_MOMENT).expect("there is such a stream");
            batch.deliveries.iter().map(|delivery| self.open(delivery)).collect()
        }
    }

    fn open(&self, delivery: &Delivery) -> Read {
        let id = MessageId::parse(delivery.message_id.as_deref().unwrap()).expect("an id of the log's");
        assert_eq!((id.log, &*partition_queue(id.partition)), (&*self.token, &*delivery.queue));
        assert_eq!((delivery.kind.as_deref(), delivery.correlation_id.as_deref()), (Some(MESSAGE), Some("request")));
        let LogMessage { text, key, accepted_at, run } = serde_json::from_slice(&delivery.body).unwrap();
        assert!(accepted_at.is_some_and(|time| time <= Utc::now()), "it says when it was accepted");
        Read { seq: id.seq, run: run.unwrap(), key, text }
    }

    /// The sequences and runs in a partition's stream as they stand there, of which there are so many.
    #[track_caller]
    fn raw(&self, partition: i32, count: usize) -> Vec<(i64, i64)> {
        let (mut reader, mut all) = (self.reader(partition), Vec::new());
        eventually_within(PATIENCE, "the messages are in the stream", || {
            all.extend(reader().iter().map(|read| (read.seq, read.run)));
            (all.len() >= count).then_some(())
        });
        all.extend(reader().iter().map(|read| (read.seq, read.run)));
        assert_eq!(all.len(), count, "{all:?}");
        all
    }

    /// What a reader that stands there takes of a partition's stream, up to the newest message.
    #[track_caller]
    fn taken(&self, partition: &Partition, mut watermark: Watermark) -> Vec<Read> {
        let (mut reader, mut taken) = (self.reader(partition.partition), Vec::new());
        let mut last_came = Instant::now();
        while watermark.newest() < partition.seq {
            for read in reader() {
                last_came = Instant::now();
                if let Arrival::Next { missing } = watermark.meet(read.seq, read.run) {
                    assert_eq!(missing, 0, "before {read:?}");
                    taken.push(read);
                }
            }
            assert!(last_came.elapsed() < PATIENCE, "{partition:?} ends at {watermark:?}");
        }
        taken
    }

    /// What a reader takes of all the streams: each sequence once, and in its order.
    #[track_caller]
    fn all_taken(&self) -> Vec<Vec<Read>> {
        let one = |partition: &Partition| {
            let taken = self.taken(partition, Watermark::after(0));
            assert!(taken.iter().map(|read| read.seq).eq(1..=partition.seq), "{partition:?}: {taken:?}");
            taken
        };
        self.partitions().iter().map(one).collect()
    }

    fn session(&self) -> Session {
        Session::open(&self.broker, "test").unwrap()
    }

    fn delete_stream(&self, partition: i32) {
        broker::delete_queues(&mut self.session(), &[partition_queue(partition)]).unwrap();
    }

    fn has_stream(&self, partition: i32) -> bool {
        !broker::existing(&mut self.session(), &[partition_queue(partition)]).unwrap().is_empty()
    }

    /// From now on `sql` runs before messages that are confirmed are removed: amid the transaction that has published them.
    fn before_removal(&self, sql: &str) {
        self.database.execute(&format!(
            "CREATE FUNCTION before_removal() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN PERFORM {sql}; RETURN NULL; END $$"
        ));
        self.database
            .execute("CREATE TRIGGER before_removal BEFORE DELETE ON message_outbox EXECUTE FUNCTION before_removal()");
    }

    fn nothing_before_removal(&self) {
        self.database.execute("DROP FUNCTION before_removal CASCADE");
    }
}

fn texts(read: &[Read]) -> Vec<&str> {
    read.iter().map(|read| &*read.text).collect()
}

/// Relays until it's told to stop.
fn run(mut relay: LogRelay, stop: &Stop) {
    while !stop.is_requested() {
        match relay.round() {
            Ok(Round::Relayed) => {}
            Ok(Round::Idle) => _ = stop.wait(Duration::from_millis(2)),
            Ok(Round::BrokerAway) | Err(_) => _ = stop.wait(Duration::from_millis(50)),
        }
    }
    relay.close();
}

/// Stops the relays however the test ends.
struct Stopping<'a>(&'a Stop);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.request();
    }
}

/// Accepts messages one after another, in alternation of a key of their own and of any partition, until it's told to stop. Returns
/// how many of each.
fn produce(stage: &Stage, producer: usize, stop: &Stop) -> usize {
    let key = format!("key {producer}");
    let mut rounds = 0;
    while !stop.is_requested() {
        stage.append(&New { text: &rounds.to_string(), key: Some(&key), ..ANY });
        stage.append(&New { text: &format!("{producer}/{rounds}"), ..ANY });
        rounds += 1;
    }
    rounds
}

/// Asserts that all that producers have accepted is there once, and each key's in its order.
#[track_caller]
fn assert_complete(taken: &[Vec<Read>], produced: &[usize]) {
    let mut others: Vec<&str> = Vec::new();
    let mut of_keys = BTreeMap::<&str, Vec<&str>>::new();
    for (partition, read) in (0..).zip(taken) {
        for Read { key, text, .. } in read {
            match key {
                Some(key) => {
                    assert_eq!(key_hash(key) % 4, partition);
                    of_keys.entry(key).or_default().push(text);
                }
                None => others.push(text),
            }
        }
    }
    let mut expected: Vec<String> = Vec::new();
    for (producer, &rounds) in produced.iter().enumerate() {
        let numbers: Vec<_> = (0..rounds).map(|round| round.to_string()).collect();
        assert_eq!(of_keys.remove(&*format!("key {producer}")).unwrap_or_default(), numbers);
        expected.extend(numbers.iter().map(|number| format!("{producer}/{number}")));
    }
    assert!(of_keys.is_empty());
    others.sort_unstable();
    expected.sort_unstable();
    assert_eq!(others, expected);
}

#[test]
fn messages_reach_their_partitions_in_the_order_in_which_they_were_accepted() {
    let stage = Stage::new();
    stage.append(&New { text: "chosen", partition: Some(2), count: Some(25), key: Some("k") });
    stage.append(&New { text: "of a key", key: Some("k"), count: Some(10), ..ANY });
    stage.append(&New { text: "any", count: Some(40), ..ANY });
    let mut relay = stage.relay(10);
    assert_eq!(relay.round().unwrap(), Round::Relayed, "the first are taken");
    stage.relay_all(&mut relay);
    assert_eq!((relay.round().unwrap(), stage.waiting()), (Round::Idle, 0));

    let home = key_hash("k") % 4;
    let numbered = |text: &str, count: i64| (0..count).map(|n| format!("{text} #{n}")).collect::<Vec<_>>();
    for (partition, read) in (0..).zip(stage.all_taken()) {
        let mut expected = Vec::new();
        if partition == 2 {
            expected.extend(numbered("chosen", 25));
        }
        if partition == home {
            expected.extend(numbered("of a key", 10));
        }
        let of_key = expected.len();
        let texts = texts(&read);
        assert_eq!(texts[..of_key], expected);
        assert!(read.iter().enumerate().all(|(n, read)| read.key.as_deref() == (n < of_key).then_some("k")));
        // In turn, and in their order.
        let numbers = texts[of_key..].iter().map(|text| text.strip_prefix("any #").unwrap().parse::<i64>().unwrap());
        let numbers: Vec<_> = numbers.collect();
        assert!(numbers.len() == 10 && numbers.windows(2).all(|pair| pair[1] == pair[0] + 4), "{numbers:?}");
        // Ten at a time: each run begins where its round began.
        let runs = stage.raw(partition, read.len());
        assert!(runs.iter().all(|(seq, run)| *run == (seq - 1) / 10 * 10 + 1), "{runs:?}");
    }
}

#[test]
fn texts_that_are_large_together_go_in_several_rounds() {
    let stage = Stage::new();
    let text = "x".repeat(65_000);
    stage.append(&New { text: &text, partition: Some(0), count: Some(150), ..ANY });
    stage.relay_all(&mut stage.relay(1000));
    // Four mebibytes hold 64 of them, and the one that is begun within.
    let runs: Vec<_> = stage.raw(0, 150).into_iter().map(|(_, run)| run).collect();
    assert_eq!((runs[64], runs[65], runs[149]), (1, 66, 131));
}

#[test]
fn relays_side_by_side_keep_the_order_of_each_partition() {
    let stage = Stage::new();
    let (stop, no_more) = (Stop::new(), Stop::new());
    let produced: Vec<_> = thread::scope(|scope| {
        let _stopping = (Stopping(&stop), Stopping(&no_more));
        for _ in 0..2 {
            scope.spawn(|| run(stage.relay(20), &stop));
        }
        let (stage, no_more) = (&stage, &no_more);
        let producers: Vec<_> = (0..4).map(|producer| scope.spawn(move || produce(stage, producer, no_more))).collect();
        eventually_within(PATIENCE, "much is published", || {
            stage.partitions().iter().all(|partition| partition.seq > 500).then_some(())
        });
        no_more.request();
        let produced = producers.into_iter().map(|producer| producer.join().unwrap()).collect();
        eventually_within(PATIENCE, "all is published", || (stage.waiting() == 0).then_some(()));
        produced
    });
    let taken = stage.all_taken();
    assert_complete(&taken, &produced);
    // Nothing failed, so nothing was published twice.
    for (partition, taken) in (0..).zip(&taken) {
        stage.raw(partition, taken.len());
    }
}

#[test]
fn what_is_published_when_its_transaction_is_lost_comes_again_under_the_same_sequences() {
    let stage = Stage::new();
    let mut relay = stage.relay(100);
    stage.append(&New { count: Some(3), partition: Some(1), ..ANY });
    stage.relay_all(&mut relay);
    stage.append(&New { count: Some(4), partition: Some(1), ..ANY });
    stage.before_removal("pg_terminate_backend(pg_backend_pid())");
    assert_eq!(relay.round().unwrap(), Round::Relayed, "they are taken");
    for _ in 0..2 {
        relay.round().unwrap_err();
    }
    assert_eq!(stage.waiting(), 4);
    stage.nothing_before_removal();
    stage.append(&New { text: "later", partition: Some(1), ..ANY });
    stage.relay_all(&mut relay);

    let (first, again) = ([(1, 1), (2, 1), (3, 1)], [(4, 4), (5, 4), (6, 4), (7, 4)]);
    assert_eq!(stage.raw(1, 16), [&first[..], &again, &again, &again, &[(8, 8)]].concat());
    let taken = &stage.all_taken()[1];
    let expected = ["any #0", "any #1", "any #2", "any #0", "any #1", "any #2", "any #3", "later"];
    assert_eq!(texts(taken), expected);
}

/// The service as a process, killed with the value.
struct Process(Child);

impl Process {
    fn start(stage: &Stage) -> Self {
        let child = Command::new("setpriv")
            // However the test ends.
            .args(["--pdeathsig", "KILL", "--", env!("CARGO_BIN_EXE_outbox-relay")])
            .env("MURMURATION__DATABASE__URL", stage.database.url())
            .env("MURMURATION__BROKER__URL", stage.broker.url.expose())
            // Whatever it gives up it publishes once more.
            .env("MURMURATION__BROKER__HEARTBEAT_S", "60")
            .env("MURMURATION__BROKER__CONFIRM_TIMEOUT_MS", "300000")
            .env("MURMURATION__DATABASE__STATEMENT_TIMEOUT_MS", "600000")
            .env("MURMURATION__DATABASE__CALL_TIMEOUT_MS", "700000")
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

#[test]
fn a_relay_that_is_killed_between_publishing_and_committing_is_followed_by_one_that_publishes_the_same() {
    let stage = Stage::new();
    stage.append(&New { count: Some(5), partition: Some(3), ..ANY });
    let process = Process::start(&stage);
    eventually_within(PATIENCE, "it publishes", || (stage.waiting() == 0).then_some(()));

    stage.before_removal("pg_advisory_xact_lock_shared(1)");
    let mut gate = stage.database.database().connection().unwrap();
    sql::execute(&mut gate, "SELECT pg_advisory_lock(1)").unwrap();
    stage.append(&New { count: Some(1000), partition: Some(3), ..ANY });
    let held = "SELECT count(*) AS n FROM pg_locks JOIN pg_database d ON d.oid = database
                WHERE d.datname = current_database() AND locktype = 'advisory' AND NOT granted";
    eventually_within(PATIENCE, "it has published, and not committed", || {
        (stage.database.count(held) == 1).then_some(())
    });
    // The outbox doesn't wait for that.
    let tweet = Envelope::new(exchange::PUBLISH_TWEET, queue::PUBLISH_TWEET, b"{}".to_vec());
    stage.database.database().transaction(|conn| outbox::push(conn, std::slice::from_ref(&tweet))).unwrap();
    eventually_within(PATIENCE, "the outbox goes on", || {
        (stage.database.count("SELECT count(*) AS n FROM outbox") == 0).then_some(())
    });
    drop(process);
    sql::execute(&mut gate, "SELECT pg_advisory_unlock(1)").unwrap();
    stage.relay_all(&mut stage.relay(100));

    let begun: Vec<_> = (1..=5).map(|seq| (seq, 1)).chain((6..=1005).map(|seq| (seq, 6))).collect();
    let again: Vec<_> = (6..=1005).map(|seq| (seq, 6)).collect();
    assert_eq!(stage.raw(3, 2005), [begun, again].concat());
    assert_eq!(stage.all_taken()[3].len(), 1005);
}

#[test]
fn a_row_that_is_removed_by_hand_leaves_its_sequence_unused() {
    let stage = Stage::new();
    let mut relay = stage.relay(100);
    stage.append(&New { count: Some(7), partition: Some(0), ..ANY });
    assert_eq!(relay.round().unwrap(), Round::Relayed, "they are taken");
    let removed = "DELETE FROM message_outbox WHERE text IN ('any #0', 'any #1', 'any #4')";
    assert_eq!(stage.database.execute(removed), 3);
    stage.relay_all(&mut relay);
    assert_eq!(stage.raw(0, 4), [(3, 3), (4, 3), (6, 6), (7, 6)]);

    stage.append_to(0, "gone");
    assert_eq!(relay.round().unwrap(), Round::Relayed, "it is taken");
    assert_eq!(stage.database.execute("DELETE FROM message_outbox"), 1);
    stage.append_to(0, "there");
    stage.relay_all(&mut relay);
    assert_eq!(stage.raw(0, 5)[4], (9, 9));
}

#[test]
fn a_stream_that_is_deleted_is_declared_again() {
    let stage = Stage::new();
    let mut relay = stage.relay(100);
    stage.append(&New { count: Some(40), ..ANY });
    stage.relay_all(&mut relay);
    stage.delete_stream(1);
    stage.append(&New { count: Some(40), ..ANY });
    stage.relay_all(&mut relay);
    assert_eq!(stage.raw(1, 10), (11..=20).map(|seq| (seq, 11)).collect::<Vec<_>>());
    for partition in [0, 2, 3] {
        assert_eq!(stage.raw(partition, 20).len(), 20);
    }
    broker::delete_exchanges(&mut stage.session(), &[MESSAGE.into()]).unwrap();
    stage.append(&New { count: Some(40), ..ANY });
    stage.relay_all(&mut relay);
    assert_eq!(stage.raw(1, 20)[19], (30, 21));
}

#[test]
fn a_stream_that_is_deleted_amid_the_traffic_is_declared_again_and_nothing_waits_for_ever() {
    let stage = Stage::new();
    let (stop, no_more) = (Stop::new(), Stop::new());
    let produced: Vec<_> = thread::scope(|scope| {
        let _stopping = (Stopping(&stop), Stopping(&no_more));
        scope.spawn(|| run(stage.relay(50), &stop));
        let (stage, no_more) = (&stage, &no_more);
        let producers: Vec<_> = (0..3).map(|producer| scope.spawn(move || produce(stage, producer, no_more))).collect();
        for _ in 0..3 {
            let before = stage.partitions()[1].seq;
            eventually_within(PATIENCE, "the partition moves", || {
                (stage.partitions()[1].seq > before + 50).then_some(())
            });
            stage.delete_stream(1);
            eventually_within(PATIENCE, "it's declared again", || stage.has_stream(1).then_some(()));
        }
        no_more.request();
        let produced = producers.into_iter().map(|producer| producer.join().unwrap()).collect();
        eventually_within(PATIENCE, "all is published", || (stage.waiting() == 0).then_some(()));
        produced
    });
    let partitions = stage.partitions();
    let total: i64 = partitions.iter().map(|partition| partition.seq).sum();
    assert_eq!(i64::try_from(2 * produced.iter().sum::<usize>()), Ok(total), "each has a sequence");
    for partition in &partitions {
        let begin = if partition.partition == 1 { Watermark::beginning(0) } else { Watermark::after(0) };
        let taken = stage.taken(partition, begin);
        let first = taken[0].seq;
        assert!(first == 1 || partition.partition == 1);
        assert!(taken.iter().map(|read| read.seq).eq(first..=partition.seq), "{partition:?}: {taken:?}");
    }
}

#[test]
fn a_partition_that_takes_nothing_waits_and_the_others_go_on() {
    let mut stage = Stage::new();
    stage.broker.confirm_timeout_ms = 300_000;
    let mut relay = stage.relay(10);
    stage.append(&New { count: Some(4), ..ANY });
    stage.relay_all(&mut relay);
    // A queue of another kind is where the stream was, so it can't be declared.
    stage.delete_stream(2);
    let queue = Queue { name: partition_queue(2), expiry: Expiry::Never };
    broker::declare(&mut stage.session(), &Topology { queues: vec![queue], ..Topology::default() }).unwrap();
    // Nor by one that connects only now.
    for mut relay in [relay, stage.relay(10)] {
        for _ in 0..10 {
            stage.append(&New { count: Some(40), ..ANY });
            let (begin, mut rounds) = (Instant::now(), 0);
            eventually_within(PATIENCE, "the others are published", || {
                relay.round().expect("the database answers");
                rounds += 1;
                stage.partitions().iter().all(|one| one.partition == 2 || one.waiting == 0).then_some(())
            });
            // No wait for the one is a wait of the others: neither for its confirms, nor until it's tried again, which is
            // seconds later in the end, where a hundred rounds go by in one.
            assert!(rounds < 100 && begin.elapsed() < Duration::from_secs(60), "{rounds} in {:?}", begin.elapsed());
        }
    }
    assert_eq!((stage.waiting(), stage.partitions()[2].seq), (200, 11));
    let tweet = Envelope::new(exchange::PUBLISH_TWEET, queue::PUBLISH_TWEET, b"{}".to_vec());
    stage.database.database().transaction(|conn| outbox::push(conn, std::slice::from_ref(&tweet))).unwrap();
    let database = stage.database.database().clone();
    let mut outbox = Relay::new(database, &stage.broker, Topology::fleet(&[]), log_retention(), 10);
    assert_eq!(outbox.round().unwrap(), Round::Relayed, "the outbox has nothing to do with it");
    stage.delete_stream(2);
    stage.relay_all(&mut stage.relay(100));
    let taken = stage.taken(&stage.partitions()[2], Watermark::beginning(0));
    assert!(taken.iter().map(|read| read.seq).eq(2..=201));
}

#[test]
fn partitions_that_are_added_get_messages() {
    let stage = Stage::new();
    let (mut before, mut after) = (stage.relay(100), stage.relay(100));
    stage.append(&New { count: Some(4), ..ANY });
    stage.relay_all(&mut before);
    let mut conn = stage.database.database().connection().unwrap();
    broker::declare(&mut stage.session(), &Topology::log(6, log_retention())).unwrap();
    partitions::extend_to(&mut conn, 6).unwrap();
    stage.append(&New { count: Some(6), ..ANY });
    stage.append_to(5, "chosen");
    // By one that connected before, and once more by one that connects now.
    stage.relay_all(&mut before);
    stage.append_to(5, "chosen again");
    stage.relay_all(&mut after);
    let taken = stage.all_taken();
    assert_eq!(taken.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 2, 2, 1, 3]);
    assert_eq!(texts(&taken[5])[1..], ["chosen", "chosen again"]);
    // And even where somebody forgot to declare them.
    partitions::extend_to(&mut conn, 7).unwrap();
    stage.append_to(6, "chosen");
    stage.relay_all(&mut before);
    assert_eq!(texts(&stage.all_taken()[6]), ["chosen"]);
}

#[test]
fn connections_that_the_broker_closes_lose_and_double_nothing() {
    let stage = Stage::new();
    let (stop, no_more) = (Stop::new(), Stop::new());
    let produced: Vec<_> = thread::scope(|scope| {
        let _stopping = (Stopping(&stop), Stopping(&no_more));
        for _ in 0..2 {
            scope.spawn(|| run(stage.relay(50), &stop));
        }
        let (stage, no_more) = (&stage, &no_more);
        let producers: Vec<_> = (0..2).map(|producer| scope.spawn(move || produce(stage, producer, no_more))).collect();
        let vhost = stage.vhost.as_ref().unwrap();
        for _ in 0..5 {
            let before = stage.partitions()[0].seq;
            eventually_within(PATIENCE, "the partition moves", || {
                (stage.partitions()[0].seq > before + 50).then_some(())
            });
            eventually_within(PATIENCE, "connections are closed by the server", || {
                (vhost.close_connections() > 0).then_some(())
            });
        }
        no_more.request();
        let produced = producers.into_iter().map(|producer| producer.join().unwrap()).collect();
        eventually_within(PATIENCE, "all is published", || (stage.waiting() == 0).then_some(()));
        produced
    });
    assert_complete(&stage.all_taken(), &produced);
}

#[test]
fn a_broker_that_goes_and_comes_back_gets_everything() {
    let mut rabbitmq = PrivateRabbitmq::new();
    rabbitmq.start();
    let mut stage = Stage::at(&rabbitmq.url());
    // Streams that are just coming back may never confirm what they are sent.
    stage.broker.confirm_timeout_ms = 5000;
    let stage = stage;
    let (stop, no_more) = (Stop::new(), Stop::new());
    let produced: Vec<_> = thread::scope(|scope| {
        let _stopping = (Stopping(&stop), Stopping(&no_more));
        scope.spawn(|| run(stage.relay(100), &stop));
        let (stage, no_more) = (&stage, &no_more);
        let producers: Vec<_> = (0..2).map(|producer| scope.spawn(move || produce(stage, producer, no_more))).collect();
        for _ in 0..2 {
            let before = stage.partitions()[0].seq;
            eventually_within(PATIENCE, "the partition moves", || {
                (stage.partitions()[0].seq > before + 200).then_some(())
            });
            rabbitmq.write_down();
            rabbitmq.kill();
            let behind = stage.waiting() + 200;
            eventually_within(PATIENCE, "messages pile up", || (stage.waiting() > behind).then_some(()));
            rabbitmq.start();
        }
        no_more.request();
        let produced = producers.into_iter().map(|producer| producer.join().unwrap()).collect();
        eventually_within(PATIENCE, "all is published", || (stage.waiting() == 0).then_some(()));
        produced
    });
    assert_complete(&stage.all_taken(), &produced);
}
