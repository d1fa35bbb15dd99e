//! What becomes of a tweet that was posted.

use domain::{
    TweetId, UserId,
    message::{Message as _, PublishTweet, Tweet},
    topology::queue,
    values::Channel,
};
use feed_fanout::Fanout;
use serde_json::{Value, json};
use test_support::TestDatabase;
use worker::{
    Received,
    testing::{self, Handled},
};

/// An author with so many followers, and what a fan-out in chunks of three makes of the tweet.
struct Stage {
    db: TestDatabase,
    author: UserId,
    followers: Vec<i64>,
}

impl Stage {
    fn new(followers: usize) -> Self {
        let db = TestDatabase::new();
        let author = db.user("author", Channel::Email);
        let followers: Vec<_> = (0..followers).map(|n| db.user(&format!("reader{n}"), Channel::Email)).collect();
        db.follow(author, &followers);
        Self { db, author, followers: followers.into_iter().map(i64::from).collect() }
    }

    fn fan_out(&self, tweets: &[Tweet]) -> Handled {
        let messages = tweets.iter().map(|tweet| PublishTweet(tweet.clone()).envelope().correlated(Some("request")));
        self.handle(messages.map(|envelope| Received::of(queue::PUBLISH_TWEET, envelope)))
    }

    fn handle(&self, messages: impl IntoIterator<Item = Received>) -> Handled {
        testing::handle(&mut Fanout::new(self.db.database().clone(), 3), messages)
    }
}

/// The ranges of the chunks, each as `(after, upto)`.
fn ranges(chunks: &[Value]) -> Vec<(i64, i64)> {
    chunks.iter().map(|chunk| (chunk["after"].as_i64().unwrap(), chunk["upto"].as_i64().unwrap())).collect()
}

#[test]
fn every_follower_is_in_exactly_one_chunk_and_a_second_time_in_the_same() {
    for count in [1, 2, 3, 4, 6, 7] {
        let stage = Stage::new(count);
        let tweet = stage.db.post(stage.author, "hello");
        let handled = stage.fan_out(std::slice::from_ref(&tweet));
        assert!(handled.is_done(), "{handled:?}");
        let chunks = handled.bodies();
        let ranges = ranges(&chunks);
        for follower in &stage.followers {
            let holding = ranges.iter().filter(|(after, upto)| after < follower && follower <= upto).count();
            assert_eq!(holding, 1, "{follower} of {count} in {ranges:?}");
        }
        assert_eq!(ranges.len(), count.div_ceil(3), "no chunk is empty");
        assert_eq!(stage.fan_out(&[tweet]).bodies(), chunks);
    }
}

#[test]
fn a_chunk_is_the_tweet_with_a_range_and_goes_on_under_the_requests_id() {
    let stage = Stage::new(1);
    let tweet = stage.db.post(stage.author, "hello");
    let Handled { published, .. } = stage.fan_out(std::slice::from_ref(&tweet));
    let [chunk] = &published[..] else { panic!("one chunk: {published:?}") };
    assert_eq!((&*chunk.exchange, chunk.kind.as_deref()), ("update_feed", Some("update_feed.chunk")));
    assert_eq!(chunk.correlation_id.as_deref(), Some("request"));
    let created_at = tweet.created_at.format("%Y-%m-%d %H:%M:%S").to_string();
    let expected = json!({
        "id": tweet.id, "author": "author", "authorId": stage.author, "text": "hello", "createdAt": created_at,
        "after": 0, "upto": stage.followers[0],
    });
    assert_eq!(serde_json::from_slice::<Value>(&chunk.body).unwrap(), expected);
}

#[test]
fn an_author_without_followers_reaches_nobody() {
    let stage = Stage::new(0);
    let handled = stage.fan_out(&[stage.db.post(stage.author, "hello")]);
    assert!(handled.is_done() && handled.published.is_empty());
}

