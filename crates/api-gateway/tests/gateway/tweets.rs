use crate::app::{App, has_form, ids, keys};
use domain::{
    UserId,
    message::{FollowerRange, Message, PublishTweet, SendNotificationChunk},
    values::Channel,
};
use serde_json::json;
use storage::{feeds, notifications, outbox, subscriptions};
use ureq::http::Method;

#[test]
fn tweets_come_page_by_page_the_newest_first() {
    let app = App::start();
    let author = app.user("author");
    let mut posted: Vec<_> = (0..5).map(|i| app.tweet(author, &format!(" tweet {i} "))).collect();
    posted.reverse();
    let list = app.get("/api/v1/get-tweet").ok();
    assert_eq!(ids(&list["tweets"]), posted);
    let tweet = &list["tweets"][0];
    assert_eq!(keys(tweet), ["author", "createdAt", "id", "text"]);
    assert_eq!((&tweet["author"], &tweet["text"]), (&json!("author"), &json!("tweet 4")));
    assert!(has_form(&tweet["createdAt"], "0000-00-00 00:00:00"));
    assert_eq!(ids(&app.get("/api/v1/get-tweet?page=1&perPage=2").ok()["tweets"]), posted[2..4]);
    assert_eq!(app.get("/api/v1/get-tweet?page=9").ok(), json!({"tweets": []}));
}

#[test]
fn a_tweet_in_the_request_is_seen_and_notified_of_when_the_answer_is_there() {
    let app = App::start();
    let (author, reader, phone) = (app.user("author"), app.user("reader"), app.phone_user("phone"));
    app.follow(author, reader);
    app.follow(author, phone);
    let text = "ж".repeat(100);
    for by_workers in [json!(null), json!(false), json!(0), json!("0")] {
        let tweet = json!({"userId": author, "text": text, "async": by_workers});
        assert_eq!(app.post("/api/v1/post-tweet", tweet).ok()["success"], true);
    }
    assert_eq!((app.feed(reader).len(), app.feed(phone).len()), (4, 4));
    assert_eq!(app.db.count(&format!("SELECT count(*) AS n FROM email_notification WHERE text = '{text}'")), 4);
    let cut = format!("{}...", "ж".repeat(57));
    assert_eq!(app.db.count(&format!("SELECT count(*) AS n FROM sms_notification WHERE text = '{cut}'")), 4);
    assert_eq!(app.db.count("SELECT count(*) AS n FROM outbox"), 0);
    app.assert_audit_is_clean();
}

#[test]
fn a_tweet_for_the_workers_commits_with_its_message_and_ends_in_the_same_rows() {
    let app = App::start();
    let (author, reader, phone) = (app.user("author"), app.user("reader"), app.phone_user("phone"));
    app.follow(author, reader);
    app.follow(author, phone);
    let headers = [("content-type", "application/json"), ("x-correlation-id", "from-the-test")];
    let body = json!({"userId": author, "text": "hello", "async": true}).to_string();
    let answer = app.send(Method::POST, "/api/v1/post-tweet", &headers, Some(body.as_bytes()));
    let id = answer.ok()["id"].as_i64().unwrap();
    assert!(app.feed(reader).is_empty());

    let rows = app.db.database().transaction(|conn| outbox::take(conn, 10)).unwrap();
    let [row] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!(row.envelope.exchange, PublishTweet::EXCHANGE);
    assert_eq!(row.envelope.routing_key, PublishTweet::EXCHANGE);
    assert_eq!(row.envelope.kind.as_deref(), Some(PublishTweet::TYPE));
    assert_eq!(row.envelope.correlation_id.as_deref(), Some("from-the-test"));
    let PublishTweet(tweet) = serde_json::from_slice(&row.envelope.body).unwrap();
    assert_eq!((tweet.id.0, tweet.author_id, tweet.author.as_str()), (id, UserId(author), "author"));

    // What the workers do with it, chunk by chunk.
    app.db
        .database()
        .transaction(|conn| {
            let mut after = UserId(0);
            while let Some(upto) = subscriptions::next_chunk(conn, tweet.author_id, after, 1)? {
                let range = FollowerRange { after, upto };
                feeds::write(conn, &[(tweet.id, range)])?;
                for channel in Channel::ALL {
                    let chunk = SendNotificationChunk::of(&tweet, range, channel);
                    notifications::record_chunks(conn, channel, &[&chunk])?;
                }
                after = upto;
            }
            Ok(())
        })
        .unwrap();
    assert_eq!((app.feed(reader), app.feed(phone)), (vec![id], vec![id]));
    app.assert_audit_is_clean();
}

#[test]
fn a_tweet_whose_message_cant_be_kept_isnt_posted() {
    let app = App::start();
    let author = app.user("author");
    app.db.execute("ALTER TABLE outbox ADD CONSTRAINT no_room CHECK (false)");
    let answer = app.post("/api/v1/post-tweet", json!({"userId": author, "text": "hello", "async": true}));
    assert_eq!((answer.status, answer.complaints().len()), (500, 0));
    assert!(!String::from_utf8_lossy(&answer.body).contains("outbox"), "the client learns nothing of the inside");
    assert_eq!(app.db.count("SELECT count(*) AS n FROM tweet"), 0);
}
