//! What other programs have put into the streams.

use crate::stage::{PATIENCE, PRIVATE, Stage, group};
use broker::{Consumer, Publisher, StreamOffset};
use domain::{
    Envelope,
    log::{KEY_MAX, MESSAGE, MessageId, TEXT_MAX, partition_queue},
    topology::Topology,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{
    thread,
    time::{Duration, Instant},
};
use storage::{message_outbox, messages, partitions};
use test_support::{TestDatabase, eventually_within, log_retention};

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

/// The body of partition 0's first message, as it stands in the stream.
fn first_body(stage: &Stage) -> Vec<u8> {
    let mut reader = Consumer::of_stream_queue(stage.broker(), "test", &partition_queue(0), 10, StreamOffset::First);
    eventually_within(PATIENCE, "the first message comes", || {
        let batch = reader.next_batch(1, Duration::ZERO, Duration::from_secs(1)).expect("the broker is there");
        batch.into_iter().next().map(|delivery| delivery.body)
    })
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

    // Also much later, and by another process. A copy of one of the log's own is one that has been here, too; one that only has
    // its id isn't.
    stage.signal(member, Signal::TERM);
    assert_eq!(stage.wait(member).code(), Some(0));
    let log = stage.transaction(partitions::token);
    let own = MessageId { log: &log, partition: 0, seq: 1 }.to_string();
    let copy = Envelope { message_id: own.clone(), ..envelope(first_body(&stage)) };
    publish(
        &stage,
        &[named("first", &text("twice")), copy, named(&own, &text("forged")), named("last", &text("last"))],
    );
    stage.producer("afterwards").to(0, 1);
    stage.restart(member);
    let expected = [&expected[..], &["forged", "last", "afterwards 0 #0"]].concat();
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
        let said =
            format!("skipped a record that is no message group={GROUP} partition=0 offset={} reason=", skipped.offset);
        // What is recorded is said afterwards.
        stage.await_log(member, &said);
    }
    // A group that comes later skips the same.
    stage.member("later");
    stage.await_count("later", stage.recorded(GROUP));
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM skipped_message"), 2 * passed(&stage, "max(skipped)"));
    stage.stop_all();
}

/// Awaits that these are the texts of partition 0.
#[track_caller]
fn await_texts(stage: &Stage, expected: &[&str]) {
    let end = Instant::now() + PATIENCE;
    while texts(stage) != expected {
        assert!(Instant::now() < end, "expected {expected:?}: {:?}", texts(stage));
        thread::sleep(Duration::from_millis(50));
    }
}

/// What was set aside of partition 0, in the order of the offsets: offsets and reasons.
fn set_aside(stage: &Stage) -> Vec<(i64, String)> {
    let mut skipped = stage.transaction(|conn| messages::skipped(conn, &group(GROUP), 100));
    skipped.sort_unstable_by_key(|skipped| skipped.offset);
    skipped.into_iter().map(|skipped| (skipped.offset, skipped.reason)).collect()
}

#[test]
fn times_that_the_database_does_not_hold_are_set_aside_and_their_neighbours_recorded() {
    let (mut stage, _) = begin();
    let at = |time: &str| {
        let mut body = text(time);
        body["acceptedAt"] = json!(time);
        envelope(body.to_string())
    };
    let refused = ["-5000-01-01T00:00:00Z", "+262000-01-01T00:00:00Z", "0000-01-01T00:00:00+00:01"];
    let taken = ["0000-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"];
    publish(&stage, &[&refused.map(at)[..], &taken.map(at)].concat());
    stage.producer("behind").to(0, 1);
    await_texts(&stage, &["own 0 #0", "own 0 #1", taken[0], taken[1], "behind 0 #0"]);
    let set_aside = set_aside(&stage);
    assert_eq!(set_aside.iter().map(|one| one.0).collect::<Vec<_>>(), [2, 3, 4]);
    assert!(set_aside.iter().all(|(_, reason)| reason.contains("its body isn't {text, key?}")), "{set_aside:?}");
    stage.stop_all();
}

