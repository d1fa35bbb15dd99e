//! Shards that come and go.

use crate::{
    NOWHERE, complaint, fleetctl, interrupt, run, spawn,
    streams::{accept, park},
};
use broker::{Consumer, Session};
use domain::{
    stream::{ACCOUNT_EVENT, AccountId, Payload, key_hash, shard, shard_queue, shard_resource, shard_routing_key},
    topology::Topology,
};
use outbox_relay::{Relay, Round};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    ops::Range,
    process::{Child, Command},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use storage::{
    PgConnection, leases, resharding,
    streams::{self, Layout},
};
use test_support::{TestDatabase, TestVhost, broker_settings, eventually, log_retention, sql};

struct Stage {
    database: TestDatabase,
    vhost: TestVhost,
}

impl Stage {
    fn new() -> Self {
        let stage = Self { database: TestDatabase::new(), vhost: TestVhost::new() };
        run(stage.fleetctl(&["topology", "declare"]), 0);
        stage
    }

    fn fleetctl(&self, args: &[&str]) -> Command {
        let mut command = fleetctl(&self.database, args);
        command.env("AMQP_URL", self.vhost.url());
        command
    }

    fn reshard(&self, shards: i32) -> Command {
        self.fleetctl(&["reshard", "--shards", &shards.to_string()])
    }

    fn layout(&self) -> Layout {
        streams::layout(&mut self.database.database().connection().unwrap(), ACCOUNT_EVENT).unwrap()
    }

    fn await_layout(&self, shards: i32, queues: i32) {
        let layout = Layout { shards, queues };
        eventually(&format!("{layout:?}"), || (self.layout() == layout).then_some(()));
    }

    /// Accepts an event of each of a hundred accounts, and leaves their messages in the outbox.
    fn accept(&self) {
        (0..100).for_each(|n| accept(&self.database, &format!("a{n}"), &["1"]));
    }

    /// Brings what is in the outbox to the broker.
    fn relay(&self) {
        let mut relay = Relay::new(
            self.database.database().clone(),
            &broker_settings(self.vhost.url()),
            Topology::fleet(&[]),
            log_retention(),
            1000,
        );
        while relay.round().unwrap() != Round::Idle {}
        relay.close();
    }

    /// How many messages are in each of the queues that there are.
    fn depths(&self) -> BTreeMap<String, u32> {
        let mut session = Session::open(&broker_settings(self.vhost.url()), "test").unwrap();
        let depths = broker::existing(&mut session, &names(0..64)).unwrap();
        session.close(Instant::now() + Duration::from_secs(5));
        depths.into_iter().map(|queue| (queue.name, queue.messages)).collect()
    }

    /// The same, as soon as there are so many in all: the broker says of a queue that can't answer at once that it's empty.
    #[track_caller]
    fn await_messages(&self, count: usize) -> BTreeMap<String, u32> {
        let mut depths = BTreeMap::new();
        eventually(&format!("there are {count} messages"), || {
            depths = self.depths();
            (depths.values().sum::<u32>() as usize == count).then_some(())
        });
        depths
    }

    /// Takes so many messages out of the queues.
    fn drain(&self, shards: Range<i32>, count: usize) {
        let mut consumer = Consumer::new(&broker_settings(self.vhost.url()), "test", names(shards), 1000);
        let mut taken = 0;
        eventually("the messages come", || {
            let batch = consumer.next_batch(1000, Duration::ZERO, Duration::from_millis(100)).unwrap();
            taken += batch.deliveries.len();
            consumer.ack(batch);
            (taken >= count).then_some(())
        });
        // The acknowledgements get there before the goodbye does.
        consumer.close(Instant::now() + Duration::from_secs(5));
        assert_eq!(taken, count);
    }

    fn is_bound(&self, shard: i32) -> bool {
        self.vhost.publish(ACCOUNT_EVENT, &shard_routing_key(shard), &json!({}), b"{}")
    }

