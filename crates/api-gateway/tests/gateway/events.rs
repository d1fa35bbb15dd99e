use crate::app::{Answer, App, keys};
use domain::stream::{ACCOUNT_EVENT, AccountEvent, key_hash, shard, shard_routing_key};
use serde_json::{Value, json};
use std::{collections::BTreeMap, thread};
use storage::{outbox, streams};
use ureq::http::Method;

const PATH: &str = "/api/v1/event";

/// Sends a body as it's written: its text is what matters here.
fn post(app: &App, body: &str) -> Answer {
    app.send(Method::POST, PATH, &[("content-type", "application/json")], Some(body.as_bytes()))
}

fn bulk(events: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    let events = events.into_iter().map(|(account, payload)| json!({"accountId": account, "payload": payload}));
    json!({"events": events.collect::<Vec<_>>()})
}

/// The rows of every table that a request with events writes to.
fn rows(app: &App) -> i64 {
    app.db.count(
        "SELECT (SELECT count(*) FROM stream_head) + (SELECT count(*) FROM stream_cursor)
              + (SELECT count(*) FROM stream_event) + (SELECT count(*) FROM outbox) AS n",
    )
}

/// Sequences and payloads of all of an account's events.
fn told(app: &App, account: &str) -> Vec<(i64, Value)> {
    let (mut events, mut after) = (Vec::new(), json!(0));
    while !after.is_null() {
        let page = app.get(&format!("{PATH}/{account}?after={after}")).ok();
        events.extend(page["events"].as_array().unwrap().clone());
        after = page["next"].clone();
    }
    events.iter().map(|event| (event["seq"].as_i64().unwrap(), event["payload"].clone())).collect()
}