#[test]
fn what_only_the_database_refuses_is_found_and_set_aside_and_its_neighbours_are_recorded_once() {
    let (mut stage, member) = begin();
    stage.database.execute(&format!(
        r#"ALTER TABLE message ADD CONSTRAINT unwanted CHECK ("group" <> '{GROUP}' OR text NOT LIKE '%poison%')"#
    ));
    let named = |name: &str| envelope(text(name).to_string());
    let names: Vec<_> = (0..40).map(|n| if n % 13 == 5 { "poison".into() } else { format!("theirs {n}") }).collect();
    publish(&stage, &names.iter().map(|name| named(name)).collect::<Vec<_>>());
    // One of the log's own as well: its sequence is done with.
    let mut producer = stage.producer("poison");
    producer.to(0, 1);
    stage.producer("behind").to(0, 2);
    let mut expected = vec!["own 0 #0", "own 0 #1"];
    expected.extend(names.iter().map(String::as_str).filter(|name| *name != "poison"));
    expected.extend(["behind 0 #0", "behind 0 #1"]);
    await_texts(&stage, &expected);
    let set_aside = set_aside(&stage);
    assert_eq!(set_aside.iter().map(|one| one.0).collect::<Vec<_>>(), [7, 20, 33, 42]);
    assert!(set_aside.iter().all(|(_, reason)| reason.contains("unwanted")), "{set_aside:?}");
    assert_eq!((passed(&stage, "skipped"), passed(&stage, "missing"), passed(&stage, "repeated")), (4, 0, 0));
    stage.await_ready(member);
    stage.stop_all();
}

