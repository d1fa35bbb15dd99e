//! Schedules that are rare: who follows, deletes and sweeps at once, and what somebody else holds meanwhile.

use domain::{
    TweetId, UserId,
    message::{FollowerRange, SendNotificationChunk},
    values::Channel,
};
use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};
use storage::{Database, audit, feeds, notifications, subscriptions, sweep, tweets};
use test_support::{TestDatabase, eventually, sql};

const EVERYBODY: FollowerRange = FollowerRange { after: UserId(0), upto: UserId(i64::MAX) };

/// Posts, and brings the tweet into every feed and notification.
fn post(db: &TestDatabase, author: UserId) -> TweetId {
    let tweet = db.post(author, "hello");
    db.database()
        .transaction(|conn| {
            feeds::write(conn, &[(tweet.id, EVERYBODY)])?;
            for channel in Channel::ALL {
                notifications::record_chunks(conn, channel, &[&SendNotificationChunk::of(&tweet, EVERYBODY, channel)])?;
            }
            Ok(())
        })
        .unwrap();
    tweet.id
}

fn follow(db: &TestDatabase, author: UserId, reader: UserId) {
    db.database().transaction(|conn| subscriptions::create(conn, author, reader)).unwrap();
}

fn leave(db: &TestDatabase, author: UserId, reader: UserId) {
    db.database().transaction(|conn| subscriptions::remove(conn, author, reader)).unwrap();
}

fn feed(db: &TestDatabase, reader: UserId) -> Vec<TweetId> {
    let mut conn = db.database().connection().unwrap();
    feeds::page(&mut conn, reader, TweetId(i64::MAX), 1000).unwrap().into_iter().map(|tweet| tweet.id).collect()
}

fn assert_audit_is_clean(db: &TestDatabase) {
    for finding in db.database().transaction(|conn| audit::run(conn, |_| ())).unwrap() {
        assert_eq!(finding.count, 0, "{finding:?}");
    }
}

fn make_due(db: &TestDatabase) {
    db.execute("UPDATE feed_garbage SET due_at = clock_timestamp() - interval '1 second'");
}

/// Sweeps what is due, as the service does.
fn sweep_with(database: &Database) {
    while let Some(piece) = database.transaction(sweep::take).unwrap() {
        // What fails was put off.
        let _ = database.transaction(|conn| sweep::remove_page(conn, &piece));
    }
}

fn sweep(db: &TestDatabase) {
    sweep_with(db.database());
}

/// Runs `work` while another session has run `sql` and not committed, until that one hears that it may go back.
fn while_held<T>(db: &TestDatabase, sql: &str, work: impl FnOnce(&mpsc::Sender<()>) -> T) -> T {
    let (let_go, may_go) = mpsc::channel::<()>();
    let (held, is_held) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut conn = db.database().connection().unwrap();
            sql::execute(&mut conn, "BEGIN").unwrap();
            sql::execute(&mut conn, sql).unwrap();
            held.send(()).unwrap();
            // Also when the other side is gone.
            let _ = may_go.recv();
            sql::execute(&mut conn, "ROLLBACK").unwrap();
        });
        is_held.recv().unwrap();
        let result = work(&let_go);
        drop(let_go);
        result
    })
}

/// Awaits that so many sessions wait for locks.
fn await_waiting(db: &TestDatabase, sessions: i64) {
    let waiting = "SELECT count(*) AS n FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("sessions wait for a lock", || (db.count(waiting) >= sessions).then_some(()));
}

