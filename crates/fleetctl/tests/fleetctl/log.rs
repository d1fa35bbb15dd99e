//! The message log: its partitions, groups and messages.

use crate::{NOWHERE, await_line, checked, complaint, fleetctl, interrupt, run, spawn};
use chrono::{TimeDelta, Utc};
use domain::{
    log::{Group, MESSAGE, partition_routing_key},
    topology::Topology,
};
use outbox_relay::{LogRelay, Round};
use serde_json::{Value, json};
use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command},
    thread,
    time::Duration,
};
use storage::{
    PgConnection,
    consumer_offsets::{self, Passed, Position},
    leases,
    message_outbox::{self, New},
    messages::{self, NewMessage, NewSkipped},
    partitions, resharding,
};
use test_support::{
    Action, Direction, Proxy, TestDatabase, TestVhost, Trap, broker_settings, eventually, eventually_within,
    log_retention,
};

struct Stage {
    database: TestDatabase,
    vhost: TestVhost,
}

impl Stage {
    /// A log of four partitions whose streams are declared.
    fn new() -> Self {
        let stage = Self { database: TestDatabase::new(), vhost: TestVhost::new() };
        run(stage.fleetctl(&["topology", "declare"]), 0);
        stage
    }

    /// The same with streams that keep about a megabyte.
    fn forgetful() -> Self {
        let stage = Self { database: TestDatabase::new(), vhost: TestVhost::new() };
        let mut declare = stage.fleetctl(&["topology", "declare"]);
        declare.env("MURMURATION__MESSAGE_LOG__MAX_BYTES", "1000000");
        declare.env("MURMURATION__MESSAGE_LOG__SEGMENT_BYTES", "500000");
        run(declare, 0);
        stage
    }

