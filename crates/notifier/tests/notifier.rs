//! Who is told what, once.

use domain::{
    TweetId, UserId,
    message::{FollowerRange, SendNotification, SendNotificationChunk, Tweet},
    values::Channel,
};
use notifier::Notifier;
use test_support::TestDatabase;
use worker::{
    Received,
    testing::{self, Handled},
};

/// An author with a follower of each channel, who has posted.
struct Stage {
    db: TestDatabase,
    by_email: UserId,
    by_phone: UserId,
    tweet: Tweet,
}

const EVERYBODY: FollowerRange = FollowerRange { after: UserId(0), upto: UserId(i64::MAX) };

impl Stage {
    fn new() -> Self {
        let db = TestDatabase::new();
        let author = db.user("author", Channel::Email);
        let (by_email, by_phone) = (db.user("ann", Channel::Email), db.user("bob", Channel::Phone));
        db.follow(author, &[by_email, by_phone]);
        let tweet = db.post(author, "hello");
        Self { db, by_email, by_phone, tweet }
    }

    fn handle(&self, channel: Channel, messages: impl IntoIterator<Item = Received>) -> Handled {
        testing::handle(&mut Notifier::new(self.db.database().clone(), channel), messages)
    }

    fn told(&self, channel: Channel) -> Vec<i64> {
        let table = match channel {
            Channel::Email => "email_notification",
            Channel::Phone => "sms_notification",
        };
        self.db.ids(&format!("SELECT user_id AS n FROM {table} ORDER BY 1"))
    }
}

fn chunk(tweet: &Tweet, followers: FollowerRange, channel: Channel) -> Received {
    Received::of("send_notification", SendNotificationChunk::of(tweet, followers, channel).envelope(channel))
}

/// Another program's message, with the id that it has been given, if any.
fn single(user_id: UserId, text: &str, id: Option<&str>) -> Received {
    let body = serde_json::to_vec(&SendNotification { user_id, text: text.into() }).unwrap();
    let mut received = Received::new("send_notification", body);
    received.message_id = id.map(Into::into);
    received
}

#[test]
fn each_notifier_tells_those_of_its_channel_once() {
    let stage = Stage::new();
    for (channel, reader) in [(Channel::Email, stage.by_email), (Channel::Phone, stage.by_phone)] {
        for _ in 0..2 {
            let handled = stage.handle(channel, [chunk(&stage.tweet, EVERYBODY, channel)]);
            assert!(handled.is_done() && handled.published.is_empty(), "{handled:?}");
            assert_eq!(stage.told(channel), [reader.0]);
        }
    }
    let addressed = "SELECT count(*) AS n FROM email_notification WHERE source = 'tweet' AND email = 'ann@example.com' AND text = 'hello'";
    assert_eq!(stage.db.count(addressed), 1);
}

#[test]
fn an_empty_range_and_a_deleted_tweet_tell_nobody() {
    let stage = Stage::new();
    let nobody = FollowerRange { after: stage.by_email, upto: stage.by_email };
    assert!(stage.handle(Channel::Email, [chunk(&stage.tweet, nobody, Channel::Email)]).is_done());
    stage.db.execute("UPDATE tweet SET deleted_at = now()");
    assert!(stage.handle(Channel::Email, [chunk(&stage.tweet, EVERYBODY, Channel::Email)]).is_done());
    assert!(stage.told(Channel::Email).is_empty());
}

#[test]
fn who_follows_later_or_is_deleted_is_not_told() {
    let stage = Stage::new();
    let late = stage.db.user("late", Channel::Email);
    stage.db.follow(stage.tweet.author_id, &[late]);
    stage.db.execute("UPDATE \"user\" SET deleted_at = now() WHERE login = 'bob'");
    for channel in Channel::ALL {
        assert!(stage.handle(channel, [chunk(&stage.tweet, EVERYBODY, channel)]).is_done());
    }
    assert_eq!(stage.told(Channel::Email), [stage.by_email.0]);
    assert!(stage.told(Channel::Phone).is_empty());
}

