//! Messages that nobody can handle, and failures that pass.

use crate::stage::{PATIENCE, PRIVATE, Stage};
use domain::values::{EMAIL_TEXT_MAX, SMS_TEXT_MAX, TWEET_MAX};
use harness::Name;
use serde_json::{Value, json};
use test_support::{TestVhost, eventually_within, sql};

/// Nobody has these ids.
const NOBODY: i64 = 1_000_000;
const NOTHING: i64 = 2_000_000;

/// A bad message, and what is to be said of it.
struct Bad {
    properties: Value,
    body: Vec<u8>,
    reason: String,
}

fn bad(body: impl AsRef<[u8]>, reason: &str) -> Bad {
    Bad { properties: json!({}), body: body.as_ref().into(), reason: reason.into() }
}

fn bad_json(body: &Value, reason: &str) -> Bad {
    bad(body.to_string(), reason)
}

/// Where messages of one kind go.
struct Kind {
    exchange: &'static str,
    key: &'static str,
    /// What the name of its queues begins with.
    queue: &'static str,
    bad: Vec<Bad>,
}

impl Kind {
    /// What is bad for every kind, and what is for this one. `good` is a good message's body.
    fn new(
        exchange: &'static str,
        key: &'static str,
        queue: &'static str,
        good: &Value,
        own: impl IntoIterator<Item = Bad>,
    ) -> Self {
        let mut unknown_type = bad_json(good, "unknown type \"mystery\", expected ");
        unknown_type.properties = json!({"type": "mystery"});
        let mut bad = vec![
            bad("", "empty body"),
            bad("nonsense", "not JSON: "),
            bad(&good.to_string().as_bytes()[..20], "not JSON: "),
            bad(b"{\"text\": \"\xff\xfe\"}", "not UTF-8 after byte 10"),
            bad_json(&json!([1, 2]), "wrong shape: "),
            bad_json(&json!({}), "wrong shape: missing field"),
            unknown_type,
        ];
        bad.extend(own);
        Self { exchange, key, queue, bad }
    }
}

fn with(good: &Value, field: &str, value: impl Into<Value>) -> Value {
    let mut body = good.clone();
    body[field] = value.into();
    body
}

fn ranged(good: &Value, after: i64, upto: i64) -> Value {
    with(&with(good, "after", after), "upto", upto)
}

/// Tweets that are there, but that nobody has been told of.
pub(crate) fn untold_tweet(stage: &Stage, author: i64) -> i64 {
    let mut conn = stage.database.database().connection().expect("a connection");
    let insert = format!(
        "WITH new AS (INSERT INTO tweet (author_id, text) VALUES ({author}, '{PRIVATE}') RETURNING id) SELECT id AS n FROM new"
    );
    sql::count(&mut conn, &insert).expect("it's inserted")
}

fn tweet_body(id: i64, author: i64) -> Value {
    json!({"id": id, "author": "author", "authorId": author, "text": PRIVATE, "createdAt": "2024-05-01 10:00:00"})
}

