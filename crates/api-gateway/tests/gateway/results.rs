use crate::app::{App, keys};
use chrono::DateTime;
use serde_json::{Value, json};
use std::thread;
use storage::{
    account_effects::{self, Effect},
    results,
    streams::{self, Change, Position},
};
use test_support::{eventually, sql};
use ureq::http::Method;

const STREAM: &str = "account_event";

fn accept(app: &App, account: &str, events: i64) {
    let events: Vec<_> = (0..events).map(|n| json!({"accountId": account, "payload": n})).collect();
    app.post("/api/v1/event", json!({"events": events})).ok();
}

/// What a worker does with events of one account that are next, one after another.
fn apply(app: &App, account: &str, seqs: std::ops::RangeInclusive<i64>, worker: &str) {
    for seq in seqs {
        app.db
            .database()
            .transaction(|conn| {
                let position = Position { key: account, seq, revision: 0 };
                assert_eq!(streams::advance(conn, STREAM, &[position], worker)?, [Change::Made], "{account} {seq}");
                account_effects::record(conn, worker, &[Effect { account, seq, work_ms: 40 }])
            })
            .unwrap();
    }
}

/// What no worker would do.
fn plant(app: &App, account: &str, seq: i64) {
    app.db.execute(&format!(
        "INSERT INTO account_effect (account_id, seq, worker, work_ms) VALUES ('{account}', {seq}, 'zombie', 1)"
    ));
}

fn skip(app: &App, account: &str, seq: i64) {
    app.db.execute(&format!(
        "UPDATE stream_event SET processed_at = clock_timestamp(), worker = 'ann', outcome = 'skipped'
         WHERE key = '{account}' AND seq = {seq}"
    ));
    app.db.execute(&format!("UPDATE stream_cursor SET seq = {seq} WHERE key = '{account}'"));
}

fn order_errors(app: &App, prefix: &str) -> i64 {
    results::order_errors(&mut app.db.database().connection().unwrap(), prefix).unwrap()
}

fn results(app: &App, query: &str) -> Value {
    app.get(&format!("/api/v1/results{query}")).ok()
}

fn listed(results: &Value) -> Vec<&str> {
    results["accounts"].as_array().unwrap().iter().map(|account| account["accountId"].as_str().unwrap()).collect()
}

