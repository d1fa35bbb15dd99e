//! Parked keys.

use crate::{
    checked, complaint, fleetctl, run,
    streams::{accept, apply, apply_as_seen, park, state},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::Write as _,
    process::{Command, Stdio},
};
use test_support::TestDatabase;

fn keys(database: &TestDatabase, args: &[&str]) -> Command {
    fleetctl(database, &[&["keys"], args].concat())
}

fn json(output: &str) -> Value {
    serde_json::from_str(output).unwrap()
}

/// One event of account `a` is applied, the second is what it's parked for, the third waits.
fn parked() -> TestDatabase {
    let database = TestDatabase::new();
    accept(&database, "a", &["1", r#"{"n": 1.50}"#, "3"]);
    apply(&database, "a");
    park(&database, "a", "boom\u{1b}[2J");
    database
}

#[test]
fn parked_keys_are_listed_and_shown_with_what_is_next() {
    let database = parked();
    accept(&database, "b", &["1"]);
    park(&database, "b", "bang");
    accept(&database, "c", &["1"]);
    accept(&database, "idle", &["1"]);
    apply(&database, "idle");

    let listed = run(keys(&database, &["list"]), 0);
    let rows: Vec<Vec<_>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["KEY", "EVENT", "PARKED", "(UTC)", "ATTEMPTS", "DEATHS", "REASON"]);
    assert_eq!(rows.len(), 3);
    assert_eq!((rows[1][0], rows[1][1], &rows[1][4..]), ("a", "2", &["1", "0", r"boom\u{1b}[2J"][..]));
    assert_eq!((rows[2][0], rows[2][1], &rows[2][4..]), ("b", "1", &["1", "0", "bang"][..]));
    assert!(run(keys(&database, &["list", "--limit", "1"]), 0).ends_with("for more: --after a\n"));
    let page = json(&run(keys(&database, &["list", "--json", "--after", "a"]), 0));
    assert_eq!(page.as_array().unwrap().len(), 1);
    assert_eq!((&page[0]["key"], &page[0]["seq"], &page[0]["lastError"]), (&json!("b"), &json!(1), &json!("bang")));
    assert_eq!(run(keys(&database, &["list", "--stream", "other"]), 0).lines().count(), 1);

    let shown = run(keys(&database, &["show", "a"]), 0);
    for line in ["state:          parked", r"reason:         boom\u{1b}[2J", "accepted:       3", "settled:        1"] {
        assert!(shown.lines().any(|shown| shown == line), "no line `{line}` in\n{shown}");
    }
    assert!(shown.contains("with 1 behind it") && shown.ends_with("payload (11 bytes):\n{\"n\": 1.50}\n"), "{shown}");
    assert!(
        run(keys(&database, &["show", "a", "--max-payload", "4"]), 0).ends_with("(11 bytes, the first 4):\n{\"n\"\n")
    );
    let shown = run(keys(&database, &["show", "a", "--json"]), 0);
    assert!(shown.contains(r#"{"n": 1.50}"#), "the payload is as it was sent: {shown}");
    let shown = json(&shown);
    assert_eq!((&shown["state"], &shown["next"]["seq"], &shown["behind"]), (&json!("parked"), &json!(2), &json!(1)));
    assert_eq!((&shown["head"], &shown["cursor"], &shown["history"]), (&json!(3), &json!(1), &json!([])));
    for (key, state) in [("c", "waiting"), ("idle", "idle")] {
        assert_eq!(json(&run(keys(&database, &["show", key, "--json"]), 0))["state"], state);
    }
    assert!(complaint(keys(&database, &["show", "nobody"]), 2).contains("unknown key"));
    assert!(complaint(keys(&database, &["show", "a", "--stream", "other"]), 2).contains("unknown key"));
}

#[test]
fn a_key_that_is_retried_goes_on_with_its_attempts_counted_afresh() {
    let database = parked();
    accept(&database, "waits", &["1"]);
    let seen = state(&database, "a");
    assert_eq!(run(keys(&database, &["retry", "a", "--seq", "2", "--by", "olga"]), 0), "1 to be retried\n");
    let now = state(&database, "a");
    assert_eq!((now.parked, now.attempts, now.cursor, now.revision), (false, 0, 1, seen.revision + 1));
    let shown = json(&run(keys(&database, &["show", "a", "--json"]), 0));
    let change = &shown["history"][0];
    assert_eq!((&change["action"], &change["seq"], &change["changedBy"]), (&json!("retry"), &json!(2), &json!("olga")));
    assert_eq!((&change["lastError"], &change["payload"]), (&json!("boom\u{1b}[2J"), &Value::Null));

    // One that is refused holds up no other, and changes nothing.
    park(&database, "waits", "bang");
    let output = keys(&database, &["retry", "a", "nobody", "waits"]).output().unwrap();
    assert_eq!(checked(&output, 1), "1 to be retried\n");
    let stderr = String::from_utf8_lossy(&output.stderr);
    for refusal in ["key a: it isn't parked", "key nobody: unknown key"] {
        assert!(stderr.contains(refusal), "{stderr}");
    }
    assert_eq!(database.count("SELECT count(*) AS n FROM stream_change"), 2);

    park(&database, "a", "boom");
    park(&database, "waits", "bang");
    assert!(complaint(keys(&database, &["retry", "a", "--seq", "3"]), 1).contains("another event is next by now"));
    assert_eq!(run(keys(&database, &["retry", "--all"]), 0), "2 to be retried\n");
    assert_eq!(run(keys(&database, &["retry", "--all"]), 0), "0 to be retried\n");
    for nothing_said in [&["retry"][..], &["retry", "a", "--all"], &["retry", "a", "b", "--seq", "1"]] {
        complaint(keys(&database, nothing_said), 2);
    }
    ["a", "a", "waits"].iter().for_each(|account| apply(&database, account));
    run(fleetctl(&database, &["events", "verify"]), 0);
}

#[test]
fn a_skipped_event_never_takes_effect_and_the_key_goes_on_behind_it() {
    let database = parked();
    let seen = state(&database, "a");
    assert!(
        complaint(keys(&database, &["skip", "a", "--seq", "1"]), 2).contains("key a: another event is next by now")
    );
    assert_eq!(run(keys(&database, &["skip", "a", "--seq", "2", "--by", "olga"]), 0), "event 2 skipped\n");
    assert!(!apply_as_seen(&database, &seen), "a worker that had it in hand comes too late");
    let now = state(&database, "a");
    assert_eq!((now.parked, now.attempts, now.cursor, now.revision), (false, 0, 2, seen.revision + 1));
    let skipped = "SELECT count(*) AS n FROM stream_event WHERE key = 'a' AND seq = 2 AND outcome = 'skipped'
                   AND worker = 'olga' AND processed_at IS NOT NULL";
    assert_eq!(database.count(skipped), 1);
    assert!(complaint(keys(&database, &["skip", "a"]), 2).contains("key a: it isn't parked"));
    assert!(complaint(keys(&database, &["skip", "nobody"]), 2).contains("key nobody: unknown key"));
    apply(&database, "a");
    let report = run(fleetctl(&database, &["events", "verify"]), 0);
    assert!(report.ends_with("3 events of 1 keys: 2 applied, 1 skipped, 0 parked\n"), "{report}");
}

#[test]
fn a_replaced_payload_is_tried_and_the_old_one_is_kept() {
    let database = parked();
    let seen = state(&database, "a");
    let replace = |payload: &str| keys(&database, &["replace", "a", "--by", "olga", "--payload", payload]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("payload.json");
    let at_file = format!("@{}", file.display());

    fs::write(&file, format!("\"{}\"", "x".repeat(65_536))).unwrap();
    for (wrong, why) in [
        ("{", "the payload must be JSON"),
        ("", "the payload must be JSON"),
        ("1 2", "the payload must be JSON"),
        (&at_file, "at most 65536 bytes"),
        ("@/nowhere", "can't read the payload from /nowhere"),
    ] {
        let complaint = complaint(replace(wrong), 2);
        assert!(complaint.contains(why), "{wrong}: {complaint}");
    }
    let mut other = replace("2");
    assert!(
        complaint(
            {
                other.args(["--seq", "3"]);
                other
            },
            2
        )
        .contains("key a: another event is next by now")
    );
    assert_eq!(state(&database, "a"), seen, "nothing has changed");

    fs::write(&file, "{\"n\": 2.50}\n").unwrap();
    assert_eq!(run(replace(&at_file), 0), "event 2 replaced\n");
    assert!(!apply_as_seen(&database, &seen), "the old payload can't take effect any more");
    let now = state(&database, "a");
    assert_eq!((now.parked, now.attempts, now.cursor, now.revision), (false, 0, 1, seen.revision + 1));
    assert_eq!(now.next.unwrap().payload, "{\"n\": 2.50}");
    assert!(complaint(replace("-1"), 2).contains("key a: it isn't parked"));

    park(&database, "a", "again");
    let mut child = replace("@-").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"null").unwrap();
    assert_eq!(checked(&child.wait_with_output().unwrap(), 0), "event 2 replaced\n");
    let shown = run(keys(&database, &["show", "a", "--json"]), 0);
    let history = &json(&shown)["history"];
    assert_eq!(history.as_array().unwrap().len(), 2);
    assert_eq!((&history[0]["lastError"], &history[1]["lastError"]), (&json!("boom\u{1b}[2J"), &json!("again")));
    for old in [r#""payload": {"n": 1.50}"#, r#""payload": {"n": 2.50}"#] {
        assert!(shown.contains(old), "{shown}");
    }
    let shown = run(keys(&database, &["show", "a"]), 0);
    assert_eq!(shown.lines().filter(|line| line.contains("  replace  olga  ")).count(), 2, "{shown}");
    apply(&database, "a");
    apply(&database, "a");
    run(fleetctl(&database, &["events", "verify"]), 0);
}
