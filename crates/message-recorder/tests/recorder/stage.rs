//! Recorders and relays as processes, with a database and a broker of their own.

use broker::{Session, Survey};
use domain::{
    log::{Group, MessageId, PARTITIONS_MAX, partition_queue},
    topology::Topology,
};
use process::Stop;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use storage::{
    Database,
    audit::Finding,
    consumer_offsets, leases, log_audit,
    message_outbox::{self, New},
    messages::{self, Message, Pick},
    partitions,
};
use test_support::{TestDatabase, TestVhost, broker_settings, eventually_within, log_retention};

/// Is in every text: no log may hold it.
pub(crate) const PRIVATE: &str = "between us";

/// How long it may take until everything has come to rest, on a busy machine: a bound against hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

pub(crate) const LEASE_TTL_MS: &str = "MURMURATION__MESSAGE_RECORDER__LEASE_TTL_MS";

/// No lease runs out in the time of a test.
pub(crate) const FOR_EVER: (&str, &str) = (LEASE_TTL_MS, "3600000");

/// For tests in which the database is away: it's soon given up.
pub(crate) const IMPATIENT: [(&str, &str); 3] = [
    ("MURMURATION__DATABASE__CONNECT_TIMEOUT_MS", "2000"),
    ("MURMURATION__DATABASE__STATEMENT_TIMEOUT_MS", "3000"),
    ("MURMURATION__DATABASE__CALL_TIMEOUT_MS", "4000"),
];

/// Short waits between attempts, and long time limits: what a busy machine delays isn't given up, or published twice. Small
/// batches: many transactions of few messages.
const SETTINGS: [(&str, &str); 15] = [
    // What a process that has died or frozen had is waited for in some tests.
    (LEASE_TTL_MS, "5000"),
    ("MURMURATION__MESSAGE_RECORDER__LEASE_RENEW_MS", "100"),
    ("MURMURATION__MESSAGE_RECORDER__BATCH", "50"),
    ("MURMURATION__MESSAGE_RECORDER__PREFETCH", "200"),
    ("MURMURATION__OUTBOX_RELAY__BATCH", "100"),
    ("MURMURATION__WORKER__UNAVAILABLE_BACKOFF_MAX_MS", "500"),
    // Who doesn't finish by itself when it's told to stop isn't ended by this.
    ("MURMURATION__WORKER__STOP_GRACE_MS", "3600000"),
    ("MURMURATION__DATABASE__CONNECT_TIMEOUT_MS", "10000"),
    ("MURMURATION__DATABASE__STATEMENT_TIMEOUT_MS", "120000"),
    ("MURMURATION__DATABASE__CALL_TIMEOUT_MS", "150000"),
    ("MURMURATION__BROKER__CONNECT_TIMEOUT_MS", "10000"),
    ("MURMURATION__BROKER__HEARTBEAT_S", "30"),
    ("MURMURATION__BROKER__CONFIRM_TIMEOUT_MS", "30000"),
    ("MURMURATION__HEALTH__PORT", "0"),
    ("RUST_LOG", "info"),
];

/// The group under which the database notes what is accepted.
const ACCEPTED: &str = "accepted";

/// Notes what is accepted as it's committed, whether whoever had it accepted learns of that or not.
const NOTE_ACCEPTED: [&str; 2] = [
    r#"CREATE FUNCTION note_accepted() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           INSERT INTO message ("group", partition, "offset", key, text, recorded_by)
           SELECT 'accepted', partition, id, key, text, '' FROM new;
           RETURN NULL;
       END $$"#,
    "CREATE TRIGGER note_accepted AFTER INSERT ON message_outbox REFERENCING NEW TABLE AS new
     FOR EACH STATEMENT EXECUTE FUNCTION note_accepted()",
];

pub(crate) fn group(name: &str) -> Group {
    Group::parse(name).expect("a group's name")
}

/// A process, or what is left of it.
struct Process {
    binary: PathBuf,
    arguments: Vec<String>,
    settings: Vec<(String, String)>,
    child: Child,
    /// Where its log begins, behind those of its lives before.
    log_begins: usize,
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended needs no more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A database and a broker, with processes that end with this value.
pub(crate) struct Stage {
    processes: Vec<Process>,
    pub(crate) database: TestDatabase,
    broker: broker::Settings,
    settings: Vec<(String, String)>,
    logs: PathBuf,
    vhost: Option<TestVhost>,
}

impl Stage {
    /// On the servers that all tests share.
    pub(crate) fn new() -> Self {
        let vhost = TestVhost::new();
        let stage = Self::at(TestDatabase::new(), vhost.url());
        Self { vhost: Some(vhost), ..stage }
    }