    fn leases(&self) -> i64 {
        self.database.count("SELECT count(*) AS n FROM lease")
    }
}

fn names(shards: Range<i32>) -> Vec<String> {
    shards.map(|shard| shard_queue(ACCOUNT_EVENT, shard)).collect()
}

/// How many of the hundred accounts belong to these shards.
fn accounts(shards: i32, those: Range<i32>) -> usize {
    (0..100).filter(|n| those.contains(&shard(key_hash(&format!("a{n}")), shards))).count()
}

/// A reshard under way.
struct Running {
    child: Child,
    said: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
}

impl Running {
    fn start(command: Command) -> Self {
        let mut child = spawn(command);
        let said = Arc::<Mutex<String>>::default();
        let (stdout, saying) = (child.stdout.take().unwrap(), said.clone());
        let reader = thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                saying.lock().unwrap().push_str(&format!("{line}\n"));
            }
        });
        Self { child, said, reader }
    }

    #[track_caller]
    fn await_said(&self, text: &str) {
        eventually(text, || self.said.lock().unwrap().contains(text).then_some(()));
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    #[track_caller]
    fn end(self, status: i32) -> String {
        let output = self.child.wait_with_output().unwrap();
        self.reader.join().unwrap();
        let said = self.said.lock().unwrap().clone();
        assert_eq!(output.status.code(), Some(status), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
        said
    }
}

#[test]
fn a_stream_is_resharded_up_and_down_and_no_message_is_lost_with_a_queue() {
    let stage = Stage::new();
    stage.accept();
    stage.relay();
    let report = run(stage.reshard(32), 0);
    assert!(report.starts_with("account_event: 16 shards in 16 queues, to be 32\n"), "{report}");
    assert!(report.ends_with("account_event: 32 shards in 32 queues\n"), "{report}");
    assert_eq!(stage.layout(), Layout { shards: 32, queues: 32 });
    stage.accept();
    stage.relay();
    let depths = stage.await_messages(200);
    assert_eq!(depths.keys().cloned().collect::<Vec<_>>(), names(0..32));
    assert_eq!(depths[&shard_queue(ACCOUNT_EVENT, 31)] as usize, accounts(32, 31..32), "by the new number");

    // Downwards, with messages that the relay hasn't brought yet, and a process that holds an old shard.
    stage.accept();
    let held = shard_resource(ACCOUNT_EVENT, 20);
    let mut conn = stage.database.database().connection().unwrap();
    let ttl = Duration::from_secs(600);
    assert_eq!(leases::claim(&mut conn, "worker-1", ttl, &[&held], 1).unwrap().len(), 1);
    let mut command = stage.reshard(8);
    command.env("MURMURATION__SEQUENCED__LEASE_TTL_MS", "600000");
    let mut child = Running::start(command);
    stage.await_layout(8, 32);
    // These go by the new number already.
    stage.accept();
    stage.relay();
    child.await_said("account_event: 24 queues unbound: account_event.s008 ");
    let old = accounts(16, 8..16) + 2 * accounts(32, 8..32);
    stage.await_layout(8, 8);
    eventually("it waits for the lease", || child.is_running().then_some(()));
    // What somebody takes meanwhile isn't missed.
    stage.drain(8..12, accounts(16, 8..12) + 2 * accounts(32, 8..12));
    let old = old - accounts(16, 8..12) - 2 * accounts(32, 8..12);
    assert!(child.is_running() && stage.depths().len() == 32, "the lease is live");
    leases::release(&mut conn, "worker-1", &[&held]).unwrap();
    let report = child.end(0);
    let moved = format!(
        "account_event: they are empty: {old} messages were moved to account_event.s000\n\
         account_event: 24 queues deleted\naccount_event: 8 shards in 8 queues\n"
    );
    assert!(report.ends_with(&moved), "{report}");
    let depths = stage.await_messages(400 - accounts(16, 8..12) - 2 * accounts(32, 8..12));
    assert_eq!(depths.keys().cloned().collect::<Vec<_>>(), names(0..8));
    assert!(stage.is_bound(7) && !stage.is_bound(8));
    assert_eq!(stage.leases(), 8);

    let report = run(stage.reshard(8), 0);
    assert!(!report.contains("deleted") && report.ends_with("8 shards in 8 queues\n"), "{report}");
}

/// What the broker says of a queue that is too busy to answer: no messages, no consumers.
#[test]
fn a_queue_that_looks_empty_and_isnt_keeps_its_messages() {
    let stage = Stage::new();
    stage.accept();
    stage.relay();
    stage.await_messages(100);
    let (url, told) = told_nothing_of_depths(stage.vhost.url());
    let mut command = stage.reshard(4);
    command.env("AMQP_URL", url);
    run(command, 0);
    assert!(told.load(Ordering::Acquire) >= 12, "it has looked");
    assert_eq!(stage.await_messages(100).len(), 4);
}

/// A broker that tells of every queue that it's empty and unused, at the URL that is returned; and how often it has.
fn told_nothing_of_depths(url: &str) -> (String, Arc<AtomicUsize>) {
    const HOST: &str = "127.0.0.1:";
    let listener = TcpListener::bind((HOST.trim_end_matches(':'), 0)).unwrap();
    let (before, behind) = url.rsplit_once(HOST).unwrap();
    let (port, path) = behind.split_once('/').unwrap();
    let (port, told): (u16, _) = (port.parse().unwrap(), Arc::<AtomicUsize>::default());
    let by_way = format!("{before}{HOST}{}/{path}", listener.local_addr().unwrap().port());
    let telling = told.clone();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let server = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let (mut asking, mut asked) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || {
                let _ = std::io::copy(&mut asking, &mut asked);
                let _ = asked.shutdown(Shutdown::Both);
            });
            let telling = telling.clone();
            thread::spawn(move || {
                let (mut server, mut client) = (server, client);
                let _ = forward_frames(&mut server, &mut client, &telling);
                let _ = client.shutdown(Shutdown::Both);
            });
        }
    });
    (by_way, told)
}