#[test]
fn what_is_deleted_or_whose_author_is_reaches_nobody_and_holds_up_no_other() {
    let stage = Stage::new(1);
    let tweets: Vec<_> = (0..3).map(|n| stage.db.post(stage.author, &format!("hello {n}"))).collect();
    stage.db.database().transaction(|conn| storage::tweets::delete(conn, tweets[1].id)).unwrap();
    let handled = stage.fan_out(&tweets);
    assert!(handled.is_done(), "{handled:?}");
    let reach: Vec<_> = handled.bodies().iter().map(|chunk| chunk["text"].as_str().unwrap().to_owned()).collect();
    assert_eq!(reach, ["hello 0", "hello 2"]);
    storage::users::delete(&mut stage.db.database().connection().unwrap(), stage.author).unwrap();
    let handled = stage.fan_out(&tweets);
    assert!(handled.is_done() && handled.published.is_empty(), "{handled:?}");
}

#[test]
fn what_is_unknown_or_misshapen_is_set_aside_alone() {
    let stage = Stage::new(1);
    let tweet = stage.db.post(stage.author, "hello");
    let unknown = Tweet { id: TweetId(tweet.id.0 + 1), ..tweet.clone() };
    let of_another = Tweet { author_id: UserId(stage.followers[0]), ..tweet.clone() };
    let sent = |tweet: &Tweet| Received::of(queue::PUBLISH_TWEET, PublishTweet(tweet.clone()).envelope());
    let misshapen = Received::new(queue::PUBLISH_TWEET, "{}");
    let mut of_no_kind = sent(&tweet);
    of_no_kind.kind = Some("update_feed".into());

    let handled = stage.handle([sent(&tweet), sent(&unknown), misshapen, sent(&of_another), of_no_kind, sent(&tweet)]);
    let dead: Vec<_> = handled.dead.iter().map(|(place, why)| (*place, why.split(':').next().unwrap())).collect();
    let unknown_type = "unknown type \"update_feed\", expected publish_tweet";
    let expected = [(1, "unknown tweet of this author"), (2, "wrong shape"), (3, "unknown tweet of this author")];
    assert_eq!(dead, [&expected[..], &[(4, unknown_type)]].concat());
    assert_eq!(handled.published.len(), 2, "the good ones");
}

#[test]
fn what_no_column_holds_is_refused_at_once_and_the_most_that_one_holds_is_handled() {
    let stage = Stage::new(1);
    let tweet = stage.db.post(stage.author, "hello");
    let body = |field: &str, value: Value| {
        let mut body = serde_json::to_value(PublishTweet(tweet.clone())).unwrap();
        body[field] = value;
        Received::new(queue::PUBLISH_TWEET, body.to_string())
    };
    let good = [
        body("createdAt", "0000-01-01T00:00:00Z".into()),
        body("createdAt", "9999-12-31T23:59:59.999999999Z".into()),
        body("text", "😀".repeat(140).into()),
    ];
    let handled = stage.handle(good);
    assert!(handled.is_done() && handled.published.len() == 3, "{handled:?}");
    let bad = [
        body("createdAt", "-0001-12-31 23:59:59".into()),
        body("createdAt", "9999-12-31T23:59:59-01:00".into()),
        body("createdAt", "+262142-12-31 23:59:59".into()),
        body("text", "a\0b".into()),
        body("author", "a\0b".into()),
        body("id", u64::MAX.into()),
        body("id", i64::MIN.into()),
        body("authorId", json!(1e300)),
        body("authorId", i64::MIN.into()),
    ];
    let count = bad.len();
    let handled = stage.handle(bad);
    assert_eq!(handled.dead.len(), count, "{handled:?}");
    assert!(handled.published.is_empty());
}

#[test]
fn a_database_that_is_away_is_waited_for() {
    let stage = Stage::new(1);
    let tweet = stage.db.post(stage.author, "hello");
    let message = Received::of(queue::PUBLISH_TWEET, PublishTweet(tweet).envelope());
    let handled = testing::handle(&mut Fanout::new(TestDatabase::unreachable(), 3), [message]);
    assert_eq!((&handled.waiting[..], handled.published.len()), (&[0][..], 0));
}

#[test]
fn a_query_that_fails_is_tried_again() {
    let stage = Stage::new(1);
    let tweet = stage.db.post(stage.author, "hello");
    stage.db.execute("ALTER TABLE subscription RENAME TO elsewhere");
    let handled = stage.fan_out(&[tweet]);
    assert!(matches!(&handled.retried[..], [(0, why)] if why.contains("the query failed")), "{handled:?}");
}
