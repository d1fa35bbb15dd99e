//! Event processors as processes, with a database and a broker of their own.

use broker::{Publisher, Session};
use domain::{
    Envelope,
    stream::{ACCOUNT_EVENT, SHARDS_MAX, shard_resource, shard_routing_key},
    topology::{Topology, queue},
};
use outbox_relay::{Relay, Round};
use process::Stop;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use storage::{
    Database, leases,
    parked::{self, Parked},
};
use test_support::{TestDatabase, TestVhost, broker_settings, eventually_within, log_retention};

/// How long it may take until everything has come to rest, on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// Short waits: what takes seconds in production takes less here.
const SETTINGS: [(&str, &str); 9] = [
    ("MURMURATION__EVENT_PROCESSOR__SIMULATE_FAILURES", "true"),
    ("MURMURATION__EVENT_PROCESSOR__WORK_MS", "1..5"),
    ("MURMURATION__EVENT_PROCESSOR__LANES", "64"),
    ("MURMURATION__SEQUENCED__LEASE_TTL_MS", "800"),
    ("MURMURATION__SEQUENCED__LEASE_RENEW_MS", "100"),
    ("MURMURATION__SEQUENCED__SWEEP_MS", "100"),
    ("MURMURATION__WORKER__RETRY_DELAYS_MS", "50,100"),
    ("MURMURATION__HEALTH__PORT", "0"),
    ("RUST_LOG", "info"),
];

/// The attempts that the settings allow.
pub(crate) const ATTEMPTS: i32 = 3;

/// No event.
const FENCE: &[u8] = b"fence";

/// A process, or what is left of it.
struct Process {
    child: Child,
    settings: Vec<(String, String)>,
}

/// A database and a broker, with processes that end with this value.
pub(crate) struct Stage {
    pub(crate) database: TestDatabase,
    broker: broker::Settings,
    logs: PathBuf,
    processes: Vec<Process>,
    relay: Option<(Stop, JoinHandle<()>)>,
    _vhost: Option<TestVhost>,
}

impl Stage {
    /// On the servers that all tests share.
    pub(crate) fn new() -> Self {
        let vhost = TestVhost::new();
        let mut stage = Self::at(vhost.url());
        stage._vhost = Some(vhost);
        stage
    }

    /// At this broker, which nobody else uses.
    pub(crate) fn at(url: &str) -> Self {
        let broker = broker_settings(url);
        let test = thread::current().name().expect("a test's thread has its name").replace("::", ".");
        let logs = Path::new(env!("CARGO_TARGET_TMPDIR")).join("event-processor").join(test);
        if logs.exists() {
            fs::remove_dir_all(&logs).expect("the last run's logs can be removed");
        }
        fs::create_dir_all(&logs).expect("a folder for logs");
        let database = TestDatabase::new();
        let relay = relay(&database, &broker);
        Self { database, broker, logs, processes: Vec::new(), relay: Some(relay), _vhost: None }
    }

    /// Starts one more process, with these settings beside the usual ones. Returns its number.
    pub(crate) fn start(&mut self, settings: &[(&str, &str)]) -> usize {
        let urls = [
            ("MURMURATION__DATABASE__URL", self.database.url()),
            ("MURMURATION__BROKER__URL", self.broker.url.expose()),
        ];
        let all = SETTINGS.iter().chain(&urls).chain(settings);
        let settings: Vec<_> = all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let number = self.processes.len();
        self.processes.push(Process { child: self.spawn(number, &settings), settings });
        number
    }

    fn spawn(&self, number: usize, settings: &[(String, String)]) -> Child {
        let log = File::options().append(true).create(true).open(self.log_path(number)).expect("a log file");
        Command::new("setpriv")
            // However the test ends.
            .args(["--pdeathsig", "KILL", "--", env!("CARGO_BIN_EXE_event-processor")])
            .envs(settings.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("another handle"))
            .stderr(log)
            .spawn()
            .expect("the binary starts")
    }

