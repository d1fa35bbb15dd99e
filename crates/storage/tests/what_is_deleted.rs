//! Who sees and is told what when something is deleted, by the moment: the table in docs/feeds.md, row by row.

use domain::{
    TweetId, UserId,
    message::{FollowerRange, SendNotificationChunk, Tweet},
    values::{Channel, ImportPlan, TweetText},
};
use storage::{Error, audit, feeds, imports, notifications, subscriptions, sweep, tweets, users};
use test_support::TestDatabase;

/// How far a tweet has come.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Moment {
    /// It's posted.
    Posted,
    /// The first half of the followers has it in the feed, and was told.
    Half,
    /// The second half has it in the feed, too, and wasn't told yet.
    Seen,
    /// All were told.
    Told,
}

const MOMENTS: [Moment; 4] = [Moment::Posted, Moment::Half, Moment::Seen, Moment::Told];

/// An author with four followers, of both channels, and a tweet.
struct Stage {
    db: TestDatabase,
    author: UserId,
    readers: Vec<UserId>,
    tweet: Tweet,
}

impl Stage {
    fn new() -> Self {
        let db = TestDatabase::new();
        let author = db.user("author", Channel::Email);
        let readers: Vec<_> = (0..4).map(|n| db.user(&format!("reader{n}"), Channel::ALL[n % 2])).collect();
        db.follow(author, &readers);
        let tweet = db.post(author, "hello");
        Self { db, author, readers, tweet }
    }

    fn half(&self, half: usize) -> FollowerRange {
        FollowerRange { after: UserId(self.readers[2 * half].0 - 1), upto: self.readers[2 * half + 1] }
    }

    fn write(&self, half: usize) {
        let chunk = (self.tweet.id, self.half(half));
        self.db.database().transaction(|conn| feeds::write(conn, &[chunk])).unwrap();
    }

    fn tell(&self, half: usize) {
        for channel in Channel::ALL {
            let chunk = SendNotificationChunk::of(&self.tweet, self.half(half), channel);
            self.db.database().transaction(|conn| notifications::record_chunks(conn, channel, &[&chunk])).unwrap();
        }
    }

    /// Brings the tweet on from one moment to another.
    fn bring(&self, from: Option<Moment>, to: Moment) {
        let comes = |moment| from.is_none_or(|from| from < moment) && moment <= to;
        if comes(Moment::Half) {
            self.write(0);
            self.tell(0);
        }
        if comes(Moment::Seen) {
            self.write(1);
        }
        if comes(Moment::Told) {
            self.tell(1);
        }
    }

    /// Places of those who see the tweet.
    fn seen(&self) -> Vec<usize> {
        let mut conn = self.db.database().connection().unwrap();
        let sees = |reader: &UserId| match feeds::page(&mut conn, *reader, TweetId(i64::MAX), 10) {
            Err(Error::NotFound("user")) => false,
            page => !page.unwrap().is_empty(),
        };
        let sees: Vec<_> = self.readers.iter().map(sees).collect();
        (0..4).filter(|place| sees[*place]).collect()
    }

    /// Places of those who were told of it.
    fn told(&self) -> Vec<usize> {
        let told = "SELECT user_id AS n FROM email_notification UNION ALL SELECT user_id FROM sms_notification";
        let told = self.db.ids(told);
        (0..4).filter(|place| told.contains(&self.readers[*place].0)).collect()
    }

    fn assert_audit_is_clean(&self) {
        for finding in self.db.database().transaction(|conn| audit::run(conn, |_| ())).unwrap() {
            assert_eq!(finding.count, 0, "{finding:?}");
        }
    }

    /// Until nothing is left, whenever it would be due.
    fn sweep(&self) {
        let database = self.db.database();
        while self.db.execute("UPDATE feed_garbage SET due_at = clock_timestamp()") > 0 {
            let piece = database.transaction(sweep::take).unwrap().expect("it's due");
            database.transaction(|conn| sweep::remove_page(conn, &piece)).unwrap();
        }
    }

    /// Places of those whose feeds hold a row, seen or not.
    fn rows(&self) -> Vec<usize> {
        let rows = self.db.ids("SELECT reader_id AS n FROM feed_entry");
        (0..4).filter(|place| rows.contains(&self.readers[*place].0)).collect()
    }
}

/// At each moment: deletes, brings the tweet on to the end, and sweeps. Nobody of `concerned` sees it then, and of these
/// only who had been told before was told.
fn at_each_moment(concerned: &[usize], delete: impl Fn(&Stage)) {
    for moment in MOMENTS {
        let stage = Stage::new();
        stage.bring(None, moment);
        let told_before = stage.told();
        delete(&stage);
        let see: Vec<_> = stage.seen();
        assert!(concerned.iter().all(|place| !see.contains(place)), "at once, {moment:?}: {see:?}");
        stage.bring(Some(moment), Moment::Told);
        let others: Vec<_> = (0..4).filter(|place| !concerned.contains(place)).collect();
        let told: Vec<_> = (0..4).filter(|place| others.contains(place) || told_before.contains(place)).collect();
        assert_eq!((stage.seen(), stage.told()), (others.clone(), told.clone()), "{moment:?}");
        stage.assert_audit_is_clean();
        stage.sweep();
        assert_eq!((stage.seen(), stage.told(), stage.rows()), (others.clone(), told, others), "swept, {moment:?}");
        stage.assert_audit_is_clean();
    }
}

