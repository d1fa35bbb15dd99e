//! What the message log rests on, on a real database: accepting messages, taking them to be published, where groups stand, and what
//! they have recorded.

use chrono::{DateTime, Utc};
use domain::{
    log::{Group, PARTITIONS_MAX, proof::Epoch},
    stream::key_hash,
};
use std::{collections::BTreeSet, thread};
use storage::{
    Error, PgConnection, Result,
    consumer_offsets::{self, Passed, Position, Standing},
    log_audit, message_epochs,
    message_outbox::{self, New, Published, Taken},
    messages::{self, NewMessage, NewSkipped, Pick},
    partitions::{self, Partition},
};
use test_support::{TestDatabase, eventually};

/// Not chosen, and no key.
const ANY: New<'_> = New { text: "text", key: None, partition: None, count: None };

/// Enough for everything.
const MANY: i64 = 1 << 20;

fn run<T>(db: &TestDatabase, work: impl FnMut(&mut PgConnection) -> Result<T>) -> T {
    db.database().transaction(work).unwrap()
}

fn append(db: &TestDatabase, new: &New<'_>) -> usize {
    run(db, |conn| message_outbox::append(conn, new, Some("request")))
}

fn append_to(db: &TestDatabase, partition: i32, texts: &[&str]) {
    for text in texts {
        assert_eq!(append(db, &New { text, partition: Some(partition), ..ANY }), 1);
    }
}

/// The texts of what was taken; `-` for a row that is gone.
fn texts(taken: &Taken) -> Vec<&str> {
    taken.messages.iter().map(|(_, message)| message.as_ref().map_or("-", |message| &*message.body.text)).collect()
}

/// Publishes so many of what was taken of each partition, and takes the next.
fn publish(conn: &mut PgConnection, taken: &[Taken], count: usize, limit: i64, bytes: i64) -> Result<()> {
    let ids: Vec<Vec<i64>> = taken.iter().map(|taken| taken.messages.iter().map(|(id, _)| *id).collect()).collect();
    let published: Vec<_> = taken
        .iter()
        .zip(&ids)
        .map(|(taken, ids)| {
            let (confirmed, left) = ids.split_at(count.min(ids.len()));
            Published { partition: taken.partition, confirmed, left }
        })
        .collect();
    message_outbox::advance(conn, &published, limit, bytes)
}

/// One round of a relay that publishes up to so many of each partition: returns the partition, the first sequence and the texts
/// of what was to be published.
fn round(db: &TestDatabase, count: usize, limit: i64, bytes: i64) -> Vec<(i32, i64, Vec<String>)> {
    run(db, |conn| {
        let taken = message_outbox::taken(conn)?;
        publish(conn, &taken, count, limit, bytes)?;
        let told =
            |taken: &Taken| (taken.partition, taken.first_seq, texts(taken).into_iter().map(str::to_owned).collect());
        Ok(taken.iter().map(told).collect())
    })
}

/// What a round tells.
fn told(partition: i32, first_seq: i64, texts: &[&str]) -> (i32, i64, Vec<String>) {
    (partition, first_seq, texts.iter().map(|text| (*text).to_owned()).collect())
}

fn group(name: &str) -> Group {
    Group::parse(name).unwrap()
}

