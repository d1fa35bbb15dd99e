//! Account events: loading them, and verifying what has become of them.

use crate::{
    NOWHERE, await_activity, complaint, figure, fleetctl,
    gateway::{Gateway, Loser, Lost},
    run, spawn,
    streams::{accept, apply, park},
    wrong,
};
use serde_json::Value;
use std::{
    process::Command,
    time::{Duration, Instant},
};
use test_support::{PrivatePostgres, TestDatabase, eventually};

const ACCEPTED: &str = "SELECT count(*) AS n FROM stream_event";

/// Account `a` has 5 events that are applied; `b` has 3 of which the second is skipped; `c` is parked at the second of 3.
fn settled() -> TestDatabase {
    let database = TestDatabase::new();
    accept(&database, "a", &["1"; 5]);
    (0..5).for_each(|_| apply(&database, "a"));
    accept(&database, "b", &["1"; 3]);
    apply(&database, "b");
    park(&database, "b", "boom");
    run(fleetctl(&database, &["keys", "skip", "b"]), 0);
    apply(&database, "b");
    accept(&database, "c", &["1"; 3]);
    apply(&database, "c");
    park(&database, "c", "boom");
    database
}

#[test]
fn verifying_events_finds_nothing_where_all_is_well_and_exactly_what_was_planted() {
    let database = settled();
    let report = run(fleetctl(&database, &["events", "verify"]), 0);
    assert!(report.ends_with("11 events of 3 keys: 8 applied, 1 skipped, 2 parked\n"), "{report}");
    assert!(report.lines().filter(|line| line.starts_with("ok")).count() >= 10, "{report}");
    drop(database);

    let effect = |account: &str, seq: i64| {
        format!(
            "INSERT INTO account_effect (account_id, seq, worker, work_ms) VALUES ('{account}', {seq}, 'zombie', 1)"
        )
    };
    let event = |change: &str, account: &str, seq: i64| {
        format!("UPDATE stream_event SET {change} WHERE key = '{account}' AND seq = {seq}")
    };
    let skipped = "processed_at = clock_timestamp(), outcome = 'skipped', worker = 'olga'";
    // Each error, what is found, and the first row that is named.
    let planted = [
        (
            "DELETE FROM stream_event WHERE key = 'c' AND seq = 2".into(),
            &["accepted events missing: 1"][..],
            "key c, events 2 to 2",
        ),
        (
            "UPDATE stream_head SET seq = 5 WHERE key = 'c'".into(),
            &["accepted events missing: 1"],
            "key c, events 4 to 5",
        ),
        (
            "UPDATE stream_head SET seq = 2 WHERE key = 'c'".into(),
            &["events beyond their key's head: 1"],
            "key c, event 3, head 2",
        ),
        (
            "DELETE FROM stream_cursor WHERE key = 'a'".into(),
            &["cursors that aren't where as many events are settled: 1"],
            "key a, cursor missing, 5 settled",
        ),
        (
            "UPDATE stream_cursor SET seq = 2 WHERE key = 'c'".into(),
            &["cursors that aren't where as many events are settled: 1", "events settled out of turn: 1"],
            "key c, cursor 2, 1 settled",
        ),
        (
            format!("{}; UPDATE stream_cursor SET seq = 2 WHERE key = 'c'", event(skipped, "c", 3)),
            &["events settled out of turn: 2"],
            "key c, event 2 waits, cursor 2",
        ),
        (
            "DELETE FROM account_effect WHERE account_id = 'a' AND seq = 3".into(),
            &["effects missing: 1"],
            "key a, event 3",
        ),
        (effect("nobody", 1), &["effects without an applied event: 1"], "key nobody, event 1 isn't there"),
        (effect("c", 2), &["effects without an applied event: 1"], "key c, event 2 waits"),
        (
            effect("b", 2),
            &["effects without an applied event: 1", "effects out of order: 1"],
            "key b, event 2 is skipped",
        ),
        (effect("a", 5), &["effects doubled: 1"], "key a, event 5, 2 times"),
        (effect("a", 2), &["effects doubled: 1"], "key a, event 2, 2 times"),
        (
            "UPDATE account_effect SET seq = 7 - seq WHERE account_id = 'a' AND seq IN (3, 4)".into(),
            &["effects out of order: 1"],
            "key a, event 3 after 4",
        ),
        (
            format!("{}; UPDATE stream_cursor SET parked_at = NULL WHERE key = 'c'", event("rests = true", "c", 2)),
            &["events that rest though their key doesn't: 1", "events not through yet: 2"],
            "key c, event 2",
        ),
        (
            "UPDATE stream_cursor SET parked_at = NULL WHERE key = 'c'".into(),
            &["events not through yet: 2"],
            "key c, event 2",
        ),
    ];
    for (plant, findings, example) in planted {
        let database = settled();
        plant.split("; ").for_each(|statement| assert!(database.execute(statement) > 0, "{statement}"));
        let report = run(fleetctl(&database, &["events", "verify"]), 1);
        assert_eq!(wrong(&report), findings.iter().map(|finding| format!("WRONG   {finding}")).collect::<Vec<_>>());
        let after = report.lines().skip_while(|line| !line.starts_with("WRONG")).nth(1);
        assert_eq!(after.map(str::trim), Some(example), "{plant}: {report}");
    }
}