#[test]
fn while_the_database_refuses_everything_nothing_is_set_aside_and_readiness_says_so() {
    let (mut stage, member) = begin();
    stage
        .database
        .execute(&format!(r#"ALTER TABLE message ADD CONSTRAINT closed CHECK ("group" <> '{GROUP}') NOT VALID"#));
    stage.producer("later").to(0, 2);
    eventually_within(PATIENCE, "it says what is wrong", || {
        stage.ready(member).filter(|(status, text)| *status == 503 && text.contains("closed"))
    });
    assert_eq!((set_aside(&stage), passed(&stage, "skipped")), (vec![], 0));
    stage.database.execute("ALTER TABLE message DROP CONSTRAINT closed");
    await_texts(&stage, &["own 0 #0", "own 0 #1", "later 0 #0", "later 0 #1"]);
    stage.await_ready(member);
    stage.stop_all();
}

#[test]
fn an_id_in_the_logs_own_form_from_a_stranger_loses_nothing() {
    let (mut stage, _) = begin();
    let log = stage.transaction(partitions::token);
    let forged = |seq: i64, name: &str| Envelope {
        message_id: MessageId { log: &log, partition: 0, seq }.to_string(),
        ..envelope(text(name).to_string())
    };
    let with_run = |seq: i64, name: &str| {
        let mut body = text(name);
        body["run"] = json!(seq);
        Envelope { message_id: forged(seq, name).message_id, ..envelope(body.to_string()) }
    };
    publish(&stage, &[forged(1000, "ahead"), with_run(500, "ahead with a run"), forged(1, "behind")]);
    stage.producer("real").to(0, 3);
    stage.await_relayed();
    // It has been seen how the log's own look.
    publish(&stage, &[with_run(5, "again"), with_run(6, "next")]);
    stage.producer("last").to(0, 1);
    let expected = [
        "own 0 #0",
        "own 0 #1",
        "ahead",
        "ahead with a run",
        "behind",
        "real 0 #0",
        "real 0 #1",
        "real 0 #2",
        "again",
        "next",
        "last 0 #0",
    ];
    await_texts(&stage, &expected);
    assert_eq!((passed(&stage, "missing"), passed(&stage, "repeated"), passed(&stage, "seq")), (0, 0, 6));
    stage.stop_all();
}

#[test]
fn messages_of_a_restored_copy_of_the_database_are_another_programs() {
    let (mut stage, _) = begin();
    let copy = TestDatabase::new();
    let log = stage.transaction(partitions::token);
    copy.execute(&format!("UPDATE message_log SET token = '{log}'"));
    copy.execute("UPDATE message_partition SET seq = 2 WHERE partition = 0");
    stage.set(&[("MURMURATION__DATABASE__URL", copy.url())]);
    let relay = stage.relay();
    let append = |text: &str, count| {
        let text = format!("{PRIVATE} {text}");
        let new = message_outbox::New { text: &text, key: None, partition: Some(0), count: Some(count) };
        copy.database().transaction(|conn| message_outbox::append(conn, &new, None)).expect("it's accepted");
    };
    append("copy's", 4);
    eventually_within(PATIENCE, "the copy's messages are published", || {
        (copy.count("SELECT count(*) AS n FROM message_outbox") == 0).then_some(())
    });
    stage.producer("real").to(0, 3);
    stage.await_relayed();
    append("copy's next", 1);
    let expected = [
        "own 0 #0",
        "own 0 #1",
        "copy's #0",
        "copy's #1",
        "copy's #2",
        "copy's #3",
        "real 0 #0",
        "real 0 #1",
        "real 0 #2",
        "copy's next #0",
    ];
    await_texts(&stage, &expected);
    assert_eq!((passed(&stage, "missing"), passed(&stage, "repeated"), passed(&stage, "seq")), (0, 0, 5));
    stage.signal(relay, Signal::TERM);
    stage.wait(relay);
    stage.stop_all();
}

#[test]
fn ids_that_identify_nothing_are_no_ids_and_the_last_message_is_known_again_without_one() {
    let (mut stage, member) = begin();
    let name = |id: &str, name: &str| Envelope { message_id: id.into(), ..envelope(text(name).to_string()) };
    publish(&stage, &[name("", "empty"), name("", "empty again"), name(" ", "blank"), name(" ", "blank again")]);
    let mut expected = vec!["own 0 #0", "own 0 #1", "empty", "empty again", "blank", "blank again"];
    await_texts(&stage, &expected);
    let longest = "x".repeat(255);
    let mut skipped = 0;
    for (id, text) in [("", "empty"), (" ", "blank"), ("nul\0", "nul"), (&*longest, "long")] {
        publish(&stage, &[name(id, text)]);
        match id.contains('\0') {
            true => skipped += 1,
            false => expected.push(text),
        }
        let read =
            |stage: &Stage| stage.database.count("SELECT next_offset AS n FROM consumer_offset WHERE partition = 0");
        let next = i64::try_from(expected.len() + skipped).expect("a count");
        eventually_within(PATIENCE, "it's read", || (read(&stage) == next).then_some(()));
        stage.signal(member, Signal::TERM);
        assert_eq!(stage.wait(member).code(), Some(0));
        stage.restart(member);
        stage.producer("behind").to(0, 1);
        expected.push("behind 0 #0");
        await_texts(&stage, &expected);
    }
    assert!(!stage.log(member).contains("stopped reading"));
    assert_eq!(set_aside(&stage).len(), 1);
    stage.stop_all();
}

#[test]
fn messages_from_before_there_were_proofs_keep_their_sequences() {
    let mut stage = Stage::new();
    // As a relay of the version before has published them: the second run begins with what the first one had unconfirmed.
    let log = stage.transaction(partitions::token);
    let old = |seq: i64, run: i64| {
        let mut body = text(&format!("old {seq}"));
        body["run"] = json!(run);
        Envelope { message_id: MessageId { log: &log, partition: 0, seq }.to_string(), ..envelope(body.to_string()) }
    };
    broker::declare(&mut stage.session(), &Topology::log(4, log_retention())).expect("all declared");
    publish(&stage, &[old(1, 1), old(2, 1), old(4, 1), old(3, 3), old(4, 3), old(5, 5)]);
    stage.database.execute("UPDATE message_partition SET seq = 6, unproven_upto = NULL WHERE partition = 0");
    let member = stage.member(GROUP);
    // A recorder that comes before the relay trusts them all.
    publish(&stage, &[old(6, 6)]);
    let mut expected = vec!["old 1", "old 2", "old 3", "old 4", "old 5", "old 6"];
    await_texts(&stage, &expected);
    stage.relay();
    stage.producer("new").to(0, 2);
    expected.extend(["new 0 #0", "new 0 #1"]);
    await_texts(&stage, &expected);
    // From then on it doesn't, whatever the sequence is.
    publish(&stage, &[old(7, 7), old(9, 9), old(6, 6)]);
    stage.producer("last").to(0, 1);
    expected.extend(["old 7", "old 9", "old 6", "last 0 #0"]);
    await_texts(&stage, &expected);
    assert_eq!((passed(&stage, "missing"), passed(&stage, "repeated"), passed(&stage, "seq")), (0, 1, 9));
    stage.await_ready(member);
    // A group that begins afterwards sees it all alike.
    stage.member("late");
    stage.await_count("late", expected.len());
    let seqs = |group: &str| {
        stage
            .database
            .count(&format!(r#"SELECT count(*) AS n FROM message WHERE "group" = '{group}' AND seq BETWEEN 1 AND 9"#))
    };
    assert_eq!((seqs(GROUP), seqs("late")), (9, 9));
    stage.stop_all();
}