#[test]
fn messages_go_to_the_chosen_partition_or_their_keys_or_each_in_turn() {
    let db = TestDatabase::new();
    for absent in [-1, 4, i32::MAX] {
        assert_eq!(append(&db, &New { partition: Some(absent), count: Some(3), ..ANY }), 0);
    }
    assert_eq!(append(&db, &New { text: "as it is", partition: Some(2), key: Some("k"), ..ANY }), 1);
    assert_eq!(append(&db, &New { text: "many", key: Some("k"), count: Some(3), ..ANY }), 3);
    assert_eq!(append(&db, &New { text: "one", count: Some(1), ..ANY }), 1);
    assert_eq!(append(&db, &New { text: "spread", count: Some(10_000), ..ANY }), 10_000);
    let count = |condition: &str| db.count(&format!("SELECT count(*) AS n FROM message_outbox WHERE {condition}"));
    assert_eq!(count("partition = 2 AND text = 'as it is' AND key = 'k' AND correlation_id = 'request'"), 1);
    let home = key_hash("k") % 4;
    assert_eq!(count(&format!("partition = {home} AND text IN ('many #0', 'many #1', 'many #2')")), 3);
    assert_eq!(count("text = 'one #0' AND key IS NULL"), 1);
    for partition in 0..4 {
        assert_eq!(count(&format!("text LIKE 'spread%' AND partition = {partition}")), 2500);
    }
    // The numbers are in the order of the ids.
    let disorder = "SELECT count(*) AS n FROM (
                        SELECT text, 'spread #' || row_number() OVER (ORDER BY id) - 1 AS expected
                        FROM message_outbox WHERE text LIKE 'spread%') numbered WHERE text <> expected";
    assert_eq!(db.count(disorder), 0);
    assert_eq!(run(&db, message_outbox::count), 10_005);
    // In turn also where each comes by itself.
    db.execute("DELETE FROM message_outbox");
    (0..8).for_each(|_| assert_eq!(append(&db, &ANY), 1));
    let waiting: Vec<_> = run(&db, partitions::list).iter().map(|partition| partition.waiting).collect();
    assert_eq!(waiting, [2, 2, 2, 2]);
}

#[test]
fn partitions_are_added_and_never_taken_away() {
    let db = TestDatabase::new();
    let token = run(&db, partitions::token);
    assert!(token.len() == 12 && token.bytes().all(|byte| byte.is_ascii_hexdigit()), "{token}");
    append_to(&db, 3, &["a"]);
    round(&db, 0, MANY, MANY);
    for (wanted, count) in [(6, 6), (2, 6), (PARTITIONS_MAX, 100)] {
        run(&db, |conn| partitions::extend_to(conn, wanted));
        assert_eq!(run(&db, partitions::count), count);
    }
    let too_many = db.database().transaction(|conn| partitions::extend_to(conn, PARTITIONS_MAX + 1));
    assert!(matches!(too_many, Err(Error::Query(_))), "{too_many:?}");
    let list = run(&db, partitions::list);
    assert_eq!(list[3], Partition { partition: 3, seq: 1, waiting: 1 });
    assert_eq!(list[99], Partition { partition: 99, seq: 0, waiting: 0 });
    append_to(&db, 99, &["b"]);
    assert_eq!(run(&db, partitions::token), token);
}

#[test]
fn what_is_taken_keeps_its_sequences_until_it_is_published() {
    let db = TestDatabase::new();
    append_to(&db, 1, &["a", "b", "c"]);
    append_to(&db, 3, &["x"]);
    // The first round only takes.
    assert_eq!(round(&db, 9, MANY, MANY), [told(1, 1, &[]), told(3, 1, &[])]);
    append_to(&db, 1, &["d"]);
    // Nothing is confirmed: the same comes again.
    for _ in 0..2 {
        assert_eq!(round(&db, 0, MANY, MANY), [told(1, 1, &["a", "b", "c"]), told(3, 1, &["x"])]);
    }
    // Nor if the transaction is given up, whatever was confirmed.
    let given_up: Result<()> = db.database().transaction(|conn| {
        let taken = message_outbox::taken(conn)?;
        publish(conn, &taken, 9, MANY, MANY)?;
        Err(Error::Conflict("given up"))
    });
    given_up.unwrap_err();
    // One of each is confirmed.
    assert_eq!(round(&db, 1, MANY, MANY), [told(1, 1, &["a", "b", "c"]), told(3, 1, &["x"])]);
    assert_eq!(round(&db, 0, MANY, MANY), [told(1, 2, &["b", "c"])]);
    assert_eq!(round(&db, 9, MANY, MANY), [told(1, 2, &["b", "c"])]);
    assert_eq!(round(&db, 9, MANY, MANY), [told(1, 4, &["d"])]);
    assert_eq!(round(&db, 9, MANY, MANY), []);
    let list = run(&db, partitions::list);
    assert_eq!(list.iter().map(|one| (one.seq, one.waiting)).collect::<Vec<_>>(), [(0, 0), (4, 0), (0, 0), (1, 0)]);
}