#[test]
fn verifying_events_finds_nothing_wrong_with_a_clock_that_was_set_back() {
    let database = settled();
    database
        .execute("UPDATE stream_event SET processed_at = processed_at - interval '1 hour' WHERE key = 'a' AND seq = 4");
    database
        .execute("UPDATE stream_event SET generated_at = generated_at + interval '1 hour' WHERE key = 'a' AND seq = 3");
    run(fleetctl(&database, &["events", "verify"]), 0);
}

#[test]
fn verifying_events_looks_at_those_asked_for_and_names_some_of_what_is_wrong() {
    let database = settled();
    accept(&database, "a", &["1"; 25]);
    let verify = |args: &[&str]| fleetctl(&database, &[&["events", "verify"], args].concat());
    let report = run(verify(&[]), 1);
    assert_eq!(wrong(&report), ["WRONG   events not through yet: 25"]);
    assert!(report.contains("key a, event 25\n          and 5 more\n"), "{report}");
    assert!(report.ends_with("36 events of 3 keys: 8 applied, 1 skipped, 2 parked\n"), "{report}");
    let report = run(verify(&["--prefix", "b"]), 0);
    assert!(report.ends_with("3 events of 1 keys: 2 applied, 1 skipped, 0 parked\n"), "{report}");
    assert!(complaint(verify(&["--prefix", "bb"]), 2).contains("no key that starts with `bb`"));
    assert!(complaint(verify(&["--stream", "nothing"]), 2).contains("unknown stream"));
    run(verify(&["--prefix", "a", "--wait", "1s"]), 1);

    let report: Value = serde_json::from_str(&run(verify(&["--json"]), 1)).unwrap();
    assert_eq!((&report["ok"], &report["accepted"], &report["parked"]), (&false.into(), &36.into(), &2.into()));
    let checks = report["checks"].as_array().unwrap();
    let under_way = checks.iter().find(|check| check["check"] == "events not through yet").unwrap();
    assert_eq!((&under_way["count"], under_way["examples"].as_array().unwrap().len()), (&25.into(), 20));
    assert_eq!(checks.iter().filter(|check| check["count"] != 0).count(), 1);
}

#[test]
fn verifying_events_waits_for_those_on_their_way() {
    let database = settled();
    accept(&database, "a", &["1"]);
    let child = spawn(fleetctl(&database, &["events", "verify", "--wait", "60s"]));
    await_activity(&database, "%AS waiting%");
    apply(&database, "a");
    crate::checked(&child.wait_with_output().unwrap(), 0);
}

