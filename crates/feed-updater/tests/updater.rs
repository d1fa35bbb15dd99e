//! What becomes of a chunk of a fan-out, and of another program's single update.

use domain::{
    TweetId, UserId,
    message::{FollowerRange, Message, Tweet, UpdateFeed, UpdateFeedChunk},
    values::Channel,
};
use feed_updater::Updater;
use serde_json::{Value, json};
use storage::Database;
use test_support::{TestDatabase, sql};
use worker::{
    Received,
    testing::{self, Handled},
};

/// An author with four followers, who has posted.
struct Stage {
    db: TestDatabase,
    author: UserId,
    readers: Vec<UserId>,
    tweet: Tweet,
}

const READERS: usize = 4;

impl Stage {
    fn new() -> Self {
        let db = TestDatabase::new();
        let author = db.user("author", Channel::Email);
        let readers: Vec<_> = (0..READERS).map(|n| db.user(&format!("reader{n}"), Channel::Email)).collect();
        db.follow(author, &readers);
        let tweet = db.post(author, &"é".repeat(140));
        Self { db, author, readers, tweet }
    }

    fn handle(&self, messages: impl IntoIterator<Item = Received>) -> Handled {
        testing::handle(&mut Updater::new(self.db.database().clone()), messages)
    }

    /// A chunk with the followers from one place in the list up to, and without, another.
    fn chunk(&self, tweet: &Tweet, from: usize, to: usize) -> Received {
        let after = UserId(self.readers[from].0 - 1);
        let upto = if to > from { self.readers[to - 1] } else { after };
        received(&UpdateFeedChunk { tweet: tweet.clone(), followers: FollowerRange { after, upto } })
    }

    fn single(&self, follower_id: UserId) -> Received {
        received(&UpdateFeed { tweet: self.tweet.clone(), follower_id })
    }

    /// Whose feed holds which tweet.
    fn feeds(&self) -> Vec<i64> {
        self.db.ids("SELECT reader_id AS n FROM feed_entry ORDER BY 1")
    }

    fn readers(&self, from: usize, to: usize) -> Vec<i64> {
        self.readers[from..to].iter().map(|reader| reader.0).collect()
    }
}

fn received(message: &impl Message) -> Received {
    Received::of("update_feed.00", message.envelope())
}

#[test]
fn the_followers_in_the_range_find_the_tweet_and_the_notifiers_get_the_same_range() {
    let stage = Stage::new();
    let handled = stage.handle([stage.chunk(&stage.tweet, 1, 3)]);
    assert!(handled.is_done(), "{handled:?}");
    assert_eq!(stage.feeds(), stage.readers(1, 3));
    let told: Vec<_> = handled.published.iter().map(|envelope| (&*envelope.exchange, &*envelope.routing_key)).collect();
    assert_eq!(told, [("send_notification", "email"), ("send_notification", "phone")]);
    for (chunk, length) in handled.bodies().iter().zip([140, 60]) {
        let range = (chunk["after"].as_i64().unwrap(), chunk["upto"].as_i64().unwrap());
        assert_eq!(range, (stage.readers[1].0 - 1, stage.readers[2].0));
        assert_eq!((&chunk["tweetId"], &chunk["authorId"]), (&stage.tweet.id.0.into(), &stage.author.0.into()));
        assert_eq!(chunk["text"].as_str().unwrap().chars().count(), length, "cut to what the channel carries");
    }
}

#[test]
fn a_second_time_changes_nothing_and_publishes_the_same() {
    let stage = Stage::new();
    let all = || [stage.chunk(&stage.tweet, 0, 2), stage.chunk(&stage.tweet, 1, READERS)];
    let first = stage.handle(all()).bodies();
    assert_eq!(stage.feeds(), stage.readers(0, READERS), "chunks may overlap");
    assert_eq!(stage.handle(all()).bodies(), first);
    assert_eq!(stage.feeds(), stage.readers(0, READERS));
}

