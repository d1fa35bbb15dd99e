//! The main job: a tweet reaches every follower's feed and notifications, whoever asks for it and how often.

use crate::{
    api::number,
    stage::{PATIENCE, PRIVATE, Stage},
};
use serde_json::{Value, json};
use test_support::eventually_within;

/// The notifications' texts of one table, each with its reader.
fn texts(stage: &Stage, table: &str, reader: i64, source: &str) -> i64 {
    stage.database.count(&format!(
        "SELECT count(*) AS n FROM {table} WHERE user_id = {reader} AND source = '{source}' AND state = 'recorded'"
    ))
}

#[test]
fn a_tweet_reaches_every_followers_feed_and_notifications() {
    let (_vhost, mut stage) = Stage::shared();
    stage.start();
    let author = stage.api.reader_by_email("author");
    let email = stage.api.reader_by_email("email");
    let phone = stage.api.reader_by_phone("phone", 1);
    let stranger = stage.api.reader_by_email("stranger");
    stage.api.follow(author, email);
    stage.api.follow(author, phone);
    stage.api.follow(author, phone);

    const IMPORTED: i64 = 55;
    let order = json!({"followerLoginPrefix": "imported", "count": IMPORTED, "async": 1});
    let answer = stage.api.ask("POST", &format!("/api/v1/add-followers/{author}"), &order);
    assert_eq!(answer["count"], IMPORTED);
    let import = number(&answer["importId"]);
    let progress = eventually_within(PATIENCE, "the import is done", || {
        let progress = stage.api.ask("GET", &format!("/api/v1/follower-import/{import}"), &Value::Null);
        (progress["state"] == "done").then_some(progress)
    });
    let done = json!({"requested": IMPORTED, "created": IMPORTED, "skipped": 0, "state": "done", "error": null});
    assert_eq!(progress, done);
    let imported = stage.api.ask("GET", "/api/v1/get-user-by-login/imported_54", &Value::Null);
    let imported = number(&imported["user"]["id"]);

    // In the request: whoever has the answer finds it everywhere.
    let long = format!("{PRIVATE} {}", "x".repeat(100));
    let sync = stage.api.post(author, &long, false);
    for reader in [email, phone, imported] {
        assert_eq!(stage.api.feed(reader), [sync]);
    }
    let cut = format!("SELECT count(*) AS n FROM sms_notification WHERE user_id = {phone} AND length(text) = 60");
    assert_eq!(stage.database.count(&cut), 1);

    // By the workers.
    let by_workers: Vec<_> = (0..3).map(|n| stage.api.post(author, &format!("{PRIVATE} {n}"), true)).collect();
    let tweets: Vec<_> = [sync].into_iter().chain(by_workers).collect();
    for reader in [email, phone, imported] {
        eventually_within(PATIENCE, "the feed is complete", || (stage.api.feed(reader) == tweets).then_some(()));
    }
    assert!(stage.api.feed(stranger).is_empty());
    stage.await_rest();
    // Imported users with even numbers have e-mail addresses.
    for (reader, emails, texts_) in [(email, 4, 0), (phone, 0, 4), (imported, 4, 0), (stranger, 0, 0)] {
        assert_eq!(texts(&stage, "email_notification", reader, "tweet"), emails);
        assert_eq!(texts(&stage, "sms_notification", reader, "tweet"), texts_);
    }

    // Whoever follows later finds what was posted, and isn't told of it; what is deleted or left is gone at once.
    stage.api.follow(author, stranger);
    assert_eq!(stage.api.feed(stranger), tweets);
    stage.api.ask("DELETE", &format!("/api/v1/tweet/{sync}"), &Value::Null);
    assert_eq!(stage.api.feed(stranger), tweets[1..]);
    stage.api.ask("DELETE", &format!("/api/v1/subscription/{author}/{phone}"), &Value::Null);
    assert!(stage.api.feed(phone).is_empty());
    assert_eq!(texts(&stage, "email_notification", stranger, "tweet"), 0);
    stage.ends_well(0);
}

#[test]
fn messages_of_other_programs_are_handled_like_the_fleets_own_and_have_one_effect_each() {
    let (vhost, mut stage) = Stage::shared();
    stage.start();
    let author = stage.api.reader_by_email("author");
    let email = stage.api.reader_by_email("email");
    let phone = stage.api.reader_by_phone("phone", 1);
    for reader in [email, phone] {
        stage.api.follow(author, reader);
    }
    // Tweets that this other program has put into the table.
    let tweet = |id: i64| {
        stage.database.execute(&format!(
            "INSERT INTO tweet (id, author_id, text) OVERRIDING SYSTEM VALUE VALUES ({id}, {author}, '{PRIVATE}')"
        ));
        json!({"id": id, "author": "author", "authorId": author, "text": PRIVATE, "createdAt": "2024-05-01 10:00:00"})
    };
    let publish_tweet = tweet(101);
    let mut update_feed = tweet(102);
    let twice = |exchange: &str, key: &str, properties: &Value, body: &Value| {
        for _ in 0..2 {
            assert!(vhost.publish(exchange, key, properties, body.to_string().as_bytes()));
        }
    };
    let no_id = json!({});
    twice("publish_tweet", "publish_tweet", &no_id, &publish_tweet);
    for reader in [email, phone] {
        update_feed["followerId"] = reader.into();
        twice("update_feed", &reader.to_string(), &no_id, &update_feed);
    }
    let notification = |reader: i64| json!({"userId": reader, "text": PRIVATE});
    twice("send_notification", "email", &json!({"message_id": "a"}), &notification(email));
    twice("send_notification", "phone", &json!({"message_id": "a"}), &notification(phone));
    let followers = |prefix: &str| json!({"userId": author, "followerLogin": prefix, "count": 15});
    twice("add_followers", "add_followers", &no_id, &followers("anonymous"));
    twice("add_followers", "add_followers", &json!({"message_id": "b"}), &followers("named"));

    let followed = format!("SELECT count(*) AS n FROM subscription WHERE author_id = {author}");
    eventually_within(PATIENCE, "the imports are done", || (stage.database.count(&followed) == 32).then_some(()));
    // These are missed by no audit.
    for (reader, table) in [(email, "email_notification"), (phone, "sms_notification")] {
        eventually_within(PATIENCE, "the notification is there", || {
            (texts(&stage, table, reader, "message") > 0).then_some(())
        });
    }
    stage.await_rest();
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM follower_import"), 2);
    for reader in [email, phone] {
        assert_eq!(stage.api.feed(reader), [101, 102]);
    }
    for (reader, emails, texts_) in [(email, 2, 0), (phone, 0, 2)] {
        assert_eq!(texts(&stage, "email_notification", reader, "tweet"), emails);
        assert_eq!(texts(&stage, "sms_notification", reader, "tweet"), texts_);
        assert_eq!(texts(&stage, "email_notification", reader, "message"), emails / 2);
        assert_eq!(texts(&stage, "sms_notification", reader, "message"), texts_ / 2);
    }
    stage.ends_well(0);
}
