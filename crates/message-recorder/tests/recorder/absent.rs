//! Servers that go away and come back.

use crate::stage::{Load, PATIENCE, Stage};
use rustix::process::Signal;
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};
use test_support::{PrivatePostgres, PrivateRabbitmq, TestDatabase, TestVhost, eventually, eventually_within};

const GROUP: &str = "recorder";

fn load(stage: &Stage) -> Load {
    Load::begin(stage.producer("load"), 5, Duration::from_millis(10))
}

/// A relay and two members at work.
fn at_work(stage: &mut Stage) -> [usize; 2] {
    stage.relay();
    let members = [stage.member(GROUP), stage.member(GROUP)];
    stage.await_shares(GROUP, &[2, 2]);
    members
}

#[test]
fn sessions_that_postgres_ends_cost_nothing() {
    let mut stage = Stage::new();
    at_work(&mut stage);
    let load = load(&stage);
    for _ in 0..15 {
        stage.await_more(GROUP, 100);
        let ended = stage.database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name <> 'test'",
        );
        assert!(ended > 0);
    }
    drop(load);
    stage.ends_well(&[GROUP]);
}

#[test]
fn while_postgres_is_away_reading_rests() {
    let mut postgres = PrivatePostgres::new();
    postgres.start();
    let vhost = TestVhost::new();
    let mut stage = Stage::at(TestDatabase::on(&postgres.url()), vhost.url());
    let [first, _] = at_work(&mut stage);
    let load = load(&stage);
    for end in [PrivatePostgres::stop, PrivatePostgres::kill] {
        stage.await_more(GROUP, 200);
        end(&mut postgres);
        eventually("it isn't ready", || stage.ready(first).filter(|(status, _)| *status == 503));
        postgres.start();
        stage.await_ready(first);
    }
    // What has frozen answers late, and what was asked of it takes place or not.
    stage.await_more(GROUP, 200);
    let frozen = postgres.freeze();
    eventually("it isn't ready", || stage.ready(first).filter(|(status, _)| *status == 503));
    drop(frozen);
    stage.await_more(GROUP, 200);
    drop(load);
    stage.ends_well(&[GROUP]);
}

#[test]
fn connections_that_the_broker_closes_cost_nothing() {
    let mut stage = Stage::new();
    at_work(&mut stage);
    let load = load(&stage);
    for _ in 0..3 {
        stage.await_more(GROUP, 200);
        eventually("the broker lists the connections", || (stage.vhost().close_connections() > 0).then_some(()));
    }
    stage.await_more(GROUP, 200);
    drop(load);
    stage.ends_well(&[GROUP]);
}

#[test]
fn a_broker_that_goes_and_comes_back_is_read_on() {
    let mut rabbitmq = PrivateRabbitmq::new();
    rabbitmq.start();
    let mut stage = Stage::at(TestDatabase::new(), &rabbitmq.url());
    stage.set(&[("MURMURATION__BROKER__HEARTBEAT_S", "1")]);
    let [first, _] = at_work(&mut stage);
    let load = load(&stage);
    stage.await_more(GROUP, 200);
    rabbitmq.stop();
    eventually("it isn't ready", || stage.ready(first).filter(|(status, _)| *status == 503));
    rabbitmq.start();
    stage.await_ready(first);
    stage.await_more(GROUP, 200);
    let frozen = rabbitmq.freeze();
    eventually("it isn't ready", || stage.ready(first).filter(|(status, _)| *status == 503));
    drop(frozen);
    stage.await_ready(first);
    stage.await_more(GROUP, 200);
    drop(load);
    stage.ends_well(&[GROUP]);
}

#[test]
fn a_member_waits_for_both_servers_and_stops_all_the_same_when_it_is_told_to() {
    let mut rabbitmq = PrivateRabbitmq::new();
    let mut stage = Stage::at(TestDatabase::new(), &rabbitmq.url());
    let members = [stage.member(GROUP), stage.member(GROUP)];
    for member in members {
        stage.await_log(member, "no connection to the broker");
        assert_eq!(stage.ready(member).map(|(status, _)| status), Some(503));
    }
    stage.signal(members[1], Signal::TERM);
    let told = Instant::now();
    assert_eq!(stage.wait(members[1]).code(), Some(0));
    assert!(told.elapsed() < Duration::from_secs(5), "{:?}", told.elapsed());
    rabbitmq.start();
    stage.await_ready(members[0]);
    stage.relay();
    stage.producer("at last").spread(100);
    stage.await_recorded(GROUP);
    // One that has begun stops as well while the broker is away.
    rabbitmq.kill();
    eventually_within(PATIENCE, "it isn't ready", || stage.ready(members[0]).filter(|(status, _)| *status == 503));
    stage.signal(members[0], Signal::TERM);
    let told = Instant::now();
    assert_eq!(stage.wait(members[0]).code(), Some(0));
    assert!(told.elapsed() < Duration::from_secs(10), "{:?}", told.elapsed());
    assert_eq!(stage.holders(GROUP).into_keys().collect::<BTreeSet<_>>(), BTreeSet::new(), "its leases are free");
    stage.ends_well(&[GROUP]);
}