#[test]
fn who_follows_again_amid_a_sweep_keeps_the_authors_tweets() {
    let db = TestDatabase::new();
    let (author, reader) = (db.user("author", Channel::Email), db.user("reader", Channel::Email));
    follow(&db, author, reader);
    let tweets: Vec<_> = (0..3).map(|_| post(&db, author)).collect();
    leave(&db, author, reader);
    // As chunks leave them that were under way.
    for tweet in &tweets {
        db.execute(&format!("INSERT INTO feed_entry VALUES ({reader}, {tweet}) ON CONFLICT DO NOTHING"));
    }
    make_due(&db);
    let first = format!("SELECT FROM feed_entry WHERE reader_id = {reader} ORDER BY tweet_id LIMIT 1 FOR UPDATE");
    while_held(&db, &first, |let_go| {
        thread::scope(|scope| {
            scope.spawn(|| sweep(&db));
            await_waiting(&db, 1);
            let again = scope.spawn(|| follow(&db, author, reader));
            eventually("the follower is done, or waits as well", || {
                let waiting = "SELECT count(*) AS n FROM pg_stat_activity
                               WHERE datname = current_database() AND wait_event_type = 'Lock'";
                (again.is_finished() || db.count(waiting) > 1).then_some(())
            });
            let_go.send(()).unwrap();
        });
    });
    assert_eq!(feed(&db, reader).len(), 3);
    make_due(&db);
    sweep(&db);
    assert_eq!(feed(&db, reader).len(), 3);
    assert_audit_is_clean(&db);
}

#[test]
fn a_tweet_deleted_amid_following_lets_no_older_one_in() {
    let db = TestDatabase::new();
    let author = db.user("author", Channel::Email);
    let (reader, other) = (db.user("reader", Channel::Email), db.user("other", Channel::Email));
    let tweets: Vec<_> = (0..102).map(|_| post(&db, author)).collect();
    // The same subscription, uncommitted: whoever follows waits for it, with what was seen before.
    let held = format!("INSERT INTO subscription SELECT {author}, {reader}, 0, now(), 0");
    while_held(&db, &held, |let_go| {
        thread::scope(|scope| {
            let following = scope.spawn(|| follow(&db, author, reader));
            await_waiting(&db, 1);
            db.database().transaction(|conn| tweets::delete(conn, tweets[50])).unwrap();
            let_go.send(()).unwrap();
            following.join().unwrap();
        });
    });
    follow(&db, author, other);
    assert_audit_is_clean(&db);
    assert_eq!(feed(&db, reader).len(), 99, "the hundred newest that there were, without the one that is deleted");
    assert_eq!(feed(&db, other).len(), 100);
}

#[test]
fn garbage_that_cant_be_removed_now_doesnt_keep_the_rest_waiting() {
    let db = TestDatabase::new();
    let author = db.user("author", Channel::Email);
    let readers: Vec<_> = (0..3).map(|n| db.user(&format!("reader{n}"), Channel::Email)).collect();
    for reader in &readers {
        follow(&db, author, *reader);
    }
    let (first, second) = (post(&db, author), post(&db, author));
    for tweet in [first, second] {
        db.database().transaction(|conn| tweets::delete(conn, tweet)).unwrap();
        make_due(&db);
    }
    let rows = |tweet: TweetId| db.count(&format!("SELECT count(*) AS n FROM feed_entry WHERE tweet_id = {tweet}"));
    let held = format!("SELECT FROM feed_entry WHERE tweet_id = {first} ORDER BY reader_id LIMIT 1 FOR UPDATE");
    let mut settings = db.settings();
    settings.statement_timeout_ms = 2000;
    let database = Database::open(&settings, "test").unwrap();
    while_held(&db, &held, |_| {
        for _ in 0..2 {
            sweep_with(&database);
        }
        assert_eq!((rows(first), rows(second)), (3, 0));
    });
    make_due(&db);
    sweep(&db);
    assert_eq!(rows(first), 0);
    assert_eq!(db.count("SELECT count(*) AS n FROM feed_garbage"), 0);
}

