//! Processes that die, stop or freeze while they have events in hand.

use crate::stage::{PATIENCE, Stage, events};
use rustix::process::Signal;
use std::collections::BTreeSet;
use storage::Connection;
use test_support::{eventually, eventually_within, sql};

const WORK_MS: &str = "MURMURATION__EVENT_PROCESSOR__WORK_MS";
const LEASE_TTL_MS: &str = "MURMURATION__SEQUENCED__LEASE_TTL_MS";

/// Two processes share the shards, and both have events in hand for certain, of which none can take effect until the
/// connection that this answers ends its transaction. Returns also who holds the leases of the first one.
fn two_at_work(stage: &mut Stage, settings: &[(&str, &str)]) -> (String, Connection) {
    stage.start(settings);
    let first = eventually_within(PATIENCE, "the first one has all shards", || {
        stage.holders().into_iter().find_map(|(holder, shards)| (shards == 16).then_some(holder))
    });
    stage.start(settings);
    stage.await_shares(&[8, 8]);
    let mut lock = stage.database.database().connection().expect("a connection");
    sql::execute(&mut lock, "BEGIN").expect("it begins");
    sql::execute(&mut lock, "LOCK TABLE account_effect IN EXCLUSIVE MODE").expect("it's locked");
    stage.database.append_events(&events(60, 20));
    let waiting = "SELECT count(*) AS n FROM pg_locks WHERE relation = 'account_effect'::regclass AND NOT granted";
    eventually("both are at work", || (stage.database.count(waiting) == 2).then_some(()));
    (first, lock)
}

fn unlock(mut lock: Connection) {
    sql::execute(&mut lock, "ROLLBACK").expect("it ends");
}

#[test]
fn when_a_process_is_killed_another_takes_its_shards_over() {
    let mut stage = Stage::new();
    let (_, lock) = two_at_work(&mut stage, &[(WORK_MS, "20..60")]);
    stage.signal(0, Signal::KILL);
    stage.wait(0);
    unlock(lock);
    stage.await_shares(&[16]);
    stage.await_all();
    stage.ends_well(60 * 20);
}

#[test]
fn a_process_that_stops_hands_its_shards_over_and_exits_with_0() {
    let mut stage = Stage::new();
    // No lease runs out in the time of this test.
    let (_, lock) = two_at_work(&mut stage, &[(WORK_MS, "20..60"), (LEASE_TTL_MS, "3600000")]);
    stage.signal(0, Signal::TERM);
    let members = || stage.database.count("SELECT count(*) AS n FROM member");
    eventually_within(PATIENCE, "it's leaving", || (members() == 1).then_some(()));
    unlock(lock);
    stage.await_shares(&[16]);
    assert_eq!(stage.wait(0).code(), Some(0));
    stage.await_all();
    stage.ends_well(60 * 20);
}

#[test]
fn a_process_that_was_frozen_past_its_lease_changes_nothing_twice() {
    let mut stage = Stage::new();
    let (frozen, lock) = two_at_work(&mut stage, &[(WORK_MS, "20..60"), ("RUST_LOG", "debug")]);
    stage.signal(0, Signal::STOP);
    unlock(lock);
    stage.await_shares(&[16]);
    assert!(!stage.holders().contains_key(&frozen));
    stage.await_all();
    let by_then = stage.applied();
    stage.signal(0, Signal::CONT);
    // What it had in hand has taken effect meanwhile.
    let late = || {
        let log = stage.log(0);
        let counts = log.lines().filter_map(|line| line.split_once(" late=")?.1.split(' ').next()?.parse::<u32>().ok());
        (counts.sum::<u32>() > 0).then_some(())
    };
    eventually_within(PATIENCE, "it tries to record what it had in hand", late);
    assert_eq!(stage.applied(), by_then);
    eventually_within(PATIENCE, "it's back", || (stage.holders().get(&frozen) == Some(&8)).then_some(()));
    stage.database.append_events(&events(60, 2));
    stage.await_all();
    stage.ends_well(60 * 22);
}

#[test]
fn processes_started_and_stopped_at_random_leave_order_alone() {
    let mut stage = Stage::new();
    let settings = [(WORK_MS, "5..30")];
    stage.database.append_events(&events(50, 40));
    let mut running: BTreeSet<usize> = (0..3).map(|_| stage.start(&settings)).collect();
    for signal in [Signal::KILL, Signal::TERM, Signal::KILL] {
        stage.await_more(200);
        let oldest = running.pop_first().expect("some run");
        stage.signal(oldest, signal);
        running.insert(stage.start(&settings));
        stage.wait(oldest);
    }
    stage.await_all();
    stage.ends_well(50 * 40);
}