/// Frame by frame: its type, the channel, the length, what it holds, and a last byte.
fn forward_frames(server: &mut TcpStream, client: &mut TcpStream, told: &AtomicUsize) -> std::io::Result<()> {
    const DECLARE_OK: [u8; 4] = [0, 50, 0, 11];
    loop {
        let mut head = [0; 7];
        server.read_exact(&mut head)?;
        let length = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        let mut frame = vec![0; length + 1];
        server.read_exact(&mut frame)?;
        if head[0] == 1 && frame.starts_with(&DECLARE_OK) {
            // Its last two numbers are those of messages and of consumers.
            frame[length - 8..length].fill(0);
            told.fetch_add(1, Ordering::Release);
        }
        client.write_all(&head)?;
        client.write_all(&frame)?;
    }
}

#[test]
fn an_interrupted_reshard_goes_on_to_the_same_or_another_number() {
    let stage = Stage::new();
    stage.accept();
    stage.relay();
    let mut conn = stage.database.database().connection().unwrap();
    // Somebody holds a shard that is to go.
    let claim = |conn: &mut PgConnection, shard| {
        let held = shard_resource(ACCOUNT_EVENT, shard);
        leases::announce(conn, &[&held]).unwrap();
        assert_eq!(leases::claim(conn, "worker-1", Duration::from_secs(3600), &[&held], 1).unwrap().len(), 1);
    };
    let patient = |shards| {
        let mut command = stage.reshard(shards);
        command.env("MURMURATION__SEQUENCED__LEASE_TTL_MS", "3600000");
        command
    };
    claim(&mut conn, 5);
    let child = Running::start(patient(4));
    child.await_said("12 queues unbound");
    stage.await_layout(4, 4);
    interrupt(&child.child);
    assert!(child.end(130).ends_with("interrupted; run the same command again to continue\n"));
    assert_eq!(stage.depths().len(), 16);

    // To more shards than that: their queues are in use again, and those beyond are still to be emptied.
    let report = run(patient(12), 0);
    assert!(
        report.contains(
            "4 queues unbound: account_event.s012 account_event.s013 account_event.s014 account_event.s015\n"
        ),
        "{report}"
    );
    assert_eq!(stage.layout(), Layout { shards: 12, queues: 12 });
    stage.await_messages(100);
    assert!(stage.is_bound(5) && stage.is_bound(11) && !stage.is_bound(12));
    leases::release(&mut conn, "worker-1", &[&shard_resource(ACCOUNT_EVENT, 5)]).unwrap();
    assert!(run(stage.reshard(4), 0).contains("8 queues deleted"));
    assert_eq!(stage.await_messages(102).len(), 4);
}