#[test]
fn who_is_notified_depends_on_no_clock() {
    let db = TestDatabase::new();
    let author = db.user("author", Channel::Email);
    let (early, late) = (db.user("early", Channel::Email), db.user("late", Channel::Phone));
    follow(&db, author, early);
    // As if the clock had been set back by an hour since.
    db.execute("UPDATE subscription SET created_at = created_at + interval '1 hour'");
    let first = db.post(author, "hello");
    let tell = || {
        for channel in Channel::ALL {
            let chunk = SendNotificationChunk::of(&first, EVERYBODY, channel);
            db.database().transaction(|conn| notifications::record_chunks(conn, channel, &[&chunk])).unwrap();
        }
    };
    tell();
    assert_eq!(db.ids("SELECT user_id AS n FROM email_notification"), [early.0]);
    follow(&db, author, late);
    // And forward again, and further, before this chunk came.
    db.execute("UPDATE tweet SET created_at = created_at + interval '2 hours'");
    tell();
    assert!(db.ids("SELECT user_id AS n FROM sms_notification").is_empty(), "this one followed afterwards");
    db.database().transaction(|conn| feeds::write(conn, &[(first.id, EVERYBODY)])).unwrap();
    assert_audit_is_clean(&db);

    // Those who have left are told from those who should never have been told, whatever the times say.
    leave(&db, author, early);
    db.execute("UPDATE former_subscription SET ended_at = created_at - interval '3 hours'");
    assert_audit_is_clean(&db);
    post(&db, author);
    db.execute(&format!(
        "INSERT INTO email_notification (user_id, source, source_id, email, text)
         SELECT {early}, 'tweet', max(id), 'x', 'x' FROM tweet"
    ));
    let findings = db.database().transaction(|conn| audit::run(conn, |_| ())).unwrap();
    let extra = findings.iter().find(|finding| finding.check == "notifications extra").unwrap();
    assert_eq!(extra.count, 1, "left before that was posted");
}

#[test]
fn a_sequence_that_was_set_back_changes_nothing_of_who_sees_and_is_told() {
    let db = TestDatabase::new();
    let author = db.user("author", Channel::Email);
    let (early, late) = (db.user("early", Channel::Email), db.user("late", Channel::Email));
    follow(&db, author, early);
    let before: Vec<_> = (0..5).map(|_| post(&db, author)).collect();
    // Only the newest are left of what the sequence has given: ids below them are free again.
    db.execute("UPDATE tweet SET id = DEFAULT");
    db.execute("UPDATE feed_entry SET tweet_id = tweet_id + 5");
    db.execute("UPDATE email_notification SET source_id = source_id::bigint + 5");
    follow(&db, author, late);
    for restart in [1, 6] {
        db.execute(&format!("ALTER TABLE tweet ALTER COLUMN id RESTART WITH {restart}"));
        let tweet = post(&db, author);
        assert!(tweet.0 > before[4].0 + 5, "{tweet}");
        assert!(feed(&db, late).contains(&tweet) && feed(&db, early).contains(&tweet));
        assert_audit_is_clean(&db);
    }
    let told =
        |reader: UserId| db.count(&format!("SELECT count(*) AS n FROM email_notification WHERE user_id = {reader}"));
    assert_eq!((told(early), told(late)), (7, 2));
}

/// Readers who come and go, tweets that come and are deleted, chunks that come late, and sweeps, all at once.
#[test]
fn whatever_comes_and_goes_at_once_the_feeds_are_as_they_must_be_in_the_end() {
    let db = TestDatabase::new();
    let author = db.user("author", Channel::Email);
    let readers: Vec<_> = (0..6).map(|n| db.user(&format!("reader{n}"), Channel::ALL[n % 2])).collect();
    for _ in 0..5 {
        post(&db, author);
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let changing: Vec<_> = readers
            .chunks(3)
            .map(|readers| {
                let db = &db;
                scope.spawn(move || {
                    for _ in 0..60 {
                        for reader in readers {
                            follow(db, author, *reader);
                            leave(db, author, *reader);
                            // As of a chunk that was under way.
                            db.execute(&format!(
                                "INSERT INTO feed_entry SELECT {reader}, id FROM tweet ON CONFLICT DO NOTHING"
                            ));
                        }
                    }
                    for reader in readers {
                        follow(db, author, *reader);
                    }
                })
            })
            .collect();
        let swept = scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                make_due(&db);
                sweep(&db);
            }
        });
        for round in 0..20 {
            let tweet = post(&db, author);
            if round % 2 == 0 {
                db.database().transaction(|conn| tweets::delete(conn, tweet)).unwrap();
            }
        }
        changing.into_iter().for_each(|changing| changing.join().unwrap());
        over.store(true, Ordering::Release);
        swept.join().unwrap();
    });
    assert_audit_is_clean(&db);
    make_due(&db);
    sweep(&db);
    let tweets = db.count("SELECT count(*) AS n FROM tweet WHERE deleted_at IS NULL");
    assert_eq!(
        db.count("SELECT count(*) AS n FROM feed_entry"),
        tweets * readers.len() as i64,
        "and nothing is left over"
    );
}

