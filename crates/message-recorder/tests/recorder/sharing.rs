//! Members of a group that come, go, die and freeze.

use crate::stage::{FOR_EVER, Load, PATIENCE, Stage};
use rustix::process::Signal;
use std::time::{Duration, Instant};
use storage::admin;
use test_support::eventually_within;

const GROUP: &str = "recorder";

fn load(stage: &Stage) -> Load {
    Load::begin(stage.producer("load"), 5, Duration::from_millis(10))
}

/// The database's clock, in microseconds.
fn now(stage: &Stage) -> i64 {
    stage.database.count("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS n")
}

/// Awaits that what is recorded from then on has so many different values in a column.
#[track_caller]
fn await_different(stage: &Stage, column: &str, count: i64, since: i64) {
    let sql = format!(
        r#"SELECT count(DISTINCT {column}) AS n FROM message
           WHERE "group" = '{GROUP}' AND recorded_at > to_timestamp({since} / 1000000.0)"#
    );
    eventually_within(PATIENCE, column, || (stage.database.count(&sql) == count).then_some(()));
}

/// Two members that share the partitions, with messages coming in.
fn two_at_work(stage: &mut Stage) -> ([usize; 2], Load) {
    stage.relay();
    let members = [stage.member(GROUP), stage.member(GROUP)];
    stage.await_shares(GROUP, &[2, 2]);
    let load = load(stage);
    await_different(stage, "recorded_by", 2, 0);
    (members, load)
}

#[test]
fn one_member_reads_all_partitions_until_a_second_one_takes_half_of_them_and_leaves() {
    let mut stage = Stage::new();
    stage.set(&[FOR_EVER]);
    stage.relay();
    let first = stage.member(GROUP);
    stage.await_shares(GROUP, &[4]);
    let load = load(&stage);
    await_different(&stage, "partition", 4, 0);

    let second = stage.member(GROUP);
    stage.await_shares(GROUP, &[2, 2]);
    assert_eq!((stage.held(GROUP, first).len(), stage.held(GROUP, second).len()), (2, 2));
    await_different(&stage, "recorded_by", 2, now(&stage));

    stage.signal(second, Signal::TERM);
    // Nothing has to run out for that.
    eventually_within(Duration::from_secs(10), "the first one has all of them again", || {
        (stage.held(GROUP, first) == [0, 1, 2, 3]).then_some(())
    });
    assert_eq!(stage.wait(second).code(), Some(0));
    stage.await_more(GROUP, 200);
    drop(load);
    stage.ends_well(&[GROUP]);
}

#[test]
fn when_a_member_is_killed_the_other_one_reads_on_with_its_partitions() {
    let mut stage = Stage::new();
    let ([first, second], load) = two_at_work(&mut stage);
    let of_dead = stage.held(GROUP, first);
    assert_eq!(of_dead.len(), 2);
    stage.kill(first);
    let died = Instant::now();
    eventually_within(Duration::from_secs(10), "the other one has all partitions", || {
        (stage.held(GROUP, second) == [0, 1, 2, 3]).then_some(())
    });
    await_different(&stage, "partition", 4, now(&stage));
    assert!(died.elapsed() < Duration::from_secs(15));
    drop(load);
    stage.ends_well(&[GROUP]);
}

#[test]
fn a_member_that_was_frozen_past_its_lease_records_nothing_twice_and_goes_on_with_its_share() {
    let mut stage = Stage::new();
    let ([first, second], load) = two_at_work(&mut stage);
    let frozen = stage.holders(GROUP);
    drop(load);
    // So many that there are always some on their way to it.
    stage.producer("backlog").spread(10_000);
    stage.await_more(GROUP, 2000);
    stage.signal(first, Signal::STOP);
    eventually_within(Duration::from_secs(10), "the other one has all partitions", || {
        (stage.held(GROUP, second) == [0, 1, 2, 3]).then_some(())
    });
    stage.await_recorded(GROUP);
    stage.signal(first, Signal::CONT);
    // With something in hand or not, as it happens: it comes to nothing.
    stage.await_shares(GROUP, &[2, 2]);
    assert_eq!(
        stage.holders(GROUP).into_keys().collect::<Vec<_>>(),
        frozen.into_keys().collect::<Vec<_>>(),
        "it's back"
    );
    let since = now(&stage);
    stage.producer("afterwards").spread(1000);
    await_different(&stage, "recorded_by", 2, since);
    stage.ends_well(&[GROUP]);
}

#[test]
fn a_member_that_freezes_amid_a_transaction_keeps_nobody_from_reading_on() {
    let mut stage = Stage::new();
    stage.relay();
    let first = stage.member(GROUP);
    stage.await_shares(GROUP, &[4]);
    stage.producer("before").spread(400);
    stage.await_recorded(GROUP);
    // It's held up where it moves the group on, frozen there, and let through by the server alone.
    let mut gate = stage.database.database().connection().expect("a connection");
    let mut gate = |sql| admin::execute(&mut gate, sql).expect("the statement runs");
    gate("BEGIN");
    gate("SELECT FROM consumer_offset FOR UPDATE");
    stage.producer("amid").spread(400);
    let held_up = "SELECT count(*) AS n FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%consumer_offset%'";
    eventually_within(PATIENCE, "it's amid its transactions", || (stage.database.count(held_up) == 4).then_some(()));
    stage.signal(first, Signal::STOP);
    gate("COMMIT");
    stage.member(GROUP);
    stage.await_recorded(GROUP);
    stage.signal(first, Signal::CONT);
    stage.await_shares(GROUP, &[2, 2]);
    let since = now(&stage);
    stage.producer("afterwards").spread(1000);
    await_different(&stage, "recorded_by", 2, since);
    stage.ends_well(&[GROUP]);
}

#[test]
fn a_member_that_is_told_to_stop_finishes_what_it_has_in_hand_and_leaves_at_once() {
    let mut stage = Stage::new();
    stage.set(&[FOR_EVER]);
    stage.relay();
    let member = stage.member(GROUP);
    stage.await_shares(GROUP, &[4]);
    stage.producer("backlog").spread(10_000);
    stage.await_more(GROUP, 1000);
    stage.signal(member, Signal::TERM);
    let told = Instant::now();
    assert_eq!(stage.wait(member).code(), Some(0));
    assert!(told.elapsed() < Duration::from_secs(5), "{:?}", told.elapsed());
    assert!(stage.holders(GROUP).is_empty(), "its leases are free");
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM member"), 0, "it's no member any more");
    assert!(stage.recorded(GROUP) < stage.accepted(), "there was more to do");
    // The next one needn't wait for anything.
    stage.member(GROUP);
    eventually_within(Duration::from_secs(10), "the next one has them", || {
        (stage.holders(GROUP).values().map(Vec::len).sum::<usize>() == 4).then_some(())
    });
    stage.ends_well(&[GROUP]);
}