#[test]
fn an_event_is_accepted_with_its_message_and_told_as_it_was_sent() {
    let app = App::start();
    let headers = [("content-type", "application/json"), ("x-correlation-id", "from-the-test")];
    let payload = r#"{"b":1.50,  "a": [1e2, "é\u00e9", null],"b":2}"#;
    let body = format!(r#"{{"payload": {payload}, "accountId": 17}}"#);
    let answer = app.send(Method::POST, PATH, &headers, Some(body.as_bytes()));
    assert_eq!(answer.status, 202);
    assert_eq!(answer.json(), json!({"accepted": 1, "heads": [{"accountId": 17, "seq": 1}]}));

    let rows = app.db.database().transaction(|conn| outbox::take(conn, 10)).unwrap();
    let [row] = &rows[..] else { panic!("{rows:?}") };
    let shards = app.db.database().transaction(|conn| streams::layout(conn, ACCOUNT_EVENT)).unwrap().shards;
    assert_eq!(row.envelope.exchange, ACCOUNT_EVENT);
    assert_eq!(row.envelope.routing_key, shard_routing_key(shard(key_hash("17"), shards)));
    assert_eq!(row.envelope.kind.as_deref(), Some(ACCOUNT_EVENT));
    assert_eq!(row.envelope.correlation_id.as_deref(), Some("from-the-test"));
    let event: AccountEvent = serde_json::from_slice(&row.envelope.body).unwrap();
    assert_eq!((event.account_id.as_str(), event.seq, event.payload.as_str()), ("17", 1, payload));

    let answer = app.get("/api/v1/event/17");
    assert!(String::from_utf8_lossy(&answer.body).contains(&format!("\"payload\":{payload},")), "{answer:?}");
    // Also to a reader who keeps one of two equal keys.
    let account = answer.ok();
    assert_eq!(keys(&account), ["accountId", "applied", "events", "head", "lastError", "next", "parked", "parkedAt"]);
    assert_eq!((&account["accountId"], &account["head"], &account["applied"]), (&json!(17), &json!(1), &json!(0)));
    assert_eq!((&account["parked"], &account["next"]), (&json!(false), &json!(null)));
    let event = &account["events"][0];
    assert_eq!(keys(event), ["generatedAt", "outcome", "payload", "processedAt", "seq", "worker"]);
    assert_eq!(
        (&event["processedAt"], &event["worker"], &event["outcome"]),
        (&json!(null), &json!(null), &json!(null))
    );
    assert!(chrono::DateTime::parse_from_rfc3339(event["generatedAt"].as_str().unwrap()).is_ok());
}

#[test]
fn a_list_keeps_its_order_per_account_from_request_to_request() {
    let app = App::start();
    let first = bulk([("b", json!(1)), ("a", json!(2)), ("b", json!(3)), ("B", json!(null)), ("b", json!([]))]);
    let answer = app.post(PATH, first).ok();
    let head = |account: &str, seq: i64| json!({"accountId": account, "seq": seq});
    assert_eq!(answer, json!({"accepted": 5, "heads": [head("B", 1), head("a", 1), head("b", 3)]}));
    let answer = app.post(PATH, bulk([("a", json!(6)), ("b", json!(7))])).ok();
    assert_eq!(answer, json!({"accepted": 2, "heads": [head("a", 2), head("b", 4)]}));

    assert_eq!(told(&app, "B"), [(1, json!(null))]);
    assert_eq!(told(&app, "a"), [(1, json!(2)), (2, json!(6))]);
    assert_eq!(told(&app, "b"), [(1, json!(1)), (2, json!(3)), (3, json!([])), (4, json!(7))]);
    // One message for each account of a request, published in the order of their rows.
    let rows = app.db.database().transaction(|conn| outbox::take(conn, 10)).unwrap();
    let ids: Vec<_> = rows.iter().map(|row| row.envelope.message_id.as_str()).collect();
    let expected = ["b/1", "a/1", "B/1", "a/2", "b/4"].map(|id| format!("{ACCOUNT_EVENT}/{id}"));
    assert_eq!(ids, expected);
}

#[test]
fn whatever_is_json_is_a_payload() {
    let app = App::start();
    let deepest = format!("{}{}", "[".repeat(100), "]".repeat(100));
    let longest = format!("\"{}\"", "x".repeat(65_534));
    let payloads = [
        "null",
        "false",
        r#""""#,
        r#""\u0000""#,
        r#"{"\u0000": "lone surrogates: \ud800 \udc00"}"#,
        "123456789012345678901234567890.123456789e-99999",
        r#"[[["[[[{{{\"]"]]]"#,
        &deepest,
        &longest,
    ];
    for payload in payloads {
        let answer = post(&app, &format!(r#"{{"accountId": "a", "payload": {payload}}}"#));
        assert_eq!(answer.status, 202, "{payload:.60}: {answer:?}");
    }
    let answer = app.get("/api/v1/event/a");
    let text = String::from_utf8(answer.body).unwrap();
    let mut from = 0;
    for payload in payloads {
        let wanted = format!("\"payload\":{payload},\"generatedAt\"");
        from += text[from..].find(&wanted).unwrap_or_else(|| panic!("{payload:.60} is as it was, and in its place"));
    }
}

#[test]
fn what_is_wrong_is_named_with_its_place_and_nothing_is_accepted_in_part() {
    let app = App::start();
    let good = r#"{"accountId": "a", "payload": 1}"#;
    let too_many = format!(r#"{{"events": [{}]}}"#, vec![good; 10_001].join(","));
    let too_deep =
        format!(r#"{{"events": [{good}, {{"accountId": 1, "payload": {}{}}}]}}"#, "[".repeat(101), "]".repeat(101));
    let long = "x".repeat(65);
    let long_id = format!(r#"{{"accountId": "{long}", "payload": 1}}"#);
    let long_name = format!(r#"{{"accountId": "a", "payload": 1, "{long}": 1}}"#);
    let all_wrong = format!(r#"{{"events": [{}]}}"#, vec!["1"; 500].join(","));
    let first_20: Vec<_> = (0..20).map(|i| format!("events[{i}]")).collect();
    let mut first_20: Vec<_> = first_20.iter().map(String::as_str).collect();
    first_20.sort_unstable();
    let cut_name = &long[..64];
    let cases: Vec<(&str, Vec<&str>)> = vec![
        // Neither form, both, and things of the wrong kind.
        ("{}", vec!["events"]),
        (r#"{"accountId": "a"}"#, vec!["payload"]),
        (r#"{"payload": null}"#, vec!["accountId"]),
        (r#"{"accountId": "a", "payload": 1, "events": []}"#, vec!["events"]),
        (r#"{"payload": 1, "events": [], "x": 1}"#, vec!["events", "x"]),
        (r#"{"events": null}"#, vec!["events"]),
        (r#"{"events": {}}"#, vec!["events"]),
        (r#"{"events": []}"#, vec!["events"]),
        (&too_many, vec!["events"]),
        (&all_wrong, first_20),
        // Unknown fields, and known ones twice: which would count?
        (r#"{"accountId": "a", "payload": 1, "accountid": 1}"#, vec!["accountid"]),
        (r#"{"accountId": "a", "payload": 1, "payload": 2}"#, vec!["payload"]),
        (r#"{"events": [], "events": []}"#, vec!["events", "events"]),
        (&long_name, vec![cut_name]),
        // Accounts.
        (r#"{"accountId": null, "payload": 1}"#, vec!["accountId"]),
        (r#"{"accountId": "", "payload": 1}"#, vec!["accountId"]),
        (r#"{"accountId": "a b", "payload": 1}"#, vec!["accountId"]),
        (r#"{"accountId": "\ud800", "payload": 1}"#, vec!["accountId"]),
        (r#"{"accountId": "\u0000", "payload": 1}"#, vec!["accountId"]),
        (r#"{"accountId": -1, "payload": 1}"#, vec!["accountId"]),
        (r#"{"accountId": 1.0, "payload": 1}"#, vec!["accountId"]),
        (r#"{"accountId": 18446744073709551616, "payload": 1}"#, vec!["accountId"]),
        (r#"{"accountId": {"a": 1}, "payload": 1}"#, vec!["accountId"]),
        (&long_id, vec!["accountId"]),
        // In a list, with their place.
        (
            r#"{"events": [{"accountId": "a", "payload": 1}, {"accountId": "a b", "x": 1}, 7, [], {"events": []}]}"#,
            vec![
                "events[1].accountId",
                "events[1].payload",
                "events[1].x",
                "events[2]",
                "events[3]",
                "events[4].accountId",
                "events[4].events",
                "events[4].payload",
            ],
        ),
        (&too_deep, vec!["events[1].payload"]),
    ];
    for (body, fields) in cases {
        let answer = post(&app, body);
        assert_eq!(
            (answer.status, answer.complaints()),
            (400, fields.into_iter().map(String::from).collect()),
            "{body:.100}"
        );
    }
    assert_eq!(rows(&app), 0);
    // Each of those was refused for what it was: the good one is good.
    assert_eq!(post(&app, good).status, 202);
}

#[test]
fn what_is_no_json_is_refused_without_being_quoted() {
    let app = App::start();
    for body in [
        &b""[..],
        b"hunter2",
        b"[]",
        b"\"hunter2\"",
        br#"{"accountId": "hunter2", "payload": }"#,
        br#"{"accountId": "hunter2", "payload": [1,]}"#,
        br#"{"accountId": "hunter2", "payload": "\x"}"#,
        br#"{"accountId": "hunter2", "payload": 01}"#,
        br#"{"accountId": "hunter2", "payload": 1} {}"#,
        b"{\"accountId\": \"hunter2\", \"payload\": \"\xff\"}",
        b"{\"accountId\": \"hunter2\", \"payload\": \"\n\"}",
        br#"{"\ud800": 1, "accountId": "hunter2", "payload": 1}"#,
        br#"{"events": [{"accountId": "hunter2", "payload": 1}"#,
        "[".repeat(1_000_000).as_bytes(),
    ] {
        let answer = app.send(Method::POST, PATH, &[("content-type", "application/json")], Some(body));
        let text = String::from_utf8_lossy(body);
        assert_eq!((answer.status, answer.complaints().len()), (400, 0), "{text:.60}");
        assert!(!String::from_utf8_lossy(&answer.body).contains("hunter2"), "{text:.60}");
    }
    let form = app.post_form(PATH, "accountId=1&payload=1");
    assert_eq!((form.status, form.complaints().len()), (415, 0));
    assert_eq!(rows(&app), 0);
}

#[test]
fn payloads_and_bodies_that_are_too_large_are_413_and_say_so() {
    let app = App::start_with(|settings| settings.api_gateway.event_body_limit_bytes = 200_000);
    let large = format!("\"{}\"", "x".repeat(65_535));
    for (body, what) in [
        (format!(r#"{{"accountId": "a", "payload": {large}}}"#), "payload may have at most 65536 bytes"),
        (
            format!(r#"{{"events": [{{"accountId": "a", "payload": 1}}, {{"accountId": "a", "payload": {large}}}]}}"#),
            "events[1].payload may have at most 65536 bytes",
        ),
        (" ".repeat(200_001), "the body may have at most 200000 bytes"),
    ] {
        let answer = post(&app, &body);
        assert_eq!((answer.status, answer.complaints().len()), (413, 0));
        assert_eq!(answer.json()["detail"], what);
    }
    assert_eq!(rows(&app), 0);
    let blank = " ".repeat(200_000 - 32);
    assert_eq!(post(&app, &format!(r#"{blank}{{"accountId": "a", "payload": 1}}"#)).status, 202, "the limit itself");
}

#[test]
fn ten_thousand_events_are_one_request() {
    let app = App::start();
    let events: Vec<_> = (0..10_000).map(|n| json!({"accountId": n % 1000, "payload": {"n": n}})).collect();
    let answer = app.post(PATH, json!({"events": events})).ok();
    assert_eq!((&answer["accepted"], answer["heads"].as_array().unwrap().len()), (&json!(10_000), 1000));
    assert!(answer["heads"].as_array().unwrap().iter().all(|head| head["seq"] == 10));
    assert_eq!(app.db.count("SELECT count(*) AS n FROM outbox"), 1000);
    let expected: Vec<_> = (0..10).map(|i| (i + 1, json!({"n": 1000 * i + 7}))).collect();
    assert_eq!(told(&app, "7"), expected);
}

#[test]
fn events_whose_messages_cant_be_kept_arent_accepted() {
    let app = App::start();
    app.db.execute("ALTER TABLE outbox ADD CONSTRAINT no_room CHECK (message_id NOT LIKE '%/b/1')");
    let answer = app.post(PATH, bulk([("a", json!(0)), ("b", json!(1))]));
    assert_eq!((answer.status, answer.complaints().len()), (500, 0));
    assert_eq!(rows(&app), 0);
    app.post(PATH, bulk((0..2).map(|n| ("a", json!(n))))).ok();
    assert_eq!(told(&app, "a"), [(1, json!(0)), (2, json!(1))]);
}

#[test]
fn lists_for_the_same_accounts_at_once_leave_no_gap_and_each_keeps_its_order() {
    const THREADS: i64 = 4;
    const LISTS: i64 = 8;
    let app = App::start_with(|settings| settings.api_gateway.blocking_threads = 8);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let app = &app;
            scope.spawn(move || {
                for list in 0..LISTS {
                    // Each names the accounts in another order, and so would lock them.
                    let events = (0..60).map(|n| {
                        let account = (n * (2 * thread + 1) + list) % 20;
                        json!({"accountId": account, "payload": [thread, list, n]})
                    });
                    let answer = app.post(PATH, json!({"events": events.collect::<Vec<_>>()}));
                    assert_eq!(answer.status, 202, "{answer:?}");
                }
            });
        }
    });
    let mut count = 0;
    for account in 0..20 {
        let events = told(&app, &account.to_string());
        let seqs: Vec<_> = events.iter().map(|(seq, _)| *seq).collect();
        assert_eq!(seqs, (1..=events.len() as i64).collect::<Vec<_>>(), "account {account}");
        let mut last = BTreeMap::new();
        for (_, payload) in &events {
            let [thread, list, n] = [0, 1, 2].map(|i| payload[i].as_i64().unwrap());
            assert!(last.insert(thread, (list, n)) < Some((list, n)), "account {account}: {payload} comes too late");
        }
        count += events.len() as i64;
    }
    assert_eq!(count, THREADS * LISTS * 60);
}

#[test]
fn an_accounts_events_come_page_by_page() {
    let app = App::start();
    app.post(PATH, bulk((1..=1201).map(|n| ("a", json!(n))))).ok();
    let page = |query: &str| app.get(&format!("/api/v1/event/a{query}")).ok();
    let seqs = |page: &Value| -> Vec<i64> {
        page["events"].as_array().unwrap().iter().map(|event| event["seq"].as_i64().unwrap()).collect()
    };
    for (query, expected, next) in [
        ("", 1..=500, json!(500)),
        ("?after=0", 1..=500, json!(500)),
        ("?after=500", 501..=1000, json!(1000)),
        ("?after=701", 702..=1201, json!(null)),
        ("?after=1200", 1201..=1201, json!(null)),
    ] {
        let page = page(query);
        assert_eq!((seqs(&page), &page["next"], &page["head"]), (expected.collect(), &next, &json!(1201)), "{query}");
    }
    let beyond = page("?after=9223372036854775807");
    assert_eq!((seqs(&beyond).len(), &beyond["next"]), (0, &json!(null)));
    // Large ones end a page sooner.
    let large = json!("x".repeat(60_000));
    app.post(PATH, bulk((0..40).map(|_| ("large", large.clone())))).ok();
    let first = app.get("/api/v1/event/large").ok();
    assert_eq!((seqs(&first), &first["next"]), ((1..=18).collect(), &json!(18)));
    assert_eq!(told(&app, "large").len(), 40);
}

#[test]
fn an_account_that_isnt_known_is_404_and_one_that_cant_be_is_400() {
    let app = App::start();
    let unknown = app.get("/api/v1/event/nobody");
    assert_eq!((unknown.status, &unknown.json()["detail"]), (404, &json!("unknown account")));
    for (path, field) in
        [("a%20b", "accountId"), ("%00", "accountId"), ("a?after=-1", "after"), ("a?after=x", "after"), ("a?x=1", "x")]
    {
        let answer = app.get(&format!("/api/v1/event/{path}"));
        assert_eq!((answer.status, answer.complaints()), (400, vec![field.to_owned()]), "{path}");
    }
}

#[test]
fn an_account_that_a_path_cannot_carry_is_told_by_a_parameter() {
    let app = App::start();
    for account in [".", "..", "a..b", "17"] {
        post(&app, &format!(r#"{{"accountId": "{account}", "payload": 1}}"#)).ok();
        let told = app.get(&format!("{PATH}?accountId={account}&after=0")).ok();
        assert_eq!((&told["head"], &told["events"][0]["seq"]), (&json!(1), &json!(1)), "{account}");
    }
    assert_eq!(app.get(PATH).complaints(), ["accountId"]);
    assert_eq!(app.get(&format!("{PATH}/a?accountId=a")).complaints(), ["accountId"]);
}

#[test]
fn an_id_is_answered_as_it_was_given_and_never_as_a_number_that_a_browser_would_change() {
    let app = App::start();
    for (given, told) in [
        ("17", json!(17)),
        ("\"17\"", json!("17")),
        ("9007199254740991", json!(9_007_199_254_740_991_i64)),
        ("9007199254740992", json!("9007199254740992")),
        ("\"9007199254740993\"", json!("9007199254740993")),
        ("18446744073709551615", json!("18446744073709551615")),
    ] {
        let answer = post(&app, &format!(r#"{{"accountId": {given}, "payload": 1}}"#)).ok();
        assert_eq!(answer["heads"][0]["accountId"], told, "{given}");
    }
    // They are the same account however they're written, and where both are, the string says more.
    let answer = post(&app, r#"{"events": [{"accountId": 17, "payload": 1}, {"accountId": "17", "payload": 1}]}"#).ok();
    assert_eq!(answer["heads"], json!([{"accountId": "17", "seq": 4}]));
    assert_eq!(app.get(&format!("{PATH}/17")).ok()["accountId"], 17);
    assert_eq!(app.get(&format!("{PATH}/9007199254740993")).ok()["accountId"], "9007199254740993");
}