#[test]
fn a_large_piece_of_garbage_is_swept_in_pages_between_which_others_have_their_turn() {
    let db = TestDatabase::new();
    let author = db.user("author", Channel::Email);
    let readers = 2500;
    db.execute(&format!(
        "INSERT INTO subscription SELECT {author}, id, 0, now(), 0 FROM generate_series(1000, 999 + {readers}) id"
    ));
    // Those who have left may have a row as well, and may have left more than once.
    db.execute(&format!(
        "INSERT INTO former_subscription
         SELECT {author}, id, 0, clock_timestamp(), now(), 0, 0 FROM generate_series(1000, 1099) id, generate_series(1, 3)"
    ));
    let (large, small) = (post(&db, author), db.post(author, "hello").id);
    let lone = FollowerRange::only(UserId(1500));
    db.database().transaction(|conn| feeds::write(conn, &[(small, lone)])).unwrap();
    let rows = |tweet: TweetId| db.count(&format!("SELECT count(*) AS n FROM feed_entry WHERE tweet_id = {tweet}"));
    assert_eq!((rows(large), rows(small)), (readers, 1));
    for tweet in [large, small] {
        db.database().transaction(|conn| tweets::delete(conn, tweet)).unwrap();
    }
    make_due(&db);
    db.execute(&format!("UPDATE feed_garbage SET due_at = due_at - interval '1 s' WHERE tweet_id = {large}"));
    let page = || {
        let piece = db.database().transaction(sweep::take).unwrap().expect("a piece is due");
        db.database().transaction(|conn| sweep::remove_page(conn, &piece)).unwrap()
    };
    assert_eq!(page(), 1000);
    assert_eq!(page(), 1);
    assert_eq!((rows(large), rows(small)), (readers - 1000, 0));
    sweep(&db);
    assert_eq!(db.count("SELECT count(*) AS n FROM feed_entry"), 0);
    assert_eq!(
        db.count("SELECT count(*) AS n FROM feed_garbage WHERE author_id IS NOT NULL AND tweet_id IS NOT NULL"),
        0
    );
}

#[test]
fn leaving_an_author_of_thousands_of_tweets_takes_the_newest_at_once_and_the_rest_with_the_sweep() {
    let db = TestDatabase::new();
    let (author, reader) = (db.user("author", Channel::Email), db.user("reader", Channel::Email));
    let other = db.user("other", Channel::Email);
    follow(&db, author, reader);
    follow(&db, author, other);
    db.execute(&format!("INSERT INTO tweet (author_id, text) SELECT {author}, 'hello' FROM generate_series(1, 2500)"));
    db.execute("INSERT INTO feed_entry SELECT follower_id, id FROM subscription, tweet");
    leave(&db, author, reader);
    let rows = |reader: UserId| db.count(&format!("SELECT count(*) AS n FROM feed_entry WHERE reader_id = {reader}"));
    assert_eq!((rows(reader), feed(&db, reader).len()), (1500, 0));
    make_due(&db);
    sweep(&db);
    assert_eq!((rows(reader), rows(other)), (0, 2500));
    assert_eq!(db.count("SELECT count(*) AS n FROM feed_garbage"), 0);
}
