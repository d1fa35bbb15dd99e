//! Producers and consumers that somebody starts in terminals.

use crate::stage::{Ended, Stage};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    net::UdpSocket,
    process::{Child, Stdio},
    time::Duration,
};
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
    let statsd = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let mut consumer = stage.command("consume competing --consumer-id 1 --work-ms 0");
    consumer.env("MURMURATION__TELEMETRY__STATSD", statsd.local_addr().expect("it's bound").to_string());
    let consumer = consumer.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    eventually("the messages take effect", || (consumed(&stage) == 12).then_some(()));
    let (mut counted, mut buffer) = (0, [0; 2048]);
    statsd.set_read_timeout(Some(Duration::from_millis(100))).expect("it can be limited");
    eventually("statsd is told of each", || {
        let length = statsd.recv(&mut buffer).unwrap_or(0);
        let lines = String::from_utf8_lossy(&buffer[..length]).into_owned();
        counted += lines.lines().filter(|line| *line == "murmuration.processed_version.2:1|c").count();
        (counted == 12).then_some(())
    });
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