    fn fleetctl(&self, args: &[&str]) -> Command {
        let mut command = fleetctl(&self.database, args);
        command.env("AMQP_URL", self.vhost.url());
        command
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&run(self.fleetctl(&[args, &["--json"]].concat()), 0)).expect("JSON")
    }

    fn blind(&self, args: &[&str]) -> Command {
        fleetctl(&self.database, args)
    }

    #[track_caller]
    fn refusal(&self, args: &[&str]) -> String {
        complaint(self.fleetctl(args), 2)
    }

    fn with<T>(&self, work: impl FnMut(&mut PgConnection) -> storage::Result<T>) -> T {
        self.database.database().transaction(work).unwrap()
    }

    /// Accepts so many messages for a partition: `text #0` …
    fn accept(&self, partition: i32, count: i64, text: &str, key: Option<&str>) {
        let new = New { text, key, partition: Some(partition), count: Some(count) };
        assert_eq!(self.with(|conn| message_outbox::append(conn, &new, None)) as i64, count);
    }

    /// Brings what was accepted to the streams.
    fn relay(&self) {
        let broker = broker_settings(self.vhost.url());
        let database = self.database.database().clone();
        let mut relay = LogRelay::new(database, &broker, Topology::fleet(&[]), log_retention(), 1000);
        while relay.round().unwrap() != Round::Idle {}
        relay.close();
    }

    fn bring(&self, partition: i32, count: i64, text: &str) {
        self.accept(partition, count, text, None);
        self.relay();
    }

    /// A message of another program.
    fn publish(&self, partition: i32, properties: &Value, body: &[u8]) {
        assert!(self.vhost.publish(MESSAGE, &partition_routing_key(partition), properties, body));
    }

    /// Has the group stand at an offset, with so much recorded before it: a sequence of n at the offset n - 1.
    fn read(&self, group: &Group, partition: i32, offset: i64) {
        let rows: Vec<_> = (0..offset).map(|offset| (offset, Some(offset + 1), None)).collect();
        self.record(group, partition, &rows);
        let to =
            Position { next_offset: offset, placed: false, seq: (offset > 0).then_some(offset), last_message_id: None };
        self.with(|conn| {
            consumer_offsets::create(conn, group, &[(partition, 0)])?;
            assert!(consumer_offsets::advance(conn, group, partition, 0, &to, Passed::default())?);
            Ok(())
        });
    }

    /// Records messages: offset, sequence, key.
    fn record(&self, group: &Group, partition: i32, rows: &[(i64, Option<i64>, Option<&str>)]) {
        let ids: Vec<_> = rows.iter().map(|(offset, ..)| format!("id-{offset}")).collect();
        let rows = rows.iter().zip(&ids).map(|((offset, seq, key), id)| NewMessage {
            group: group.as_str(),
            partition,
            offset: *offset,
            seq: *seq,
            message_id: Some(id),
            key: *key,
            text: "hello",
            accepted_at: seq.map(|_| Utc::now()),
            recorded_by: "test",
        });
        let rows: Vec<_> = rows.collect();
        self.with(|conn| messages::record(conn, &rows));
    }

    fn recorded(&self, group: &Group) -> i64 {
        self.database.count(&format!(r#"SELECT count(*) AS n FROM message WHERE "group" = '{group}'"#))
    }

    /// Where the group stands in each partition.
    fn offsets(&self, group: &Group) -> Vec<(i32, i64)> {
        let standings = self.with(|conn| consumer_offsets::list(conn, Some(group)));
        standings.into_iter().map(|standing| (standing.partition, standing.next_offset)).collect()
    }
}

fn group(name: &str) -> Group {
    Group::parse(name).unwrap()
}

/// The cells of a table's line.
fn cells(line: &str) -> Vec<&str> {
    line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect()
}

fn table(text: &str) -> Vec<Vec<&str>> {
    text.lines().map(cells).collect()
}

const A_LONG_TIME: Duration = Duration::from_secs(600);

#[test]
fn the_partitions_are_shown_with_what_is_in_the_streams_and_on_the_way_there() {
    let stage = Stage { database: TestDatabase::new(), vhost: TestVhost::new() };
    let shown = run(stage.fleetctl(&["log", "partitions"]), 0);
    let rows = table(&shown);
    assert_eq!(rows[0], ["PARTITION", "STREAM", "FIRST", "NEWEST", "MESSAGES (ABOUT)", "SEQUENCE", "WAITING"]);
    assert_eq!(rows[4], ["3", "message.p03", "no stream", "no stream", "no stream", "0", "0"]);
    assert_eq!(rows.len(), 5);

    run(stage.fleetctl(&["topology", "declare"]), 0);
    stage.bring(0, 10, "a");
    stage.accept(2, 3, "b", None);
    let shown = run(stage.fleetctl(&["log", "partitions"]), 0);
    let rows = table(&shown);
    assert_eq!(rows[1], ["0", "message.p00", "0", "9", "10", "10", "0"]);
    assert_eq!(rows[3], ["2", "message.p02", "-", "-", "0", "0", "3"]);
    let report = stage.json(&["log", "partitions"]);
    assert_eq!(report["streamsOutOfSight"], Value::Null);
    let expected = json!({
        "partition": 0, "stream": "message.p00", "declared": true, "firstOffset": 0, "newestOffset": 9,
        "aboutMessages": 10, "newestSequence": 10, "waiting": 0,
    });
    assert_eq!(report["partitions"][0], expected);

    let output = stage.blind(&["log", "partitions"]).output().unwrap();
    assert_eq!(table(&checked(&output, 0))[1], ["0", "message.p00", "?", "?", "?", "10", "0"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("can't tell what the streams hold: "));
}

#[test]
fn groups_are_shown_with_lag_holder_and_what_they_havent_recorded() {
    let stage = Stage::new();
    assert_eq!(run(stage.fleetctl(&["log", "groups"]), 0), "no group has read anything yet\n");
    assert!(stage.refusal(&["log", "groups", "--group", "audit"]).contains("no group `audit`; there are none yet"));
    stage.accept(0, 10, "a", None);
    stage.accept(1, 10, "b", None);
    stage.accept(2, 5, "c", None);
    stage.relay();
    let (audit, recorder) = (group("audit"), group("recorder"));
    stage.read(&audit, 0, 10);
    stage.read(&recorder, 0, 4);
    stage.read(&recorder, 1, 10);
    stage.read(&recorder, 3, 7);
    let passed = Passed { skipped: 1, repeated: 2, missing: 3 };
    stage.with(|conn| {
        let to = Position { next_offset: 7, placed: false, seq: Some(4), last_message_id: None };
        assert!(consumer_offsets::advance(conn, &recorder, 0, 4, &to, passed)?);
        leases::attend(conn, &recorder.service(), "host-17-abcdef", A_LONG_TIME)?;
        leases::claim(conn, "host-17-abcdef", A_LONG_TIME, &[&recorder.resource(0)], 1)?;
        leases::claim(conn, "host-18-fedcba", Duration::ZERO, &[&recorder.resource(1)], 1)
    });

    let shown = run(stage.fleetctl(&["log", "groups"]), 0);
    let rows = table(&shown);
    assert_eq!(rows[0], ["group audit"]);
    assert_eq!(
        rows[1],
        ["PARTITION", "NEWEST", "NEXT", "LAG (ABOUT)", "HOLDER", "LEASE", "SKIPPED", "REPEATED", "MISSING"]
    );
    assert_eq!(rows[2], ["0", "9", "10", "0", "-", "free", "0", "0", "0"]);
    assert_eq!(rows[3], ["1", "9", "-", "10", "-", "free", "0", "0", "0"]);
    let place = rows.iter().position(|row| row == &["group recorder"]).unwrap();
    let rows = &rows[place + 2..];
    assert_eq!(rows[0], ["0", "9", "7", "3", "host-17-abcdef", "held", "1", "2", "3"]);
    assert_eq!(rows[1], ["1", "9", "10", "0", "host-18-fedcba", "run out", "0", "0", "0"]);
    assert_eq!(rows[2], ["2", "4", "-", "5", "-", "free", "0", "0", "0"]);
    assert_eq!(rows[3], ["3", "-", "7 (beyond the end)", "0", "-", "free", "0", "0", "0"]);
    assert_eq!(rows[5], ["MEMBER", "PARTITIONS", "LAST SEEN"]);
    assert_eq!(rows[6][..2], ["host-17-abcdef", "1"]);
    assert_eq!(rows.len(), 7);

    let report = stage.json(&["log", "groups", "--group", "recorder"]);
    assert_eq!(report["groups"].as_array().unwrap().len(), 1);
    let expected = json!({
        "partition": 0, "stream": "message.p00", "declared": true, "newestOffset": 9, "nextOffset": 7, "lag": 3,
        "trimmed": false, "beyondEnd": false, "holder": "host-17-abcdef", "runOut": false, "skipped": 1, "repeated": 2,
        "missing": 3,
    });
    assert_eq!(report["groups"][0]["partitions"][0], expected);
    assert_eq!(report["groups"][0]["partitions"][1]["runOut"], json!(true));
    assert_eq!(report["groups"][0]["partitions"][3]["beyondEnd"], json!(true));
    assert_eq!(report["groups"][0]["members"][0]["holder"], json!("host-17-abcdef"));
    assert!(stage.refusal(&["log", "groups", "--group", "x"]).contains("no group `x`; there are: audit, recorder"));
    assert!(stage.refusal(&["log", "groups", "--group", "a/b"]).contains("may hold letters, digits"));

    let output = stage.blind(&["log", "groups", "--group", "recorder"]).output().unwrap();
    let blind = checked(&output, 0);
    assert_eq!(table(&blind)[2], ["0", "?", "7", "?", "host-17-abcdef", "held", "1", "2", "3"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("can't tell"));
}

#[test]
fn a_partition_is_browsed_from_any_place_that_it_has() {
    let stage = Stage::new();
    let first = ["log", "browse", "--partition", "0", "--from", "first"];
    assert_eq!(run(stage.fleetctl(&first), 0).lines().count(), 1, "an empty one has no rows");
    assert!(stage.refusal(&["log", "browse", "--partition", "0", "--from", "0"]).contains("it's empty"));
    stage.accept(0, 30, "a\x1b[2J", Some("order-17"));
    stage.relay();
    let log = stage.with(partitions::token);

    let shown = run(stage.fleetctl(&["log", "browse", "--partition", "0"]), 0);
    let rows = table(&shown);
    assert_eq!(rows[0], ["OFFSET", "TIME (UTC)", "MESSAGE ID", "KEY", "TEXT"]);
    assert_eq!((rows.len(), rows[1][0], rows[20][0]), (21, "10", "29"));
    assert_eq!(rows[20][2..], [&format!("{log}/00/30"), "order-17", r"a\u{1b}[2J #29"]);
    let shown = run(stage.fleetctl(&["log", "browse", "--partition", "0", "--from", "7", "--count", "2"]), 0);
    let rows = table(&shown);
    assert_eq!((rows[1][0], rows[2][0], rows[3][0], rows.len()), ("7", "8", "for more: --from 9", 4));

    let long = "x".repeat(500);
    stage.publish(0, &json!({"message_id": "theirs", "type": "message"}), format!(r#"{{"text":"{long}"}}"#).as_bytes());
    stage.publish(0, &json!({"timestamp": 1_700_000_000}), b"not JSON\x07");
    stage.publish(0, &json!({"type": "tweet"}), br#"{"text":"x"}"#);
    stage.publish(0, &json!({}), &[0xff, 0xfe]);
    let others = ["log", "browse", "--partition", "0", "--from", "30"];
    let shown = run(stage.fleetctl(&others), 0);
    let rows = table(&shown);
    assert_eq!(rows[1][2..4], ["theirs", "-"]);
    assert!(rows[1][4].ends_with("xx…") && rows[1][4].chars().count() == 80, "{shown}");
    assert_eq!(rows[2][1..4], ["2023-11-14 22:13:20", "-", "-"]);
    assert!(
        rows[2][4].starts_with("(no message: its body is no JSON") && rows[2][4].ends_with(r"not JSON\u{7}"),
        "{shown}"
    );
    assert!(rows[3][4].starts_with("(no message: its type isn't `message`) {"), "{shown}");
    assert!(rows[4][4].ends_with(" fffe"), "{shown}");
    assert!(run(stage.fleetctl(&[&others[..], &["--full"]].concat()), 0).contains(&long));
    let report = stage.json(&others);
    assert_eq!((&report[0]["text"], &report[0]["seq"]), (&json!(long), &Value::Null));
    assert_eq!((&report[1]["text"], &report[1]["body"]), (&Value::Null, &json!("not JSON\u{7}")));
    assert_eq!((&report[3]["bodyHex"], report.as_array().unwrap().len()), (&json!("fffe"), 4));
    let own = stage.json(&["log", "browse", "--partition", "0", "--from", "4", "--count", "1"]);
    assert_eq!((&own[0]["seq"], &own[0]["offset"], &own[0]["key"]), (&json!(5), &json!(4), &json!("order-17")));
    assert!(own[0]["acceptedAt"].is_string() && own[0]["problem"].is_null());

    let refused =
        |partition: &str, from: &str| stage.refusal(&["log", "browse", "--partition", partition, "--from", from]);
    assert!(refused("0", "34").contains("partition 0 has no offset 34 yet; the first is 0, the newest 33"));
    assert!(refused("4", "first").contains("there is no partition 4; there are 0 to 3"));
    assert!(refused("-1", "first").contains("-1"));
    assert!(refused("0", "next").contains("must be an offset, `first` or `last`"));
    assert!(complaint(stage.blind(&first), 2).contains("broker"));
    let undeclared = TestVhost::new();
    let mut elsewhere = stage.fleetctl(&first);
    elsewhere.env("AMQP_URL", undeclared.url());
    assert!(complaint(elsewhere, 2).contains("there is no stream `message.p00`"));
}

#[test]
fn what_retention_has_removed_is_told_with_the_first_that_is_left() {
    let stage = Stage::forgetful();
    let recorder = group("recorder");
    stage.read(&recorder, 0, 10);
    let text = "x".repeat(2000);
    // In small steps: the next segment to be removed is far away when the first one is, so what is seen stays true.
    let bring = || stage.bring(0, 20, &text);
    (0..20).for_each(|_| bring());
    let first = eventually_within(Duration::from_secs(180), "retention removes the first segment", || {
        bring();
        let report = stage.json(&["log", "partitions"]);
        report["partitions"][0]["firstOffset"].as_i64().filter(|first| *first > 10)
    });
    let report = stage.json(&["log", "groups"]);
    let shown = &report["groups"][0]["partitions"][0];
    let newest = shown["newestOffset"].as_i64().unwrap();
    assert_eq!((&shown["trimmed"], shown["lag"].as_i64()), (&json!(true), Some(newest + 1 - first)));
    assert!(run(stage.fleetctl(&["log", "groups"]), 0).contains(" 10 (trimmed) "));

    let told = format!("no longer has offset 10: retention removed it; the first is {first}, the newest {newest}");
    let browse = ["log", "browse", "--partition", "0", "--from", "10", "--count", "1"];
    assert!(stage.refusal(&browse).contains(&told));
    assert_eq!(stage.json(&[&browse[..], &["--or-first"]].concat())[0]["offset"], json!(first));
    assert_eq!(stage.json(&["log", "browse", "--partition", "0", "--from", "first"])[0]["offset"], json!(first));
    let reset = ["log", "reset-offset", "--group", "recorder", "--partition", "0"];
    assert!(stage.refusal(&[&reset[..], &["--offset", "10"]].concat()).contains(&told));
    assert_eq!(stage.offsets(&recorder), [(0, 10)]);
    let report = run(stage.fleetctl(&[&reset[..], &["--first"]].concat()), 0);
    assert_eq!(report, format!("partition 0: 10 -> {first}, 0 recorded messages removed\n"));
    assert_eq!((stage.offsets(&recorder), stage.recorded(&recorder)), (vec![(0, first)], 10));
}

/// A tail under way, and what it has said.
struct Tail {
    child: Child,
}

impl Tail {
    /// Everything that comes from now on is followed.
    fn start(stage: &Stage, args: &[&str]) -> Self {
        let mut child = spawn(stage.fleetctl(&[&["log", "tail"], args].concat()));
        await_line(&mut child, "following from");
        Self { child }
    }

    /// Its next lines.
    fn lines(&mut self, count: usize) -> Vec<String> {
        let mut stdout = BufReader::new(self.child.stdout.as_mut().expect("the stream is piped"));
        let mut lines = Vec::new();
        while lines.len() < count {
            let mut line = String::new();
            assert!(stdout.read_line(&mut line).unwrap() > 0, "it ended after {lines:?}");
            lines.push(line.trim_end().to_owned());
        }
        assert!(stdout.buffer().is_empty(), "there is more");
        lines
    }

    fn end(mut self, status: i32) {
        assert_eq!(self.child.wait().unwrap().code(), Some(status));
    }
}

#[test]
fn messages_are_followed_as_they_come_over_lost_connections_too() {
    let stage = Stage::new();
    stage.bring(1, 5, "before");
    let mut all = Tail::start(&stage, &[]);
    let mut one = Tail::start(&stage, &["--partition", "1", "--count", "3", "--json"]);
    stage.bring(0, 1, "a");
    assert!(all.lines(1)[0].starts_with("0/0  "));
    stage.bring(1, 2, "b");
    let lines = all.lines(2);
    assert!(lines[0].starts_with("1/5  ") && lines[0].ends_with("/01/6  -  b #0"), "{lines:?}");
    assert!(lines[1].starts_with("1/6  ") && lines[1].ends_with("b #1"), "{lines:?}");
    eventually("the broker lists the connections", || (stage.vhost.close_connections() > 0).then_some(()));
    stage.bring(1, 1, "c");
    stage.bring(3, 1, "d");
    let mut lines = all.lines(2);
    lines.sort();
    assert!(lines[0].ends_with("c #0") && lines[1].ends_with("d #0"), "{lines:?}");
    let told: Vec<Value> = one.lines(3).iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(told.iter().map(|told| &told["offset"]).collect::<Vec<_>>(), [5, 6, 7]);
    one.end(0);
    interrupt(&all.child);
    all.end(130);
}

#[test]
fn following_ends_when_nobody_reads_any_more() {
    let stage = Stage::new();
    let mut tail = Tail::start(&stage, &["--partition", "2"]);
    drop(tail.child.stdout.take());
    stage.bring(2, 1, "a");
    tail.end(0);
    for (args, why) in [
        (&["--partition", "4"][..], "there is no partition 4; there are 0 to 3"),
        (&["--count", "0"], "must be 1 or more"),
    ] {
        assert!(stage.refusal(&[&["log", "tail"], args].concat()).contains(why));
    }
    assert!(complaint(stage.blind(&["log", "tail"]), 2).contains("broker"));
}

#[test]
fn a_group_is_reset_to_where_it_is_asked_to_with_what_it_had_recorded_from_there() {
    let stage = Stage::new();
    let (audit, recorder) = (group("audit"), group("recorder"));
    stage.accept(0, 10, "a", None);
    stage.accept(1, 6, "b", None);
    stage.relay();
    for group in [&audit, &recorder] {
        stage.read(group, 0, 10);
        stage.read(group, 1, 6);
    }
    let skipped = NewSkipped { group: "recorder", partition: 0, offset: 9, message_id: None, reason: "x", body: b"x" };
    stage.with(|conn| messages::skip(conn, std::slice::from_ref(&skipped)));
    let reset = |args: &[&str]| {
        run(stage.fleetctl(&[&["log", "reset-offset", "--group", "recorder", "--yes"], args].concat()), 0)
    };
    let there = vec![(0, 10), (1, 6)];

    let report = reset(&["--partition", "0", "--offset", "4", "--dry-run"]);
    assert_eq!(report, "partition 0: 10 -> 4, 6 recorded messages would be removed\n");
    assert_eq!((stage.offsets(&recorder), stage.recorded(&recorder)), (there.clone(), 16));
    let report = reset(&["--partition", "0", "--offset", "9"]);
    assert_eq!(report, "partition 0: 10 -> 9, 1 recorded message removed\n");
    assert_eq!((stage.offsets(&recorder), stage.recorded(&recorder)), (vec![(0, 9), (1, 6)], 15));
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM skipped_message"), 0);
    assert_eq!(reset(&["--partition", "0", "--offset", "10"]), "partition 0: 9 -> 10, 0 recorded messages removed\n");
    let report = reset(&["--first"]);
    let empty = "0 recorded messages removed";
    assert_eq!(
        report,
        format!(
            "partition 0: 10 -> 0, 9 recorded messages removed\npartition 1: 6 -> 0, 6 recorded messages removed\n\
             partition 2: - -> 0, {empty}\npartition 3: - -> 0, {empty}\n"
        )
    );
    assert_eq!((stage.offsets(&recorder), stage.recorded(&recorder)), (vec![(0, 0), (1, 0), (2, 0), (3, 0)], 0));
    reset(&["--next"]);
    assert_eq!(stage.offsets(&recorder), [(0, 10), (1, 6), (2, 0), (3, 0)]);

    // The broker counts in whole seconds.
    thread::sleep(Duration::from_millis(2100));
    let between = (Utc::now() - TimeDelta::seconds(1)).to_rfc3339();
    stage.bring(0, 5, "c");
    reset(&["--time", "1h"]);
    assert_eq!(stage.offsets(&recorder), [(0, 0), (1, 0), (2, 0), (3, 0)]);
    reset(&["--time", &between]);
    assert_eq!(stage.offsets(&recorder), [(0, 10), (1, 6), (2, 0), (3, 0)]);
    assert_eq!((stage.offsets(&audit), stage.recorded(&audit)), (there, 16), "no other group is touched");
}

#[test]
fn a_reset_that_isnt_safe_or_makes_no_sense_is_refused_and_changes_nothing() {
    let stage = Stage::new();
    let recorder = group("recorder");
    stage.bring(0, 10, "a");
    let refused = |args: &[&str]| stage.refusal(&[&["log", "reset-offset", "--group", "recorder"], args].concat());
    assert!(refused(&["--first"]).contains("there is no group `recorder`; there are none yet"));
    stage.read(&recorder, 0, 10);
    assert!(stage.refusal(&["log", "reset-offset", "--group", "x", "--first"]).contains("there are: recorder"));

    let at = |offset: &str| refused(&["--partition", "0", "--offset", offset]);
    assert!(at("11").contains("partition 0 has no offset 11 yet; the first is 0, the newest 9"));
    assert!(at("-1").contains("-1"));
    assert!(refused(&["--partition", "1", "--offset", "1"]).contains("it's empty"));
    assert!(refused(&["--partition", "4", "--first"]).contains("there is no partition 4; there are 0 to 3"));
    assert!(refused(&["--offset", "1"]).contains("--partition"));
    assert!(refused(&[]).contains("required"));
    assert!(refused(&["--first", "--next"]).contains("cannot be used with"));
    assert!(refused(&["--time", "yesterday"]).contains("must be a time such as"));
    assert!(complaint(stage.blind(&["log", "reset-offset", "--group", "recorder", "--first"]), 2).contains("broker"));

    stage.with(|conn| leases::attend(conn, &recorder.service(), "host-17-abcdef", A_LONG_TIME));
    let mut patient = stage.fleetctl(&["log", "reset-offset", "--group", "recorder", "--first"]);
    patient.env("MURMURATION__MESSAGE_RECORDER__LEASE_TTL_MS", "300000");
    let told = complaint(patient, 2);
    assert!(told.contains("members of `recorder` are running: host-17-abcdef (seen "), "{told}");
    assert!(told.contains("stop them first, or use --force"), "{told}");
    assert_eq!((stage.offsets(&recorder), stage.recorded(&recorder)), (vec![(0, 10)], 10));
    let mut forced = stage.fleetctl(&[
        "log",
        "reset-offset",
        "--group",
        "recorder",
        "--partition",
        "0",
        "--first",
        "--force",
        "--yes",
    ]);
    forced.env("MURMURATION__MESSAGE_RECORDER__LEASE_TTL_MS", "300000");
    run(forced, 0);
    assert_eq!((stage.offsets(&recorder), stage.recorded(&recorder)), (vec![(0, 0)], 0));
    // One that has been silent for long is dead.
    stage.database.execute("UPDATE member SET seen_at = seen_at - interval '1 minute'");
    run(stage.fleetctl(&["log", "reset-offset", "--group", "recorder", "--partition", "0", "--next"]), 0);
    assert_eq!(stage.offsets(&recorder), [(0, 10)]);
}

/// From the broker's next answer on that a reader may begin, nothing arrives on that connection.
fn silence(proxy: &Proxy) -> Trap {
    // The method consume-ok, and its frame's end.
    let begun = |bytes: &[u8]| {
        let at = bytes.windows(4).position(|window| window == [0, 60, 0, 21])?;
        Some(at + bytes[at..].iter().position(|byte| *byte == 0xce)? + 1)
    };
    proxy.trap(Direction::ToClient, begun, Action::Hold)
}

#[test]
fn a_broker_that_is_slow_to_send_is_not_taken_for_an_empty_stream() {
    let stage = Stage::new();
    let recorder = group("recorder");
    stage.bring(0, 10, "a");
    stage.read(&recorder, 0, 10);
    let (proxy, url) = Proxy::of(stage.vhost.url());
    let partition = ["--partition", "0"];
    let reset = [&["log", "reset-offset", "--group", "recorder"], &partition[..]].concat();
    let browse = [&["log", "browse"], &partition[..]].concat();
    for args in [
        [&reset[..], &["--next"]].concat(),
        [&reset[..], &["--first"]].concat(),
        [&reset[..], &["--time", "1h"]].concat(),
        [&reset[..], &["--offset", "10"]].concat(),
        [&browse[..], &["--from", "first"]].concat(),
    ] {
        let silence = silence(&proxy);
        let mut command = stage.fleetctl(&args);
        command.env("AMQP_URL", &url).env("MURMURATION__BROKER__CONFIRM_TIMEOUT_MS", "7000");
        let told = complaint(command, 2);
        assert!(silence.sprung() && told.contains("no answer from the broker"), "{args:?}: {told}");
        assert_eq!((stage.offsets(&recorder), stage.recorded(&recorder)), (vec![(0, 10)], 10), "{args:?}");
    }
    // Where only a look is asked for, it's said that there was none.
    let _silence = silence(&proxy);
    let mut command = stage.fleetctl(&["log", "groups"]);
    command.env("AMQP_URL", &url).env("MURMURATION__BROKER__CONFIRM_TIMEOUT_MS", "7000");
    let output = command.output().unwrap();
    assert!(checked(&output, 0).contains('?') && String::from_utf8_lossy(&output.stderr).contains("can't tell"));
}

#[test]
fn what_a_reset_removes_is_agreed_to_and_the_way_back_takes_a_word_of_its_own() {
    let stage = Stage::new();
    let recorder = group("recorder");
    stage.bring(0, 10, "a");
    stage.read(&recorder, 0, 10);
    fn reset<'a>(args: &[&'a str]) -> Vec<&'a str> {
        [&["log", "reset-offset", "--group", "recorder", "--partition", "0"], args].concat()
    }
    let told = stage.refusal(&reset(&["--offset", "4"]));
    assert!(
        told.contains("of group `recorder`, 6 recorded messages are to be removed; nothing was changed: pass --yes"),
        "{told}"
    );
    broker::delete_queues(
        &mut broker::Session::open(&broker_settings(stage.vhost.url()), "test").unwrap(),
        &["message.p00".into()],
    )
    .unwrap();
    run(stage.fleetctl(&["topology", "declare"]), 0);
    for args in [&["--next"][..], &["--next", "--yes"], &["--next", "--dry-run"]] {
        let told = stage.refusal(&reset(args));
        assert!(told.contains("the next message would be at offset 0, and the group has read up to 10"), "{told}");
    }
    assert!(stage.refusal(&reset(&["--next", "--back"])).contains("10 recorded messages are to be removed"));
    assert!(stage.refusal(&reset(&["--first", "--back"])).contains("cannot be used with"));
    assert_eq!((stage.offsets(&recorder), stage.recorded(&recorder)), (vec![(0, 10)], 10));
    let report = run(stage.fleetctl(&reset(&["--next", "--back", "--yes"])), 0);
    assert_eq!(report, "partition 0: 10 -> 0, 10 recorded messages removed\n");
}

#[test]
fn a_group_is_removed_with_all_that_it_has_and_no_other_and_not_while_members_run() {
    let stage = Stage::new();
    let (audit, recorder) = (group("audit"), group("recorder"));
    let remove = ["log", "remove-group", "--group", "audit"];
    assert!(stage.refusal(&remove).contains("there is no group `audit`; there are none yet"));
    for group in [&audit, &recorder] {
        stage.read(group, 0, 10);
        stage.read(group, 3, 6);
        let skipped =
            NewSkipped { group: group.as_str(), partition: 0, offset: 10, message_id: None, reason: "x", body: b"x" };
        stage.with(|conn| messages::skip(conn, std::slice::from_ref(&skipped)));
    }
    let (own, other) = (audit.resource(0), recorder.resource(0));
    let resources = [&*own, &*other];
    stage.with(|conn| {
        leases::attend(conn, &audit.service(), "host-17-abcdef", A_LONG_TIME)?;
        leases::claim(conn, "host-17-abcdef", A_LONG_TIME, &resources, 2)
    });

    let patiently = |args: &[&str]| {
        let mut command = stage.fleetctl(args);
        command.env("MURMURATION__MESSAGE_RECORDER__LEASE_TTL_MS", "300000");
        command
    };
    let told = complaint(patiently(&remove), 2);
    assert!(told.contains("members of `audit` are running: host-17-abcdef (seen "), "{told}");
    // One that has been silent for long is dead.
    stage.database.execute("UPDATE member SET seen_at = seen_at - interval '1 hour'");
    let report = run(patiently(&[&remove[..], &["--dry-run"]].concat()), 0);
    assert_eq!(report, "group `audit`, 16 recorded and 1 skipped messages: would be removed\n");
    assert_eq!((stage.offsets(&audit), stage.recorded(&audit)), (vec![(0, 10), (3, 6)], 16));

    let told = complaint(patiently(&remove), 2);
    assert!(
        told.contains("is to be removed, with 16 recorded messages and 1 skipped; nothing was changed: pass --yes"),
        "{told}"
    );
    assert_eq!((stage.offsets(&audit), stage.recorded(&audit)), (vec![(0, 10), (3, 6)], 16));
    let report = run(patiently(&[&remove[..], &["--yes"]].concat()), 0);
    assert_eq!(report, "group `audit`, 16 recorded and 1 skipped messages: removed\n");
    assert_eq!((stage.offsets(&audit), stage.recorded(&audit)), (vec![], 0));
    assert_eq!((stage.offsets(&recorder), stage.recorded(&recorder)), (vec![(0, 10), (3, 6)], 16));
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM skipped_message"), 1);
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM member"), 0);
    let left = stage.with(|conn| leases::list(conn, &resources));
    assert_eq!(left.into_iter().map(|lease| lease.resource).collect::<Vec<_>>(), [other]);
    assert!(stage.refusal(&remove).contains("there are: recorder"));
}

#[test]
fn partitions_are_added_with_their_streams_by_one_at_a_time() {
    let stage = Stage::new();
    let count = || stage.with(partitions::count);
    let is_bound = |partition| stage.vhost.publish(MESSAGE, &partition_routing_key(partition), &json!({}), b"{}");
    assert_eq!(run(stage.fleetctl(&["log", "add-partitions", "2"]), 0), "4 -> 6\n");
    assert_eq!((count(), is_bound(5), is_bound(6)), (6, true, false));
    stage.bring(5, 3, "a");
    assert_eq!(stage.json(&["log", "partitions"])["partitions"][5]["newestSequence"], json!(3));

    for (more, why) in
        [("0", "0 is not in 1..=99"), ("-1", "-1"), ("100", "100 is not in 1..=99"), ("x", "invalid digit")]
    {
        let told = stage.refusal(&["log", "add-partitions", more]);
        assert!(told.contains(why), "{told}");
    }
    assert!(stage.refusal(&["log", "add-partitions", "95"]).contains("there are 6 partitions; the maximum is 100"));
    assert!(complaint(stage.blind(&["log", "add-partitions", "1"]), 2).contains("broker"));
    let mut conn = stage.database.database().connection().unwrap();
    let told = resharding::alone(&mut conn, MESSAGE, |_| stage.refusal(&["log", "add-partitions", "1"]));
    assert!(told.unwrap().unwrap().contains("another process is adding partitions just now"));
    assert_eq!((count(), is_bound(6)), (6, false));
}

#[test]
fn what_a_group_has_skipped_is_shown_the_newest_first() {
    let stage = Stage::new();
    let recorder = group("recorder");
    stage.read(&recorder, 0, 0);
    let skipped = |offset, message_id, body| NewSkipped {
        group: "recorder",
        partition: 0,
        offset,
        message_id,
        reason: "its body is no JSON",
        body,
    };
    stage.with(|conn| messages::skip(conn, &[skipped(3, Some("theirs"), b"not\x07 JSON")]));
    stage.with(|conn| messages::skip(conn, &[skipped(8, None, &[0xff; 100])]));
    let skipped = ["log", "skipped", "--group", "recorder"];
    let shown = run(stage.fleetctl(&skipped), 0);
    let rows = table(&shown);
    assert_eq!(rows[0], ["PARTITION", "OFFSET", "SKIPPED (UTC)", "MESSAGE ID", "REASON", "BODY"]);
    assert_eq!((&rows[1][..2], &rows[1][3..5]), (&["0", "8"][..], &["-", "its body is no JSON"][..]));
    assert!(rows[1][5].starts_with("ff ff ") && rows[1][5].ends_with('…'), "{shown}");
    assert_eq!(rows[2][3..], ["theirs", "its body is no JSON", r"not\u{7} JSON"]);
    assert_eq!(rows.len(), 3);
    let report = stage.json(&[&skipped[..], &["--limit", "1"]].concat());
    assert_eq!((&report[0]["offset"], &report[0]["bodyHex"]), (&json!(8), &json!("ff".repeat(100))));
    assert_eq!(report.as_array().unwrap().len(), 1);
    assert!(stage.refusal(&["log", "skipped", "--group", "x"]).contains("there are: recorder"));
}

#[test]
fn verifying_the_log_finds_nothing_where_all_is_well_and_exactly_what_was_planted() {
    let (well, audit) = (group("well"), group("audit"));
    let stage = Stage { database: TestDatabase::new(), vhost: TestVhost::new() };
    let verify = |group: &str, status| run(stage.blind(&["log", "verify", "--group", group]), status);
    assert!(complaint(stage.blind(&["log", "verify", "--group", "well"]), 2).contains("there are none yet"));
    stage.read(&well, 0, 100);
    // Another program's message amid, one of the broker's own offsets, and a group that began late.
    stage.record(&well, 0, &[(100, None, Some("k")), (102, Some(101), Some("k"))]);
    stage.read(&well, 1, 0);
    stage.record(&well, 1, &[(7, Some(5), Some("k")), (8, Some(6), None), (9, Some(7), Some("k"))]);
    let shown = verify("well", 0);
    let rows = table(&shown);
    assert_eq!(
        rows[0],
        ["PARTITION", "RECORDED", "FOREIGN", "SEQUENCES", "MISSING", "REPEATED", "OUT OF ORDER", "BY KEY"]
    );
    assert_eq!(rows[1], ["0", "102", "1", "1 to 101", "0", "0", "0", "0"]);
    assert_eq!(rows[2], ["1", "3", "0", "5 to 7", "0", "0", "0", "0"]);
    assert_eq!(shown.lines().filter(|line| line.starts_with("ok ")).count(), 4, "{shown}");

    // In partition 0 of sequences 1 to 9: 4 and 5 are missing, 2 comes again, 7 comes after 8, with another key.
    stage.read(&audit, 0, 0);
    let rows = [
        (0, Some(1), Some("a")),
        (1, Some(2), Some("a")),
        (2, Some(3), Some("b")),
        (3, Some(2), Some("a")),
        (4, Some(6), Some("a")),
        (5, None, Some("a")),
        (6, Some(8), Some("b")),
        (7, Some(7), Some("a")),
        (8, Some(9), None),
    ];
    stage.record(&audit, 0, &rows);
    // In partition 1, two of one key.
    stage.record(&audit, 1, &[(0, Some(2), Some("a")), (1, Some(3), None), (2, Some(1), Some("a"))]);
    let shown = verify("audit", 1);
    let rows = table(&shown);
    assert_eq!(rows[1], ["0", "9", "1", "1 to 9", "2", "1", "1", "0"]);
    assert_eq!(rows[2], ["1", "3", "0", "1 to 3", "0", "0", "1", "1"]);
    let wrong = "WRONG   gaps in the sequences: 1\n          partition 0, sequences 4 to 5\n\
                 WRONG   sequences recorded more than once: 1\n          partition 0, sequence 2 again at offset 3\n\
                 WRONG   messages out of order: 2\n          partition 0, sequence 7 at offset 7 after 8\n\
                 \u{20}         partition 1, sequence 1 at offset 2 after 3\n\
                 WRONG   messages of one key out of order: 1\n          partition 1, sequence 1 at offset 2 after 2\n";
    assert!(shown.ends_with(wrong), "{shown}");
    let report: Value =
        serde_json::from_str(&run(stage.blind(&["log", "verify", "--group", "audit", "--json"]), 1)).unwrap();
    assert_eq!((&report["ok"], &report["group"], &report["underWay"]), (&json!(false), &json!("audit"), &json!([])));
    let expected = json!({
        "partition": 0, "recorded": 9, "foreign": 1, "firstSequence": 1, "lastSequence": 9, "missing": 2, "repeated": 1,
        "outOfOrder": 1, "outOfOrderByKey": 0,
    });
    assert_eq!(report["partitions"][0], expected);
    assert_eq!(report["checks"][3]["count"], json!(1));
    verify("well", 0);
}

#[test]
fn verifying_the_log_waits_until_the_group_has_all_that_was_accepted() {
    let stage = Stage::new();
    let recorder = group("recorder");
    stage.accept(0, 10, "a", None);
    stage.accept(1, 5, "b", None);
    stage.with(|conn| consumer_offsets::create(conn, &recorder, &[(0, 0), (1, 0)]));
    let verify = |wait| ["log", "verify", "--group", "recorder", "--wait", wait];
    let shown = run(stage.fleetctl(&verify("0s")), 1);
    assert!(shown.contains("WRONG   still in progress: partition 0: 10 to be published\n"), "{shown}");
    stage.relay();
    let shown = run(stage.fleetctl(&verify("0s")), 1);
    assert!(shown.contains("still in progress: partition 1: nothing recorded from offset 0 onwards\n"), "{shown}");
    run(stage.fleetctl(&["log", "verify", "--group", "recorder"]), 0);

    let child = spawn(stage.fleetctl(&verify("60s")));
    crate::await_activity(&stage.database, "%message_outbox%");
    // The group begins behind what partition 1 has.
    run(stage.fleetctl(&["log", "reset-offset", "--group", "recorder", "--partition", "1", "--next"]), 0);
    stage.with(|conn| {
        let to = |seq| Position { next_offset: seq, placed: false, seq: Some(seq), last_message_id: None };
        consumer_offsets::advance(conn, &recorder, 0, 0, &to(9), Passed::default())
    });
    let shown = run(stage.fleetctl(&verify("0s")), 1);
    assert!(shown.contains("still in progress: partition 0: recorded up to 9 of 10\n"), "{shown}");
    stage.with(|conn| {
        let to = |seq| Position { next_offset: seq, placed: false, seq: Some(seq), last_message_id: None };
        consumer_offsets::advance(conn, &recorder, 0, 9, &to(10), Passed::default())
    });
    assert!(!checked(&child.wait_with_output().unwrap(), 0).contains("in progress"));
    // Where a new group can't be told to have nothing to read.
    let mut blind = stage.blind(&verify("0s"));
    blind.env("AMQP_URL", NOWHERE);
    assert!(run(blind, 1).contains("partition 1: nothing recorded from offset 5 on"));
}
