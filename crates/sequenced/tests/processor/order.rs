//! In order per key, keys side by side.

use crate::support::{Accounts, NEVER_MS, Running, Stage, events, random_batches};
use rand::random_range;
use std::{
    sync::{
        Arc, Barrier,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

#[test]
fn events_from_many_producers_take_effect_once_and_in_order() {
    let stage = Stage::new();
    let accounts = Accounts::new(|_| {
        thread::sleep(Duration::from_millis(random_range(0..4)));
        Ok(())
    });
    let _relay = stage.relay();
    let processor = stage.start(&accounts);
    let producers: Vec<_> = (0..3).map(|seed| random_batches(seed, 30, 25)).collect();
    thread::scope(|scope| {
        for batches in &producers {
            scope.spawn(|| batches.iter().for_each(|batch| stage.database.append_events(batch)));
        }
    });
    stage.await_applied();
    processor.stop();
    let accepted = producers.iter().flatten().map(Vec::len).sum();
    stage.assert_in_order(accepted);
    assert_eq!(accounts.assert_one_at_a_time(), accepted, "each was worked on once");
}

#[test]
fn as_many_keys_are_worked_on_side_by_side_as_there_are_lanes() {
    const LANES: usize = 8;
    let stage = Stage::new();
    let (together, at_once, most) = (Barrier::new(LANES), AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let noted = most.clone();
    let accounts = Accounts::new(move |_| {
        noted.fetch_max(at_once.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        // Nobody goes on before all lanes are here.
        together.wait();
        at_once.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    });
    stage.database.append_events(&events(3 * LANES, 2, "1"));
    let mut processor = stage.processor(&accounts);
    processor.lanes = LANES;
    let _processor = Running::start(processor);
    stage.await_applied();
    stage.assert_in_order(6 * LANES);
    assert_eq!(most.load(Ordering::SeqCst), LANES);
    accounts.assert_one_at_a_time();
}

/// There's room for four keys, and no message says anything: each of the others has to be found as soon as there's room
/// for it.
#[test]
fn keys_that_were_turned_away_have_their_turn_when_there_is_room() {
    let stage = Stage::new();
    let accounts = Accounts::prompt();
    stage.database.append_events(&events(700, 1, "1"));
    let mut processor = stage.processor(&accounts);
    processor.lanes = 1;
    processor.settings.sweep_ms = NEVER_MS;
    let _processor = Running::start(processor);
    stage.await_applied();
    stage.assert_in_order(700);
}
