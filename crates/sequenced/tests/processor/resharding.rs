//! The number of shards changes while events flow.

use crate::support::{Accounts, Running, Stage, queues};
use domain::{stream::shard_routing_key, topology::queue};
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

/// As if it had been frozen meanwhile: it looks at the number of shards once.
#[test]
fn a_process_that_was_not_told_of_fewer_queues_declares_no_others_when_it_connects_again() {
    let stage = Stage::new();
    let accounts = Accounts::prompt();
    let mut processor = stage.processor(&accounts);
    processor.settings.lease_ttl_ms = 7_200_000;
    processor.settings.lease_renew_ms = 3_600_000;
    let _processor = Running::start(processor);
    stage.database.append_events(&[("a", "1")]);
    stage.await_applied();
    eventually("it has declared them", || (stage.existing(&queues(0..16)) == 16).then_some(()));
    stage.divide(4, 4);
    stage.delete(&queues(4..16));
    stage.unbind(&queues(0..1)[0], &shard_routing_key(0));
    stage.close_connections();
    // Bindings are declared behind all queues.
    eventually("it has declared what there is", || stage.is_bound(&shard_routing_key(0)).then_some(()));
    assert_eq!(stage.existing(&queues(0..16)), 4);
}