    /// In this database, and at this broker, which nobody else uses.
    pub(crate) fn at(database: TestDatabase, broker_url: &str) -> Self {
        let test = thread::current().name().expect("a test's thread has its name").replace("::", ".");
        let logs = Path::new(env!("CARGO_TARGET_TMPDIR")).join("message-recorder").join(test);
        if logs.exists() {
            fs::remove_dir_all(&logs).expect("the last run's logs can be removed");
        }
        fs::create_dir_all(&logs).expect("a folder for logs");
        for sql in NOTE_ACCEPTED {
            database.execute(sql);
        }
        let urls = [("MURMURATION__DATABASE__URL", database.url()), ("MURMURATION__BROKER__URL", broker_url)];
        let settings = SETTINGS.iter().chain(&urls).map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let broker = broker::Settings {
            connect_timeout_ms: 30_000,
            heartbeat_s: 30,
            confirm_timeout_ms: 30_000,
            ..broker_settings(broker_url)
        };
        Self { processes: Vec::new(), broker, database, settings, logs, vhost: None }
    }

    /// Settings for all processes that are yet to be started.
    pub(crate) fn set(&mut self, settings: &[(&str, &str)]) {
        self.settings.extend(settings.iter().map(|(name, value)| ((*name).into(), (*value).into())));
    }

    /// Starts one more relay, and returns its number.
    pub(crate) fn relay(&mut self) -> usize {
        // Another package's binary, which is beside this one's.
        let binary = Path::new(env!("CARGO_BIN_EXE_message-recorder")).with_file_name("outbox-relay");
        assert!(binary.exists(), "{} isn't there: build the workspace's binaries first", binary.display());
        self.start(binary, Vec::new())
    }

    /// Starts one more member of a group, and returns its number.
    pub(crate) fn member(&mut self, group: &str) -> usize {
        self.member_with(&["--group", group])
    }

    /// The same with these arguments.
    pub(crate) fn member_with(&mut self, arguments: &[&str]) -> usize {
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        self.start(env!("CARGO_BIN_EXE_message-recorder").into(), arguments)
    }

    fn start(&mut self, binary: PathBuf, arguments: Vec<String>) -> usize {
        let (number, settings) = (self.processes.len(), self.settings.clone());
        let child = self.spawn(number, &binary, &arguments, &settings);
        self.processes.push(Process { binary, arguments, settings, child, log_begins: 0 });
        number
    }

    fn spawn(&self, number: usize, binary: &Path, arguments: &[String], settings: &[(String, String)]) -> Child {
        let log = File::options().append(true).create(true).open(self.log_path(number)).expect("a log file");
        Command::new("setpriv")
            // However the test ends.
            .args(["--pdeathsig", "KILL", "--"])
            .arg(binary)
            .args(arguments)
            .envs(settings.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("another handle"))
            .stderr(log)
            .spawn()
            .expect("the binary starts")
    }

    /// Kills a process, as the kernel does when there's no memory left.
    pub(crate) fn kill(&mut self, number: usize) {
        self.signal(number, Signal::KILL);
        assert_eq!(self.wait(number).signal(), Some(Signal::KILL.as_raw()), "it had ended before");
    }

    /// Starts a process again that has ended, as a supervisor does.
    pub(crate) fn restart(&mut self, number: usize) {
        let log_begins = self.log(number).len();
        let Process { binary, arguments, settings, .. } = &self.processes[number];
        let child = self.spawn(number, binary, arguments, settings);
        self.processes[number].child = child;
        self.processes[number].log_begins = log_begins;
    }

    pub(crate) fn signal(&self, number: usize, signal: Signal) {
        let pid = i32::try_from(self.pid(number)).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("it's there");
    }

    /// Awaits that a process ends that was told to.
    pub(crate) fn wait(&mut self, number: usize) -> ExitStatus {
        let child = &mut self.processes[number].child;
        eventually_within(PATIENCE, "the process ends", || child.try_wait().expect("it can be looked after"))
    }

    fn pid(&self, number: usize) -> u32 {
        self.processes[number].child.id()
    }

    fn log_path(&self, number: usize) -> PathBuf {
        self.logs.join(format!("{number}.log"))
    }