#[test]
fn a_deleted_tweet_is_seen_by_nobody_and_told_to_nobody_more() {
    at_each_moment(&[0, 1, 2, 3], |stage| {
        stage.db.database().transaction(|conn| tweets::delete(conn, stage.tweet.id)).unwrap();
        let live = tweets::live(&mut stage.db.database().connection().unwrap(), &[(stage.tweet.id, stage.author)]);
        assert!(live.unwrap().is_empty(), "a fan-out that begins now has nothing to do");
    });
}

#[test]
fn a_deleted_authors_tweets_are_seen_by_nobody_and_told_to_nobody_more() {
    at_each_moment(&[0, 1, 2, 3], |stage| {
        let mut conn = stage.db.database().connection().unwrap();
        users::delete(&mut conn, stage.author).unwrap();
        let live = tweets::live(&mut conn, &[(stage.tweet.id, stage.author)]);
        assert!(live.unwrap().is_empty(), "a fan-out that begins now has nothing to do");
    });
}

#[test]
fn a_deleted_reader_sees_nothing_is_told_nothing_more_and_follows_nobody_in_the_end() {
    for place in [0, 3] {
        at_each_moment(&[place], |stage| {
            users::delete(&mut stage.db.database().connection().unwrap(), stage.readers[place]).unwrap();
        });
    }
    let stage = Stage::new();
    users::delete(&mut stage.db.database().connection().unwrap(), stage.readers[0]).unwrap();
    stage.sweep();
    assert_eq!(stage.db.count("SELECT count(*) AS n FROM subscription"), 3);
    assert_eq!(stage.db.count("SELECT count(*) AS n FROM former_subscription"), 1);
}

#[test]
fn who_has_left_sees_nothing_and_is_told_nothing_more() {
    for place in [1, 2] {
        at_each_moment(&[place], |stage| {
            let left = |conn: &mut _| subscriptions::remove(conn, stage.author, stage.readers[place]);
            stage.db.database().transaction(left).unwrap();
        });
    }
}

#[test]
fn who_leaves_and_follows_again_sees_it_and_is_told_nothing_more() {
    for moment in MOMENTS {
        let stage = Stage::new();
        stage.bring(None, moment);
        let told_before = stage.told();
        for reader in &stage.readers {
            stage.db.database().transaction(|conn| subscriptions::remove(conn, stage.author, *reader)).unwrap();
        }
        stage.db.follow(stage.author, &stage.readers);
        stage.bring(Some(moment), Moment::Told);
        stage.sweep();
        assert_eq!((stage.seen(), stage.told(), stage.rows()), (vec![0, 1, 2, 3], told_before, vec![0, 1, 2, 3]));
        stage.assert_audit_is_clean();
    }
}

#[test]
fn a_deleted_user_neither_posts_nor_follows_nor_is_followed() {
    let stage = Stage::new();
    let (database, reader) = (stage.db.database(), stage.readers[0]);
    for user in [stage.author, reader] {
        users::delete(&mut database.connection().unwrap(), user).unwrap();
    }
    let text = TweetText::parse("hello").unwrap();
    let posted = database.transaction(|conn| tweets::post(conn, stage.author, &text).map(|_| ()));
    let followed = database.transaction(|conn| subscriptions::create(conn, stage.author, stage.readers[1]).map(|_| ()));
    let follows = database.transaction(|conn| subscriptions::create(conn, stage.readers[1], reader).map(|_| ()));
    for refused in [posted, followed, follows] {
        assert!(matches!(refused, Err(Error::NotFound("user"))), "{refused:?}");
    }
}

#[test]
fn an_import_whose_author_is_deleted_has_failed_and_what_it_made_stays() {
    let stage = Stage::new();
    let database = stage.db.database();
    let plan = ImportPlan::new("fan", 10, 100).unwrap();
    let import = database.transaction(|conn| imports::open(conn, "key", stage.author, &plan)).unwrap();
    let step = || database.transaction(|conn| imports::step(conn, import.id, 4)).unwrap();
    assert_eq!(step().state, "running");
    users::delete(&mut database.connection().unwrap(), stage.author).unwrap();
    for _ in 0..2 {
        let import = step();
        assert_eq!((import.state.as_str(), import.created, import.is_over()), ("failed", 4, true));
        assert_eq!(import.error.as_deref(), Some("the author was deleted"));
    }
    stage.bring(None, Moment::Told);
    stage.assert_audit_is_clean();
    stage.sweep();
    assert!(stage.rows().is_empty());
    assert_eq!(stage.db.count("SELECT count(*) AS n FROM feed_entry"), 0, "nor do the new followers have any");
    stage.assert_audit_is_clean();
}