#[test]
fn events_are_loaded_as_the_seed_draws_them_however_often() {
    let database = TestDatabase::new();
    let gateway = Gateway::serve(&database, &[]);
    let load = |args: &[&str]| {
        let arguments = ["load", "events", "--accounts", "50", "--events", "2000", "--gateway", &gateway.url];
        fleetctl(&database, &[&arguments[..], args].concat())
    };
    let summary = run(load(&["--seed", "7", "--prefix", "p-", "--batch", "150"]), 0);
    assert!(summary.starts_with(&format!("accounts p-*: {}/results?prefix=p-\n", gateway.url)), "{summary}");
    assert_eq!((figure(&summary, "accepted"), figure(&summary, "unconfirmed")), (2000, 0));
    let of =
        |prefix: &str| database.count(&format!("SELECT count(*) AS n FROM stream_event WHERE key LIKE '{prefix}%'"));
    assert_eq!(of("p-"), 2000);
    assert_eq!(database.count("SELECT count(DISTINCT payload->>'event') AS n FROM stream_event"), 2000);
    assert_eq!(database.count("SELECT count(*) AS n FROM stream_event WHERE length(payload::text) <> 64"), 0);
    // At least the first event of an account has a message.
    let first = "SELECT count(*) AS n FROM outbox WHERE exchange = 'account_event' AND message_id LIKE '%/1'";
    assert_eq!(database.count(first), 50);

    database.execute("CREATE TABLE before AS SELECT * FROM stream_head");
    run(load(&["--seed", "7", "--prefix", "p-", "--connections", "1"]), 0);
    let others = "SELECT count(*) AS n FROM stream_head h JOIN before b USING (key) WHERE h.seq <> 2 * b.seq";
    assert_eq!(database.count(others), 0, "the seed makes the accounts");

    // Without a prefix they are accounts that nobody had before.
    let started = Instant::now();
    let summary = run(load(&["--hot", "0.5", "--rate", "4000", "--payload-bytes", "1000"]), 0);
    // In requests of 400, the last of which is due at 400 ms.
    assert!(started.elapsed() >= Duration::from_millis(400), "{:?}", started.elapsed());
    let prefix = summary.strip_prefix("accounts ").unwrap().split('*').next().unwrap();
    assert_eq!(of(prefix), 2000);
    assert!(
        (900..1150).contains(&database.count(&format!("SELECT seq AS n FROM stream_head WHERE key = '{prefix}0'")))
    );
    let long =
        format!("SELECT count(*) AS n FROM stream_event WHERE key LIKE '{prefix}%' AND length(payload::text) = 1000");
    assert_eq!(database.count(&long), 2000);
}

#[test]
fn loading_waits_for_the_events_to_be_through_when_its_asked_to() {
    let database = TestDatabase::new();
    let gateway = Gateway::serve(&database, &[]);
    let load = |args: &[&str]| {
        let arguments = ["load", "events", "--accounts", "1", "--events", "3", "--gateway", &gateway.url];
        fleetctl(&database, &[&arguments[..], args].concat())
    };
    let child = spawn(load(&["--prefix", "p", "--wait", "60s"]));
    await_activity(&database, "%AS waiting%");
    (0..3).for_each(|_| apply(&database, "p0"));
    let summary = crate::checked(&child.wait_with_output().unwrap(), 0);
    assert!(summary.contains("\napplied: 3 of 3, 0 skipped, 0 parked; since the first was accepted "), "{summary}");
    assert!(summary.contains("\nlongest account: p0, 3 events, 0.0 s of work; all of it took "), "{summary}");

    let child = spawn(load(&["--prefix", "q", "--wait", "60s"]));
    await_activity(&database, "%AS waiting%");
    apply(&database, "q0");
    park(&database, "q0", "boom");
    let summary = crate::checked(&child.wait_with_output().unwrap(), 1);
    assert!(summary.contains("\napplied: 1 of 3, 0 skipped, 2 parked;"), "{summary}");

    let summary = run(load(&["--prefix", "r", "--wait", "100ms"]), 1);
    assert!(summary.contains("\n3 events still pending\n"), "{summary}");
}

#[test]
fn what_cant_be_loaded_is_refused_before_anything_is_posted() {
    let database = TestDatabase::new();
    let load = |args: &[&str]| fleetctl(&database, &[&["load", "events"], args].concat());
    let long = "p".repeat(64);
    for (args, why) in [
        (&["--accounts", "1", "--events", "0"][..], "0 is not in 1"),
        (&["--accounts", "0", "--events", "1"], "0 is not in 1"),
        (&["--accounts", "1"], "required"),
        (&["--events", "1"], "required"),
        (&["--accounts", "1", "--events", "1", "--batch", "10001"], "10001 is not in 1..=10000"),
        (&["--accounts", "1", "--events", "1", "--payload-bytes", "65537"], "65537 is not in"),
        (&["--accounts", "1", "--events", "1", "--hot", "1.5"], "must be a number from 0 to 1"),
        (&["--accounts", "1", "--events", "1", "--hot=-0.5"], "must be a number from 0 to 1"),
        (&["--accounts", "1", "--events", "1", "--hot", "NaN"], "must be a number from 0 to 1"),
        (&["--accounts", "1", "--events", "1", "--rate", "0"], "0 is not in 1"),
        (&["--accounts", "1", "--events", "1", "--prefix", "a b"], "--prefix: an account's id may hold letters"),
        (&["--accounts", "1", "--events", "1", "--prefix", &long], "--prefix: an account's id must be at most 64"),
    ] {
        let complaint = complaint(load(args), 2);
        assert!(complaint.contains(why), "{args:?}: {complaint}");
    }
}