#[test]
fn bad_messages_are_set_aside_with_the_reason_and_stop_nobody() {
    let (vhost, mut stage) = Stage::shared();
    stage.start();
    let author = stage.api.reader_by_email("author");
    let email = stage.api.reader_by_email("email");
    let phone = stage.api.reader_by_phone("phone", 1);
    stage.api.follow(author, email);
    let import = json!({"userId": phone, "followerLogin": "bad", "count": 1});
    let tweet = tweet_body(untold_tweet(&stage, phone), phone);
    let update = with(&tweet, "followerId", email);
    let notify = |reader: i64| json!({"userId": reader, "text": PRIVATE});
    let long = |length: usize| "x".repeat(length + 1);
    let chunk = |channel: &str, body: Value, reason: &str| Bad {
        properties: json!({"type": format!("{channel}.chunk")}),
        body: body.to_string().into(),
        reason: reason.into(),
    };
    let notify_chunk = json!({"tweetId": NOTHING, "authorId": author, "text": PRIVATE, "after": 0, "upto": NOBODY});
    let kinds = [
        Kind::new(
            "add_followers",
            "add_followers",
            "add_followers",
            &import,
            [
                bad_json(&with(&import, "userId", NOBODY), "unknown user"),
                bad_json(&with(&import, "count", 0), "count must be between 1 and "),
                bad_json(&with(&import, "count", -1), "count must be between 1 and "),
                bad_json(&with(&import, "count", 10_000_000), "count must be between 1 and "),
                bad_json(&with(&import, "count", "many"), "wrong shape: "),
                bad_json(&with(&import, "count", i64::MAX), "count must be between 1 and "),
                bad_json(&with(&import, "userId", u64::MAX), "wrong shape: "),
                bad_json(&with(&import, "followerLogin", "a\0b"), "followerLogin must not contain the NUL character"),
                bad_json(&with(&import, "followerLogin", long(31)), "followerLogin is too long"),
                bad_json(&with(&import, "followerLogin", "a b"), "followerLogin must not contain whitespace"),
                bad_json(&with(&import, "importId", NOTHING), "unknown import"),
            ],
        ),
        Kind::new(
            "publish_tweet",
            "publish_tweet",
            "publish_tweet",
            &tweet,
            [
                bad_json(&with(&tweet, "id", NOTHING), "unknown tweet"),
                bad_json(&with(&tweet, "authorId", NOBODY), "unknown tweet of this author"),
                bad_json(&with(&tweet, "text", long(TWEET_MAX)), "wrong shape: must be at most 140 characters long"),
                bad_json(&with(&tweet, "createdAt", "yesterday"), "wrong shape: "),
                bad_json(&with(&tweet, "createdAt", "-5000-01-01T00:00:00Z"), "wrong shape: "),
                bad_json(&with(&tweet, "createdAt", "-5000-01-01 00:00:00"), "wrong shape: "),
                bad_json(&with(&tweet, "createdAt", "+10000-01-01 00:00:00"), "wrong shape: "),
                bad_json(&with(&tweet, "createdAt", "0000-01-01T00:00:00+00:01"), "wrong shape: "),
                bad_json(&with(&tweet, "text", "a\0b"), "wrong shape: must not contain the NUL character"),
                bad_json(&with(&tweet, "author", "a\0b"), "wrong shape: must not contain the NUL character"),
                bad_json(&with(&tweet, "id", 1e30), "wrong shape: "),
                bad(vec![b' '; 100_000], "empty body"),
            ],
        ),
        Kind::new(
            "update_feed",
            "1",
            "update_feed.",
            &update,
            [
                bad_json(&with(&update, "id", NOTHING), "unknown tweet"),
                bad_json(&with(&update, "followerId", NOBODY), "unknown user"),
                bad_json(&with(&update, "text", long(TWEET_MAX)), "wrong shape: must be at most 140 characters long"),
                chunk("update_feed", update.clone(), "wrong shape: missing field"),
                chunk("update_feed", ranged(&update, 5, 4), "wrong shape: after must be at most upto"),
                chunk("update_feed", ranged(&update, i64::MAX, i64::MIN), "wrong shape: after must be"),
                chunk("update_feed", ranged(&update, -1, 4), "wrong shape: after must be at least 0"),
            ],
        ),
        Kind::new(
            "send_notification",
            "email",
            "send_notification.email",
            &notify(email),
            [
                bad_json(&notify(NOBODY), "unknown user with an e-mail address"),
                bad_json(&notify(phone), "unknown user with an e-mail address"),
                bad_json(
                    &with(&notify(email), "text", long(EMAIL_TEXT_MAX)),
                    "text must be at most 512 characters long",
                ),
                bad_json(&with(&notify(email), "text", " "), "text must not be empty"),
                bad_json(&with(&notify(email), "text", "a\0b"), "text must not contain the NUL character"),
                chunk("send_notification", notify_chunk.clone(), "unknown tweet"),
                chunk("send_notification", ranged(&notify_chunk, 5, 4), "wrong shape: after must be at most upto"),
            ],
        ),
        Kind::new(
            "send_notification",
            "phone",
            "send_notification.sms",
            &notify(phone),
            [
                bad_json(&notify(email), "unknown user with a phone number"),
                bad_json(&with(&notify(phone), "text", long(SMS_TEXT_MAX)), "text must be at most 60 characters long"),
                chunk("send_notification", notify_chunk, "unknown tweet"),
            ],
        ),
    ];

    // Each bad message has a good neighbour.
    let mut expected = Vec::new();
    for Kind { exchange, key, queue, bad } in kinds {
        for Bad { properties, body, reason } in bad {
            let id = format!("message {}", expected.len());
            let mut properties = properties;
            properties["message_id"] = id.as_str().into();
            assert!(vhost.publish(exchange, key, &properties, &body));
            neighbour(&vhost, &stage, exchange, key, &id, [author, email, phone]);
            expected.push((id, queue, reason, body));
        }
    }

    eventually_within(PATIENCE, "all bad messages are set aside", || {
        (stage.dead_letters().len() >= expected.len()).then_some(())
    });
    let letters = stage.dead_letters();
    for (id, queue, reason, body) in &expected {
        let of_this: Vec<_> = letters.iter().filter(|letter| letter.message_id.as_ref() == Some(id)).collect();
        let [letter] = of_this[..] else { panic!("{} dead letters of {id} ({reason})", of_this.len()) };
        assert!(letter.error.starts_with(reason), "{queue}: {:?} instead of {reason:?}", letter.error);
        assert!(!letter.error.contains(PRIVATE), "{}", letter.error);
        assert!(letter.queue.starts_with(queue), "{} in {}", reason, letter.queue);
        assert_eq!((letter.attempts, &letter.body), (1, body), "{queue}: {reason}");
    }
    let neighbours =
        |exchange: &str| expected.iter().filter(|(_, queue, ..)| queue.starts_with(exchange)).count() as i64;
    let mut effects = Vec::new();
    for (exchange, query) in [
        ("add_followers", "SELECT count(*) AS n FROM \"user\" WHERE login LIKE 'message%'"),
        ("send_notification.email", "SELECT count(*) AS n FROM email_notification WHERE source = 'message'"),
        ("send_notification.sms", "SELECT count(*) AS n FROM sms_notification WHERE source = 'message'"),
    ] {
        effects.push((exchange, query, neighbours(exchange)));
    }
    for (exchange, query, count) in &effects {
        eventually_within(PATIENCE, &format!("the neighbours in {exchange} take effect"), || {
            (stage.database.count(query) >= *count).then_some(())
        });
    }
    stage.await_rest();
    for (exchange, query, count) in &effects {
        assert_eq!(stage.database.count(query), *count, "{exchange}");
    }

    // What was unknown is made known, and the messages about it are sent once more.
    stage.database.execute(&format!(
        "INSERT INTO \"user\" (id, login, channel, email) OVERRIDING SYSTEM VALUE
         VALUES ({NOBODY}, 'late', 'email', 'late@example.com')"
    ));
    let mended: Vec<_> =
        letters.iter().filter(|letter| letter.error == "unknown user" || letter.error.contains("e-mail")).collect();
    let (mended, still_bad): (Vec<_>, Vec<_>) =
        mended.into_iter().partition(|letter| String::from_utf8_lossy(&letter.body).contains(&NOBODY.to_string()));
    assert_eq!((mended.len(), still_bad.len()), (3, 1));
    let ids: Vec<_> = mended.iter().chain(&still_bad).map(|letter| letter.id.to_string()).collect();
    let mut replay = vec!["dead-letters", "replay", "--by", "test"];
    replay.extend(ids.iter().map(String::as_str));
    assert_eq!(stage.fleetctl(&replay), "4 replayed\n");
    eventually_within(PATIENCE, "the messages take effect", || {
        let effects = format!(
            "SELECT (SELECT count(*) FROM subscription WHERE author_id = {NOBODY})
                  + (SELECT count(*) FROM email_notification WHERE user_id = {NOBODY}) AS n"
        );
        (stage.database.count(&effects) == 2).then_some(())
    });
    // What is as bad as before is set aside again, and the rest was never gone.
    eventually_within(PATIENCE, "the bad one is set aside again", || {
        (stage.dead_letters().len() == expected.len() - mended.len()).then_some(())
    });
    let dropped = stage.fleetctl(&["dead-letters", "drop", "--all", "--yes", "--by", "test"]);
    assert_eq!(dropped, format!("{} dropped\n", expected.len() - mended.len()));
    stage.ends_well(0);
}