/// Killed before it had deleted the queues; and a process that was frozen all the while, which declares again what it knew.
#[test]
fn queues_that_are_left_over_are_found_and_taken_away_with_the_present_number() {
    let stage = Stage::new();
    run(stage.reshard(2), 0);
    assert_eq!((stage.layout(), stage.leases()), (Layout { shards: 2, queues: 2 }, 2));
    let mut session = Session::open(&broker_settings(stage.vhost.url()), "test").unwrap();
    broker::declare(&mut session, &Topology::stream(ACCOUNT_EVENT, 16)).unwrap();
    assert!(stage.is_bound(15) && stage.is_bound(9));
    let report = run(stage.reshard(2), 0);
    assert!(
        report.contains("2 messages were moved to account_event.s000\naccount_event: 14 queues deleted\n"),
        "{report}"
    );
    assert_eq!(stage.await_messages(2).keys().cloned().collect::<Vec<_>>(), names(0..2));
}

/// Its holder has died, and the clock was set back since.
#[test]
fn a_lease_that_lasts_for_too_long_holds_up_no_reshard() {
    let stage = Stage::new();
    let mut conn = stage.database.database().connection().unwrap();
    let held = shard_resource(ACCOUNT_EVENT, 15);
    leases::claim(&mut conn, "worker-1", Duration::from_secs(3600), &[&held], 1).unwrap();
    run(stage.reshard(8), 0);
    assert_eq!(stage.leases(), 8);
}

#[test]
fn a_reshard_that_cant_be_is_refused_and_changes_nothing() {
    let stage = Stage::new();
    for (shards, why) in [("0", "0 is not in 1..=256"), ("257", "257 is not in 1..=256"), ("x", "invalid digit")] {
        let complaint = complaint(stage.fleetctl(&["reshard", "--shards", shards]), 2);
        assert!(complaint.contains(why), "{complaint}");
    }
    assert!(
        complaint(stage.fleetctl(&["reshard", "--stream", "nothing", "--shards", "8"]), 2).contains("unknown stream")
    );
    let mut away = stage.reshard(8);
    assert!(
        complaint(
            {
                away.env("AMQP_URL", NOWHERE);
                away
            },
            2
        )
        .contains("broker")
    );
    let mut conn = stage.database.database().connection().unwrap();
    let refused = resharding::alone(&mut conn, ACCOUNT_EVENT, |_| complaint(stage.reshard(8), 2)).unwrap().unwrap();
    assert!(refused.contains("account_event is being resharded by another process"), "{refused}");
    assert_eq!((stage.layout(), stage.depths().len()), (Layout { shards: 16, queues: 16 }, 16));
}

