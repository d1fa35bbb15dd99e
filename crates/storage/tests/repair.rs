//! Repairing feeds and notifications: what it writes and removes, that it goes on where it stopped, and that it's right while
//! everything changes.

use domain::{
    TweetId, UserId,
    message::{FollowerRange, SendNotificationChunk},
    values::{Channel, TweetText},
};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};
use storage::{
    audit, feeds, notifications,
    repair::{self, Repair, Totals},
    subscriptions, sweep, tweets, users,
};
use test_support::TestDatabase;

const EVERYBODY: FollowerRange = FollowerRange { after: UserId(0), upto: UserId(i64::MAX) };

fn post(db: &TestDatabase, author: UserId) -> TweetId {
    let text = TweetText::parse(&"words ".repeat(20)).unwrap();
    db.database()
        .transaction(|conn| {
            let tweet = tweets::post(conn, author, &text)?;
            feeds::write(conn, &[(tweet.id, EVERYBODY)])?;
            for channel in Channel::ALL {
                notifications::record_chunks(conn, channel, &[&SendNotificationChunk::of(&tweet, EVERYBODY, channel)])?;
            }
            Ok(tweet.id)
        })
        .unwrap()
}

/// Authors with so many followers each and tweets, all of which have arrived.
fn settled(followers: &[usize], tweets: usize) -> (TestDatabase, Vec<UserId>) {
    let db = TestDatabase::new();
    let mut authors = Vec::new();
    for (place, count) in followers.iter().enumerate() {
        let author = db.user(&format!("author{place}"), Channel::Email);
        let followers: Vec<_> =
            (0..*count).map(|n| db.user(&format!("reader{place}_{n}"), Channel::ALL[n % 2])).collect();
        db.follow(author, &followers);
        authors.push(author);
    }
    for _ in 0..tweets {
        for author in &authors {
            post(&db, *author);
        }
    }
    (db, authors)
}

fn run(db: &TestDatabase) -> Totals {
    let mut repair = db.database().transaction(|conn| repair::open(conn, "ann")).unwrap();
    while !repair.is_over() {
        repair = db.database().transaction(|conn| repair::step(conn, repair.id)).unwrap();
    }
    repair.totals
}

fn rehearsed(db: &TestDatabase) -> Totals {
    let mut repair = Repair::rehearsal();
    while !repair.is_over() {
        repair = db.database().transaction(|conn| repair::rehearse(conn, &repair)).unwrap();
    }
    repair.totals
}

fn wrong(db: &TestDatabase) -> Vec<(&'static str, u64)> {
    let findings = db.database().transaction(|conn| audit::run(conn, |_| ())).unwrap();
    findings.into_iter().filter(|finding| finding.count > 0).map(|finding| (finding.check, finding.count)).collect()
}

fn sweep(db: &TestDatabase) {
    db.execute("UPDATE feed_garbage SET due_at = clock_timestamp()");
    while let Some(piece) = db.database().transaction(sweep::take).unwrap() {
        let _ = db.database().transaction(|conn| sweep::remove_page(conn, &piece));
    }
}

/// Every row of feeds and notifications, told apart.
fn rows(db: &TestDatabase) -> Vec<i64> {
    db.ids(
        "SELECT hashtextextended(r::text, 0) AS n FROM (
             SELECT 'feed', reader_id, tweet_id::text, '', '' FROM feed_entry
             UNION ALL SELECT 'email', user_id, source_id, email, text FROM email_notification
             UNION ALL SELECT 'sms', user_id, source_id, phone, text FROM sms_notification) r ORDER BY 1",
    )
}