#[test]
fn dead_letters_of_one_message_id_are_told_apart_and_none_vanishes() {
    let (vhost, mut stage) = Stage::shared();
    stage.start();
    let waiting = |what: &str, bodies: &[&str]| {
        eventually_within(PATIENCE, what, || (stage.dead_letters().len() >= bodies.len()).then_some(()));
        stage.await_rest();
        let letters = stage.dead_letters();
        let mut found: Vec<_> = letters.iter().map(|letter| String::from_utf8_lossy(&letter.body)).collect();
        found.sort();
        assert_eq!(found, bodies, "{what}");
        assert!(letters.iter().all(|letter| letter.message_id.as_deref() == Some("42")), "{what}");
        letters.into_iter().map(|letter| letter.id.to_string()).collect::<Vec<_>>()
    };
    let publish = |body: &str| {
        assert!(vhost.publish("add_followers", "add_followers", &json!({"message_id": "42"}), body.as_bytes()));
    };
    let settle = |verb: &str, ids: &[String]| {
        let mut command = vec!["dead-letters", verb, "--by", "test"];
        command.extend(ids.iter().map(String::as_str));
        stage.fleetctl(&command);
    };
    publish("broken 1");
    publish("broken 2");
    let ids = waiting("two bodies, two letters", &["broken 1", "broken 2"]);
    settle("drop", &ids);
    publish("broken 1");
    let ids = waiting("another one leaves a trace after the first was dropped", &["broken 1"]);
    settle("replay", &ids);
    let ids = waiting("so does the same one when it was replayed", &["broken 1"]);
    publish("broken 1");
    let both = waiting("and another one beside it", &["broken 1", "broken 1"]);
    assert!(both.contains(&ids[0]));
    settle("drop", &both);
    stage.ends_well(0);
}