#[test]
fn accepting_events_is_not_held_up_for_long_by_one_who_takes_long_over_it() {
    let stage = Stage::new();
    let mut slow = stage.database.database().connection().unwrap();
    sql::execute(&mut slow, "BEGIN").unwrap();
    streams::append(
        &mut slow,
        ACCOUNT_EVENT,
        &[(AccountId::parse("slow").unwrap(), Payload::parse("1").unwrap())],
        None,
    )
    .unwrap();
    let mut child = Running::start(stage.reshard(8));
    let waits = "SELECT count(*) AS n FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    for _ in 0..3 {
        eventually("the reshard waits for it", || (stage.database.count(waits) > 0).then_some(()));
        let began = Instant::now();
        // The slow one hasn't committed: whoever waits for that waits for good.
        accept(&stage.database, "fast", &["1"]);
        assert!(began.elapsed() < Duration::from_secs(30), "took {:?}", began.elapsed());
    }
    assert!(child.is_running());
    sql::execute(&mut slow, "COMMIT").unwrap();
    stage.await_layout(8, 16);
    stage.relay();
    // Of these accounts none had a shard that goes.
    child.end(0);
    stage.await_messages(4);
}

#[test]
fn shards_are_shown_with_holder_and_lag() {
    let stage = Stage::new();
    let layout = Layout { shards: 8, queues: 16 };
    stage.database.database().transaction(|conn| streams::divide(conn, ACCOUNT_EVENT, layout)).unwrap();
    stage.accept();
    stage.relay();
    let parked = (0..100).map(|n| format!("a{n}")).find(|key| shard(key_hash(key), 8) == 3).unwrap();
    park(&stage.database, &parked, "boom");
    let mut conn = stage.database.database().connection().unwrap();
    let resources = [0, 1, 9].map(|shard| shard_resource(ACCOUNT_EVENT, shard));
    let resources: Vec<_> = resources.iter().map(String::as_str).collect();
    let (long, over) = (Duration::from_secs(600), Duration::ZERO);
    leases::attend(&mut conn, "event-processor", "host-17-abcdef", long).unwrap();
    leases::claim(&mut conn, "host-17-abcdef", long, &resources[..2], 2).unwrap();
    leases::claim(&mut conn, "host-18-fedcba", over, &resources[2..], 1).unwrap();

    stage.await_messages(100);
    let messages = |row: &str| row.split_whitespace().next_back()?.parse::<u32>().ok();
    let shown = eventually("all messages are counted", || {
        let shown = run(stage.fleetctl(&["shards", "show"]), 0);
        (shown.lines().skip(1).take(16).filter_map(messages).sum::<u32>() == 100).then_some(shown)
    });
    let rows: Vec<Vec<_>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["SHARD", "QUEUE", "HOLDER", "LEASE", "WAITING", "OLDEST", "PARKED", "MESSAGES"]);
    let (first, third) = (accounts(8, 0..1).to_string(), accounts(8, 3..4));
    assert_eq!(rows[1][..5], ["0", "account_event.s000", "host-17-abcdef", "held", &first]);
    assert_eq!(rows[1][6..], ["s", "0", &first], "it's some seconds old");
    assert_eq!(rows[4][..5], ["3", "account_event.s003", "-", "free", &(third - 1).to_string()]);
    assert_eq!(rows[4][6..], ["s", "1", &third.to_string()]);
    assert_eq!(
        rows[10],
        ["9", "(drain", "only)", "account_event.s009", "host-18-fedcba", "run", "out", "0", "-", "0", "0"]
    );
    assert_eq!(rows[18], ["PROCESS", "SHARDS", "LAST", "SEEN"]);
    assert_eq!(rows[19][..2], ["host-17-abcdef", "2"]);
    assert_eq!(rows.len(), 20);

    let mut blind = stage.fleetctl(&["shards", "show", "--stream", ACCOUNT_EVENT, "--json"]);
    let report: Value = serde_json::from_str(&run(
        {
            blind.env("AMQP_URL", NOWHERE);
            blind
        },
        0,
    ))
    .unwrap();
    assert_eq!((&report["shardCount"], &report["queueCount"]), (&json!(8), &json!(16)));
    let shard = &report["shards"][9];
    assert_eq!((&shard["drainOnly"], &shard["runOut"], &shard["messages"]), (&json!(true), &json!(true), &Value::Null));
    assert!(report["queuesOutOfSight"].is_string());
    assert!(complaint(stage.fleetctl(&["shards", "show", "--stream", "nothing"]), 2).contains("unknown stream"));
}
