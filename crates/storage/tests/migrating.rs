//! What migrations make of rows that are there.

use diesel::connection::SimpleConnection as _;
use domain::{TweetId, UserId, values::Channel};
use storage::{audit, subscriptions, sweep, tweets};
use test_support::TestDatabase;

/// By the rule of the time: whoever had followed by when a tweet was posted was notified of it.
#[test]
fn who_was_notified_by_the_old_rule_is_by_the_new_one() {
    let db = TestDatabase::new();
    let author = db.user("author", Channel::Email);
    let readers: Vec<_> = (0..4).map(|n| db.user(&format!("reader{n}"), Channel::Email)).collect();
    let quiet = db.user("quiet", Channel::Email);
    db.follow(quiet, &readers);
    let gone = db.user("gone", Channel::Email);
    db.follow(author, &[gone]);
    // One reader follows after each tweet; the second has left for the last, and the third has come again for it.
    let leave = |reader: UserId| db.database().transaction(|conn| subscriptions::remove(conn, author, reader)).unwrap();
    let mut told = Vec::new();
    let mut following: Vec<UserId> = Vec::new();
    for (place, reader) in readers.iter().enumerate() {
        let tweet = db.post(author, "hello").id;
        told.extend(following.iter().map(|reader| (*reader, tweet)));
        db.follow(author, &[*reader]);
        following.push(*reader);
        if place == 2 {
            leave(readers[1]);
            following.retain(|reader| *reader != readers[1]);
            leave(readers[2]);
            db.follow(author, &[readers[2]]);
        }
    }
    db.database().transaction(|conn| tweets::delete(conn, TweetId(1))).unwrap();
    for (reader, tweet) in told {
        db.execute(&format!(
            "INSERT INTO email_notification (user_id, source, source_id, email, text) VALUES ({reader}, 'tweet', '{tweet}', 'x', 'x')"
        ));
    }
    db.execute("INSERT INTO feed_entry SELECT s.follower_id, t.id FROM subscription s, tweet t WHERE t.author_id = s.author_id AND t.id >= s.since_tweet_id ON CONFLICT DO NOTHING");
    db.execute("UPDATE \"user\" SET deleted_at = now() WHERE login = 'gone'");
    let columns = |table: &str| {
        db.ids(&format!(
            "SELECT hashtextextended(t::text, 0) AS n FROM {table} t ORDER BY author_id, follower_id, created_at"
        ))
    };
    let before = (columns("subscription"), columns("former_subscription"));
    db.execute("DELETE FROM feed_garbage");

    let mut conn = db.database().connection().unwrap();
    conn.batch_execute(include_str!("../../../migrations/00000000000009_audience/down.sql")).unwrap();
    conn.batch_execute(&format!(
        "BEGIN; {} COMMIT",
        include_str!("../../../migrations/00000000000009_audience/up.sql")
    ))
    .unwrap();
    assert_eq!((columns("subscription"), columns("former_subscription")), before);
    for finding in db.database().transaction(|conn| audit::run(conn, |_| ())).unwrap() {
        assert_eq!(finding.count, 0, "{finding:?}");
    }
    // And of who was deleted before, what follows from it now.
    while let Some(piece) = db.database().transaction(sweep::take).unwrap() {
        db.database().transaction(|conn| sweep::remove_page(conn, &piece)).unwrap();
    }
    assert_eq!(db.count(&format!("SELECT count(*) AS n FROM subscription WHERE follower_id = {gone}")), 0);
}
