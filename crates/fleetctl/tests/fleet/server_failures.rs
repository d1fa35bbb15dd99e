//! Servers that are killed, restarted and frozen under load, one test after another on a pair of servers of their own.

use crate::{
    load::Load,
    stage::{PATIENCE, PRIVATE, Stage},
};
use serde_json::json;
use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};
use test_support::{PrivatePostgres, PrivateRabbitmq, TestDatabase, TestVhost, eventually};

/// Longer than any time limit for the frozen server's answer.
const FREEZE: Duration = Duration::from_secs(7);

/// The time limits for Postgres, where that is broken.
const POSTGRES: [(&str, &str); 5] = [
    ("MURMURATION__DATABASE__CONNECT_TIMEOUT_MS", "2000"),
    ("MURMURATION__DATABASE__STATEMENT_TIMEOUT_MS", "3000"),
    ("MURMURATION__DATABASE__CALL_TIMEOUT_MS", "4000"),
    ("MURMURATION__API_GATEWAY__REQUEST_TIMEOUT_MS", "5000"),
    ("MURMURATION__API_GATEWAY__LONG_REQUEST_TIMEOUT_MS", "10000"),
];

/// Those for RabbitMQ, where that is broken: then no request may fail.
const RABBITMQ: [(&str, &str); 2] =
    [("MURMURATION__BROKER__HEARTBEAT_S", "2"), ("MURMURATION__BROKER__CONFIRM_TIMEOUT_MS", "4000")];

struct Servers {
    postgres: PrivatePostgres,
    rabbitmq: PrivateRabbitmq,
}

/// Both running, for one test at a time.
fn servers() -> MutexGuard<'static, Option<Servers>> {
    static SERVERS: Mutex<Option<Servers>> = Mutex::new(None);
    let mut servers = SERVERS.lock().unwrap_or_else(PoisonError::into_inner);
    let Servers { postgres, rabbitmq } =
        servers.get_or_insert_with(|| Servers { postgres: PrivatePostgres::new(), rabbitmq: PrivateRabbitmq::new() });
    // What a failed test has left behind is put right.
    postgres.start();
    rabbitmq.start();
    servers
}

/// What the gateway answers to valid requests: 404 to who leaves without having followed.
const WELL: [u16; 3] = [200, 201, 404];
const WELL_OR_AWAY: [u16; 4] = [200, 201, 404, 503];

/// Lets a fleet work, breaks a server under it, and sees that all is well in the end and no request had another answer.
fn under_load(seed: u64, limits: &[(&str, &str)], answers: &[u16], break_it: impl FnOnce(&mut Servers, &Stage, &Load)) {
    let mut servers = servers();
    let servers = servers.as_mut().expect("they were started");
    let vhost = TestVhost::on(&servers.rabbitmq.url(), &servers.rabbitmq.management_url());
    let mut stage = Stage::new(TestDatabase::on(&servers.postgres.url()), vhost.url());
    limits.iter().for_each(|(name, value)| stage.set(name, value));
    stage.start();
    let load = Load::start(&stage, seed);
    load.await_more(50);
    break_it(servers, &stage, &load);
    load.await_more(50);
    stage.fleet.wait_ready(PATIENCE).expect("every process has found its way back");
    let accepted = load.stop();
    accepted.has_only(answers);
    stage.await_rest();
    accepted.is_all_there(&stage);
    stage.ends_well(0);
}

/// Awaits that the gateway says that it can't now, and when to come back.
fn gateway_says_when_to_come_back(stage: &Stage) {
    let answer = eventually("the gateway says that the database is away", || {
        let tweet = json!({"userId": 1, "text": PRIVATE, "async": true});
        stage.api.call("POST", "/api/v1/post-tweet", &tweet).ok().filter(|answer| answer.status == 503)
    });
    assert!(answer.retry_after.is_some_and(|seconds| seconds.parse::<u32>().is_ok()));
    assert_eq!(answer.body["status"], 503);
}

/// Awaits that tweets are accepted as ever, and wait.
fn gateway_goes_on(stage: &Stage, load: &Load) {
    load.await_more(50);
    let waiting = || stage.database.count("SELECT count(*) AS n FROM outbox") > 0;
    eventually("messages wait in the outbox", || waiting().then_some(()));
}

#[test]
fn nothing_is_lost_when_postgres_is_killed() {
    under_load(2, &POSTGRES, &WELL_OR_AWAY, |servers, stage, _| {
        servers.postgres.kill();
        gateway_says_when_to_come_back(stage);
        servers.postgres.start();
    });
}

#[test]
fn nothing_is_lost_when_postgres_is_restarted() {
    under_load(3, &POSTGRES, &WELL_OR_AWAY, |servers, stage, _| {
        servers.postgres.stop();
        gateway_says_when_to_come_back(stage);
        servers.postgres.start();
    });
}

#[test]
fn nothing_is_lost_and_nobody_hangs_when_postgres_is_frozen() {
    under_load(4, &POSTGRES, &WELL_OR_AWAY, |servers, stage, _| {
        let frozen = servers.postgres.freeze();
        gateway_says_when_to_come_back(stage);
        thread::sleep(FREEZE);
        drop(frozen);
    });
}

#[test]
fn tweets_are_accepted_while_rabbitmq_is_killed_and_arrive_later() {
    under_load(5, &RABBITMQ, &WELL, |servers, stage, load| {
        servers.rabbitmq.kill();
        gateway_goes_on(stage, load);
        servers.rabbitmq.start();
    });
}

#[test]
fn tweets_are_accepted_while_rabbitmq_is_restarted_and_arrive_later() {
    under_load(6, &RABBITMQ, &WELL, |servers, stage, load| {
        servers.rabbitmq.stop();
        gateway_goes_on(stage, load);
        servers.rabbitmq.start();
    });
}

#[test]
fn tweets_are_accepted_while_rabbitmq_is_frozen_and_arrive_later() {
    under_load(7, &RABBITMQ, &WELL, |servers, stage, load| {
        let frozen = servers.rabbitmq.freeze();
        gateway_goes_on(stage, load);
        thread::sleep(FREEZE);
        drop(frozen);
    });
}
