use crate::app::{Answer, App, Part, keys};
use chrono::DateTime;
use domain::{
    log::{Group, TEXT_MAX},
    stream::key_hash,
};
use serde_json::{Value, json};
use std::fmt::Write as _;
use storage::{
    consumer_offsets, message_outbox,
    messages::{self, NewMessage},
    partitions,
};
use ureq::http::Method;

const PATH: &str = "/api/v1/message";
const WAITING: &str = "SELECT count(*) AS n FROM message_outbox";

/// A message as a relay takes it.
#[derive(Debug, PartialEq, Eq)]
struct Accepted {
    partition: i32,
    text: String,
    key: Option<String>,
    correlation_id: Option<String>,
}

/// Everything that was accepted since this was last asked, the partitions in their order.
fn accepted(app: &App) -> Vec<Accepted> {
    let round = |conn: &mut _| {
        let taken = message_outbox::taken(conn)?;
        let ids: Vec<Vec<i64>> = taken.iter().map(|part| part.messages.iter().map(|(id, _)| *id).collect()).collect();
        let published: Vec<_> = taken
            .iter()
            .zip(&ids)
            .map(|(part, ids)| message_outbox::Published { partition: part.partition, confirmed: ids, left: &[] })
            .collect();
        message_outbox::advance(conn, &published, i64::from(i32::MAX), i64::MAX)?;
        Ok(taken)
    };
    let db = app.db.database();
    // The first round takes them, the second one has them.
    db.transaction(round).unwrap();
    let taken = db.transaction(round).unwrap();
    let accepted = taken.into_iter().flat_map(|part| {
        part.messages.into_iter().map(move |(_, message)| {
            let message = message.expect("nobody has removed one");
            let (body, correlation_id) = (message.body, message.correlation_id);
            Accepted { partition: part.partition, text: body.text, key: body.key, correlation_id }
        })
    });
    accepted.collect()
}

fn texts(accepted: &[Accepted]) -> Vec<(i32, &str)> {
    accepted.iter().map(|message| (message.partition, message.text.as_str())).collect()
}

#[test]
fn a_message_is_accepted_from_every_kind_of_body_with_the_requests_correlation_id() {
    let app = App::start();
    let headers = |kind| [("content-type", kind), ("x-correlation-id", "from-the-test")];
    let json = json!({"text": " one two\n", "key": " k ", "partition": 2}).to_string();
    let form = "text=+one%20two%0A&key=+k+&partition=+2+&count=";
    for (kind, body) in [("application/json", json.as_str()), ("application/x-www-form-urlencoded", form)] {
        let answer = app.send(Method::POST, PATH, &headers(kind), Some(body.as_bytes()));
        assert_eq!((answer.status, answer.json()), (200, json!({"success": true, "published": 1})));
    }
    let parts = [Part::Text("text", " one two\n"), Part::Text("key", "k"), Part::Text("partition", "2")];
    app.post_multipart(PATH, &parts).ok();
    let accepted = accepted(&app);
    assert_eq!(accepted.len(), 3);
    for (n, message) in accepted.iter().enumerate() {
        assert_eq!((message.partition, message.text.as_str(), message.key.as_deref()), (2, "one two", Some("k")));
        if n < 2 {
            assert_eq!(message.correlation_id.as_deref(), Some("from-the-test"));
        } else {
            assert_eq!(message.correlation_id.as_ref().map(String::len), Some(36));
        }
    }
}

#[test]
fn messages_go_to_each_partition_in_turn_or_that_of_their_key_or_the_chosen_one() {
    let app = App::start();
    for text in ["a", "b", "c", "d", "e"] {
        app.post(PATH, json!({"text": text})).ok();
    }
    app.post(PATH, json!({"text": "n", "count": 4})).ok();
    let in_turn = accepted(&app);
    // Ids begin with 1, so partition 1 comes first.
    let expected =
        [(0, "d"), (0, "n #2"), (1, "a"), (1, "e"), (1, "n #3"), (2, "b"), (2, "n #0"), (3, "c"), (3, "n #1")];
    assert_eq!(texts(&in_turn), expected);
    assert!(in_turn.iter().all(|message| message.key.is_none()));

    for key in ["a", "b", "longer key", "7"] {
        app.post(PATH, json!({"text": "x", "key": key})).ok();
        app.post(PATH, json!({"text": "y", "key": key, "count": 3})).ok();
        let partition = key_hash(key) % 4;
        let of_key = accepted(&app);
        assert_eq!(
            texts(&of_key),
            [(partition, "x"), (partition, "y #0"), (partition, "y #1"), (partition, "y #2")],
            "{key}"
        );
        assert!(of_key.iter().all(|message| message.key.as_deref() == Some(key)));
    }

    for i in 0..6 {
        app.post(PATH, json!({"text": i.to_string(), "key": "k", "partition": i % 2})).ok();
    }
    assert_eq!(texts(&accepted(&app)), [(0, "0"), (0, "2"), (0, "4"), (1, "1"), (1, "3"), (1, "5")]);
}