#[test]
fn totals_and_accounts_say_what_has_become_of_the_events() {
    let app = App::start();
    let empty = results(&app, "?prefix=none");
    assert_eq!((&empty["matching"], &empty["accounts"]), (&json!(0), &json!([])));
    for absent in
        ["firstGeneratedAt", "lastProcessedAt", "elapsedMs", "longestAccount", "elapsedToLongest", "eventsPerSecond"]
    {
        assert_eq!(empty["totals"][absent], json!(null), "{absent}");
    }

    for (account, events) in [("r1.b", 4), ("r1.a", 3), ("r1.17", 2), ("r2.a", 9)] {
        accept(&app, account, events);
    }
    apply(&app, "r1.b", 1..=2, "w1");
    apply(&app, "r1.b", 3..=4, "w2");
    apply(&app, "r1.a", 1..=1, "w1");
    skip(&app, "r1.a", 2);
    app.db.execute(
        "UPDATE stream_cursor SET attempts = 5, parked_at = clock_timestamp(), last_error = '<b>no</b>' WHERE key = 'r1.a'",
    );

    let answer = results(&app, "?prefix=r1.");
    assert_eq!(keys(&answer), ["accounts", "matching", "now", "only", "prefix", "sort", "totals"]);
    assert_eq!((&answer["prefix"], &answer["only"], &answer["sort"]), (&json!("r1."), &json!("all"), &json!("events")));
    let totals = &answer["totals"];
    let counts = json!({
        "accounts": 3, "waitingAccounts": 2, "parkedAccounts": 1, "disorderedAccounts": 0, "accepted": 9, "applied": 5,
        "skipped": 1, "waiting": 3, "parked": 1, "orderErrors": 0,
        "longestAccount": {"accountId": "r1.b", "events": 4, "workMs": 160},
    });
    for (name, count) in counts.as_object().unwrap() {
        assert_eq!(&totals[name], count, "{name}");
    }
    let time = |text: &Value| DateTime::parse_from_rfc3339(text.as_str().unwrap()).unwrap();
    let elapsed = time(&totals["lastProcessedAt"]) - time(&totals["firstGeneratedAt"]);
    let elapsed_ms = elapsed.num_microseconds().unwrap() as f64 / 1000.0;
    let near = |value: &Value, expected: f64| (value.as_f64().unwrap() - expected).abs() < 1e-6 * expected;
    assert!(elapsed_ms > 0.0 && near(&totals["elapsedMs"], elapsed_ms), "{totals}");
    assert!(near(&totals["elapsedToLongest"], elapsed_ms / 160.0), "{totals}");
    assert!(near(&totals["eventsPerSecond"], 5000.0 / elapsed_ms), "{totals}");
    let workers = totals["workers"].as_array().unwrap();
    let applied: Vec<_> = workers.iter().map(|worker| (&worker["worker"], &worker["applied"])).collect();
    assert_eq!(applied, [(&json!("w1"), &json!(3)), (&json!("w2"), &json!(2))]);
    assert!(time(&workers[0]["firstProcessedAt"]) < time(&workers[0]["lastProcessedAt"]));

    assert_eq!((listed(&answer), &answer["matching"]), (vec!["r1.b", "r1.a", "r1.17"], &json!(3)));
    let parked = &answer["accounts"][1];
    let state = ["head", "applied", "attempts", "lastError", "orderErrors"].map(|name| &parked[name]);
    assert_eq!(state, [&json!(3), &json!(2), &json!(5), &json!("<b>no</b>"), &json!(0)]);
    assert!(time(&parked["parkedAt"]) <= time(&answer["now"]));
    let events: Vec<_> = parked["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| (&event["seq"], &event["outcome"], &event["worker"]))
        .collect();
    assert_eq!(
        events,
        [
            (&json!(1), &json!("applied"), &json!("w1")),
            (&json!(2), &json!("skipped"), &json!("ann")),
            (&json!(3), &json!(null), &json!(null))
        ]
    );
    let account = app.get("/api/v1/event/r1.a").ok();
    assert_eq!((&account["parked"], &account["lastError"]), (&json!(true), &json!("<b>no</b>")));
    assert_eq!((&account["applied"], &account["head"]), (&json!(2), &json!(3)));
}

#[test]
fn accounts_are_listed_part_by_part() {
    let app = App::start();
    for (account, events) in [("a", 1), ("b", 70), ("c", 2), ("d", 2)] {
        accept(&app, account, events);
    }
    apply(&app, "a", 1..=1, "w");
    apply(&app, "c", 1..=2, "w");
    app.db.execute("UPDATE stream_cursor SET parked_at = clock_timestamp() WHERE key = 'd'");
    for (query, expected, matching) in [
        ("", vec!["b", "c", "d", "a"], 4),
        ("?sort=id", vec!["a", "b", "c", "d"], 4),
        ("?sort=id&perPage=3&page=1", vec!["d"], 4),
        ("?page=9", vec![], 4),
        ("?only=waiting", vec!["b", "d"], 2),
        ("?only=parked", vec!["d"], 1),
        ("?only=errors", vec![], 0),
        ("?prefix=c", vec!["c"], 1),
    ] {
        let answer = results(&app, query);
        assert_eq!((listed(&answer), &answer["matching"]), (expected, &json!(matching)), "{query}");
    }
    // Of many events, the latest.
    let many = results(&app, "?prefix=b");
    let seqs: Vec<_> =
        many["accounts"][0]["events"].as_array().unwrap().iter().map(|event| event["seq"].as_i64()).collect();
    assert_eq!(seqs, (11..=70).map(Some).collect::<Vec<_>>());
    for (query, field) in [
        ("?only=some", "only"),
        ("?sort=size", "sort"),
        ("?prefix=a%25", "prefix"),
        ("?perPage=101", "perPage"),
        ("?x=1", "x"),
    ] {
        let answer = app.get(&format!("/api/v1/results{query}"));
        assert_eq!((answer.status, answer.complaints()), (400, vec![field.to_owned()]));
    }
}

#[test]
fn effects_out_of_order_are_found_and_named() {
    let app = App::start();
    for account in ["good", "skipping", "doubled", "backwards", "gap", "late", "x.doubled"] {
        accept(&app, account, 5);
    }
    apply(&app, "good", 1..=5, "w");
    apply(&app, "skipping", 1..=1, "w");
    skip(&app, "skipping", 2);
    skip(&app, "skipping", 3);
    apply(&app, "skipping", 4..=4, "w");
    skip(&app, "skipping", 5);
    assert_eq!((order_errors(&app, ""), &results(&app, "?prefix=skipping")["totals"]["orderErrors"]), (0, &json!(0)));

    apply(&app, "doubled", 1..=2, "w");
    plant(&app, "doubled", 2);
    apply(&app, "x.doubled", 1..=1, "w");
    plant(&app, "x.doubled", 1);
    apply(&app, "backwards", 1..=3, "w");
    plant(&app, "backwards", 1);
    apply(&app, "gap", 1..=1, "w");
    skip(&app, "gap", 2);
    plant(&app, "gap", 4);
    plant(&app, "late", 2);

    assert_eq!((order_errors(&app, ""), order_errors(&app, "x."), order_errors(&app, "g")), (5, 1, 1));
    let answer = results(&app, "?only=errors&sort=id");
    let totals = &answer["totals"];
    assert_eq!(
        (&totals["orderErrors"], &totals["disorderedAccounts"], &answer["matching"]),
        (&json!(5), &json!(5), &json!(5))
    );
    let found: Vec<_> = answer["accounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|account| {
            assert_eq!(account["orderErrors"], 1);
            (
                account["accountId"].as_str().unwrap(),
                account["disorder"][0]["after"].as_i64(),
                account["disorder"][0]["seq"].as_i64(),
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            ("backwards", Some(3), Some(1)),
            ("doubled", Some(2), Some(2)),
            ("gap", Some(1), Some(4)),
            ("late", Some(0), Some(2)),
            ("x.doubled", Some(1), Some(1)),
        ]
    );
    let good = results(&app, "?prefix=good");
    assert_eq!((&good["totals"]["orderErrors"], &good["accounts"][0]["orderErrors"]), (&json!(0), &json!(0)));
    assert_eq!(listed(&results(&app, "?only=errors&prefix=x")), ["x.doubled"]);
}

#[test]
fn while_totals_are_computed_others_get_those_from_before() {
    let app = App::start();
    accept(&app, "a", 1);
    let computed_at = || results(&app, "")["totals"]["computedAt"].clone();
    let before = computed_at();
    let mut lock = app.db.database().connection().unwrap();
    sql::execute(&mut lock, "BEGIN").unwrap();
    sql::execute(&mut lock, "LOCK TABLE account_effect").unwrap();
    thread::scope(|scope| {
        // Computes them anew as soon as they are due, and hangs at that.
        let other = scope.spawn(|| eventually("new totals", || Some(computed_at()).filter(|at| *at != before)));
        let waiting = "SELECT count(*) AS n FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event_type = 'Lock'";
        eventually("the totals are being computed", || (app.db.count(waiting) == 1).then_some(()));
        assert_eq!(computed_at(), before);
        assert_eq!(app.db.count(waiting), 1, "nobody else computes them");
        sql::execute(&mut lock, "ROLLBACK").unwrap();
        other.join().unwrap();
    });
}

#[test]
fn the_page_is_served_with_all_that_it_needs_and_may_load_nothing_else() {
    let app = App::start();
    let page = app.get("/results?prefix=r1");
    let html = String::from_utf8(page.body.clone()).unwrap();
    for (path, content_type) in [
        ("/results", "text/html; charset=utf-8"),
        ("/results/page.css", "text/css; charset=utf-8"),
        ("/results/page.js", "text/javascript; charset=utf-8"),
    ] {
        assert!(
            path == "/results" || html.contains(&format!("\"{}\"", &path[1..])),
            "{path} is what the page refers to"
        );
        let answer = app.get(path);
        assert_eq!((answer.status, answer.header("content-type")), (200, content_type), "{path}");
        let policy = answer.header("content-security-policy");
        assert!(policy.starts_with("default-src 'none';") && !policy.contains("unsafe"), "{policy}");
        assert_eq!(answer.header("x-content-type-options"), "nosniff");
        let elsewhere = String::from_utf8(answer.body).unwrap().replace("http://www.w3.org/2000/svg", "");
        assert!(!elsewhere.contains("://"), "{path} names no other server");
        assert!(!elsewhere.contains("innerHTML"), "{path}");
        let head = app.send(Method::HEAD, path, &[], None);
        assert_eq!((head.status, head.body.len()), (200, 0));
        assert_eq!(app.send(Method::POST, path, &[], Some(b"")).header("allow"), "GET, HEAD");
    }
}
