//! A fleet of processes with a database and a vhost of its own, and what must hold when a test is over.

use crate::api::Api;
use broker::Session;
use domain::topology::Topology;
use harness::{Fleet, services};
use management::Management;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};
use storage::{
    Database,
    audit::{self, Finding},
    dead_letters::{self, DeadLetter},
    rights,
};
use test_support::{TestDatabase, TestVhost, broker_settings, sql};

/// Is in every text that a test lets anybody write: no log may hold it.
pub(crate) const PRIVATE: &str = "between us";

/// How long services may take to start, and the fleet to come to rest, on a busy machine: a bound against hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// How long a process may take to stop.
const GRACE: Duration = Duration::from_secs(90);

/// Short waits between attempts: what takes minutes in production takes seconds here. Long time limits: what a busy
/// machine delays isn't given up.
const SETTINGS: [(&str, &str); 9] = [
    ("MURMURATION__WORKER__RETRY_DELAYS_MS", "200,500,1000,2000,4000"),
    ("MURMURATION__WORKER__STOP_GRACE_MS", "60000"),
    ("MURMURATION__WORKER__UNAVAILABLE_BACKOFF_MAX_MS", "500"),
    ("MURMURATION__DATABASE__CONNECT_TIMEOUT_MS", "10000"),
    ("MURMURATION__API_GATEWAY__REQUEST_TIMEOUT_MS", "30000"),
    ("MURMURATION__API_GATEWAY__LONG_REQUEST_TIMEOUT_MS", "50000"),
    // Several steps and chunks for few followers.
    ("MURMURATION__FOLLOWER_IMPORTER__STEP", "10"),
    ("MURMURATION__FEED_FANOUT__CHUNK", "5"),
    ("RUST_LOG", "info"),
];

pub(crate) struct Stage {
    pub(crate) fleet: Fleet,
    pub(crate) api: Api,
    /// Gone after the processes that use them, and before the database.
    _roles: Option<Roles>,
    pub(crate) database: TestDatabase,
    broker: broker::Settings,
    retry_delays: Vec<Duration>,
    logs: PathBuf,
}

/// The services' roles and users: they are the servers', so they have to go by themselves.
struct Roles {
    prefix: String,
    database: Database,
    management: Management,
}

impl Roles {
    /// As `fleetctl rights apply` makes them; the services that are yet to be started are these.
    fn make(stage: &mut Stage, vhost: &TestVhost) -> Self {
        const PASSWORD: &str = "of-this-test";
        let prefix = vhost.name().to_owned();
        let mut apply = stage.command(&["rights", "apply", "--prefix", &prefix]);
        apply.env("RABBITMQ_MANAGEMENT_URL", vhost.management_url());
        for service in services() {
            apply.env(format!("{}_PASSWORD", service.replace('-', "_").to_uppercase()), PASSWORD);
        }
        let output = apply.output().expect("the operator's tool runs");
        assert!(output.status.success(), "{output:?}");
        for service in services() {
            let (user, broker) = (rights::role(&prefix, service), stage.broker.url.expose().to_owned());
            let own = |url: &str| {
                let (scheme, rest) = url.split_once("://").expect("a URL");
                let (_, server) = rest.split_once('@').expect("a URL with a user");
                format!("{scheme}://{user}:{PASSWORD}@{server}")
            };
            stage.fleet.set_for(service, "MURMURATION__DATABASE__URL", &own(stage.database.url()));
            // The gateway has none.
            let broker = if service == "api-gateway" { String::new() } else { own(&broker) };
            stage.fleet.set_for(service, "MURMURATION__BROKER__URL", &broker);
        }
        let management = Management::new(vhost.management_url()).expect("a usable URL");
        Self { prefix, database: stage.database.database().clone(), management }
    }
}

impl Drop for Roles {
    fn drop(&mut self) {
        for service in services() {
            let user = rights::role(&self.prefix, service);
            let dropped = self.database.connection().and_then(|mut conn| {
                sql::execute(&mut conn, &format!("DROP OWNED BY \"{user}\""))?;
                sql::execute(&mut conn, &format!("DROP ROLE \"{user}\""))
            });
            if let Err(error) = dropped {
                eprintln!("the role {user} stays behind: {error:?}");
            }
            if service != "api-gateway"
                && let Err(error) = self.management.delete_user(&user)
            {
                eprintln!("the user {user} stays behind: {error}");
            }
        }
    }
}

impl Stage {
    /// On the servers that all tests share, each service with its own role and user and no other rights. No process runs yet.
    pub(crate) fn shared() -> (TestVhost, Self) {
        let vhost = TestVhost::new();
        let mut stage = Self::new(TestDatabase::new(), vhost.url());
        stage._roles = Some(Roles::make(&mut stage, &vhost));
        (vhost, stage)
    }

    /// In this database and vhost. No process runs yet.
    pub(crate) fn new(database: TestDatabase, amqp_url: &str) -> Self {
        let test = thread::current().name().expect("a test's thread has its name").replace("::", ".");
        let logs = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fleet").join(test);
        if logs.exists() {
            fs::remove_dir_all(&logs).expect("the last run's logs can be removed");
        }
        let fleet = Fleet::new(database.url(), amqp_url, &logs).expect("a fleet");
        let api = Api::new(fleet.gateway_url());
        let broker = broker_settings(amqp_url);
        let mut stage = Self { fleet, api, _roles: None, database, broker, retry_delays: Vec::new(), logs };
        for (name, value) in SETTINGS {
            stage.set(name, value);
        }
        stage
    }

