//! What other programs have put into the streams.

use crate::stage::{PATIENCE, PRIVATE, Stage, group};
use broker::Publisher;
use domain::{
    Envelope,
    log::{KEY_MAX, MESSAGE, MessageId, TEXT_MAX},
};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::time::Instant;
use storage::{messages, partitions};
use test_support::eventually_within;

const GROUP: &str = "recorder";

/// As another program might make it.
fn envelope(body: impl Into<Vec<u8>>) -> Envelope {
    Envelope::new(MESSAGE, "p00", body.into())
}

fn text(name: &str) -> Value {
    json!({"text": format!("{PRIVATE} {name}")})
}

fn publish(stage: &Stage, messages: &[Envelope]) {
    let mut publisher = Publisher::new(stage.broker(), "another program");
    publisher.publish_all(messages, Instant::now() + PATIENCE).expect("they are confirmed");
}

/// The texts of what is recorded of partition 0, without what all have in common.
fn texts(stage: &Stage) -> Vec<String> {
    let messages = stage.messages(GROUP);
    let of_partition = messages.into_iter().filter(|message| message.partition == 0);
    let prefix = format!("{PRIVATE} ");
    of_partition.map(|message| message.text.strip_prefix(&prefix).expect("a test's text").to_owned()).collect()
}

/// A group that reads partition 0, where there are two of the log's own messages.
fn begin() -> (Stage, usize) {
    let mut stage = Stage::new();
    stage.relay();
    let member = stage.member(GROUP);
    stage.producer("own").to(0, 2);
    stage.await_recorded(GROUP);
    (stage, member)
}

fn passed(stage: &Stage, what: &str) -> i64 {
    stage.database.count(&format!("SELECT {what} AS n FROM consumer_offset WHERE partition = 0"))
}

#[test]
fn messages_of_other_programs_are_recorded_and_those_with_an_id_once() {
    let (mut stage, member) = begin();
    let named = |id: &str, body: &Value| Envelope { message_id: id.into(), ..envelope(body.to_string()) };
    let twice = [named("first", &text("twice")), named("first", &text("twice"))];
    let keyed = Envelope {
        kind: Some(MESSAGE.into()),
        ..envelope(json!({"text": format!("{PRIVATE} keyed"), "key": "k", "more": 1}).to_string())
    };
    publish(&stage, &[&twice[..], &[keyed, envelope(text("any").to_string())]].concat());
    // Nothing tells those without an id.
    for _ in 0..2 {
        assert!(stage.vhost().publish(MESSAGE, "p00", &json!({}), text("no id").to_string().as_bytes()));
    }
    let expected = ["own 0 #0", "own 0 #1", "twice", "keyed", "any", "no id", "no id"];
    eventually_within(PATIENCE, "they are recorded", || (texts(&stage) == expected).then_some(()));
    assert_eq!((passed(&stage, "repeated"), passed(&stage, "skipped")), (1, 0));
    let recorded = stage.messages(GROUP);
    let of = |text: &str| recorded.iter().find(|message| message.text.ends_with(text)).expect("it's recorded");
    assert_eq!((of("twice").message_id.as_deref(), of("no id").message_id.as_deref()), (Some("first"), None));
    assert_eq!((of("keyed").key.as_deref(), of("any").key.as_deref()), (Some("k"), None));

    // Also much later, and by another process. A copy of one of the log's own is one that has been here, too.
    stage.signal(member, Signal::TERM);
    assert_eq!(stage.wait(member).code(), Some(0));
    let log = stage.transaction(partitions::token);
    let own = MessageId { log: &log, partition: 0, seq: 1 }.to_string();
    publish(&stage, &[named("first", &text("twice")), named(&own, &text("copied")), named("last", &text("last"))]);
    stage.producer("afterwards").to(0, 1);
    stage.restart(member);
    let expected = [&expected[..], &["last", "afterwards 0 #0"]].concat();
    eventually_within(PATIENCE, "the last one is recorded", || (texts(&stage) == expected).then_some(()));
    assert_eq!((passed(&stage, "repeated"), passed(&stage, "skipped")), (3, 0));
    stage.stop_all();
}

