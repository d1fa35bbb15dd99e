//! Streams that don't have any more what a group is to read next.

use crate::stage::{PATIENCE, Stage, group};
use domain::log::partition_queue;
use rustix::process::Signal;
use std::collections::BTreeMap;
use storage::consumer_offsets;
use test_support::eventually_within;

const GROUP: &str = "recorder";
const TRIMMED: &str = "MURMURATION__MESSAGE_RECORDER__TRIMMED";

/// Two small segments are kept of each partition.
const SMALL: [(&str, &str); 2] =
    [("MURMURATION__MESSAGE_LOG__SEGMENT_BYTES", "500000"), ("MURMURATION__MESSAGE_LOG__MAX_BYTES", "1000000")];

/// A group that has read some messages of partition 0 and none of partition 1, and has stopped. Retention has removed what it
/// was to read next of both. Returns the first messages that are left, unless the broker is yet to remove more: it does that
/// when it comes to it.
fn behind(stage: &mut Stage) -> [i64; 2] {
    stage.set(&SMALL);
    stage.relay();
    let member = stage.member(GROUP);
    stage.await_shares(GROUP, &[4]);
    let mut producer = stage.producer("before");
    for partition in [0, 2, 3] {
        producer.to(partition, 100);
    }
    stage.await_recorded(GROUP);
    stage.signal(member, Signal::TERM);
    assert_eq!(stage.wait(member).code(), Some(0));
    let mut survey = stage.survey();
    let first = [0, 1].map(|partition| {
        eventually_within(PATIENCE, "retention removes the first segments", || {
            stage.producer("large").large(partition, 20);
            stage.await_relayed();
            let first = survey.first(&partition_queue(partition)).expect("the stream is there");
            first.filter(|first| *first > 100)
        })
    });
    producer.to(2, 100);
    producer.to(3, 100);
    first
}

/// How many messages the group has of each partition, and the lowest offset.
fn recorded(stage: &Stage) -> BTreeMap<i32, (usize, i64)> {
    let mut recorded = BTreeMap::new();
    for message in stage.messages(GROUP) {
        recorded.entry(message.partition).or_insert((0, message.offset)).0 += 1;
    }
    recorded
}

/// Puts the group elsewhere, as an operator does.
fn reset(stage: &Stage, partition: i32, offset: i64) -> usize {
    stage.transaction(|conn| consumer_offsets::reset(conn, &group(GROUP), partition, offset))
}

/// Awaits that the group has all of a partition from this offset on.
fn await_all_from(stage: &Stage, partition: i32, offset: i64) {
    stage.await_relayed();
    let newest = stage.survey().newest(&partition_queue(partition)).expect("the stream is there").expect("a message");
    let sql = format!(
        r#"SELECT coalesce(max("offset"), -1) AS n FROM message WHERE "group" = '{GROUP}' AND partition = {partition}"#
    );
    eventually_within(PATIENCE, "the newest is recorded", || (stage.database.count(&sql) >= newest).then_some(()));
    let seqs = format!(
        r#"SELECT count(*) AS n FROM (
               SELECT seq - lag(seq) OVER (ORDER BY "offset") AS step FROM message
               WHERE "group" = '{GROUP}' AND partition = {partition} AND "offset" >= {offset}) steps
           WHERE step <> 1"#
    );
    assert_eq!(stage.database.count(&seqs), 0, "nothing is left out or recorded twice");
}

/// Awaits that a member says it isn't ready, and why.
fn await_trouble(stage: &Stage, member: usize, why: &str) {
    let ready = || stage.ready(member).filter(|(status, text)| *status == 503 && text.contains(why));
    eventually_within(PATIENCE, why, ready);
}

/// Awaits that a member goes on with what is left of a partition, and returns where.
fn await_goes_on(stage: &Stage, member: usize, partition: i32) -> i64 {
    let of_partition = format!(" partition={partition}");
    eventually_within(PATIENCE, "it goes on with what is left", || {
        let log = stage.log(member);
        let line = log.lines().rfind(|line| line.ends_with(&of_partition) && line.contains(": continuing there"))?;
        let (_, rest) = line.split_once("the first that is left is ")?;
        rest.split_once(':')?.0.parse().ok()
    })
}

fn missing(stage: &Stage) -> i64 {
    stage.database.count("SELECT sum(missing)::bigint AS n FROM consumer_offset")
}

