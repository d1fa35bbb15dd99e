//! Processes that die, stop or freeze while they have events in hand.

use crate::stage::{PATIENCE, Stage, events};
use rustix::process::Signal;
use std::{collections::BTreeSet, time::Duration};
use test_support::{eventually, eventually_within};

const WORK_MS: &str = "MURMURATION__EVENT_PROCESSOR__WORK_MS";
const LEASE_TTL_MS: &str = "MURMURATION__SEQUENCED__LEASE_TTL_MS";

/// Two processes share the shards, and have events in hand of which each takes so long; answers who holds the leases of
/// the first one.
fn two_at_work(stage: &mut Stage, settings: &[(&str, &str)]) -> String {
    stage.start(settings);
    stage.await_shares(&[16]);
    let first = stage.holders().into_keys().next().expect("a holder");
    stage.start(settings);
    stage.await_shares(&[8, 8]);
    stage.database.append_events(&events(60, 20));
    let by = |holder: &str| {
        let other = format!("SELECT count(DISTINCT worker = '{holder}') AS n FROM account_effect");
        (stage.database.count(&other) == 2).then_some(())
    };
    eventually("both are at work", || by(&first));
    first
}

#[test]
fn when_a_process_is_killed_another_takes_its_shards_over() {
    let mut stage = Stage::new();
    two_at_work(&mut stage, &[(WORK_MS, "20..60")]);
    stage.signal(0, Signal::KILL);
    stage.wait(0);
    eventually_within(Duration::from_secs(10), "its shards are taken over", || (stage.shares() == [16]).then_some(()));
    assert!(stage.database.events_waiting() > 0, "it died with events in hand");
    stage.await_all();
    stage.ends_well(60 * 20);
}

#[test]
fn a_process_that_stops_hands_its_shards_over_and_exits_with_0() {
    let mut stage = Stage::new();
    // No lease runs out in the time of this test.
    two_at_work(&mut stage, &[(WORK_MS, "20..60"), (LEASE_TTL_MS, "120000")]);
    stage.signal(0, Signal::TERM);
    eventually_within(Duration::from_secs(10), "its shards are handed over", || (stage.shares() == [16]).then_some(()));
    assert_eq!(stage.wait(0).code(), Some(0));
    assert!(stage.database.events_waiting() > 0, "it stopped while events were in hand");
    stage.await_all();
    stage.ends_well(60 * 20);
}

#[test]
fn a_process_that_was_frozen_past_its_lease_changes_nothing_twice() {
    let mut stage = Stage::new();
    let frozen = two_at_work(&mut stage, &[(WORK_MS, "100..200"), ("RUST_LOG", "debug")]);
    stage.signal(0, Signal::STOP);
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
    stage.await_shares(&[8, 8]);
    assert!(stage.holders().contains_key(&frozen), "it's back");
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