#[test]
fn an_empty_range_writes_nothing() {
    let stage = Stage::new();
    let handled = stage.handle([stage.chunk(&stage.tweet, 2, 2)]);
    assert!(handled.is_done() && stage.feeds().is_empty());
}

#[test]
fn only_who_follows_finds_it_whatever_the_range_says() {
    let stage = Stage::new();
    let stranger = stage.db.user("stranger", Channel::Email);
    let everybody = FollowerRange { after: UserId(0), upto: UserId(i64::MAX) };
    let handled = stage.handle([received(&UpdateFeedChunk { tweet: stage.tweet.clone(), followers: everybody })]);
    assert!(handled.is_done());
    assert_eq!(stage.feeds(), stage.readers(0, READERS));
    let handled = stage.handle([stage.single(stranger)]);
    assert!(handled.is_done());
    assert_eq!(stage.feeds(), stage.readers(0, READERS));
}

#[test]
fn another_programs_update_reaches_the_one_whom_it_names() {
    let stage = Stage::new();
    let handled = stage.handle([stage.single(stage.readers[2])]);
    assert!(handled.is_done(), "{handled:?}");
    assert_eq!(stage.feeds(), stage.readers(2, 3));
    let ranges: Vec<Value> = handled.bodies().iter().map(|body| body["upto"].clone()).collect();
    assert_eq!(ranges, [stage.readers[2].0, stage.readers[2].0], "and only this one is notified");
}

#[test]
fn an_author_and_a_text_that_nobody_could_choose_now_are_no_reason_to_refuse_an_update() {
    for odd in ["\u{200b}", "zoe\u{308}", "аdmin", "a\u{202e}b", "a@b:c"] {
        let stage = Stage::new();
        let update = json!({
            "id": stage.tweet.id, "author": odd, "authorId": stage.author, "text": odd, "createdAt": "2026-11-28 12:00:00",
            "followerId": stage.readers[0],
        });
        let handled = stage.handle([Received::new("update_feed", update.to_string().into_bytes())]);
        assert!(handled.is_done(), "{odd}: {handled:?}");
        assert_eq!(stage.feeds(), stage.readers(0, 1));
    }
}

#[test]
fn a_deleted_tweet_is_in_nobodys_feed() {
    let stage = Stage::new();
    stage.db.execute("UPDATE tweet SET deleted_at = now()");
    let handled = stage.handle([stage.chunk(&stage.tweet, 0, READERS)]);
    assert!(handled.is_done() && stage.feeds().is_empty(), "{handled:?}");
}

#[test]
fn a_row_that_somebody_holds_keeps_its_own_chunk_alone_waiting() {
    let stage = Stage::new();
    let held = stage.readers[2].0;
    let mut settings = stage.db.settings();
    settings.lock_timeout_ms = 500;
    let database = Database::open(&settings, "test").unwrap();
    let chunks = || (0..READERS).map(|place| stage.chunk(&stage.tweet, place, place + 1));
    let mut other = stage.db.database().connection().unwrap();
    // As a process does that froze in the middle of the same chunk, or whoever locks a row.
    for hold in [
        format!("INSERT INTO feed_entry VALUES ({held}, {})", stage.tweet.id),
        format!("SELECT FROM \"user\" WHERE id = {held} FOR UPDATE"),
        format!("SELECT pg_advisory_xact_lock({})", stage.author),
    ] {
        stage.db.execute("DELETE FROM feed_entry");
        sql::execute(&mut other, "BEGIN").unwrap();
        sql::execute(&mut other, &hold).unwrap();
        let handled = testing::handle(&mut Updater::new(database.clone()), chunks());
        // Which is no failed attempt of its own.
        assert!(handled.dead.is_empty() && handled.waiting.is_empty(), "{handled:?}");
        assert!(handled.retried.iter().all(|(place, _)| *place == 2), "{handled:?}");
        let others: Vec<_> = stage.readers(0, READERS).into_iter().filter(|reader| *reader != held).collect();
        let written: Vec<_> = stage.feeds().into_iter().filter(|reader| *reader != held).collect();
        assert_eq!(written, others, "{hold}");
        sql::execute(&mut other, "ROLLBACK").unwrap();
        assert!(stage.handle(chunks()).is_done());
        assert_eq!(stage.feeds(), stage.readers(0, READERS));
    }
}