#[test]
fn a_partition_that_doesnt_exist_is_refused_with_those_that_do() {
    let app = App::start();
    let refused = |answer: Answer, range: &str| {
        assert_eq!((answer.status, answer.complaints()), (400, vec!["partition".into()]));
        assert_eq!(answer.json()["errors"][0]["detail"], format!("must be between 0 and {range}"));
    };
    let post = |partition: i64| app.post(PATH, json!({"text": "x", "key": "k", "partition": partition}));
    for partition in [4, 99, i64::MAX] {
        refused(post(partition), "3");
    }
    assert_eq!(app.db.count(WAITING), 0);
    app.db.database().transaction(|conn| partitions::extend_to(conn, 6)).unwrap();
    refused(post(6), "5");
    post(5).ok();
    app.post(PATH, json!({"text": "x", "count": 6})).ok();
    assert_eq!(app.db.count("SELECT count(DISTINCT partition) AS n FROM message_outbox"), 6);

    app.db.database().transaction(|conn| consumer_offsets::create(conn, &group(), &[(0, 0)])).unwrap();
    refused(app.get(&format!("{PATH}?group=g&partition=6")), "5");
    app.get(&format!("{PATH}?group=g&partition=5")).ok();
}

#[test]
fn what_is_wrong_with_a_message_is_named_and_nothing_is_accepted() {
    let app = App::start();
    let long = "x".repeat(TEXT_MAX + 1);
    let longest = &long[1..];
    let key = "k".repeat(256);
    let cases: Vec<(Value, &[&str])> = vec![
        (json!({}), &["text"]),
        (json!({"text": null}), &["text"]),
        (json!({"text": " \n"}), &["text"]),
        (json!({"text": "a\0b"}), &["text"]),
        (json!({"text": 7, "count": "5", "key": [], "partition": 1.5}), &["count", "key", "partition", "text"]),
        (json!({"text": long}), &["text"]),
        // Room for ` #0`, and for ` #99999`.
        (json!({"text": &longest[2..], "count": 1}), &["text"]),
        (json!({"text": &longest[6..], "count": 100_000}), &["text"]),
        (json!({"text": "x", "count": 0}), &["count"]),
        (json!({"text": "x", "count": -1}), &["count"]),
        (json!({"text": "x", "count": 100_001}), &["count"]),
        (json!({"text": "x", "count": 10_000_000}), &["count"]),
        // 64 MiB and 6 bytes.
        (json!({"text": "x".repeat(6710), "count": 10_002}), &["count"]),
        (json!({"text": "x", "key": " "}), &["key"]),
        (json!({"text": "x", "key": key}), &["key"]),
        (json!({"text": "x", "key": "a\0"}), &["key"]),
        (json!({"text": "x", "partition": -1}), &["partition"]),
        (json!({"text": "x", "partition": "1"}), &["partition"]),
        (json!({"text": "x", "partition": 1e30, "group": "g"}), &["group", "partition"]),
    ];
    for (body, fields) in cases {
        let answer = app.post(PATH, body.clone());
        let shown: String = body.to_string().chars().take(60).collect();
        assert_eq!(
            (answer.status, answer.complaints()),
            (400, fields.iter().map(|f| (*f).into()).collect()),
            "{shown}"
        );
    }
    let answer = app.post(PATH, json!({"text": &longest[3..], "count": 11}));
    let detail = "must be at most 65532 bytes long, to leave room for ` #10`";
    assert_eq!(answer.json()["errors"], json!([{"field": "text", "detail": detail}]));
    let answer = app.post(PATH, json!({"text": "x".repeat(1 << 15), "count": 2049}));
    let detail = "must be at most 2048 with a text of this length";
    assert_eq!(answer.json()["errors"], json!([{"field": "count", "detail": detail}]));
    let answer = app.post_form(PATH, "text=+&count=x&key=a&key=b&partition=-1");
    assert_eq!(answer.complaints(), ["count", "key", "partition", "text"]);
    let answer = app.post_multipart(PATH, &[Part::File("text", b"x"), Part::Text("count", "1")]);
    assert_eq!(answer.complaints(), ["text"]);
    assert_eq!(app.db.count(WAITING), 0);
}

