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
    io::{BufRead as _, BufReader},
    ops::Range,
    process::{Child, Command},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use storage::{
    admin, leases, resharding,
    streams::{self, Layout},
};
use test_support::{TestDatabase, TestVhost, broker_settings, eventually, log_retention};

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
        self.fleetctl(&["reshard", ACCOUNT_EVENT, "--shards", &shards.to_string()])
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
    let mut child = Running::start(stage.reshard(8));
    stage.await_layout(8, 32);
    // These go by the new number already.
    stage.accept();
    stage.relay();
    child.await_said("account_event: 24 queues unbound: account_event.s008 ");
    let old = accounts(16, 8..16) + 2 * accounts(32, 8..32);
    assert!(child.is_running() && stage.depths().len() == 32, "the queues aren't empty");
    stage.drain(8..32, old);
    stage.await_layout(8, 8);
    child.await_said("account_event: they are empty");
    assert!(child.is_running() && stage.depths().len() == 32, "the lease is live");
    leases::release(&mut conn, "worker-1", &[&held]).unwrap();
    let report = child.end(0);
    assert!(report.ends_with("account_event: 24 queues deleted\naccount_event: 8 shards in 8 queues\n"), "{report}");
    let depths = stage.await_messages(400 - old);
    assert_eq!(depths.keys().cloned().collect::<Vec<_>>(), names(0..8));
    assert!(stage.is_bound(7) && !stage.is_bound(8));
    assert_eq!(stage.leases(), 8);

    let report = run(stage.reshard(8), 0);
    assert!(!report.contains("deleted") && report.ends_with("8 shards in 8 queues\n"), "{report}");
}

#[test]
fn an_interrupted_reshard_goes_on_to_the_same_or_another_number() {
    let stage = Stage::new();
    stage.accept();
    stage.relay();
    let child = Running::start(stage.reshard(4));
    child.await_said("12 queues unbound");
    interrupt(&child.child);
    assert!(child.end(130).ends_with("interrupted; the same command goes on from here\n"));
    assert_eq!(stage.layout(), Layout { shards: 4, queues: 16 });

    // To more shards than that: their queues are in use again, and those beyond are still to be emptied.
    let child = Running::start(stage.reshard(12));
    child.await_said("4 queues unbound: account_event.s012 account_event.s013 account_event.s014 account_event.s015\n");
    stage.drain(12..16, accounts(16, 12..16));
    child.end(0);
    assert_eq!(stage.layout(), Layout { shards: 12, queues: 12 });
    stage.await_messages(accounts(16, 0..12));
    assert!(stage.is_bound(5) && stage.is_bound(11) && !stage.is_bound(12));
    stage.drain(0..12, accounts(16, 0..12) + 2);
    assert!(run(stage.reshard(4), 0).contains("8 queues deleted"), "they are empty");
    assert_eq!(stage.depths().len(), 4);
}

#[test]
fn a_reshard_that_died_before_it_had_deleted_the_queues_is_finished() {
    let stage = Stage::new();
    stage.accept();
    stage.relay();
    let child = Running::start(stage.reshard(2));
    child.await_said("14 queues unbound");
    // As if it had been killed when it had just told processes to let go, with one of them giving a message back.
    interrupt(&child.child);
    child.end(130);
    let mut conn = stage.database.database().connection().unwrap();
    let layout = Layout { shards: 2, queues: 2 };
    assert!(resharding::divide_within(&mut conn, ACCOUNT_EVENT, layout, Duration::from_secs(60)).unwrap());
    stage.drain(3..16, accounts(16, 3..16));
    let child = Running::start(stage.reshard(2));
    // Processes are told to work on it once more.
    stage.await_layout(2, 3);
    stage.drain(2..3, accounts(16, 2..3));
    assert!(child.end(0).ends_with("14 queues deleted\naccount_event: 2 shards in 2 queues\n"));
    assert_eq!(stage.depths().keys().cloned().collect::<Vec<_>>(), names(0..2));
    assert_eq!(stage.layout(), layout);
}

#[test]
fn a_reshard_that_cant_be_is_refused_and_changes_nothing() {
    let stage = Stage::new();
    for (shards, why) in [("0", "0 is not in 1..=256"), ("257", "257 is not in 1..=256"), ("x", "invalid digit")] {
        let complaint = complaint(stage.fleetctl(&["reshard", ACCOUNT_EVENT, "--shards", shards]), 2);
        assert!(complaint.contains(why), "{complaint}");
    }
    assert!(complaint(stage.fleetctl(&["reshard", "nothing", "--shards", "8"]), 2).contains("unknown stream"));
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
    assert!(refused.contains("account_event is being resharded by somebody else just now"), "{refused}");
    assert_eq!((stage.layout(), stage.depths().len()), (Layout { shards: 16, queues: 16 }, 16));
}

#[test]
fn accepting_events_is_not_held_up_for_long_by_one_who_takes_long_over_it() {
    let stage = Stage::new();
    let mut slow = stage.database.database().connection().unwrap();
    admin::execute(&mut slow, "BEGIN").unwrap();
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
    admin::execute(&mut slow, "COMMIT").unwrap();
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

    let mut blind = stage.fleetctl(&["shards", "show", ACCOUNT_EVENT, "--json"]);
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
    assert!(complaint(stage.fleetctl(&["shards", "show", "nothing"]), 2).contains("unknown stream"));
}