    /// A setting for all processes that are yet to be started.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        if name == "MURMURATION__WORKER__RETRY_DELAYS_MS" {
            let delay = |text: &str| Duration::from_millis(text.parse().expect("a number"));
            self.retry_delays = value.split(',').map(delay).collect();
        }
        self.fleet.set(name, value);
    }

    /// Starts one process of each service, and awaits that all are ready.
    pub(crate) fn start(&mut self) {
        self.fleet.start_all().expect("the services' binaries");
        self.fleet.wait_ready(PATIENCE).expect("all services are ready");
    }

    /// The operator's tool on this stage's servers.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleetctl"));
        // These go before whatever else the environment says.
        command
            .env("DATABASE_URL", self.database.url())
            .env("AMQP_URL", self.broker.url.expose())
            .env("GATEWAY_URL", self.fleet.gateway_url())
            .args(arguments);
        command
    }

    /// The same; it has to succeed.
    pub(crate) fn fleetctl(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().expect("the operator's tool runs");
        assert!(output.status.success(), "fleetctl {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("it prints UTF-8")
    }

    /// The dead letters that wait for an operator, the oldest first.
    pub(crate) fn dead_letters(&self) -> Vec<DeadLetter> {
        let mut conn = self.database.database().connection().expect("a connection");
        let ids = dead_letters::waiting_ids(&mut conn, None).expect("the query runs");
        ids.into_iter().map(|id| dead_letters::get(&mut conn, id).expect("it's there")).collect()
    }

    /// Messages that are under way.
    fn under_way(&self) -> Vec<String> {
        // The outbox first: what leaves it is in a queue by then.
        let waiting = self.database.count("SELECT count(*) AS n FROM outbox");
        let names: Vec<_> = Topology::fleet(&self.retry_delays).queues.into_iter().map(|queue| queue.name).collect();
        let mut session = Session::open(&self.broker, "test").expect("the broker answers");
        let depths = broker::depths(&mut session, &names).expect("every queue is there");
        session.close(Instant::now() + GRACE);
        let queues = depths.into_iter().map(|queue| (queue.name, i64::from(queue.messages)));
        let places = queues.chain([("the outbox".into(), waiting)]);
        places.filter(|(_, messages)| *messages > 0).map(|(place, messages)| format!("{messages} in {place}")).collect()
    }

    /// Rows that are missing, extra or doubled.
    fn wrong(&self) -> Vec<String> {
        let findings = self.database.database().transaction(|conn| audit::run(conn, |_| {})).expect("the audit runs");
        let findings = findings.into_iter().filter(|finding| finding.count > 0);
        findings.map(|Finding { check, count, examples }| format!("{count} {check}: {examples:?}")).collect()
    }

    /// Awaits that nothing is under way any more, and nothing wrong.
    pub(crate) fn await_rest(&self) {
        /// So many looks in a row must find nothing: what a worker has in hand is in no queue.
        const LOOKS: u32 = 4;
        let end = Instant::now() + PATIENCE;
        let mut quiet = 0;
        loop {
            let mut unrest = self.under_way();
            quiet = if unrest.is_empty() { quiet + 1 } else { 0 };
            if quiet >= LOOKS {
                unrest = self.wrong();
                if unrest.is_empty() {
                    return;
                }
            }
            assert!(
                Instant::now() < end,
                "not at rest after {PATIENCE:?}: {unrest:#?}; logs in {}",
                self.logs.display()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// What must hold after whatever a test has done: nothing is under way or left over, no row is missing, extra or
    /// doubled, no message was set aside but those expected, every process still runs, stops when it's told to, and
    /// hasn't logged what is private.
    pub(crate) fn ends_well(mut self, dead_letters: usize) {
        self.await_rest();
        let ended = self.fleet.restart_ended().expect("the fleet can be looked after");
        assert!(ended.is_empty(), "these had ended: {ended:?}; logs in {}", self.logs.display());
        // In the order of the messages' way, so that each can still hand on what it has.
        let names = self.fleet.names();
        for service in services() {
            for name in names.iter().filter(|name| name.0 == service) {
                let status = self.fleet.stop(name, GRACE).expect("it stops");
                assert!(status.success(), "{name:?}: {status}; logs in {}", self.logs.display());
            }
        }
        // With all of them gone, nothing is in anybody's hand.
        let unrest = [self.under_way(), self.wrong()].concat();
        assert!(unrest.is_empty(), "{unrest:#?}; logs in {}", self.logs.display());
        let reasons: Vec<_> = self.dead_letters().into_iter().map(|letter| (letter.queue, letter.error)).collect();
        assert_eq!(reasons.len(), dead_letters, "{reasons:#?}");
        assert_eq!(self.database.count("SELECT count(*) AS n FROM attempt"), 0, "attempts are left on record");
        for name in names {
            let log = self.fleet.log(&name).expect("a log");
            for private in [PRIVATE, "@example.com", "+999"] {
                assert!(!log.contains(private), "the log of {name:?} holds {private:?}; {}", self.logs.display());
            }
        }
    }
}