#[test]
fn what_is_taken_comes_with_all_that_was_accepted() {
    let db = TestDatabase::new();
    let before = Utc::now();
    append(&db, &New { text: "text", key: Some("key"), partition: Some(0), count: None });
    round(&db, 0, MANY, MANY);
    let taken = run(&db, message_outbox::taken);
    let [Taken { partition: 0, first_seq: 1, messages }] = &taken[..] else { panic!("{taken:?}") };
    let [(_, Some(message))] = &messages[..] else { panic!("{messages:?}") };
    assert_eq!((&*message.body.text, message.body.key.as_deref()), ("text", Some("key")));
    assert_eq!(message.correlation_id.as_deref(), Some("request"));
    // The server's clock is this machine's.
    assert!(message.body.accepted_at.is_some_and(|at| before <= at && at <= Utc::now()));
}

#[test]
fn as_much_is_taken_as_was_asked_for_and_one_at_least() {
    let db = TestDatabase::new();
    append_to(&db, 0, &["aaaa", "bbbb", "ééé", "d", "eeeeeeeeee", "f"]);
    append_to(&db, 2, &["gggg", "h"]);
    // Two rows of each.
    assert_eq!(round(&db, 9, 2, MANY), [told(0, 1, &[]), told(2, 1, &[])]);
    // So many bytes of each that the next one begins within them: the two-byte letters count as such.
    assert_eq!(round(&db, 9, MANY, 7), [told(0, 1, &["aaaa", "bbbb"]), told(2, 1, &["gggg", "h"])]);
    assert_eq!(round(&db, 9, MANY, 1), [told(0, 3, &["ééé", "d"])]);
    assert_eq!(round(&db, 9, MANY, 10), [told(0, 5, &["eeeeeeeeee"])]);
    assert_eq!(round(&db, 9, MANY, MANY), [told(0, 6, &["f"])]);
}

#[test]
fn a_row_that_was_removed_by_hand_keeps_its_place() {
    let db = TestDatabase::new();
    append_to(&db, 0, &["a", "b", "c"]);
    round(&db, 0, MANY, MANY);
    assert_eq!(db.execute("DELETE FROM message_outbox WHERE text = 'b'"), 1);
    assert_eq!(round(&db, 1, MANY, MANY), [told(0, 1, &["a", "-", "c"])]);
    assert_eq!(round(&db, 1, MANY, MANY), [told(0, 2, &["-", "c"])]);
    assert_eq!(db.execute("DELETE FROM message_outbox"), 1);
    // Also where nothing is left to tell that the partition has anything.
    assert_eq!(round(&db, 9, MANY, MANY), [told(0, 3, &["-"])]);
    append_to(&db, 0, &["d"]);
    assert_eq!(round(&db, 9, MANY, MANY), [told(0, 4, &[])]);
    assert_eq!(round(&db, 9, MANY, MANY), [told(0, 4, &["d"])]);
}

#[test]
fn a_partition_is_one_transactions_at_a_time_and_nobody_waits_for_it() {
    let db = TestDatabase::new();
    append_to(&db, 0, &["a"]);
    append_to(&db, 1, &["b"]);
    round(&db, 0, MANY, MANY);
    run(&db, |conn| {
        let taken = message_outbox::taken(conn)?;
        assert_eq!(taken.len(), 2);
        // Accepting goes on, and the others' partitions do.
        append_to(&db, 0, &["c"]);
        append_to(&db, 2, &["d"]);
        assert_eq!(round(&db, 9, MANY, MANY), [told(2, 1, &[])]);
        publish(conn, &taken, 9, MANY, MANY)?;
        assert_eq!(round(&db, 9, MANY, MANY), [told(2, 1, &["d"])]);
        Ok(())
    });
    assert_eq!(round(&db, 9, MANY, MANY), [told(0, 2, &["c"])]);
}

