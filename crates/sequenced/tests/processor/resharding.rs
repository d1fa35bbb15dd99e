//! The number of shards changes while events flow.

use crate::support::{Accounts, Stage, queues};
use domain::topology::queue;
use test_support::eventually;

#[test]
fn events_take_effect_once_and_in_order_while_the_number_of_shards_changes() {
    let stage = Stage::new();
    let accounts = Accounts::prompt();
    let relay = stage.relay();
    let processors = [stage.start(&accounts), stage.start(&accounts)];
    let await_shares = |shares: &[usize]| {
        eventually("the shards are shared out", || (stage.shares() == shares).then_some(()));
        let attempts = accounts.attempts().len();
        eventually("events take effect", || (accounts.attempts().len() > attempts + 300).then_some(()));
    };
    stage.under_load(60, || {
        await_shares(&[8, 8]);
        // Nobody routes to a queue that isn't there yet.
        stage.declare(32);
        stage.divide(32, 32);
        await_shares(&[16, 16]);
        // The queues that are no shards any more are drained.
        stage.divide(8, 32);
        await_shares(&[16, 16]);
        stage.divide(8, 8);
        await_shares(&[4, 4]);
    });
    stage.await_applied();
    stage.assert_in_order(stage.accepted());
    // Their messages may come later: whoever works on a key takes all its events, and waits for no message.
    eventually("all messages are published", || {
        (stage.database.count("SELECT count(*) AS n FROM outbox") == 0).then_some(())
    });
    drop(relay);
    eventually("the shards' messages are taken", || (stage.depth(&queues(0..8)) == 0).then_some(()));
    assert_eq!(stage.depth(&[queue::DEAD_LETTER.into()]), 0);
    for processor in processors {
        processor.stop();
    }
}
