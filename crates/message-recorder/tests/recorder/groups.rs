//! Several groups, and more partitions.

use crate::stage::{Load, PATIENCE, Stage};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use test_support::{Action, Direction, Proxy, eventually_within};

/// Awaits that a group has its offsets: whatever comes from now on is new to it.
fn await_founded(stage: &Stage, group: &str) {
    let sql = format!(r#"SELECT count(*) AS n FROM consumer_offset WHERE "group" = '{group}'"#);
    eventually_within(PATIENCE, "the group has its offsets", || (stage.database.count(&sql) > 0).then_some(()));
}

fn partitions_of(stage: &Stage, group: &str) -> BTreeSet<i32> {
    stage.messages(group).iter().map(|message| message.partition).collect()
}

#[test]
fn a_group_begins_with_the_first_messages_or_with_the_next_as_it_is_told_to() {
    let mut stage = Stage::new();
    stage.relay();
    stage.member("early");
    stage.producer("before").keyed(40, 50);
    stage.await_recorded("early");
    let before = stage.accepted();

    stage.member_with(&["--group", "all", "--from", "first"]);
    stage.member_with(&["--group", "new", "--from", "next"]);
    stage.await_recorded("all");
    await_founded(&stage, "new");
    stage.producer("afterwards").keyed(40, 10);
    stage.await_recorded("early");
    stage.await_recorded("all");
    stage.await_count("new", stage.accepted() - before);
    // Where a group is, isn't asked of whoever joins it.
    stage.member_with(&["--group", "new", "--from", "first"]);
    stage.await_shares("new", &[2, 2]);
    stage.producer("at last").keyed(40, 10);
    stage.await_count("new", stage.accepted() - before);
    stage.stop_all();
    stage.assert_recorded("new", before);
    assert_eq!(stage.recorded("new"), 800);
    stage.ends_well(&["early", "all"]);
}

#[test]
fn a_group_that_begins_with_the_next_messages_does_not_take_a_slow_broker_for_one_that_has_none() {
    // The method consume-ok, and its frame's end.
    let begun = |bytes: &[u8]| {
        let at = bytes.windows(4).position(|window| window == [0, 60, 0, 21])?;
        Some(at + bytes[at..].iter().position(|byte| *byte == 0xce)? + 1)
    };
    let mut stage = Stage::new();
    stage.relay();
    stage.member("early");
    stage.producer("before").spread(40);
    stage.await_recorded("early");
    let (proxy, url) = Proxy::of(stage.vhost().url());
    stage.set(&[("MURMURATION__BROKER__URL", &url), ("MURMURATION__BROKER__CONFIRM_TIMEOUT_MS", "7000")]);
    let silence = proxy.trap(Direction::ToClient, begun, Action::Hold);
    let member = stage.member_with(&["--group", "new", "--from", "next"]);
    eventually_within(PATIENCE, "the broker has begun to send", || silence.sprung().then_some(()));
    stage.await_log(member, "no answer from the broker");
    drop(silence);
    await_founded(&stage, "new");
    let sql = r#"SELECT sum(next_offset)::bigint AS n FROM consumer_offset WHERE "group" = 'new'"#;
    assert_eq!(stage.database.count(sql), 40, "it begins behind what there was");
    stage.producer("afterwards").spread(40);
    stage.await_count("new", 40);
    stage.stop_all();
    assert_eq!(stage.recorded("new"), 40);
    stage.ends_well(&["early"]);
}

#[test]
fn a_group_that_begins_while_messages_come_in_misses_none_that_come_after() {
    let mut stage = Stage::new();
    stage.relay();
    stage.member("early");
    let load = Load::begin(stage.producer("load"), 5, Duration::from_millis(5));
    stage.await_more("early", 300);
    stage.member_with(&["--group", "new", "--from", "next"]);
    await_founded(&stage, "new");
    stage.await_more("early", 300);
    drop(load);
    stage.await_recorded("early");
    // From some message of each partition on, everything.
    let of_each = |group| {
        let mut texts = BTreeMap::<i32, Vec<String>>::new();
        for message in stage.messages(group) {
            texts.entry(message.partition).or_default().push(message.text);
        }
        texts
    };
    let all = of_each("early");
    let new = eventually_within(PATIENCE, "the newest are recorded", || {
        let new = of_each("new");
        let newest = all.iter().all(|(partition, all)| new.get(partition).and_then(|new| new.last()) == all.last());
        newest.then_some(new)
    });
    for (partition, all) in &all {
        let new = &new[partition];
        assert!(new.len() < all.len() && all.ends_with(new), "{partition}: {} of {}", new.len(), all.len());
    }
    stage.ends_well(&["early"]);
}

#[test]
fn partitions_that_are_added_under_load_are_read_from_their_beginning() {
    let mut stage = Stage::new();
    assert_eq!(stage.database.execute("DELETE FROM message_partition WHERE partition >= 2"), 2);
    stage.relay();
    stage.member("first");
    stage.member("first");
    stage.await_shares("first", &[1, 1]);
    stage.producer("before").keyed(40, 10);
    stage.await_recorded("first");
    let before = stage.accepted();
    stage.member_with(&["--group", "next", "--from", "next"]);
    await_founded(&stage, "next");

    let load = Load::begin(stage.producer("load"), 5, Duration::from_millis(5));
    stage.await_more("first", 300);
    assert_eq!(partitions_of(&stage, "first"), BTreeSet::from([0, 1]));
    stage.extend_to(4);
    stage.await_shares("first", &[2, 2]);
    stage.await_shares("next", &[4]);
    for group in ["first", "next"] {
        eventually_within(PATIENCE, "the new partitions have messages", || {
            (partitions_of(&stage, group).len() == 4).then_some(())
        });
        stage.await_more(group, 300);
    }
    drop(load);
    stage.await_recorded("first");
    stage.await_count("next", stage.accepted() - before);
    stage.stop_all();
    stage.assert_recorded("next", before);
    let begins = |partition| stage.messages("next").iter().find(|one| one.partition == partition).map(|one| one.offset);
    assert_eq!((begins(2), begins(3)), (Some(0), Some(0)));
    stage.ends_well(&["first"]);
}

#[test]
fn messages_are_where_their_producer_wants_them() {
    let mut stage = Stage::new();
    stage.relay();
    stage.member("recorder");
    let (mut even, mut odd) = (stage.producer("even"), stage.producer("odd"));
    for i in 0..200 {
        let producer = if i % 2 == 0 { &mut even } else { &mut odd };
        producer.to(i % 2, 1);
    }
    stage.await_recorded("recorder");
    let messages = stage.messages("recorder");
    assert_eq!(messages.len(), 200);
    for message in messages {
        let name = if message.partition == 0 { " even " } else { " odd " };
        assert!(message.partition < 2 && message.text.contains(name), "{} in {}", message.text, message.partition);
    }
    stage.ends_well(&["recorder"]);
}
