//! Processes that die. Each test runs this same program once more as the worker.

use crate::support::{DELAYS_MS, IDLE, QUEUE, depth, drain, publish, worker};
use ::process::Stop;
use domain::topology::queue;
use std::{
    collections::BTreeSet,
    env,
    io::{BufRead as _, BufReader},
    process::{self, Child, Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};
use storage::{Database, attempts::Ledger};
use test_support::{TestDatabase, TestVhost, eventually_within};
use worker::Death;

const AMQP_URL: &str = "WORKER_TEST_AMQP_URL";
const DATABASE_URL: &str = "WORKER_TEST_DATABASE_URL";
const UNTIL: &str = "WORKER_TEST_UNTIL";
const CONCURRENCY: &str = "WORKER_TEST_CONCURRENCY";
const BATCH: &str = "WORKER_TEST_BATCH";
const TIME_LIMIT_MS: &str = "WORKER_TEST_TIME_LIMIT_MS";

/// The worker: notes what it handles on its standard output, and dies of some messages.
#[test]
#[ignore = "started by the other tests as a process of its own"]
#[expect(clippy::print_stdout, reason = "it's how the test hears of it")]
fn process() {
    let (Ok(url), Ok(database_url)) = (env::var(AMQP_URL), env::var(DATABASE_URL)) else { return };
    let settings = storage::Settings {
        url: database_url.into(),
        schema: "public".into(),
        pool_size: 4,
        connect_timeout_ms: 30_000,
        statement_timeout_ms: 60_000,
        lock_timeout_ms: 60_000,
        call_timeout_ms: 60_000,
    };
    let database = Database::open(&settings, "worker-test").expect("a usable URL");
    let mut worker = worker(&url, Arc::new(Ledger::new(database.clone())), |batch, _, _| {
        for item in batch {
            match &*item.message {
                "aborts" => {
                    thread::sleep(Duration::from_millis(300));
                    process::abort();
                }
                "hangs" => loop {
                    thread::park();
                },
                "slow" => thread::sleep(Duration::from_secs(1)),
                _ => {}
            }
            println!("handled {}", item.message);
        }
        Ok(())
    });
    worker.database = database.probe();
    let number = |name| env::var(name).expect("a number").parse().expect("a number");
    worker.settings.time_limit_ms = number(TIME_LIMIT_MS) as u64;
    worker.consuming.concurrency = number(CONCURRENCY);
    worker.consuming.batch = number(BATCH);
    worker.consuming.prefetch = worker.consuming.batch as u16;
    match env::var(UNTIL).as_deref() {
        Ok("signal") => {
            let grace = Duration::from_millis(worker.settings.stop_grace_ms);
            // A batch is whole, however long the broker takes to send it.
            worker.consuming.linger_ms = 60_000;
            worker.run_until(Stop::on_signals(grace).expect("signals can be caught"))
        }
        _ => worker.run_until_idle(IDLE),
    }
    .expect("a clean end");
}

#[derive(Clone, Copy)]
struct Scale {
    concurrency: usize,
    batch: usize,
    time_limit_ms: usize,
}

/// No time limit ends it on a busy machine.
const ONE: Scale = Scale { concurrency: 1, batch: 20, time_limit_ms: 300_000 };

struct Fleet {
    vhost: TestVhost,
    database: TestDatabase,
}

impl Fleet {
    fn new() -> Self {
        Self { vhost: TestVhost::new(), database: TestDatabase::new() }
    }

    fn start(&self, until: &str, Scale { concurrency, batch, time_limit_ms }: Scale) -> Child {
        Command::new(env::current_exe().expect("this program"))
            .args(["--ignored", "--exact", "processes::process", "--nocapture"])
            .env(AMQP_URL, self.vhost.url())
            .env(DATABASE_URL, self.database.url())
            .env(UNTIL, until)
            .env(CONCURRENCY, concurrency.to_string())
            .env(BATCH, batch.to_string())
            .env(TIME_LIMIT_MS, time_limit_ms.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the process starts")
    }

    /// Starts the worker again and again until a message is set aside and these are handled. Returns what it handled, and how
    /// often it died of what.
    fn supervise(&self, scale: Scale, neighbours: &BTreeSet<String>) -> (Vec<String>, Vec<Option<i32>>) {
        let (mut handled, mut deaths) = (Vec::new(), Vec::new());
        eventually_within(Duration::from_secs(180), "all is settled", || {
            let mut child = self.start("idle", scale);
            let lines = BufReader::new(child.stdout.take().expect("its output")).lines().map_while(Result::ok);
            handled.extend(lines.filter_map(|line| Some(line.split_once("handled ")?.1.to_owned())));
            let status = child.wait().expect("its status");
            if status.success() {
                // It may have ended before a slow broker brought back everything.
                let all = neighbours.iter().all(|neighbour| handled.contains(neighbour));
                return (all && depth(self.vhost.url(), queue::DEAD_LETTER) > 0).then_some(());
            }
            deaths.push(status.code());
            assert!(deaths.len() < 20, "it dies again and again: {deaths:?}");
            None
        });
        (handled, deaths)
    }

    fn dead(&self) -> Vec<(String, String)> {
        let dead = drain(self.vhost.url(), queue::DEAD_LETTER);
        dead.into_iter().map(|dead| (dead.message_id.clone().unwrap_or_default(), Death::of(&dead).error)).collect()
    }
}

/// Several batches.
fn neighbours() -> BTreeSet<String> {
    (0..100).map(|n| format!("m{n:03}")).collect()
}

fn killed_by(killer: &str, scale: Scale) -> Vec<Option<i32>> {
    let fleet = Fleet::new();
    let neighbours = neighbours();
    let (before, after): (Vec<_>, Vec<_>) = neighbours.iter().map(String::as_str).partition(|text| *text < "m030");
    publish(fleet.vhost.url(), before.into_iter().chain([killer]).chain(after));
    let (handled, deaths) = fleet.supervise(scale, &neighbours);
    assert_eq!(handled.into_iter().collect::<BTreeSet<_>>(), neighbours, "every neighbour is handled");
    let times = DELAYS_MS.len() + 1;
    let expected = format!("its worker died while handling it ({times} times)");
    assert_eq!(fleet.dead(), [(killer.to_owned(), expected)], "only the killer is dead");
    assert_eq!(depth(fleet.vhost.url(), QUEUE), 0);
    assert_eq!(fleet.database.count("SELECT count(*) AS n FROM attempt"), 0, "no attempt stays on record");
    // The first death is before there's a record.
    assert_eq!(deaths.len(), times + 1);
    deaths
}

#[test]
fn a_message_that_kills_its_process_dies_alone() {
    assert!(killed_by("aborts", ONE).iter().all(Option::is_none), "by a signal");
}

#[test]
fn a_message_that_kills_its_process_dies_alone_among_several_consumers() {
    killed_by("aborts", Scale { concurrency: 3, ..ONE });
}

#[test]
fn a_slow_message_in_another_consumers_hand_is_not_blamed() {
    let fleet = Fleet::new();
    // Each consumer takes one, so that both are in hand at once.
    publish(fleet.vhost.url(), ["aborts", "slow"]);
    fleet.supervise(Scale { concurrency: 2, batch: 1, ..ONE }, &BTreeSet::from(["slow".to_owned()]));
    let dead = fleet.dead();
    assert!(matches!(&dead[..], [(id, _)] if id == "aborts"), "{dead:?}");
}

#[test]
fn a_message_that_runs_past_its_time_limit_dies_alone() {
    assert!(killed_by("hangs", Scale { time_limit_ms: 3000, ..ONE }).iter().all(|code| *code == Some(75)));
}

#[test]
fn a_termination_signal_lets_the_batch_in_hand_finish_and_exits_with_0() {
    let fleet = Fleet::new();
    publish(fleet.vhost.url(), ["first", "slow", "last"]);
    let mut child = fleet.start("signal", Scale { batch: 3, ..ONE });
    let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.ends_with("handled first")), "the batch is in hand");
    let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill runs");
    assert!(kill.success());
    let rest: Vec<_> = lines.filter(|line| line.starts_with("handled")).collect();
    assert_eq!(child.wait().expect("its status").code(), Some(0));
    assert_eq!(rest, ["handled slow", "handled last"]);
    assert_eq!(depth(fleet.vhost.url(), QUEUE), 0);
}
