//! Members of a group that come, go, die and freeze.

use crate::stage::{FOR_EVER, Load, PATIENCE, Stage};
use rustix::process::Signal;
use std::time::Duration;
use test_support::{eventually_within, sql};

const GROUP: &str = "recorder";

fn load(stage: &Stage, name: &'static str) -> Load {
    Load::begin(stage.producer(name), 5, Duration::from_millis(10))
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

/// Holds up a member amid its transactions, where it moves the group on.
struct Gate<'a>(&'a Stage, storage::Connection);

impl<'a> Gate<'a> {
    fn shut(stage: &'a Stage) -> Self {
        let mut conn = stage.database.database().connection().expect("a connection");
        for sql in ["BEGIN", "SELECT FROM consumer_offset FOR UPDATE"] {
            sql::execute(&mut conn, sql).expect("the statement runs");
        }
        Self(stage, conn)
    }

    /// Awaits that all partitions are held up.
    fn await_held_up(&self) {
        let sql = "SELECT count(*) AS n FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%consumer_offset%'";
        let held_up = || (self.0.database.count(sql) == 4).then_some(());
        eventually_within(PATIENCE, "it's amid its transactions", held_up);
    }

    fn open(mut self) {
        sql::execute(&mut self.1, "COMMIT").expect("the statement runs");
    }
}

/// Two members that share the partitions, with messages coming in.
fn two_at_work(stage: &mut Stage) -> ([usize; 2], Load) {
    stage.relay();
    let members = [stage.member(GROUP), stage.member(GROUP)];
    stage.await_shares(GROUP, &[2, 2]);
    let load = load(stage, "load");
    await_different(stage, "recorded_by", 2, 0);
    (members, load)
}

/// Sees that both members record, and that all ends well.
#[track_caller]
fn both_record(stage: Stage) {
    let since = now(&stage);
    let load = load(&stage, "afterwards");
    await_different(&stage, "recorded_by", 2, since);
    drop(load);
    stage.ends_well(&[GROUP]);
}

#[test]
fn one_member_reads_all_partitions_until_a_second_one_takes_half_of_them_and_leaves() {
    let mut stage = Stage::new();
    stage.set(&[FOR_EVER]);
    stage.relay();
    let first = stage.member(GROUP);
    stage.await_shares(GROUP, &[4]);
    let load = load(&stage, "load");
    await_different(&stage, "partition", 4, 0);

    let second = stage.member(GROUP);
    stage.await_shares(GROUP, &[2, 2]);
    assert_eq!((stage.held(GROUP, first).len(), stage.held(GROUP, second).len()), (2, 2));
    await_different(&stage, "recorded_by", 2, now(&stage));

    stage.signal(second, Signal::TERM);
    // Nothing has to run out for that.
    eventually_within(PATIENCE, "the first one has all of them again", || {
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
    // It has some to be taken over.
    stage.await_shares(GROUP, &[2, 2]);
    stage.kill(first);
    eventually_within(PATIENCE, "the other one has all partitions", || {
        (stage.held(GROUP, second) == [0, 1, 2, 3]).then_some(())
    });
    await_different(&stage, "partition", 4, now(&stage));
    drop(load);
    stage.ends_well(&[GROUP]);
}

#[test]
fn a_member_that_was_frozen_past_its_lease_records_nothing_twice_and_goes_on_with_its_share() {
    let mut stage = Stage::new();
    let ([first, second], load) = two_at_work(&mut stage);
    let frozen = stage.await_shares(GROUP, &[2, 2]);
    drop(load);
    stage.await_recorded(GROUP);
    let before = stage.recorded(GROUP);
    // So many that there are likely some on their way to it.
    stage.producer("backlog").spread(10_000);
    stage.await_count(GROUP, before + 2000);
    stage.signal(first, Signal::STOP);
    eventually_within(PATIENCE, "the other one has all partitions", || {
        (stage.held(GROUP, second) == [0, 1, 2, 3]).then_some(())
    });
    stage.await_recorded(GROUP);
    stage.signal(first, Signal::CONT);
    // With something in hand or not, as it happens: it comes to nothing.
    let back = stage.await_shares(GROUP, &[2, 2]);
    assert!(back.keys().eq(frozen.keys()), "{back:?} instead of {frozen:?}");
    both_record(stage);
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
    let gate = Gate::shut(&stage);
    stage.producer("amid").spread(400);
    gate.await_held_up();
    stage.signal(first, Signal::STOP);
    gate.open();
    stage.member(GROUP);
    stage.await_recorded(GROUP);
    stage.signal(first, Signal::CONT);
    stage.await_shares(GROUP, &[2, 2]);
    both_record(stage);
}

#[test]
fn a_member_that_is_told_to_stop_finishes_what_it_has_in_hand_and_leaves_at_once() {
    let mut stage = Stage::new();
    stage.set(&[FOR_EVER]);
    stage.relay();
    let member = stage.member(GROUP);
    stage.await_shares(GROUP, &[4]);
    let gate = Gate::shut(&stage);
    stage.producer("backlog").spread(10_000);
    gate.await_held_up();
    stage.signal(member, Signal::TERM);
    // It's no member any more, and renews its leases once more: by then its readers are told.
    let members = || stage.database.count("SELECT count(*) AS n FROM member");
    eventually_within(PATIENCE, "it leaves", || (members() == 0).then_some(()));
    let renewed =
        || stage.database.count("SELECT (extract(epoch FROM max(expires_at)) * 1000000)::bigint AS n FROM lease");
    let before = renewed();
    eventually_within(PATIENCE, "it keeps its leases", || (renewed() > before).then_some(()));
    assert_eq!(stage.recorded(GROUP), 0, "all is in hand");
    gate.open();
    assert_eq!(stage.wait(member).code(), Some(0));
    assert!(stage.recorded(GROUP) > 0, "what it had in hand is recorded");
    assert!(stage.holders(GROUP).is_empty(), "its leases are free");
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM member"), 0, "it's no member any more");
    assert!(stage.recorded(GROUP) < stage.accepted(), "there was more to do");
    // The next one needn't wait for anything.
    stage.member(GROUP);
    eventually_within(PATIENCE, "the next one has them", || {
        (stage.holders(GROUP).values().map(Vec::len).sum::<usize>() == 4).then_some(())
    });
    stage.ends_well(&[GROUP]);
}