#[test]
fn the_longest_text_is_accepted_however_it_is_escaped_and_a_longer_body_isnt_read() {
    let app = App::start();
    let text = "é\u{1}".repeat(TEXT_MAX / 3) + "x";
    assert_eq!(text.len(), TEXT_MAX);
    let json = text.chars().fold(String::new(), |mut json, c| {
        write!(json, "\\u{:04x}", u32::from(c)).unwrap();
        json
    });
    let escaped = text.bytes().fold(String::new(), |mut form, byte| {
        write!(form, "%{byte:02x}").unwrap();
        form
    });
    let json_kind = [("content-type", "application/json")];
    let body = format!(r#"{{"text": "{json}"}}"#);
    app.send(Method::POST, PATH, &json_kind, Some(body.as_bytes())).ok();
    app.post_form(PATH, &format!("text={escaped}")).ok();
    app.post_multipart(PATH, &[Part::Text("text", &text)]).ok();
    let accepted = accepted(&app);
    assert!(accepted.len() == 3 && accepted.iter().all(|message| message.text == text));

    let body = format!(r#"{{"text": "x"{}}}"#, " ".repeat(512 * 1024));
    let answer = app.send(Method::POST, PATH, &json_kind, Some(body.as_bytes()));
    assert_eq!((answer.status, answer.complaints().len()), (413, 0));
    assert_eq!(app.db.count(WAITING), 0);
}

#[test]
fn a_hundred_thousand_messages_are_accepted_at_once() {
    let app = App::start_with(|settings| {
        settings.database.statement_timeout_ms = 300_000;
        settings.database.call_timeout_ms = 300_000;
    });
    // 64 MiB, as far as that can be.
    let text = "x".repeat(671);
    let answer = app.post(PATH, json!({"text": text, "count": 100_000}));
    assert_eq!(answer.ok(), json!({"success": true, "published": 100_000}));
    let numbers = "SELECT count(DISTINCT substr(text, 674)::int) AS n FROM message_outbox
                   WHERE substr(text, 674)::int BETWEEN 0 AND 99999 AND left(text, 673)";
    assert_eq!(app.db.count(&format!("{numbers} = '{text} #'")), 100_000);
    let spread = "SELECT count(*) AS n FROM (SELECT FROM message_outbox GROUP BY partition HAVING count(*) = 25000) p";
    assert_eq!(app.db.count(spread), 4);
}

fn group() -> Group {
    Group::parse("g").unwrap()
}

/// A message at this place, recorded.
fn recorded<'a>(group: &'a str, partition: i32, offset: i64, text: &'a str) -> NewMessage<'a> {
    NewMessage {
        group,
        partition,
        offset,
        seq: None,
        message_id: None,
        key: None,
        text,
        accepted_at: None,
        recorded_by: "worker-1",
    }
}

fn record(app: &App, groups: &[&str], messages: &[NewMessage<'_>]) {
    let record = |conn: &mut _| {
        for group in groups {
            consumer_offsets::create(conn, &Group::parse(group).unwrap(), &[(0, 0), (1, 0), (2, 0), (3, 0)])?;
        }
        messages::record(conn, messages)
    };
    app.db.database().transaction(record).unwrap();
}

fn places(page: &Value) -> Vec<(i64, i64)> {
    let messages = page["messages"].as_array().unwrap();
    messages.iter().map(|m| (m["partition"].as_i64().unwrap(), m["offset"].as_i64().unwrap())).collect()
}

#[test]
fn what_a_group_has_recorded_is_told_with_what_is_known_of_it() {
    let app = App::start();
    let full = NewMessage {
        seq: Some(3),
        message_id: Some("ab12/01/3"),
        key: Some("k"),
        accepted_at: Some("2024-05-06T07:08:09.123456Z".parse().unwrap()),
        ..recorded("g", 1, 17, "é\n\u{1}")
    };
    record(&app, &["g", "h"], &[full, recorded("g", 0, 5, "bare"), recorded("h", 0, 6, "another group's")]);
    let page = app.get(&format!("{PATH}?group=g")).ok();
    assert_eq!(keys(&page), ["messages", "nextAfter"]);
    assert_eq!(places(&page), [(0, 5), (1, 17)]);
    let mut messages = page["messages"].as_array().unwrap().clone();
    for message in &mut messages {
        let at = message["recordedAt"].take();
        let at = at.as_str().unwrap();
        assert!(at.ends_with('Z') && DateTime::parse_from_rfc3339(at).is_ok(), "{at}");
    }
    let bare = json!({
        "partition": 0, "offset": 5, "messageId": null, "key": null, "text": "bare", "acceptedAt": null,
        "recordedBy": "worker-1", "recordedAt": null,
    });
    let full = json!({
        "partition": 1, "offset": 17, "messageId": "ab12/01/3", "key": "k", "text": "é\n\u{1}",
        "acceptedAt": "2024-05-06T07:08:09.123456Z", "recordedBy": "worker-1", "recordedAt": null,
    });
    assert_eq!(messages, [bare, full]);
}

#[test]
fn a_groups_messages_come_page_by_page() {
    let app = App::start();
    let messages: Vec<_> =
        (0..250).map(|n| recorded("g", 2, 2 * n, "x")).chain((0..30).map(|n| recorded("g", 3, n, "y"))).collect();
    record(&app, &["g"], &messages);
    let get = |query: &str| app.get(&format!("{PATH}?group=g{query}")).ok();
    let offsets = |page: &Value| -> Vec<i64> { places(page).iter().map(|(_, offset)| *offset).collect() };
    for (query, from, upto, next) in [
        ("&partition=2", 0, 198, json!(198)),
        ("&partition=2&after=198", 200, 398, json!(398)),
        ("&partition=2&after=398", 400, 498, json!(null)),
        ("&partition=2&after=399&limit=50", 400, 498, json!(498)),
        ("&partition=2&after=3&limit=1", 4, 4, json!(4)),
        ("&partition=2&limit=1000", 0, 498, json!(null)),
    ] {
        let page = get(query);
        let expected: Vec<i64> = (from..=upto).step_by(2).collect();
        assert_eq!((offsets(&page), &page["nextAfter"]), (expected, &next), "{query}");
    }
    for (query, count) in [("&partition=2&after=498", 0), ("&partition=1", 0), ("", 100), ("&limit=1000", 280)] {
        let page = get(query);
        assert_eq!((places(&page).len(), &page["nextAfter"]), (count, &json!(null)), "{query}");
    }
    // Large ones end a page sooner.
    let large = "z".repeat(60_000);
    record(&app, &[], &(0..20).map(|n| recorded("g", 1, n, &large)).collect::<Vec<_>>());
    let page = get("&partition=1");
    assert_eq!((offsets(&page), &page["nextAfter"]), ((0..18).collect(), &json!(17)));
    let page = get("&partition=1&after=17");
    assert_eq!((offsets(&page), &page["nextAfter"]), ((18..20).collect(), &json!(null)));
}

#[test]
fn a_group_that_isnt_known_is_404_and_what_cant_be_asked_is_400() {
    let app = App::start();
    record(&app, &["g"], &[]);
    let unknown = app.get(&format!("{PATH}?group=nobody&partition=9"));
    assert_eq!((unknown.status, &unknown.json()["detail"]), (404, &json!("unknown group")));
    for (query, fields) in [
        ("", &["group"][..]),
        ("?group=", &["group"]),
        ("?group=a%20b&limit=0&partition=-1", &["group", "limit", "partition"]),
        ("?group=g&limit=1001", &["limit"]),
        ("?group=g&after=5", &["after"]),
        ("?group=g&after=-1&partition=1", &["after"]),
        ("?group=g&after=x&partition=x&from=1", &["after", "from", "partition"]),
        ("?group=g&partition=4", &["partition"]),
    ] {
        let answer = app.get(&format!("{PATH}{query}"));
        let fields = fields.iter().map(|field| (*field).to_owned()).collect::<Vec<_>>();
        assert_eq!((answer.status, answer.complaints()), (400, fields), "{query}");
    }
    assert_eq!(app.send(Method::DELETE, PATH, &[], None).header("allow"), "GET, HEAD, POST");
}