    /// Starts again those that have ended, as a supervisor does; answers how they had ended.
    pub(crate) fn restart_ended(&mut self) -> Vec<ExitStatus> {
        let mut ended = Vec::new();
        for number in 0..self.processes.len() {
            if let Some(status) = self.processes[number].child.try_wait().expect("it can be looked after") {
                ended.push(status);
                self.processes[number].child = self.spawn(number, &self.processes[number].settings);
            }
        }
        ended
    }

    pub(crate) fn signal(&self, number: usize, signal: Signal) {
        let pid = self.processes[number].child.id();
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("it's there");
    }

    /// Awaits that a process ends that was told to.
    pub(crate) fn wait(&mut self, number: usize) -> ExitStatus {
        let child = &mut self.processes[number].child;
        eventually_within(PATIENCE, "the process ends", || child.try_wait().expect("it can be looked after"))
    }

    fn log_path(&self, number: usize) -> PathBuf {
        self.logs.join(format!("{number}.log"))
    }

    pub(crate) fn broker(&self) -> &broker::Settings {
        &self.broker
    }

    /// What a process has logged, over all its lives.
    pub(crate) fn log(&self, number: usize) -> String {
        fs::read_to_string(self.log_path(number)).expect("a log")
    }

    /// How many shards each process has, by the names under which they hold leases.
    pub(crate) fn holders(&self) -> BTreeMap<String, usize> {
        let resources: Vec<String> = (0..SHARDS_MAX).map(|shard| shard_resource(ACCOUNT_EVENT, shard)).collect();
        let resources: Vec<&str> = resources.iter().map(String::as_str).collect();
        let mut conn = self.database.database().connection().expect("a connection");
        let mut holders = BTreeMap::new();
        for lease in leases::list(&mut conn, &resources).expect("the leases") {
            if let (Some(holder), false) = (lease.holder, lease.expired) {
                *holders.entry(holder).or_default() += 1;
            }
        }
        holders
    }

    /// How many shards each process has, in rising order.
    pub(crate) fn shares(&self) -> Vec<usize> {
        let mut shares: Vec<usize> = self.holders().into_values().collect();
        shares.sort_unstable();
        shares
    }

    pub(crate) fn await_shares(&self, shares: &[usize]) {
        eventually_within(PATIENCE, "the shards are shared out", || (self.shares() == shares).then_some(()));
    }

    /// Events that took effect so far.
    pub(crate) fn applied(&self) -> i64 {
        self.database.count("SELECT count(*) AS n FROM account_effect")
    }

    /// Awaits that so many more events take effect.
    pub(crate) fn await_more(&self, events: i64) {
        let before = self.applied();
        eventually_within(PATIENCE, "events take effect", || (self.applied() >= before + events).then_some(()));
    }

    pub(crate) fn await_all(&self) {
        eventually_within(PATIENCE, "all events take effect", || (self.database.events_waiting() == 0).then_some(()));
    }

    /// Looks after the processes until no event waits any more but for those of parked keys; answers how processes ended.
    pub(crate) fn supervise(&mut self) -> Vec<ExitStatus> {
        let mut ended = Vec::new();
        eventually_within(PATIENCE, "all events take effect", || {
            ended.extend(self.restart_ended());
            (self.database.events_waiting() == 0).then_some(())
        });
        ended
    }

    /// The keys that are parked.
    pub(crate) fn parked(&self) -> Vec<Parked> {
        let mut conn = self.database.database().connection().expect("a connection");
        parked::list(&mut conn, ACCOUNT_EVENT, "", 1000).expect("the query runs")
    }