#[test]
fn another_programs_notification_is_told_apart_by_its_id() {
    let stage = Stage::new();
    let ann = stage.by_email;
    let messages = || [single(ann, "one", Some("a")), single(ann, "two", Some("b")), single(ann, "one", Some("a"))];
    for _ in 0..2 {
        assert!(stage.handle(Channel::Email, messages()).is_done());
        assert_eq!(stage.db.count("SELECT count(*) AS n FROM email_notification WHERE source = 'message'"), 2);
    }
}

#[test]
fn another_programs_notification_may_have_a_text_that_shows_nothing() {
    let stage = Stage::new();
    assert!(stage.handle(Channel::Email, [single(stage.by_email, "\u{200b}", None)]).is_done());
    assert_eq!(stage.told(Channel::Email).len(), 1);
}

#[test]
fn without_an_id_each_is_meant_for_itself() {
    let stage = Stage::new();
    let messages = [single(stage.by_email, "same", None), single(stage.by_email, "same", None)];
    assert!(stage.handle(Channel::Email, messages).is_done());
    assert_eq!(stage.told(Channel::Email).len(), 2);
}

#[test]
fn what_is_unknown_too_long_or_misshapen_is_set_aside_alone() {
    let stage = Stage::new();
    let ann = stage.by_email;
    let never_posted = Tweet { id: TweetId(stage.tweet.id.0 + 1), ..stage.tweet.clone() };
    let messages = [
        single(ann, &"é".repeat(512), Some("fits")),
        single(ann, &"é".repeat(513), Some("long")),
        single(UserId(i64::MAX), "text", Some("nobody")),
        single(stage.by_phone, "text", Some("of another channel")),
        chunk(&never_posted, EVERYBODY, Channel::Email),
        Received::new("send_notification", r#"{"userId": "1"}"#),
        single(ann, "text", Some("good")),
    ];
    let handled = stage.handle(Channel::Email, messages);
    let dead: Vec<_> = handled.dead.iter().map(|(place, _)| *place).collect();
    assert_eq!(dead, [1, 2, 3, 4, 5], "{handled:?}");
    for (why, expected) in handled.dead.iter().map(|(_, why)| why).zip([
        "text must be at most 512 characters long",
        "unknown user with an e-mail address",
        "unknown user with an e-mail address",
        "unknown tweet",
        "wrong shape",
    ]) {
        assert!(why.starts_with(expected), "{why}");
    }
    assert_eq!(stage.told(Channel::Email), [ann.0, ann.0]);
}

#[test]
fn what_no_column_holds_is_refused_at_once_and_the_most_that_one_holds_is_handled() {
    let stage = Stage::new();
    let ann = stage.by_email;
    let range = |after: i64, upto: i64| {
        chunk(&stage.tweet, FollowerRange { after: UserId(after), upto: UserId(upto) }, Channel::Email)
    };
    let handled = stage.handle(
        Channel::Email,
        [single(ann, &"😀".repeat(512), Some(&"x".repeat(255))), range(0, i64::MAX), range(i64::MAX, i64::MAX)],
    );
    assert!(handled.is_done(), "{handled:?}");
    let bad = [
        single(ann, "a\0b", Some("nul")),
        single(UserId(i64::MIN), "text", Some("negative")),
        Received::new("send_notification", r#"{"userId": 9223372036854775808, "text": "hello"}"#),
        range(-1, 5),
        range(6, 5),
        range(i64::MAX, i64::MIN),
        chunk(&Tweet { id: TweetId(i64::MIN), ..stage.tweet.clone() }, EVERYBODY, Channel::Email),
    ];
    let count = bad.len();
    let handled = stage.handle(Channel::Email, bad);
    assert_eq!(handled.dead.len(), count, "{handled:?}");
}

#[test]
fn a_database_that_is_away_is_waited_for_and_a_query_that_fails_is_tried_again() {
    let stage = Stage::new();
    let message = || chunk(&stage.tweet, EVERYBODY, Channel::Email);
    let away = testing::handle(&mut Notifier::new(TestDatabase::unreachable(), Channel::Email), [message()]);
    assert_eq!(away.waiting, [0]);
    stage.db.execute("ALTER TABLE email_notification RENAME TO elsewhere");
    let handled = stage.handle(Channel::Email, [message()]);
    assert!(matches!(&handled.retried[..], [(0, why)] if why.contains("the query failed")), "{handled:?}");
}
