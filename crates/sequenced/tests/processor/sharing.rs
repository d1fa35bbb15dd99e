//! Processes that come and go share the shards.

use crate::support::{Accounts, Gate, Stage, events};
use domain::stream::{key_hash, shard};
use test_support::eventually;

/// No lease runs out in the time of this test: what changes hands is handed over.
#[test]
fn processes_share_the_shards_evenly_as_they_come_and_go_under_load() {
    let stage = Stage::new();
    let accounts = Accounts::prompt();
    let _relay = stage.relay();
    let await_shares = |shares: &[usize]| {
        eventually("the shards are shared out", || (stage.shares() == shares).then_some(()));
        // And it goes on.
        let attempts = accounts.attempts().len();
        eventually("events take effect", || (accounts.attempts().len() > attempts + 20).then_some(()));
    };
    let _third = stage.under_load(50, || {
        let first = stage.start(&accounts);
        await_shares(&[16]);
        let second = stage.start(&accounts);
        await_shares(&[8, 8]);
        let third = stage.start(&accounts);
        await_shares(&[5, 5, 6]);
        first.stop();
        await_shares(&[8, 8]);
        second.stop();
        await_shares(&[16]);
        third
    });
    stage.await_applied();
    let accepted = stage.accepted();
    stage.assert_in_order(accepted);
    assert_eq!(accounts.assert_one_at_a_time(), accepted, "handed over between events, so none is worked on twice");
}

#[test]
fn whoever_stops_finishes_what_is_in_hand_and_hands_over_everything_else_at_once() {
    let stage = Stage::new();
    let gate = Gate::default();
    let at_the_gate = gate.clone();
    let accounts = Accounts::new(move |event| {
        if event.seq == 2 {
            at_the_gate.pass();
        }
        Ok(())
    });
    let first = stage.start(&accounts);
    eventually("it has all shards", || (stage.shares() == [16]).then_some(()));
    let holder = stage.holders().into_keys().next().expect("a holder");
    stage.database.append_events(&[("in-hand", "1"); 3]);
    eventually("its second event is in hand", || (gate.waiting() == 1).then_some(()));

    let second = stage.start(&accounts);
    first.ask_to_stop();
    eventually("all other shards are handed over", || (stage.shares() == [1, 15]).then_some(()));
    assert_eq!(stage.holders()[&holder].len(), 1, "the one whose event is in hand stays");
    let of = |key: &str| shard(key_hash(key), 16);
    let others: Vec<_> = events(30, 1, "1").into_iter().filter(|(key, _)| of(key) != of("in-hand")).collect();
    stage.database.append_events(&others);
    eventually("the others go on", || (stage.database.events_waiting() == 2).then_some(()));
    gate.open();
    first.stop();
    eventually("it's handed over too", || (stage.shares() == [16]).then_some(()));
    stage.await_applied();
    stage.assert_in_order(3 + others.len());
    let by = |seqs: &str| {
        let rows = format!("account_effect WHERE account_id = 'in-hand' AND seq IN ({seqs}) AND worker");
        stage.database.count(&format!("SELECT count(*) AS n FROM {rows} = '{holder}'"))
    };
    assert_eq!((by("1, 2"), by("3")), (2, 0));
    assert_eq!(accounts.assert_one_at_a_time(), 3 + others.len());
    second.stop();
    assert!(stage.holders().is_empty(), "whoever comes next needn't wait");
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM member"), 0);
}