#[test]
fn a_group_that_retention_has_overtaken_stops_there_alone_and_goes_on_when_it_is_reset() {
    let mut stage = Stage::new();
    behind(&mut stage);
    let member = stage.member(GROUP);
    let said = |next: i64, first: i64| {
        format!("the messages from offset {next} on were removed by retention; the first that is left is {first}")
    };
    let mut survey = stage.survey();
    let [first_of_0, first_of_1] = [(0, 100), (1, 0)].map(|(partition, next)| {
        eventually_within(PATIENCE, "it says what is left", || {
            let first = survey.first(&partition_queue(partition)).expect("the stream is there")?;
            let said = format!("partition={partition} reason=\"{}\"", said(next, first));
            stage.log(member).contains(&said).then_some(first)
        })
    });
    eventually_within(PATIENCE, "the others are read on", || {
        let recorded = recorded(&stage);
        (recorded[&2].0 == 200 && recorded[&3].0 == 200).then_some(())
    });
    await_trouble(&stage, member, &format!("partition 0: {}", said(100, first_of_0)));
    let so_far = recorded(&stage);
    assert_eq!((so_far.get(&0), so_far.get(&1)), (Some(&(100, 0)), None), "nothing is read there");

    assert_eq!((reset(&stage, 0, first_of_0), reset(&stage, 1, first_of_1)), (0, 0));
    await_all_from(&stage, 0, first_of_0);
    await_all_from(&stage, 1, first_of_1);
    stage.await_ready(member);
    assert_eq!(recorded(&stage)[&1].1, first_of_1);
    assert_eq!(missing(&stage), 0, "the broker has lost nothing that it was to keep");
    stage.producer("at last").spread(40);
    for (partition, from) in (0..).zip([first_of_0, first_of_1, 0, 0]) {
        await_all_from(&stage, partition, from);
    }
    stage.stop_all();
}

#[test]
fn a_group_that_retention_has_overtaken_goes_on_by_itself_where_it_is_told_to() {
    let mut stage = Stage::new();
    let first = behind(&mut stage);
    stage.set(&[(TRIMMED, "first")]);
    let member = stage.member(GROUP);
    let [first_of_0, first_of_1] = [0, 1].map(|partition| await_goes_on(&stage, member, partition));
    let mut survey = stage.survey();
    for (partition, went_on) in (0..).zip([first_of_0, first_of_1]) {
        let first_now = survey.first(&partition_queue(partition)).expect("the stream is there").expect("a message");
        let left = first[usize::from(partition == 1)]..=first_now;
        assert!(left.contains(&went_on), "it was to go on with the first that is left, {left:?}: {went_on}");
        await_all_from(&stage, partition, went_on);
    }
    stage.await_ready(member);
    let recorded = recorded(&stage);
    assert_eq!((recorded[&0].1, recorded[&1].1), (0, first_of_1));
    assert_eq!(missing(&stage), 0, "the broker has lost nothing that it was to keep");
    assert!(!stage.log(member).contains("stopped reading"));
    stage.stop_all();
}

#[test]
fn a_stream_that_was_made_anew_is_not_read_until_the_group_is_reset() {
    const STOPPED: &str = "stopped reading a partition until the group's offset is reset";
    let mut stage = Stage::new();
    stage.relay();
    let member = stage.member(GROUP);
    let mut producer = stage.producer("before");
    producer.spread(400);
    stage.await_recorded(GROUP);
    stage.signal(member, Signal::TERM);
    assert_eq!(stage.wait(member).code(), Some(0));
    // One that has nothing yet where the group was, and one that has something else there.
    stage.delete_stream(1);
    stage.delete_stream(2);
    producer.to(2, 150);
    stage.await_relayed();
    stage.restart(member);
    let said =
        |partition: i32, reason: &str| format!("{STOPPED} group={GROUP} partition={partition} reason=\"{reason}");
    stage.await_log(member, &said(1, "the group's next offset is 100, but the stream ends before its first message"));
    stage.await_log(member, &said(2, "the message before offset 100 isn't the one that was read there"));
    // And one that goes while it's read.
    producer.to(3, 10);
    stage.await_count(GROUP, 410);
    stage.delete_stream(3);
    stage.await_log(member, &said(3, "the group's next offset is 110, but the stream ends before its first message"));
    producer.to(0, 10);
    stage.await_count(GROUP, 420);
    await_trouble(&stage, member, "partition 1: the group's next offset is 100");

    assert_eq!([1, 2, 3].map(|partition| reset(&stage, partition, 0)), [100, 100, 110]);
    stage.await_count(GROUP, 110 + 150);
    producer.spread(40);
    (0..4).for_each(|partition| await_all_from(&stage, partition, 0));
    let counts: Vec<_> = recorded(&stage).into_values().collect();
    assert_eq!(counts, [(120, 0), (10, 0), (160, 0), (10, 0)]);
    stage.await_ready(member);
    stage.stop_all();
}