    /// What a process has logged, over all its lives.
    pub(crate) fn log(&self, number: usize) -> String {
        fs::read_to_string(self.log_path(number)).expect("a log")
    }

    pub(crate) fn await_log(&self, number: usize, text: &str) {
        eventually_within(PATIENCE, text, || self.log(number).contains(text).then_some(()));
    }

    /// Where a process answers health checks, as soon as it does. It also heeds signals by then.
    fn health_address(&self, number: usize) -> Option<String> {
        let log = self.log(number);
        let (_, rest) = log[self.processes[number].log_begins..].split_once("health checks on http://")?;
        Some(rest.split_once('/')?.0.to_owned())
    }

    /// What a process answers to the question whether it's ready: the status and the text.
    pub(crate) fn ready(&self, number: usize) -> Option<(u16, String)> {
        let mut socket = TcpStream::connect(self.health_address(number)?).ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
        socket.write_all(b"GET /health/ready HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
    }

    /// Awaits that a process is ready.
    pub(crate) fn await_ready(&self, number: usize) {
        eventually_within(PATIENCE, "it's ready", || self.ready(number).filter(|(status, _)| *status == 200));
    }

    pub(crate) fn vhost(&self) -> &TestVhost {
        self.vhost.as_ref().expect("a vhost of the shared broker")
    }

    pub(crate) fn broker(&self) -> &broker::Settings {
        &self.broker
    }

    pub(crate) fn session(&self) -> Session {
        Session::open(&self.broker, "test").expect("a session")
    }

    pub(crate) fn survey(&self) -> Survey {
        Survey::open(&self.broker, "test").expect("a session")
    }

    /// Deletes a partition's stream with all that is in it.
    pub(crate) fn delete_stream(&self, partition: i32) {
        broker::delete_queues(&mut self.session(), &[partition_queue(partition)]).expect("it's deleted");
    }

    /// Adds partitions, as an operator does.
    pub(crate) fn extend_to(&self, count: i32) {
        broker::declare(&mut self.session(), &Topology::log(count, log_retention())).expect("all declared");
        self.transaction(|conn| partitions::extend_to(conn, count));
    }

    pub(crate) fn transaction<T>(&self, work: impl FnMut(&mut storage::PgConnection) -> storage::Result<T>) -> T {
        self.database.database().transaction(work).expect("the transaction is committed")
    }

    /// Somebody who has messages accepted, one after another.
    pub(crate) fn producer(&self, name: &'static str) -> Producer {
        let database = Database::open(&self.database.settings(), "producer").expect("a usable URL");
        Producer { database, name, next: 0 }
    }

    /// How many messages were accepted.
    pub(crate) fn accepted(&self) -> usize {
        self.recorded(ACCEPTED)
    }

    /// How many messages a group has recorded.
    pub(crate) fn recorded(&self, group: &str) -> usize {
        let count = self.database.count(&format!(r#"SELECT count(*) AS n FROM message WHERE "group" = '{group}'"#));
        usize::try_from(count).expect("a count")
    }

    /// What a group has recorded, in the order of partition and offset.
    pub(crate) fn messages(&self, name: &str) -> Vec<Message> {
        self.transaction(|conn| messages::page(conn, &group(name), Pick::All, i64::MAX, i64::MAX))
    }

    /// Awaits that a group has recorded all that is accepted by now.
    #[track_caller]
    pub(crate) fn await_recorded(&self, group: &str) {
        self.await_count(group, self.accepted());
    }

    /// Awaits that a group has recorded so many messages.
    #[track_caller]
    pub(crate) fn await_count(&self, group: &str, count: usize) {
        let end = Instant::now() + PATIENCE;
        while self.recorded(group) < count {
            let so_far = || (self.recorded(group), self.outbox(), self.transaction(|conn| standing(conn, group)));
            assert!(
                Instant::now() < end,
                "waited {PATIENCE:?} for group {group} to record {count} messages; recorded, waiting and standing: {:?}; \
                 logs in {}",
                so_far(),
                self.logs.display()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Awaits that a group records so many more messages.
    #[track_caller]
    pub(crate) fn await_more(&self, group: &str, messages: usize) {
        self.await_count(group, self.recorded(group) + messages);
    }

    /// Messages that aren't known to be in a stream.
    pub(crate) fn outbox(&self) -> i64 {
        self.database.count("SELECT count(*) AS n FROM message_outbox")
    }

    /// Awaits that all is published.
    pub(crate) fn await_relayed(&self) {
        eventually_within(PATIENCE, "all is published", || (self.outbox() == 0).then_some(()));
    }

    /// Which partitions of a group each process reads, by the names under which they hold leases.
    pub(crate) fn holders(&self, name: &str) -> BTreeMap<String, Vec<i32>> {
        let resources: Vec<_> = (0..PARTITIONS_MAX).map(|partition| group(name).resource(partition)).collect();
        let names: Vec<_> = resources.iter().map(String::as_str).collect();
        let leases = self.transaction(|conn| leases::list(conn, &names));
        let mut holders = BTreeMap::<_, Vec<i32>>::new();
        for lease in leases {
            if let (Some(holder), false) = (lease.holder, lease.expired) {
                let partition = resources.iter().position(|resource| *resource == lease.resource);
                let partition = partition.and_then(|partition| i32::try_from(partition).ok());
                holders.entry(holder).or_default().push(partition.expect("it was asked for"));
            }
        }
        holders
    }

    /// Which partitions of a group a process reads.
    pub(crate) fn held(&self, group: &str, number: usize) -> Vec<i32> {
        let own = format!("-{}-", self.pid(number));
        let mut held: Vec<_> = self
            .holders(group)
            .into_iter()
            .filter(|(holder, _)| holder.contains(&own))
            .flat_map(|held| held.1)
            .collect();
        held.sort_unstable();
        held
    }

    /// Awaits that the processes read so many partitions of a group each, in rising order, and returns which.
    #[track_caller]
    pub(crate) fn await_shares(&self, group: &str, shares: &[usize]) -> BTreeMap<String, Vec<i32>> {
        let end = Instant::now() + PATIENCE;
        loop {
            let holders = self.holders(group);
            let mut sorted: Vec<_> = holders.values().map(Vec::len).collect();
            sorted.sort_unstable();
            if sorted == shares {
                return holders;
            }
            assert!(Instant::now() < end, "waited {PATIENCE:?} for shares {shares:?}: {sorted:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sees that every process still runs and stops well, that no log holds what is private, and that these groups
    /// have recorded all that was accepted.
    #[track_caller]
    pub(crate) fn ends_well(mut self, groups: &[&str]) {
        for group in groups {
            self.await_recorded(group);
        }
        self.stop_all();
        for group in groups {
            self.assert_recorded(group, 0);
        }
    }

    /// Sees that every process still runs and stops well, and that no log holds what is private.
    #[track_caller]
    pub(crate) fn stop_all(&mut self) {
        let running = |process: &mut Process| process.child.try_wait().expect("it can be looked after").is_none();
        let running: Vec<_> = self.processes.iter_mut().map(running).collect();
        let running: Vec<_> = (0..).zip(running).filter_map(|(number, running)| running.then_some(number)).collect();
        for number in &running {
            // One that was started just now would be killed by it.
            eventually_within(PATIENCE, "it heeds signals", || self.health_address(*number));
            self.signal(*number, Signal::TERM);
        }
        for number in running {
            let status = self.wait(number);
            assert_eq!((status.code(), status.signal()), (Some(0), None), "logs in {}", self.logs.display());
        }
        for number in 0..self.processes.len() {
            assert!(!self.log(number).contains(PRIVATE), "log {number} in {} holds a text", self.logs.display());
        }
    }

    /// Sees that a group has recorded each message that was accepted once: each partition's in sequence from 1 on, which
    /// rises with the offset, and those of each key in their order. A group that began later has to have all but the first
    /// `before`.
    #[track_caller]
    pub(crate) fn assert_recorded(&self, name: &str, before: usize) {
        let mut accepted = self.messages(ACCEPTED);
        accepted.sort_unstable_by_key(|message| message.offset);
        let accepted = accepted.split_off(before);
        let recorded = self.messages(name);
        let wheres = |messages: &[Message]| {
            let place = |one: &Message| (one.partition, one.key.clone(), one.text.clone());
            let mut places: Vec<_> = messages.iter().map(place).collect();
            places.sort_unstable();
            places
        };
        let (expected, found) = (wheres(&accepted), wheres(&recorded));
        let set: BTreeSet<_> = found.iter().collect();
        let missing: Vec<_> = expected.iter().filter(|one| !set.contains(one)).take(20).collect();
        let twice: Vec<_> = found.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| &pair[0]).take(20).collect();
        let logs = self.logs.display();
        assert!(
            missing.is_empty() && twice.is_empty() && found == expected,
            "{name}: of {} accepted, {} are recorded; missing: {missing:?}; twice: {twice:?}; logs in {logs}",
            expected.len(),
            found.len()
        );

        let log = self.transaction(partitions::token);
        let mut newest = BTreeMap::new();
        let mut numbers = BTreeMap::new();
        for Message { partition, offset, message_id, key, text, .. } in &recorded {
            let id = message_id.as_deref().and_then(MessageId::parse).expect("an id of the log's");
            let follows = newest.insert(*partition, id.seq).map_or(id.seq == 1 || before > 0, |seq| id.seq == seq + 1);
            assert!(follows && id.log == log && id.partition == *partition, "{name}: {id} at {offset}; logs in {logs}");
            if let Some(key) = key {
                let number = number(text);
                let last = numbers.insert((*partition, key), number);
                assert!(last < Some(number), "{name}: {key} {number:?} after {last:?} at {partition}/{offset}; {logs}");
            }
        }
        let (totals, findings) = self.transaction(|conn| log_audit::run(conn, &group(name)));
        let errors: Vec<_> = findings.into_iter().filter(|Finding { count, .. }| *count > 0).collect();
        assert!(errors.is_empty() && totals.iter().all(|totals| totals.foreign == 0), "{errors:?} {totals:?}");
        let standing = self.transaction(|conn| standing(conn, name));
        assert!(standing.iter().all(|one| one.missing == 0 && one.skipped == 0), "{standing:?}; logs in {logs}");
    }
}

fn standing(conn: &mut storage::PgConnection, name: &str) -> storage::Result<Vec<consumer_offsets::Standing>> {
    consumer_offsets::list(conn, Some(&group(name)))
}

/// The place of a text among its producer's.
fn number(text: &str) -> (usize, usize) {
    let (call, of_call) = text.rsplit_once(" #").expect("a producer's text");
    let (_, call) = call.rsplit_once(' ').expect("a producer's text");
    (call.parse().expect("a number"), of_call.parse().expect("a number"))
}

/// Has messages accepted, one after another. Each text has the producer's name and a number, and each key too has the name.
pub(crate) struct Producer {
    database: Database,
    name: &'static str,
    next: usize,
}

impl Producer {
    /// So many messages, in turn to each partition.
    pub(crate) fn spread(&mut self, count: i64) {
        self.append(None, None, count).expect("they are accepted");
    }

    /// So many messages to a partition.
    pub(crate) fn to(&mut self, partition: i32, count: i64) {
        self.append(None, Some(partition), count).expect("they are accepted");
    }

    /// So many messages of each of so many keys.
    pub(crate) fn keyed(&mut self, keys: usize, each: i64) {
        (0..keys).for_each(|key| self.append(Some(key), None, each).expect("they are accepted"));
    }

    /// So many large messages to a partition.
    pub(crate) fn large(&mut self, partition: i32, count: i64) {
        let text = PRIVATE.repeat(3000);
        let new = New { text: &text, key: None, partition: Some(partition), count: Some(count) };
        let mut conn = self.database.connection().expect("a connection");
        assert_eq!(message_outbox::append(&mut conn, &new, None).expect("they are accepted") as i64, count);
    }

    fn append(&mut self, key: Option<usize>, partition: Option<i32>, count: i64) -> storage::Result<()> {
        let text = format!("{PRIVATE} {} {}", self.name, self.next);
        self.next += 1;
        let key = key.map(|key| format!("{}-{key}", self.name));
        let new = New { text: &text, key: key.as_deref(), partition, count: Some(count) };
        let accepted = message_outbox::append(&mut *self.database.connection()?, &new, None)?;
        assert_eq!(i64::try_from(accepted), Ok(count));
        Ok(())
    }
}

/// Messages that are accepted all the time, of some keys and of none, until this value is dropped. Goes on when the database
/// fails.
pub(crate) struct Load(Stop, Option<JoinHandle<()>>);

impl Load {
    /// In calls of so many messages, with so much time between them.
    pub(crate) fn begin(mut producer: Producer, count: i64, pause: Duration) -> Self {
        let stop = Stop::new();
        let requested = stop.clone();
        let run = move || {
            for call in 0.. {
                let key = call % 20;
                // Whether it was accepted although there was no answer, the database knows.
                let _ = producer.append((key > 0).then_some(key), None, count);
                if requested.wait(pause) {
                    return;
                }
            }
        };
        Self(stop, Some(thread::spawn(run)))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.request();
        if let Some(thread) = self.1.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "the producer has panicked");
        }
    }
}