#[test]
fn what_the_gateway_refuses_ends_the_load_and_one_that_is_away_is_tried_for_a_while() {
    let database = TestDatabase::new();
    let gateway = Gateway::serve(&database, &[("MURMURATION__API_GATEWAY__EVENT_BODY_LIMIT_BYTES", "1000")]);
    let load = |url: &str, args: &[&str]| {
        let arguments =
            ["load", "events", "--accounts", "1", "--events", "1000", "--connections", "1", "--gateway", url];
        run(fleetctl(&database, &[&arguments[..], args].concat()), 1)
    };
    let summary = load(&gateway.url, &["--batch", "100"]);
    assert_eq!((figure(&summary, "accepted"), figure(&summary, "unconfirmed")), (0, 1000));
    assert!(summary.contains("  100 × 413 "), "{summary}");
    let port = NOWHERE.split(':').next_back().unwrap().split('/').next().unwrap();
    let summary = load(&format!("http://127.0.0.1:{port}"), &["--patience", "500ms"]);
    assert!(summary.contains("  500 × the gateway didn't answer"), "{summary}");
    assert_eq!(database.count(ACCEPTED), 0);
}

#[test]
fn events_whose_answer_is_lost_are_not_posted_again_if_they_were_accepted() {
    let database = TestDatabase::new();
    let gateway = Gateway::serve(&database, &[]);
    let loser = Loser::start(&gateway, Lost::Answers, 5);
    let load = |args: &[&str]| -> Command {
        let arguments = ["load", "events", "--accounts", "20", "--events", "1000", "--batch", "100"];
        fleetctl(&database, &[&arguments[..], &["--gateway", &loser.url], args].concat())
    };
    let summary = run(load(&["--prefix", "p"]), 0);
    assert_eq!(loser.lost(), 5);
    assert_eq!((figure(&summary, "accepted"), figure(&summary, "unconfirmed")), (1000, 0));
    assert_eq!(database.count(ACCEPTED), 1000);
    assert_eq!(database.count("SELECT count(DISTINCT payload->>'event') AS n FROM stream_event"), 1000);
}

#[test]
fn while_the_database_is_frozen_nothing_is_lost_and_whatever_is_doubled_is_told() {
    // For eight seconds, near the beginning of which the database freezes.
    const EVENTS: i64 = 8000;
    let mut postgres = PrivatePostgres::new();
    postgres.start();
    let database = TestDatabase::on(&postgres.url());
    let gateway = Gateway::serve(&database, &[("MURMURATION__API_GATEWAY__REQUEST_TIMEOUT_MS", "2000")]);
    let events = EVENTS.to_string();
    let mut load = fleetctl(&database, &["-v", "load", "events", "--accounts", "50", "--events", &events]);
    load.args(["--batch", "100", "--rate", "1000", "--gateway", &gateway.url]);
    let mut child = spawn(load);
    let accepted = |count| eventually("events are accepted", || (database.count(ACCEPTED) >= count).then_some(()));
    accepted(500);
    let frozen = postgres.freeze();
    crate::await_line(&mut child, "retrying a request: 503");
    drop(frozen);
    let output = child.wait_with_output().unwrap();
    let summary = String::from_utf8_lossy(&output.stdout);
    assert_eq!((figure(&summary, "accepted,"), figure(&summary, "unconfirmed")), (EVENTS, 0));
    assert_eq!(database.count("SELECT count(DISTINCT payload->>'event') AS n FROM stream_event"), EVENTS);
    let doubled = database.count(ACCEPTED) - EVENTS;
    eprintln!("{doubled} doubled");
    let told = if summary.contains("were accepted twice") { figure(&summary, "were accepted twice") } else { 0 };
    assert_eq!((told, output.status.code()), (doubled, Some(i32::from(doubled > 0))), "{summary}");
}