#[test]
fn a_repair_writes_what_is_missing_and_removes_what_is_extra_and_nothing_else() {
    let (db, authors) = settled(&[7, 0, 3], 4);
    db.user("stranger", Channel::Email);
    let stranger = r#"(SELECT id FROM "user" WHERE login = 'stranger')"#;
    // Nobody is told again of what came before, though it's in the feed.
    let late = db.user("late", Channel::Phone);
    db.follow(authors[0], &[late]);
    let as_it_must_be = rows(&db);
    assert_eq!((wrong(&db), rehearsed(&db), run(&db)), (vec![], Totals::default(), Totals::default()));
    assert_eq!(rows(&db), as_it_must_be);

    let feed_rows = db.execute("DELETE FROM feed_entry WHERE (reader_id + tweet_id) % 3 = 0");
    let notifications =
        db.execute("DELETE FROM email_notification WHERE user_id % 2 = 0") + db.execute("DELETE FROM sms_notification");
    assert!(feed_rows > 0 && notifications > 0);
    for planted in [
        format!("INSERT INTO feed_entry SELECT {stranger}, id FROM tweet"),
        "INSERT INTO feed_entry SELECT max(reader_id), 999999999 FROM feed_entry".to_owned(),
        format!(
            "INSERT INTO email_notification (user_id, source, source_id, email, text)
             SELECT {stranger}, 'tweet', unnest(ARRAY['1', '01', 'no tweet']), 'x', 'x'"
        ),
    ] {
        db.execute(&planted);
    }
    let totals = Totals {
        feed_rows_written: feed_rows as i64,
        notifications_written: notifications as i64,
        feed_rows_removed: db.count("SELECT count(*) + 1 AS n FROM tweet"),
        notifications_removed: 3,
    };
    assert_eq!(rehearsed(&db), totals);
    assert_ne!(rows(&db), as_it_must_be, "a rehearsal changes nothing");
    assert_eq!(run(&db), totals);
    assert_eq!((rows(&db), wrong(&db)), (as_it_must_be, vec![]));
    assert_eq!(run(&db), Totals::default());
    assert_eq!(
        db.count("SELECT count(*) AS n FROM feed_repair WHERE started_by = 'ann' AND finished_at IS NOT NULL"),
        3
    );
}

#[test]
fn a_repair_follows_the_rule_for_what_is_deleted_and_keeps_what_was_sent() {
    let (db, authors) = settled(&[4, 4], 2);
    let readers = db.ids("SELECT follower_id AS n FROM subscription ORDER BY 1");
    let told =
        db.count("SELECT (SELECT count(*) FROM email_notification) + (SELECT count(*) FROM sms_notification) AS n");
    let tweet = db.ids(&format!("SELECT max(id) AS n FROM tweet WHERE author_id = {}", authors[1]))[0];
    let database = db.database();
    users::delete(&mut database.connection().unwrap(), authors[0]).unwrap();
    database.transaction(|conn| tweets::delete(conn, TweetId(tweet))).unwrap();
    database.transaction(|conn| subscriptions::remove(conn, authors[1], UserId(readers[7]))).unwrap();
    // Another program's, and one that was sent already.
    for (source, source_id, state) in [("message", "no tweet", "recorded"), ("tweet", "no tweet", "sent")] {
        db.execute(&format!(
            "INSERT INTO email_notification (user_id, source, source_id, email, text, state)
             VALUES ({}, '{source}', '{source_id}', 'x', 'x', '{state}')",
            readers[0]
        ));
    }
    let totals = run(&db);
    // Eight of the deleted author, four of the deleted tweet, of which who has left had none any more.
    assert_eq!(totals, Totals { feed_rows_removed: 8 + 3, ..Totals::default() });
    assert_eq!(db.count("SELECT count(*) AS n FROM feed_entry"), 3);
    assert_eq!(wrong(&db), [("notifications extra", 1)], "what was sent stays, and is told");
    assert_eq!(
        db.count("SELECT (SELECT count(*) FROM email_notification) + (SELECT count(*) FROM sms_notification) AS n"),
        told + 2
    );
}

