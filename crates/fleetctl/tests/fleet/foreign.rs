//! Messages of programs that were there before the fleet: other client libraries, other ways of writing the same.

use crate::{
    bad_input::untold_tweet,
    stage::{PATIENCE, PRIVATE, Stage},
};
use serde_json::{Value, json};
use std::{
    io::Write as _,
    process::{Command, Stdio},
};
use test_support::{TestVhost, eventually_within};

/// The distribution's own, for which its package of the client library is.
const PYTHON: &str = "/usr/bin/python3";

/// Publishes with pika, which `deploy/local/install test` installs: the broker has confirmed and routed every message.
fn publish(vhost: &TestVhost, messages: &[Value]) {
    let mut python = Command::new(PYTHON)
        .args(["-c", include_str!("foreign.py")])
        .env("AMQP_URL", vhost.url())
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the distribution's python3: run `deploy/local/install test` first");
    let input = Value::from(messages).to_string();
    python.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("it reads");
    let output = python.wait_with_output().expect("it ends");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "run `deploy/local/install test` if it finds no pika: {errors}");
}

/// A message as Symfony's programs send it: no type, no id.
fn message(exchange: &str, routing_key: &str, body: &Value) -> Value {
    json!({
        "exchange": exchange, "routingKey": routing_key, "body": body.to_string(),
        "properties": {"content_type": "text/plain", "delivery_mode": 2},
    })
}

fn with(mut message: Value, property: &str, value: &str) -> Value {
    message["properties"][property] = value.into();
    message
}

#[test]
fn what_other_programs_publish_with_another_client_library_takes_effect() {
    let (vhost, mut stage) = Stage::shared();
    stage.start();
    let author = stage.api.reader_by_email("author");
    let (email, phone) = (stage.api.reader_by_email("email"), stage.api.reader_by_phone("phone", 1));
    stage.api.follow(author, email);
    stage.api.follow(author, phone);
    let times = [
        "2026-11-28T12:00:00+00:00",
        "2026-11-28T12:00:00Z",
        "2026-11-28t14:00:00.123456789z",
        "2026-11-28 06:30:00-05:30",
        "2026-11-28 12:00:00",
    ];
    let tweet = |created_at: &str| {
        let id = untold_tweet(&stage, author);
        let body = json!({
            "id": id, "author": "author", "authorId": author, "text": PRIVATE, "createdAt": created_at,
            "isPinned": false, "media": [{"url": "x"}], "context": {"trace": null},
        });
        (id, body)
    };
    let mut messages = Vec::new();
    // By the keys of the exchanges' bindings and without one.
    let published: Vec<_> = times.map(tweet).into();
    for (n, (_, body)) in published.iter().enumerate() {
        messages.push(message("publish_tweet", ["", "publish_tweet"][n % 2], body));
    }
    let named: Vec<_> = times.map(tweet).into();
    for (n, (_, body)) in named.iter().enumerate() {
        let mut body = body.clone();
        body["followerId"] = [email, phone][n % 2].into();
        messages.push(message("update_feed", &body["followerId"].to_string(), &body));
    }
    for (n, key) in ["", "add_followers"].into_iter().enumerate() {
        let body = json!({"userId": author, "followerLogin": format!("fan{n}"), "count": 12, "locale": "en"});
        messages.push(with(message("add_followers", key, &body), "type", ""));
    }
    // An id that identifies nothing is none, so each of these is a notification of its own.
    for (channel, reader) in [("email", email), ("phone", phone)] {
        let body = json!({"userId": reader, "text": PRIVATE, "priority": 1});
        let notification = || message("send_notification", channel, &body);
        messages.extend((0..3).map(|_| notification()));
        messages.extend((0..3).map(|_| with(notification(), "message_id", "")));
        messages.extend((0..3).map(|_| with(with(notification(), "message_id", " \t"), "type", " ")));
        messages.extend((0..3).map(|_| with(notification(), "message_id", "the same")));
    }
    publish(&vhost, &messages);

    let tweets = |of: &[(i64, Value)]| of.iter().map(|(id, _)| id.to_string()).collect::<Vec<_>>().join(", ");
    let effects = [
        (
            "both imports",
            "SELECT count(*) AS n FROM subscription s JOIN \"user\" u ON u.id = s.follower_id WHERE u.login LIKE 'fan%'"
                .to_owned(),
            24,
        ),
        (
            "each follower's feed",
            format!(
                "SELECT count(*) AS n FROM feed_entry WHERE tweet_id IN ({}) AND reader_id IN ({email}, {phone})",
                tweets(&published)
            ),
            10,
        ),
        (
            "the feeds that were named",
            format!(
                "SELECT count(*) AS n FROM feed_entry WHERE tweet_id IN ({}) AND reader_id IN ({email}, {phone})",
                tweets(&named)
            ),
            5,
        ),
        ("e-mails", "SELECT count(*) AS n FROM email_notification WHERE source = 'message'".to_owned(), 10),
        ("SMS", "SELECT count(*) AS n FROM sms_notification WHERE source = 'message'".to_owned(), 10),
    ];
    for (what, query, count) in &effects {
        eventually_within(PATIENCE, what, || {
            let letters = stage.dead_letters();
            assert!(letters.is_empty(), "{:#?}", letters.iter().map(|letter| &letter.error).collect::<Vec<_>>());
            (stage.database.count(query) >= *count).then_some(())
        });
    }
    // The other follower's, so that nothing is missing when all is checked.
    let rest: Vec<_> = named
        .iter()
        .enumerate()
        .map(|(n, (_, body))| {
            let mut body = body.clone();
            body["followerId"] = [phone, email][n % 2].into();
            message("update_feed", &body["followerId"].to_string(), &body)
        })
        .collect();
    publish(&vhost, &rest);
    let fans = "SELECT count(*) AS n FROM feed_entry f JOIN \"user\" u ON u.id = f.reader_id WHERE u.login LIKE 'fan%'";
    assert!(stage.database.count(fans) > 0, "who comes by an import finds what was posted before");
    stage.await_rest();
    for (what, query, count) in &effects[3..] {
        assert_eq!(stage.database.count(query), *count, "{what}");
    }
    stage.ends_well(0);
}