#[test]
fn what_is_no_message_is_set_aside_with_the_reason_and_its_neighbours_are_recorded() {
    let (mut stage, member) = begin();
    let object = |text: &str, key: &str| envelope(json!({"text": text, "key": key}).to_string());
    let long = "x".repeat(TEXT_MAX - PRIVATE.len()) + PRIVATE;
    let garbage = [
        (envelope(format!("{{{PRIVATE}")), "no JSON: line 1"),
        (envelope(""), "no JSON"),
        (envelope(*b"{\"text\": \"\xff\"}"), "no JSON"),
        (envelope(format!("\"{PRIVATE}\"")), "isn't {text, key?}"),
        (envelope(json!({"txt": PRIVATE}).to_string()), "isn't {text, key?}"),
        (envelope(json!({"text": [PRIVATE]}).to_string()), "isn't {text, key?}"),
        (envelope(json!({"text": PRIVATE, "key": 5}).to_string()), "isn't {text, key?}"),
        (object("", "k"), "text must not be empty"),
        (object(&(long.clone() + "x"), "k"), "text must be at most 65536 bytes long"),
        (object(&format!("{PRIVATE}\0"), "k"), "text must not contain the NUL character"),
        (object(PRIVATE, ""), "key must not be empty"),
        (object(PRIVATE, &PRIVATE.repeat(KEY_MAX)), "key must be at most 255 bytes long"),
        (Envelope { kind: Some(PRIVATE.into()), ..object(PRIVATE, "k") }, "type"),
        (Envelope { message_id: format!("{PRIVATE}\0"), ..object(PRIVATE, "k") }, "message id contains the NUL"),
        // Large ones are kept in part.
        (envelope(format!("[{}", "9".repeat(2 * TEXT_MAX))), "no JSON"),
    ];
    let neighbours = [object(&format!("{PRIVATE} before"), "k"), object(&format!("{PRIVATE} behind"), "k")];
    let [before, behind] = &neighbours;
    let bodies: Vec<_> = garbage.iter().flat_map(|(body, _)| [before.clone(), body.clone(), behind.clone()]).collect();
    // Ids of their own, or they'd be the same message.
    let bodies = bodies.into_iter().map(|message| match &*message.message_id {
        id if *id == before.message_id || *id == behind.message_id => envelope(message.body),
        _ => message,
    });
    publish(&stage, &bodies.collect::<Vec<_>>());
    publish(&stage, &[object(&long, "k")]);
    stage.producer("own again").to(0, 1);
    stage.await_count(GROUP, 2 + 2 * garbage.len() + 1 + 1);
    let texts: Vec<_> = stage.messages(GROUP).into_iter().map(|message| message.text).collect();
    for (number, pair) in texts[2..2 + 2 * garbage.len()].chunks(2).enumerate() {
        assert!(pair[0].ends_with(" before") && pair[1].ends_with(" behind"), "beside {number}");
    }
    assert!(texts[texts.len() - 2] == long && texts[texts.len() - 1].ends_with("own again 0 #0"));

    let mut skipped = stage.transaction(|conn| messages::skipped(conn, &group(GROUP), 100));
    skipped.sort_unstable_by_key(|skipped| skipped.offset);
    assert_eq!(skipped.len(), garbage.len(), "{skipped:?}");
    assert_eq!(passed(&stage, "skipped"), i64::try_from(garbage.len()).expect("a count"));
    for ((number, (message, reason)), skipped) in (0..).zip(&garbage).zip(&skipped) {
        assert!(skipped.reason.contains(reason) && !skipped.reason.contains(PRIVATE), "{reason}: {skipped:?}");
        // After the two own messages, each between its neighbours.
        assert_eq!((skipped.partition, skipped.offset), (0, 2 + 3 * number + 1));
        assert_eq!(skipped.body, message.body[..message.body.len().min(65536)]);
        let id = Some(&message.message_id).filter(|id| !id.contains('\0'));
        assert_eq!(skipped.message_id.as_ref(), id);
        let said = format!("skipped what is no message group={GROUP} partition=0 offset={} reason=", skipped.offset);
        // What is recorded is said afterwards.
        stage.await_log(member, &said);
    }
    // A group that comes later skips the same.
    stage.member("later");
    stage.await_count("later", stage.recorded(GROUP));
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM skipped_message"), 2 * passed(&stage, "max(skipped)"));
    stage.stop_all();
}