#[test]
fn a_message_that_is_committed_late_is_published_late() {
    let db = TestDatabase::new();
    run(&db, |conn| {
        message_outbox::append(conn, &New { text: "late", partition: Some(0), ..ANY }, None)?;
        append_to(&db, 0, &["early"]);
        assert_eq!(round(&db, 9, MANY, MANY), [told(0, 1, &[])]);
        Ok(())
    });
    append_to(&db, 0, &["later"]);
    assert_eq!(round(&db, 9, MANY, MANY), [told(0, 1, &["early"])]);
    assert_eq!(round(&db, 9, MANY, MANY), [told(0, 2, &["late", "later"])]);
}

#[test]
fn a_group_has_the_positions_that_it_was_given_first() {
    let db = TestDatabase::new();
    let (one, other) = (group("one"), group("other"));
    assert!(!run(&db, |conn| consumer_offsets::exists(conn, &one)));
    run(&db, |conn| consumer_offsets::create(conn, &one, &[(0, 0), (1, 17)]));
    run(&db, |conn| consumer_offsets::create(conn, &one, &[(2, 5), (1, 99)]));
    run(&db, |conn| consumer_offsets::create(conn, &other, &[(1, 3)]));
    assert!(run(&db, |conn| consumer_offsets::exists(conn, &one)));
    let position = |partition| run(&db, |conn| consumer_offsets::position(conn, &one, partition));
    assert_eq!([0, 1, 2].map(position), [0, 17, 5].map(|offset| Some(Position::placed(offset, None))));
    assert_eq!(position(3), None);
    let standing = |group: &Group, partition, next_offset| Standing {
        group: group.to_string(),
        partition,
        next_offset,
        skipped: 0,
        repeated: 0,
        missing: 0,
    };
    let all = [standing(&one, 0, 0), standing(&one, 1, 17), standing(&one, 2, 5), standing(&other, 1, 3)];
    assert_eq!(run(&db, |conn| consumer_offsets::list(conn, None)), all);
    assert_eq!(run(&db, |conn| consumer_offsets::list(conn, Some(&other))), all[3..]);
    assert_eq!(run(&db, |conn| consumer_offsets::list(conn, Some(&group("none")))), []);
}

/// A position at which reading has arrived.
fn at(next_offset: i64, seq: i64) -> Position {
    let last_message_id = Some(format!("log/00/{seq}"));
    Position { next_offset, placed: false, seq: Some(seq), last_message_id }
}

#[test]
fn of_two_who_move_a_group_on_from_the_same_place_one_does() {
    let db = TestDatabase::new();
    let group = group("recorder");
    run(&db, |conn| consumer_offsets::create(conn, &group, &[(0, 10), (1, 10)]));
    let advance = |conn: &mut PgConnection, from, to: &Position| {
        let passed = Passed { skipped: 1, repeated: 2, missing: 3 };
        consumer_offsets::advance(conn, &group, 0, from, to, passed)
    };
    thread::scope(|scope| {
        let loser = run(&db, |conn| {
            assert!(advance(conn, 10, &at(20, 7))?);
            let loser = scope.spawn(|| run(&db, |conn| advance(conn, 10, &at(15, 5))));
            let waits = "SELECT count(*) AS n FROM pg_stat_activity
                         WHERE datname = current_database() AND wait_event_type = 'Lock'";
            eventually("the other one waits", || (db.count(waits) == 1).then_some(()));
            Ok(loser)
        });
        assert!(!loser.join().unwrap());
    });
    assert!(!run(&db, |conn| advance(conn, 10, &at(30, 9))), "somebody who comes late");
    assert_eq!(run(&db, |conn| consumer_offsets::position(conn, &group, 0)), Some(at(20, 7)));
    assert!(run(&db, |conn| advance(conn, 20, &at(25, 8))));
    let list = run(&db, |conn| consumer_offsets::list(conn, None));
    let told: Vec<_> = list.iter().map(|one| (one.next_offset, one.skipped, one.repeated, one.missing)).collect();
    assert_eq!(told, [(25, 2, 4, 6), (10, 0, 0, 0)]);
    let absent = Position::placed(1, None);
    assert!(!run(&db, |conn| consumer_offsets::advance(conn, &group, 7, 0, &absent, Passed::default())));
}

