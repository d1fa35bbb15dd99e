//! Servers that go away and come back.

use crate::stage::{IMPATIENT, Load, PATIENCE, Stage};
use rustix::process::Signal;
use std::time::Duration;
use test_support::{PrivatePostgres, PrivateRabbitmq, TestDatabase, TestVhost, eventually_within};

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
    stage.set(&IMPATIENT);
    let [first, _] = at_work(&mut stage);
    let load = load(&stage);
    for end in [PrivatePostgres::stop, PrivatePostgres::kill] {
        stage.await_more(GROUP, 200);
        end(&mut postgres);
        await_unready(&stage, first);
        postgres.start();
        stage.await_ready(first);
    }
    // What has frozen answers late, and what was asked of it takes place or not.
    stage.await_more(GROUP, 200);
    let frozen = postgres.freeze();
    await_unready(&stage, first);
    drop(frozen);
    stage.await_more(GROUP, 200);
    drop(load);
    stage.ends_well(&[GROUP]);
}

#[test]
fn a_broker_that_goes_and_comes_back_is_read_on() {
    let mut rabbitmq = PrivateRabbitmq::new();
    let mut stage = Stage::at(TestDatabase::new(), &rabbitmq.url());
    stage.set(&[("MURMURATION__BROKER__HEARTBEAT_S", "3")]);
    let [first, second, third] = [(); 3].map(|()| stage.member(GROUP));
    for member in [first, second, third] {
        stage.await_log(member, "no connection to the broker");
        let (status, text) = eventually_within(PATIENCE, "it answers", || stage.ready(member));
        assert_eq!(status, 503, "{text}");
    }
    // Whoever waits for the broker doesn't wait for it to stop.
    stops(&mut stage, third);
    rabbitmq.start();
    stage.relay();
    stage.await_shares(GROUP, &[2, 2]);
    let load = load(&stage);
    stage.await_more(GROUP, 200);

    rabbitmq.stop();
    await_unready(&stage, first);
    rabbitmq.start();
    stage.await_ready(first);
    stage.await_more(GROUP, 200);

    let frozen = rabbitmq.freeze();
    await_unready(&stage, first);
    drop(frozen);
    stage.await_ready(first);
    stage.await_more(GROUP, 200);

    drop(load);
    stage.await_recorded(GROUP);
    rabbitmq.kill();
    await_unready(&stage, first);
    for member in [first, second] {
        stops(&mut stage, member);
    }
    assert!(stage.holders(GROUP).is_empty(), "the leases are free");
    stage.ends_well(&[GROUP]);
}

fn await_unready(stage: &Stage, member: usize) {
    eventually_within(PATIENCE, "it isn't ready", || stage.ready(member).filter(|(status, _)| *status == 503));
}

/// Tells a member to stop, and sees that it does, whatever is away, and stays so until then.
fn stops(stage: &mut Stage, member: usize) {
    stage.signal(member, Signal::TERM);
    assert_eq!(stage.wait(member).code(), Some(0));
}

#[test]
fn a_member_that_is_told_to_stop_while_postgres_is_away_stops() {
    let mut postgres = PrivatePostgres::new();
    postgres.start();
    let vhost = TestVhost::new();
    let mut stage = Stage::at(TestDatabase::on(&postgres.url()), vhost.url());
    stage.set(&IMPATIENT);
    let [first, _] = at_work(&mut stage);
    let load = load(&stage);
    stage.await_more(GROUP, 200);
    postgres.stop();
    await_unready(&stage, first);
    stops(&mut stage, first);
    // The database isn't asked once more for each partition: that takes its time limit each time.
    let log = stage.log(first);
    assert!(log.contains("could not release the leases on partitions"), "it has asked");
    assert!(!log.contains("could not release the lease on a partition"), "and once");
    postgres.start();
    drop(load);
    stage.ends_well(&[GROUP]);
}

#[test]
fn a_partition_whose_name_another_queue_has_keeps_no_other_partition_from_being_read() {
    let mut stage = Stage::new();
    stage.relay();
    let member = stage.member(GROUP);
    stage.await_shares(GROUP, &[4]);
    stage.stop_all();
    stage.delete_stream(2);
    stage.vhost().declare_classic("message.p02");

    let member_of = |stage: &mut Stage| {
        stage.restart(member);
        member
    };
    let member = member_of(&mut stage);
    stage.relay();
    eventually_within(PATIENCE, "it says what is wrong", || {
        let (status, text) = stage.ready(member)?;
        (status == 503 && text.contains("queue `message.p02` exists with other arguments")).then_some(())
    });
    let mut producer = stage.producer("others");
    for partition in [0, 1, 3] {
        producer.to(partition, 10);
    }
    stage.await_count(GROUP, 30);
}