#[test]
fn a_message_id_with_nul_is_refused_at_once() {
    let (vhost, mut stage) = Stage::shared();
    stage.start();
    let author = stage.api.reader_by_email("author");
    let (email, phone) = (stage.api.reader_by_email("email"), stage.api.reader_by_phone("phone", 1));
    let tweet = tweet_body(untold_tweet(&stage, author), author);
    let messages = [
        ("add_followers", "add_followers", json!({"userId": author, "followerLogin": "nul", "count": 1})),
        ("publish_tweet", "publish_tweet", tweet.clone()),
        ("update_feed", "1", with(&tweet, "followerId", email)),
        ("send_notification", "email", json!({"userId": email, "text": PRIVATE})),
        ("send_notification", "phone", json!({"userId": phone, "text": PRIVATE})),
        (
            "account_event",
            "s000",
            json!({"accountId": "a", "seq": 1, "payload": 1, "generatedAt": "2024-05-01T10:00:00Z"}),
        ),
    ];
    for (exchange, key, body) in &messages {
        let properties = json!({"message_id": "a\0b", "correlation_id": "c\0d"});
        assert!(vhost.publish(exchange, key, &properties, body.to_string().as_bytes()));
    }
    eventually_within(PATIENCE, "all are set aside", || (stage.dead_letters().len() >= messages.len()).then_some(()));
    let mut ids = std::collections::BTreeSet::new();
    for letter in stage.dead_letters() {
        assert_eq!((&*letter.error, letter.attempts), ("its message id contains the NUL character", 1));
        assert_eq!(letter.headers["x-original-message-id"], "a\u{fffd}b");
        ids.insert(letter.message_id.expect("it has got one that identifies it"));
    }
    assert_eq!(ids.len(), messages.len());
    stage.ends_well(messages.len());
}

/// Publishes a message that nothing is wrong with, with an effect of its own.
fn neighbour(vhost: &TestVhost, stage: &Stage, exchange: &str, key: &str, id: &str, [author, email, phone]: [i64; 3]) {
    let body = match (exchange, key) {
        ("add_followers", _) => json!({"userId": phone, "followerLogin": id.replace(' ', ""), "count": 1}),
        ("publish_tweet", _) => tweet_body(untold_tweet(stage, author), author),
        ("update_feed", _) => with(&tweet_body(untold_tweet(stage, author), author), "followerId", email),
        (_, "email") => json!({"userId": email, "text": PRIVATE}),
        _ => json!({"userId": phone, "text": PRIVATE}),
    };
    let properties = json!({"message_id": format!("neighbour of {id}")});
    assert!(vhost.publish(exchange, key, &properties, body.to_string().as_bytes()));
}

#[test]
fn what_fails_for_a_while_is_tried_again_until_it_succeeds() {
    let (_vhost, mut stage) = Stage::shared();
    // The statement is given up soon, and there are more attempts than it takes to look after both.
    stage.set("MURMURATION__DATABASE__STATEMENT_TIMEOUT_MS", "3000");
    stage.set("MURMURATION__DATABASE__CALL_TIMEOUT_MS", "30000");
    stage.set("MURMURATION__WORKER__RETRY_DELAYS_MS", "200,500,1000,2000,4000,8000,16000,32000");
    stage.start();
    let author = stage.api.reader_by_email("author");
    stage.api.follow(author, stage.api.reader_by_email("email"));
    stage.api.follow(author, stage.api.reader_by_phone("phone", 1));

    // One notifier finds no table, the other waits for a lock until its statement is given up.
    stage.database.execute("ALTER TABLE email_notification RENAME TO elsewhere");
    let mut lock = stage.database.database().connection().expect("a connection");
    sql::execute(&mut lock, "BEGIN").expect("it begins");
    sql::execute(&mut lock, "LOCK TABLE sms_notification IN SHARE MODE").expect("it's locked");
    stage.api.post(author, PRIVATE, true);
    for service in ["email-notifier", "sms-notifier"] {
        eventually_within(PATIENCE, "the message is retried", || {
            stage.fleet.log(&Name(service, 0)).expect("a log").contains("will be retried").then_some(())
        });
    }
    stage.database.execute("ALTER TABLE elsewhere RENAME TO email_notification");
    sql::execute(&mut lock, "ROLLBACK").expect("it ends");
    stage.ends_well(0);
}
