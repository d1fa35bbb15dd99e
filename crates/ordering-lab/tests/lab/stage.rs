//! A database, a vhost and a folder of a test's own, and the program that works in them.

use broker::{QueueDepth, Session, Settings};
use serde_json::Value;
use std::{
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
};
use tempfile::TempDir;
use test_support::{TestDatabase, TestVhost, broker_settings};

pub(crate) struct Stage {
    pub(crate) database: TestDatabase,
    pub(crate) vhost: TestVhost,
    pub(crate) out: TempDir,
}

impl Stage {
    pub(crate) fn new() -> Self {
        let out = tempfile::tempdir().expect("a folder");
        let database = TestDatabase::new();
        // As the program does when it starts: tests look into its tables before.
        for statement in include_str!("../../schema.sql").split_inclusive(";\n") {
            database.execute(statement);
        }
        Self { database, vhost: TestVhost::new(), out }
    }

    /// The program with these arguments, separated by spaces.
    pub(crate) fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ordering-lab"));
        command
            .args(arguments.split_whitespace())
            .env("DATABASE_URL", self.database.url())
            .env("AMQP_URL", self.vhost.url())
            // For a busy machine.
            .env("MURMURATION__DATABASE__CONNECT_TIMEOUT_MS", "30000")
            .env("MURMURATION__BROKER__CONNECT_TIMEOUT_MS", "30000")
            .env("MURMURATION__BROKER__CONFIRM_TIMEOUT_MS", "30000")
            .current_dir(self.out.path());
        command
    }

    pub(crate) fn run(&self, arguments: &str) -> Ended {
        Ended::from(self.command(arguments).output().expect("the program runs"))
    }

    /// Starts the program, to be awaited later.
    pub(crate) fn start(&self, arguments: &str) -> Child {
        let mut command = self.command(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts")
    }

    /// Runs an experiment with short work, and returns what it wrote down about it.
    pub(crate) fn experiment(&self, arguments: &str) -> Value {
        self.experiment_with_work("5..20", arguments)
    }

    /// The same with work that takes so long: for what has to happen while messages wait.
    pub(crate) fn experiment_with_work(&self, work_ms: &str, arguments: &str) -> Value {
        let ended = self.run(&format!("run {arguments} --work-ms {work_ms} --out ."));
        assert_eq!(ended.status, 0, "{arguments}: {}{}", ended.out, ended.err);
        let text = fs::read_to_string(self.out.path().join("results.json")).expect("there are results");
        let results: Value = serde_json::from_str(&text).expect("they are JSON");
        results["experiments"][0].clone()
    }

    /// The queues of the lab or of the fleet that are there.
    pub(crate) fn queues(&self) -> Vec<String> {
        self.there().into_iter().map(|queue| queue.name).collect()
    }

    fn there(&self) -> Vec<QueueDepth> {
        let mut session = Session::open(&self.broker(), "test").expect("the broker answers");
        let stream = (0..16).map(|shard| format!("lab.sequenced.s{shard:03}"));
        let experiments = ["competing", "consistent-hash", "add-consumers", "message-version", "killer"];
        let labs = experiments.iter().flat_map(|name| (1..=8).map(move |number| format!("lab.{name}.{number:02}")));
        let fleets = ["lab.guest", "dead_letter", "publish_tweet", "update_feed.00"].map(str::to_owned);
        let names: Vec<_> = labs.chain(stream).chain(fleets).collect();
        broker::existing(&mut session, &names).expect("the broker answers")
    }

    /// How many consumers these queues have.
    pub(crate) fn consumers(&self) -> u32 {
        self.there().iter().map(|queue| queue.consumers).sum()
    }

    pub(crate) fn broker(&self) -> Settings {
        broker_settings(self.vhost.url())
    }

    /// The processes that work in this test's database.
    pub(crate) fn processes(&self) -> usize {
        let ours = |process: &Path| {
            let environment = fs::read(process.join("environ")).unwrap_or_default();
            String::from_utf8_lossy(&environment).contains(self.database.url())
        };
        fs::read_dir("/proc").expect("there's a /proc").flatten().filter(|entry| ours(&entry.path())).count()
    }
}

/// How the program ended.
pub(crate) struct Ended {
    pub(crate) status: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).expect("text"),
            err: String::from_utf8(output.stderr).expect("text"),
        }
    }
}