fn message<'a>(group: &'a Group, partition: i32, offset: i64, text: &'a str) -> NewMessage<'a> {
    NewMessage {
        group: group.as_str(),
        partition,
        offset,
        seq: Some(offset + 1),
        message_id: None,
        key: None,
        text,
        accepted_at: None,
        recorded_by: "test",
    }
}

fn record(db: &TestDatabase, messages: &[NewMessage<'_>]) {
    run(db, |conn| messages::record(conn, messages));
}

#[test]
fn whoever_puts_a_group_elsewhere_takes_away_what_it_has_from_there_on() {
    let db = TestDatabase::new();
    let (one, other) = (group("one"), group("other"));
    let all: Vec<_> = [(&one, 0), (&one, 1), (&other, 0)]
        .into_iter()
        .flat_map(|(group, partition)| (0..10).map(move |offset| message(group, partition, offset, "text")))
        .collect();
    record(&db, &all);
    let skip = |offset| NewSkipped {
        group: one.as_str(),
        partition: 0,
        offset,
        message_id: None,
        reason: "why",
        body: b"body",
    };
    run(&db, |conn| messages::skip(conn, &[skip(10), skip(3)]));
    run(&db, |conn| {
        consumer_offsets::create(conn, &one, &[(0, 0), (1, 0)])?;
        consumer_offsets::advance(conn, &one, 0, 0, &at(11, 10), Passed { skipped: 2, ..Passed::default() })
    });

    let reset = |group: &Group, partition, offset| {
        let removed = run(&db, |conn| consumer_offsets::reset(conn, group, partition, offset));
        let position = run(&db, |conn| consumer_offsets::position(conn, group, partition));
        (removed, position.unwrap())
    };
    assert_eq!(reset(&one, 0, 6), (4, Position::placed(6, Some(6))));
    let offsets = |group: &Group, partition| {
        let page = run(&db, |conn| messages::page(conn, group, Pick::Partition(partition, None), MANY, MANY));
        page.iter().map(|message| message.offset).collect::<Vec<_>>()
    };
    assert_eq!(offsets(&one, 0), [0, 1, 2, 3, 4, 5]);
    assert_eq!(offsets(&one, 1).len() + offsets(&other, 0).len(), 20);
    let skipped = run(&db, |conn| messages::skipped(conn, &one, 10));
    assert_eq!(skipped.iter().map(|one| one.offset).collect::<Vec<_>>(), [3]);
    // A member that was about to record from where the group stood doesn't any more.
    let late = run(&db, |conn| consumer_offsets::advance(conn, &one, 0, 11, &at(12, 11), Passed::default()));
    assert!(!late);
    // Onwards takes nothing away, what isn't the log's own has no sequence, and before the first one there's none.
    assert_eq!(reset(&one, 0, 1000), (0, Position::placed(1000, Some(6))));
    record(&db, &[NewMessage { seq: None, ..message(&one, 0, 999, "another program's") }]);
    assert_eq!(reset(&one, 0, 1000), (0, Position::placed(1000, Some(6))));
    assert_eq!(reset(&one, 0, 0), (7, Position::placed(0, None)));
    // Where the group hasn't begun, it begins.
    assert_eq!(reset(&group("new"), 2, 5), (0, Position::placed(5, None)));
}

#[test]
fn what_is_recorded_is_read_as_it_was() {
    let db = TestDatabase::new();
    let recorder = group("recorder");
    let odd = ["\\N", "a\tb\nc\rd\\e\\.", "\\.", "", "é€😀\u{7f}\u{1}", "\"quoted\", 'too'"];
    let accepted_at = DateTime::from_timestamp_micros(1_700_000_000_123_456);
    let full = NewMessage {
        seq: Some(1),
        message_id: Some("\\N"),
        key: Some("a\tkey"),
        accepted_at,
        ..message(&recorder, 0, 0, "full")
    };
    let of_others = NewMessage { seq: None, ..message(&recorder, 0, 1, "another program's, without an id") };
    let mut all = vec![full, of_others.clone(), NewMessage { offset: 2, ..of_others }];
    all.extend((10..).zip(odd).map(|(offset, text)| message(&recorder, 1, offset, text)));
    let before = Utc::now();
    record(&db, &all);
    record(&db, &[]);

    let page = run(&db, |conn| messages::page(conn, &recorder, Pick::All, MANY, MANY));
    assert_eq!(page.len(), 9);
    let first = &page[0];
    assert_eq!((first.partition, first.offset, first.text.as_str()), (0, 0, "full"));
    assert_eq!((first.message_id.as_deref(), first.key.as_deref()), (Some("\\N"), Some("a\tkey")));
    assert_eq!((first.accepted_at, first.recorded_by.as_str()), (accepted_at, "test"));
    assert!(before <= first.recorded_at && first.recorded_at <= Utc::now());
    let (second, seq) = (&page[1], "SELECT count(*) AS n FROM message WHERE seq IS NULL");
    assert_eq!((&second.message_id, &second.key, second.accepted_at, db.count(seq)), (&None, &None, None, 2));
    assert_eq!(page[3..].iter().map(|message| message.text.as_str()).collect::<Vec<_>>(), odd);

    // Neither an offset nor another program's id comes twice, and nothing of what comes with it stays.
    let foreign = |offset| NewMessage { seq: None, message_id: Some("id"), ..message(&recorder, 2, offset, "text") };
    record(&db, &[foreign(0)]);
    for twice in [foreign(1), message(&recorder, 1, 10, "again")] {
        let refused =
            db.database().transaction(|conn| messages::record(conn, &[message(&recorder, 3, 0, "x"), twice.clone()]));
        assert!(matches!(refused, Err(Error::Query(_))), "{refused:?}");
    }
    assert_eq!(db.count("SELECT count(*) AS n FROM message"), 10);
    let elsewhere = group("elsewhere");
    record(&db, &[NewMessage { partition: 3, ..foreign(0) }, NewMessage { group: elsewhere.as_str(), ..foreign(0) }]);
}

#[test]
fn recorded_messages_come_by_pages() {
    let db = TestDatabase::new();
    let (one, other) = (group("one"), group("other"));
    let of_partition = |partition| (0..5).map(move |offset| (partition, offset * 3));
    let places: Vec<_> = of_partition(2).chain(of_partition(0)).collect();
    let new: Vec<_> = places.iter().map(|(partition, offset)| message(&one, *partition, *offset, "1234")).collect();
    record(&db, &new);
    record(&db, &[message(&other, 0, 1, "other")]);
    let page = |partition: Option<i32>, after, limit, bytes| {
        let pick = partition.map_or(Pick::All, |partition| Pick::Partition(partition, after));
        let page = run(&db, |conn| messages::page(conn, &one, pick, limit, bytes));
        page.iter().map(|message| (message.partition, message.offset)).collect::<Vec<_>>()
    };
    assert_eq!(page(None, None, MANY, MANY), of_partition(0).chain(of_partition(2)).collect::<Vec<_>>());
    assert_eq!(page(Some(2), None, 2, MANY), [(2, 0), (2, 3)]);
    assert_eq!(page(Some(2), Some(3), 2, MANY), [(2, 6), (2, 9)]);
    assert_eq!(page(Some(2), Some(4), 2, MANY), [(2, 6), (2, 9)]);
    assert_eq!(page(Some(2), Some(12), 2, MANY), []);
    assert_eq!(page(Some(1), None, 2, MANY), []);
    // Each has four bytes.
    assert_eq!(page(Some(0), None, MANY, 8), [(0, 0), (0, 3)]);
    assert_eq!(page(Some(0), None, MANY, 9), [(0, 0), (0, 3), (0, 6)]);
    assert_eq!(page(Some(0), None, MANY, 1), [(0, 0)]);
}

#[test]
fn ids_of_other_programs_are_known_by_group_and_partition() {
    let db = TestDatabase::new();
    let (one, other) = (group("one"), group("other"));
    let foreign = |group, partition, offset, id| NewMessage {
        seq: None,
        message_id: Some(id),
        ..message(group, partition, offset, "text")
    };
    let own = NewMessage { message_id: Some("own"), ..message(&one, 0, 5, "text") };
    record(
        &db,
        &[
            foreign(&one, 0, 0, "a"),
            foreign(&one, 0, 1, "b"),
            foreign(&one, 1, 0, "c"),
            foreign(&other, 0, 0, "d"),
            own,
        ],
    );
    let ids = ["a", "b", "c", "d", "own", "none"];
    let known = |ids: &[&str]| run(&db, |conn| messages::recorded_ids(conn, &one, 0, ids));
    assert_eq!(known(&ids), BTreeSet::from(["a".to_owned(), "b".to_owned()]));
    assert_eq!(known(&[]), BTreeSet::new());
}

#[test]
fn what_was_no_message_is_kept_up_to_64_kib() {
    let db = TestDatabase::new();
    let recorder = group("recorder");
    let long = vec![0xff; 65_537];
    let skipped = |offset, body| NewSkipped {
        group: recorder.as_str(),
        partition: 0,
        offset,
        message_id: Some("id"),
        reason: "its body is no JSON",
        body,
    };
    run(&db, |conn| messages::skip(conn, &[skipped(1, &long), skipped(2, b"short")]));
    run(&db, |conn| messages::skip(conn, &[skipped(0, b"")]));
    let kept = run(&db, |conn| messages::skipped(conn, &recorder, 2));
    assert_eq!(kept.iter().map(|one| one.offset).collect::<Vec<_>>(), [0, 2], "the newest first");
    let kept = run(&db, |conn| messages::skipped(conn, &recorder, 9));
    assert_eq!((kept[2].offset, kept[2].body.as_slice()), (1, &long[..65_536]));
    assert_eq!((kept[1].message_id.as_deref(), kept[1].reason.as_str()), (Some("id"), "its body is no JSON"));
    assert_eq!(run(&db, |conn| messages::skipped(conn, &group("other"), 9)), []);
}

/// The sequences up to which the partitions' messages were given.
fn seqs(db: &TestDatabase) -> Vec<i64> {
    run(db, partitions::list).iter().map(|partition| partition.seq).collect()
}

#[test]
fn a_database_that_has_become_another_one_goes_on_above_all_that_it_may_have_given() {
    let db = TestDatabase::new();
    append_to(&db, 1, &["a", "b", "c"]);
    round(&db, 0, MANY, MANY);
    assert_eq!(seqs(&db), [0, 3, 0, 0]);
    // As after a promotion: what was taken keeps its sequences, what is taken next doesn't follow them.
    db.execute("UPDATE message_partition SET lineage = '17/00000001'");
    append_to(&db, 1, &["d", "e"]);
    assert_eq!(round(&db, 3, MANY, MANY), [told(1, 1, &["a", "b", "c"])]);
    let microseconds = Utc::now().timestamp_micros();
    let newest = seqs(&db)[1];
    let near = microseconds - 3_600_000_000..microseconds + 3_600_000_000;
    assert!(near.contains(&newest) && newest < 1 << 53, "{newest}");
    assert_eq!(round(&db, 2, MANY, MANY), [told(1, newest - 1, &["d", "e"])]);
    // Once. Another partition does the same when it comes to it.
    append_to(&db, 1, &["f"]);
    append_to(&db, 2, &["g"]);
    round(&db, 0, MANY, MANY);
    assert_eq!((seqs(&db)[1], seqs(&db)[2] > newest - 3_600_000_000, seqs(&db)[0]), (newest + 1, true, 0));
    assert_eq!(db.count("SELECT count(*) AS n FROM message_unused"), 2);
    let unused = |lowest, highest| run(&db, |conn| partitions::unused_among(conn, 1, lowest, highest));
    assert_eq!(
        (unused(1, 3), unused(3, 10), unused(4, newest - 2), unused(4, newest + 5)),
        (0, 7, newest - 5, newest - 5)
    );
    // A clock that is behind what was given leaves a margin.
    db.execute("UPDATE message_partition SET lineage = NULL, seq = seq + 7200000000 WHERE partition = 1");
    let behind = seqs(&db)[1];
    db.execute("UPDATE message_partition SET seq = seq + 1 WHERE partition = 1");
    assert!(seqs(&db)[1] > behind + 1_000_000_000, "{}", seqs(&db)[1]);

    // Who has read both sides of it misses nothing.
    let one = group("one");
    let at = |offset, seq| NewMessage { seq: Some(seq), ..message(&one, 1, offset, "text") };
    record(&db, &[at(0, 1), at(1, 2), at(2, 3), at(3, newest - 1), at(4, newest)]);
    let (totals, findings) = run(&db, |conn| log_audit::run(conn, &one));
    assert!(totals[0].missing == 0 && findings.iter().all(|finding| finding.count == 0), "{totals:?} {findings:?}");
    db.execute(r#"DELETE FROM message WHERE "offset" IN (2, 3)"#);
    let (totals, findings) = run(&db, |conn| log_audit::run(conn, &one));
    assert_eq!((totals[0].missing, totals[0].gaps, findings[0].count), (2, 1, 1), "{findings:?}");
}

#[test]
fn any_role_may_know_whether_the_database_is_the_same_as_before() {
    let db = TestDatabase::new();
    assert_eq!(db.count("SELECT (message_lineage() IS NOT NULL)::int::bigint AS n"), 1);
    for function in ["pg_control_system()", "pg_walfile_name(pg_lsn)", "pg_current_wal_lsn()"] {
        let may = format!("SELECT has_function_privilege('public', '{function}', 'execute')::int::bigint AS n");
        assert_eq!(db.count(&may), 1, "{function}");
    }
}

#[test]
fn messages_without_a_proof_are_trusted_up_to_where_the_first_relay_with_one_begins() {
    let db = TestDatabase::new();
    let upto = |partition| run(&db, |conn| partitions::unproven_upto(conn, partition));
    // A new log has none.
    assert_eq!((upto(0), upto(99)), (Some(0), Some(0)));
    // As the migration leaves one that is in use.
    db.execute("UPDATE message_partition SET seq = 100, unproven_upto = NULL");
    assert_eq!(upto(0), None);
    let (first, second) = (Epoch::random(), Epoch::random());
    run(&db, |conn| message_epochs::register(conn, &first));
    db.execute("UPDATE message_partition SET seq = 200");
    for epoch in [&second, &first] {
        run(&db, |conn| message_epochs::register(conn, epoch));
    }
    assert_eq!((upto(0), upto(3)), (Some(100), Some(100)));
    let names = BTreeSet::from([first.name(), "another"]);
    assert_eq!(run(&db, |conn| message_epochs::find(conn, &names)), [first]);
}