    /// Sees that every event took effect once and in order, that there were so many, that every process still runs and
    /// stops well, and that nothing is left over.
    #[track_caller]
    pub(crate) fn ends_well(mut self, applied: i64) {
        eventually_within(PATIENCE, "all is relayed", || {
            (self.database.count("SELECT count(*) AS n FROM outbox") == 0).then_some(())
        });
        let queues: Vec<_> = Topology::stream(ACCOUNT_EVENT, 16).queues.into_iter().map(|queue| queue.name).collect();
        let dead_letters = [queue::DEAD_LETTER.to_owned()];
        assert_eq!(self.depth(&dead_letters), 0, "no message was set aside");
        // Whoever has just started isn't prepared for the signal yet, and whoever has just been sent a message gives it back.
        // What is behind it in each queue, and set aside, shows that it has been taken in.
        let running = self.processes.iter_mut().filter_map(|process| process.child.try_wait().ok());
        let running = running.filter(Option::is_none).count();
        eventually_within(PATIENCE, "each process has its share", || (self.holders().len() == running).then_some(()));
        self.publish_fences(queues.len());
        let fences = || u32::try_from(queues.len()) == Ok(self.depth(&dead_letters));
        eventually_within(PATIENCE, "all messages are taken in", || fences().then_some(()));
        for number in 0..self.processes.len() {
            if self.processes[number].child.try_wait().expect("it can be looked after").is_none() {
                self.signal(number, Signal::TERM);
                let status = self.wait(number);
                assert_eq!((status.code(), status.signal()), (Some(0), None), "logs in {}", self.logs.display());
            }
        }
        assert_eq!(self.depth(&queues), 0, "what was in a process's hand is back");
        assert_eq!(self.database.event_errors(), [""; 0], "logs in {}", self.logs.display());
        assert_eq!(self.applied(), applied, "logs in {}", self.logs.display());
        let of_others = "SELECT count(*) AS n FROM stream_cursor WHERE deaths > 0 AND parked_at IS NULL";
        assert_eq!(self.database.count(of_others), 0, "nobody is suspected any more");
        assert_eq!(self.database.count("SELECT count(*) AS n FROM attempt"), 0, "no message was thought to kill");
        let set_aside = test_support::drain(&self.broker, &dead_letters, |delivery| (delivery.ticket, delivery.body));
        assert!(
            set_aside.len() == queues.len() && set_aside.iter().all(|body| body == FENCE),
            "no other was set aside"
        );
    }

    /// Publishes a message that can only be set aside to each of the shards' queues.
    fn publish_fences(&self, shards: usize) {
        let fence = |shard| Envelope::new(ACCOUNT_EVENT, shard_routing_key(shard), FENCE.to_vec());
        let fences: Vec<_> = (0..).take(shards).map(fence).collect();
        let published = Publisher::new(&self.broker, "test").publish_all(&fences, Instant::now() + PATIENCE);
        published.map_err(|error| error.to_string()).expect("all confirmed");
    }

    fn depth(&self, queues: &[String]) -> u32 {
        let mut session = Session::open(&self.broker, "test").expect("a session");
        broker::depths(&mut session, queues).expect("their depths").iter().map(|queue| queue.messages).sum()
    }
}

/// Relays what is accepted, until it's told to stop.
fn relay(database: &TestDatabase, broker: &broker::Settings) -> (Stop, JoinHandle<()>) {
    let database = Database::open(&database.settings(), "test").expect("a usable URL");
    let mut relay =
        Relay::new(database, broker, Topology::fleet(&[50, 100].map(Duration::from_millis)), log_retention(), 200);
    let stop = Stop::new();
    let requested = stop.clone();
    let run = move || {
        while !requested.is_requested() {
            match relay.round() {
                Ok(Round::Relayed) => {}
                Ok(Round::Idle) => _ = requested.wait(Duration::from_millis(2)),
                Ok(Round::BrokerAway) | Err(_) => _ = requested.wait(Duration::from_millis(50)),
            }
        }
        relay.close();
    };
    (stop, thread::spawn(run))
}

impl Drop for Stage {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // One that has ended needs no more.
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
        if let Some((stop, thread)) = self.relay.take() {
            stop.request();
            // A test that fails says why itself.
            let _ = thread.join();
        }
    }
}

/// Events of keys `k000` and so on, so many of each: the keys take turns.
pub(crate) fn events(keys: usize, each: usize) -> Vec<(String, String)> {
    (0..keys * each).map(|n| (format!("k{:03}", n % keys), "1".to_owned())).collect()
}
