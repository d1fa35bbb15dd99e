//! Messages wake; what is to be done is in the tables.

use crate::support::{Accounts, NEVER_MS, Running, Stage, events, queues};
use domain::{
    Envelope,
    stream::{ACCOUNT_EVENT, shard_routing_key},
    topology::queue,
};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};
use serde_json::json;
use test_support::eventually;

const QUEUES: i32 = 16;

/// A processor that no sweep helps.
fn deaf(stage: &Stage, accounts: &Accounts) -> Running {
    stage.database.append_events(&[("sweep", "1")]);
    let mut processor = stage.processor(accounts);
    processor.settings.sweep_ms = NEVER_MS;
    let running = Running::start(processor);
    // The first one, for its shards are new to it.
    stage.await_applied();
    stage.intercept();
    stage.declare(QUEUES);
    running
}

#[test]
fn a_shard_whose_messages_the_broker_has_lost_is_worked_on_all_the_same() {
    let stage = Stage::new();
    stage.database.append_events(&events(40, 5, "1"));
    stage.relay_all();
    let lost = stage.drain(&queues([1, 3, 5, 8, 13])).len();
    assert!((1..200).contains(&lost), "{lost}");
    let accounts = Accounts::prompt();
    let _processor = stage.start(&accounts);
    stage.await_applied();
    stage.assert_in_order(200);
}

#[test]
fn events_take_effect_without_any_message() {
    let stage = Stage::new();
    let accounts = Accounts::prompt();
    let _processor = stage.start(&accounts);
    for _ in 0..5 {
        stage.database.append_events(&events(20, 4, "1"));
    }
    stage.await_applied();
    stage.assert_in_order(400);
    accounts.assert_one_at_a_time();
}

#[test]
fn messages_wake_however_often_in_whichever_order_and_by_whichever_queue_they_come() {
    let stage = Stage::new();
    stage.divide(8, QUEUES);
    let accounts = Accounts::prompt();
    let _processor = deaf(&stage, &accounts);
    (0..10).for_each(|_| stage.database.append_events(&events(30, 1, "1")));
    let mut random = SmallRng::seed_from_u64(1);
    let mut messages: Vec<Envelope> = stage.intercept();
    assert_eq!(messages.len(), 300);
    messages.extend_from_within(..);
    for message in &mut messages {
        // Half of them to queues that are no shards any more.
        message.routing_key = shard_routing_key(random.random_range(0..QUEUES));
    }
    messages.shuffle(&mut random);
    for some in messages.chunks(50) {
        stage.publish(some);
    }
    stage.await_applied();
    stage.assert_in_order(301);
    assert_eq!(accounts.assert_one_at_a_time(), 301);
    eventually("every queue is empty", || (stage.depth(&queues(0..QUEUES)) == 0).then_some(()));
    assert_eq!(stage.depth(&[queue::DEAD_LETTER.into()]), 0);
}

#[test]
fn messages_wake_a_key_that_another_process_has() {
    let stage = Stage::new();
    let accounts = Accounts::prompt();
    let _processors = [stage.start(&accounts), stage.start(&accounts)];
    eventually("both have shards", || (stage.shares() == [8, 8]).then_some(()));
    stage.declare(QUEUES);
    (0..10).for_each(|_| stage.database.append_events(&events(30, 1, "1")));
    let mut messages = stage.intercept();
    messages.iter_mut().for_each(|message| message.routing_key = shard_routing_key(0));
    messages.reverse();
    stage.publish(&messages);
    stage.await_applied();
    stage.assert_in_order(300);
    assert_eq!(accounts.assert_one_at_a_time(), 300);
    assert_eq!(stage.depth(&[queue::DEAD_LETTER.into()]), 0);
}

#[test]
fn messages_of_events_that_are_not_committed_are_set_aside_and_their_neighbours_are_not() {
    let stage = Stage::new();
    let accounts = Accounts::prompt();
    let _processor = deaf(&stage, &accounts);
    (0..2).for_each(|_| stage.database.append_events(&events(20, 1, "1")));
    let event = |account: &str, seq: i64| {
        let body = json!({"accountId": account, "seq": seq, "payload": 1, "generatedAt": "2026-01-01T00:00:00Z"});
        let mut envelope = Envelope::new(ACCOUNT_EVENT, shard_routing_key(0), body.to_string().into_bytes());
        envelope.kind = Some(ACCOUNT_EVENT.into());
        envelope
    };
    let mut no_json = event("k000", 1);
    no_json.body = b"{\"accountId".to_vec();
    let mut no_account = event("k000", 1);
    no_account.body = b"{\"accountId\": [1], \"seq\": 1}".to_vec();
    let body = |account: &str, seq: &str, at: &str| {
        let mut envelope = event("k000", 1);
        envelope.body =
            format!(r#"{{"accountId": {account}, "seq": {seq}, "payload": 1, "generatedAt": "{at}"}}"#).into_bytes();
        envelope
    };
    const AT: &str = "2026-01-01T00:00:00Z";
    // What a database couldn't hold, and what it could and nobody has.
    let extreme = [
        body("\"k000\\u0000\"", "1", AT),
        body("\"k000\"", "9223372036854775808", AT),
        body("\"k000\"", "1e300", AT),
        body("\"k000\"", "9223372036854775807", AT),
        body("\"k000\"", "-9223372036854775808", AT),
        body("\"k000\"", "1", "-5000-01-01T00:00:00Z"),
        body("\"k000\"", "1", "+200000-01-01T00:00:00Z"),
    ];
    let mut no_id = event("k000", 1);
    no_id.message_id = "\0".into();
    let mut other_type = event("k000", 1);
    other_type.kind = Some("publish_tweet".into());
    let bad =
        [no_json, event("nobody", 1), event("k001", 3), no_account, event("k002", 0), other_type, event("k003", -1)];

    let mut messages = stage.intercept();
    messages.iter_mut().for_each(|message| message.routing_key = shard_routing_key(0));
    for (place, bad) in bad.into_iter().chain(extreme).enumerate() {
        messages.insert(3 * place, bad);
    }
    messages.push(no_id);
    stage.publish(&messages);
    stage.await_applied();
    stage.assert_in_order(41);
    let dead_letters = [queue::DEAD_LETTER.to_owned()];
    eventually("they are set aside", || (stage.depth(&dead_letters) == 15).then_some(()));
    let mut reasons: Vec<_> =
        stage.drain(&dead_letters).into_iter().map(|headers| headers["x-error"].clone()).collect();
    reasons.sort();
    let begins = [
        ("its message id contains", 1),
        ("no such event", 6),
        ("not JSON", 1),
        ("unknown type", 1),
        ("wrong shape", 6),
    ];
    let begins = begins.into_iter().flat_map(|(begin, times)| [begin].repeat(times));
    assert!(reasons.iter().zip(begins).all(|(reason, begin)| reason.starts_with(begin)), "{reasons:#?}");
    eventually("every queue is empty", || (stage.depth(&queues(0..QUEUES)) == 0).then_some(()));
}
