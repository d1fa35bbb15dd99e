//! Producers and consumers that somebody starts in terminals.

use crate::stage::{Ended, Stage};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::process::Child;
use test_support::eventually;

fn interrupt(child: &Child) {
    kill_process(Pid::from_child(child), Signal::INT).expect("it runs");
}

fn consumed(stage: &Stage) -> i64 {
    stage.database.count("SELECT count(*) AS n FROM balance_delivery WHERE outcome = 'applied'")
}

#[test]
fn a_consumer_works_off_what_was_produced_and_says_what_it_counted() {
    let stage = Stage::new();
    let produced = stage.run("produce competing 5 --users 3 --messages 4 --message-version 2 --seed 1");
    assert_eq!(produced.status, 0, "{}", produced.err);
    assert!(produced.out.starts_with("12 messages of the users 5 to 7 are in the exchange lab.competing"));
    let consumer = stage.start("consume competing --consumer-id 1 --work-ms 0");
    eventually("the messages take effect", || (consumed(&stage) == 12).then_some(()));
    interrupt(&consumer);
    let Ended { status, out, err } = consumer.wait_with_output().expect("it ends").into();
    assert_eq!(status, 0, "{err}");
    let counted: Value = serde_json::from_str(&out).expect("JSON");
    let expected = r#"{"consumer_error":0,"order_error":0,"processed_version.2":12,"value_error":0}"#;
    assert_eq!(counted, serde_json::from_str::<Value>(expected).unwrap());

    assert_eq!(stage.queues(), ["lab.competing.01"], "others may consume it");
    assert_eq!(stage.run("clean").status, 0);
    assert_eq!(stage.queues(), [""; 0]);
}

#[test]
fn a_new_consumer_turns_messages_away_until_the_others_have_come_to_their_version() {
    let stage = Stage::new();
    let refused = stage.run("produce consistent-hash 0");
    assert_eq!(refused.status, 2);
    assert!(refused.err.contains("start a consumer first"), "{}", refused.err);

    // The one that isn't among the first gets everything.
    let new = stage.start("consume message-version --consumer-id 2 --first 1 --work-ms 0");
    eventually("the consumer's queue is there", || (!stage.queues().is_empty()).then_some(()));
    eventually("the messages are produced", || {
        (stage.run("produce consistent-hash 0 --users 1 --messages 3 --message-version 2").status == 0).then_some(())
    });
    let turned_away = "SELECT count(*) AS n FROM balance_delivery WHERE outcome = 'turned_away'";
    eventually("messages are turned away", || (stage.database.count(turned_away) > 3).then_some(()));
    assert_eq!(consumed(&stage), 0);
    stage.database.execute(
        "INSERT INTO balance_delivery (consumer_id, user_id, processed_at, version, outcome, order_error, value_error,
                                       consumer_error)
         VALUES (1, 99, now(), 2, 'applied', false, false, false)",
    );
    eventually("the messages take effect", || (consumed(&stage) == 4).then_some(()));
    interrupt(&new);
    assert!(new.wait_with_output().expect("it ends").status.success());
}