#[test]
fn what_is_unknown_or_misshapen_is_set_aside_alone() {
    let stage = Stage::new();
    let never_posted = Tweet { id: TweetId(stage.tweet.id.0 + 1), ..stage.tweet.clone() };
    let messages = [
        stage.chunk(&stage.tweet, 0, 1),
        stage.chunk(&never_posted, 1, 2),
        stage.single(UserId(i64::MAX)),
        Received::new("update_feed.00", "[]"),
        stage.chunk(&stage.tweet, 3, 4),
    ];
    let handled = stage.handle(messages);
    let dead: Vec<_> = handled.dead.iter().map(|(place, why)| (*place, why.split(':').next().unwrap())).collect();
    assert_eq!(dead, [(1, "unknown tweet"), (2, "unknown user"), (3, "wrong shape")]);
    assert_eq!(stage.feeds(), [stage.readers(0, 1), stage.readers(3, 4)].concat());
    assert_eq!(handled.published.len(), 4, "two channels each of the good ones");
}

#[test]
fn what_no_column_holds_is_refused_at_once_and_the_most_that_one_holds_is_handled() {
    let stage = Stage::new();
    let body = |change: &[(&str, Value)]| {
        let mut body =
            serde_json::to_value(UpdateFeed { tweet: stage.tweet.clone(), follower_id: stage.readers[0] }).unwrap();
        change.iter().for_each(|(field, value)| body[*field] = value.clone());
        let mut received = Received::new("update_feed.00", body.to_string());
        received.kind = body.get("upto").map(|_| "update_feed.chunk".into());
        received
    };
    let range = |after: i64, upto: i64| body(&[("after", after.into()), ("upto", upto.into())]);
    let good = [
        body(&[("createdAt", "0000-01-01T00:00:00Z".into())]),
        body(&[("createdAt", "9999-12-31T23:59:59.999999999Z".into())]),
        body(&[("text", "😀".repeat(140).into()), ("unknown", json!([1, {}]))]),
        range(0, i64::MAX),
        range(i64::MAX, i64::MAX),
    ];
    let handled = stage.handle(good);
    assert!(handled.is_done(), "{handled:?}");
    let bad = [
        body(&[("createdAt", "-0001-12-31 23:59:59".into())]),
        body(&[("createdAt", "9999-12-31T23:59:59-01:00".into())]),
        body(&[("createdAt", "+262142-12-31 23:59:59".into())]),
        body(&[("text", "a\0b".into())]),
        body(&[("author", "a\0b".into())]),
        body(&[("id", u64::MAX.into())]),
        body(&[("id", i64::MIN.into())]),
        body(&[("followerId", json!(1e300))]),
        body(&[("followerId", i64::MIN.into())]),
        range(-1, 5),
        range(6, 5),
        range(i64::MAX, i64::MIN),
    ];
    let count = bad.len();
    let handled = stage.handle(bad);
    assert_eq!(handled.dead.len(), count, "{handled:?}");
}

#[test]
fn a_database_that_is_away_is_waited_for_and_a_query_that_fails_is_tried_again() {
    let stage = Stage::new();
    let message = || stage.chunk(&stage.tweet, 0, 1);
    let away = testing::handle(&mut Updater::new(TestDatabase::unreachable()), [message()]);
    assert_eq!((&away.waiting[..], away.published.len()), (&[0][..], 0));
    stage.db.execute("ALTER TABLE feed_entry RENAME TO elsewhere");
    let handled = stage.handle([message()]);
    assert!(matches!(&handled.retried[..], [(0, why)] if why.contains("the query failed")), "{handled:?}");
    assert!(handled.published.is_empty(), "nothing follows from what had no effect");
}