#[test]
fn a_repair_goes_on_where_it_was_interrupted_whoever_runs_it_again() {
    let db = TestDatabase::new();
    let author = db.user("author", Channel::Email);
    let followers = 25_000;
    // More than a page has room for, so a tweet's followers are divided; and more tweets than a page looks at.
    db.execute(&format!(
        r#"WITH new AS (INSERT INTO "user" (login, channel, email) SELECT 'r' || i, 'email', 'x' FROM generate_series(1, {followers}) i RETURNING id)
           INSERT INTO subscription SELECT {author}, id, 0, now(), 0 FROM new"#
    ));
    let lonely = db.user("lonely", Channel::Email);
    db.execute(&format!("INSERT INTO tweet (author_id, text) SELECT {lonely}, 'x' FROM generate_series(1, 2500)"));
    let tweets = [db.post(author, "first"), db.post(author, "second")];
    let open = |by: &str| db.database().transaction(|conn| repair::open(conn, by)).unwrap();
    let step = |id| db.database().transaction(|conn| repair::step(conn, id)).unwrap();
    let first = open("ann");
    let mut repair = first.clone();
    while repair.totals.feed_rows_written == 0 {
        repair = step(first.id);
    }
    assert!(repair.totals.feed_rows_written < followers, "{repair:?}");
    // What was done is done: these are behind it.
    db.execute("DELETE FROM feed_entry WHERE reader_id = (SELECT min(reader_id) FROM feed_entry)");
    let again = open("ben");
    assert_eq!((again.id, &*again.started_by, again.totals), (first.id, "ann", repair.totals));
    while !repair.is_over() {
        repair = step(first.id);
    }
    assert_eq!(repair.totals.feed_rows_written, 2 * followers);
    assert_eq!(repair.totals.notifications_written, 2 * followers);
    assert_eq!(wrong(&db), [("feed rows missing", 1)]);
    assert_eq!(run(&db), Totals { feed_rows_written: 1, ..Totals::default() });
    for tweet in tweets {
        let rows = format!("SELECT count(*) AS n FROM feed_entry WHERE tweet_id = {}", tweet.id);
        assert_eq!(db.count(&rows), followers);
    }
    assert!(wrong(&db).is_empty());

    // Whoever wants to begin anew gives up what isn't over.
    let third = open("ann");
    db.database().transaction(repair::abandon).unwrap();
    assert_ne!(open("ann").id, third.id);
}

/// Repairs one after the other while readers come and go, tweets come and are deleted, and rows are lost.
#[test]
fn a_repair_amid_all_that_changes_never_leaves_a_wrong_row() {
    let (db, authors) = settled(&[6, 6], 3);
    let readers: Vec<_> = db.ids("SELECT follower_id AS n FROM subscription ORDER BY 1");
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let changing: Vec<_> = authors
            .iter()
            .zip(readers.chunks(6))
            .map(|(author, readers)| {
                let db = &db;
                scope.spawn(move || {
                    for round in 0..25 {
                        for reader in readers.iter().skip(round % 3) {
                            let remove = |conn: &mut _| subscriptions::remove(conn, *author, UserId(*reader));
                            db.database().transaction(remove).unwrap();
                            db.follow(*author, &[UserId(*reader)]);
                        }
                        let tweet = post(db, *author);
                        db.execute(&format!("DELETE FROM feed_entry WHERE tweet_id = {tweet} AND reader_id % 2 = 0"));
                        db.execute(&format!("DELETE FROM email_notification WHERE source_id = '{tweet}'"));
                        if round % 3 == 0 {
                            db.database().transaction(|conn| tweets::delete(conn, tweet)).unwrap();
                        }
                    }
                })
            })
            .collect();
        let repairing = scope.spawn(|| {
            let mut done = 0;
            while !over.load(Ordering::Acquire) {
                done += run(&db).sum();
            }
            done
        });
        changing.into_iter().for_each(|changing| changing.join().unwrap());
        over.store(true, Ordering::Release);
        assert!(repairing.join().unwrap() > 0);
    });
    // What is missing now was lost behind the last repair. Nothing is extra.
    assert!(wrong(&db).iter().all(|(check, _)| check.ends_with("missing")), "{:?}", wrong(&db));
    run(&db);
    assert!(wrong(&db).is_empty());
    sweep(&db);
    let due = "SELECT count(*) AS n FROM subscription s JOIN tweet t ON t.author_id = s.author_id
               AND t.id >= s.since_tweet_id AND t.deleted_at IS NULL";
    assert_eq!(db.count("SELECT count(*) AS n FROM feed_entry"), db.count(due), "and nothing is left over");
    assert!(wrong(&db).is_empty());
}
