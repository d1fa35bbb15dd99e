//! The rules of following, posting, leaving and deleting, on a real database.

use domain::{
    TweetId, UserId,
    message::{FollowerRange, SendNotificationChunk},
    values::{Channel, Contact, Email, ImportPlan, Login, Phone, TweetText},
};
use std::thread;
use storage::{
    Error, PgConnection, audit, feeds, imports, migrations, notifications, subscriptions, sweep, tweets,
    users::{self, NewUser},
};
use test_support::TestDatabase;

const EVERYBODY: FollowerRange = FollowerRange { after: UserId(0), upto: UserId(i64::MAX) };

fn user(conn: &mut PgConnection, login: &str, channel: Channel) -> UserId {
    let contact = match channel {
        Channel::Email => Contact::Email(Email::parse("a@example.com").unwrap()),
        Channel::Phone => Contact::Phone(Phone::parse("+99912345678").unwrap()),
    };
    let login = Login::parse(login).unwrap();
    let new = NewUser { login: &login, contact: &contact, password_hash: None, age: None, is_active: true, roles: &[] };
    users::create(conn, &new).unwrap().id
}

/// Posts and brings the tweet to everybody, as the request without `async` does.
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

fn feed(conn: &mut PgConnection, reader: UserId) -> Vec<TweetId> {
    feeds::page(conn, reader, TweetId(i64::MAX), 1000).unwrap().into_iter().map(|tweet| tweet.id).collect()
}

fn assert_audit_is_clean(db: &TestDatabase) {
    for finding in db.database().transaction(|conn| audit::run(conn, |_| ())).unwrap() {
        assert_eq!(finding.count, 0, "{finding:?}");
    }
}

#[test]
fn a_follower_sees_the_hundred_newest_and_all_that_follow() {
    let db = TestDatabase::new();
    let mut conn = db.database().connection().unwrap();
    let (author, early, late) = (
        user(&mut conn, "author", Channel::Email),
        user(&mut conn, "early", Channel::Email),
        user(&mut conn, "late", Channel::Phone),
    );
    db.database().transaction(|conn| subscriptions::create(conn, author, early)).unwrap();
    let posted: Vec<TweetId> = (0..120).map(|_| post(&db, author)).collect();
    assert!(db.database().transaction(|conn| subscriptions::create(conn, author, late)).unwrap());
    assert!(!db.database().transaction(|conn| subscriptions::create(conn, author, late)).unwrap());
    let newest = post(&db, author);

    let mut seen = feed(&mut conn, late);
    seen.reverse();
    assert_eq!(seen[..100], posted[20..]);
    assert_eq!(seen[100..], [newest]);
    assert_eq!(feed(&mut conn, early).len(), 121);
    assert_eq!(db.count("SELECT count(*) AS n FROM email_notification"), 121);
    assert_eq!(db.count("SELECT count(*) AS n FROM sms_notification"), 1);
    assert_eq!(db.count("SELECT count(*) AS n FROM sms_notification WHERE char_length(text) > 60"), 0);
    assert_audit_is_clean(&db);
}

#[test]
fn leaving_deleting_and_the_sweep_take_tweets_out_of_feeds() {
    let db = TestDatabase::new();
    let mut conn = db.database().connection().unwrap();
    let (author, other, reader) = (
        user(&mut conn, "author", Channel::Email),
        user(&mut conn, "other", Channel::Email),
        user(&mut conn, "reader", Channel::Email),
    );
    for author in [author, other] {
        db.database().transaction(|conn| subscriptions::create(conn, author, reader)).unwrap();
    }
    let (kept, deleted, left) = (post(&db, other), post(&db, other), post(&db, author));
    assert_eq!(feed(&mut conn, reader), [left, deleted, kept]);

    db.database().transaction(|conn| tweets::delete(conn, deleted)).unwrap();
    assert!(matches!(db.database().transaction(|conn| tweets::delete(conn, deleted)), Err(Error::NotFound("tweet"))));
    db.database().transaction(|conn| subscriptions::remove(conn, author, reader)).unwrap();
    assert!(matches!(
        db.database().transaction(|conn| subscriptions::remove(conn, author, reader)),
        Err(Error::NotFound("subscription"))
    ));
    assert_eq!(feed(&mut conn, reader), [kept]);

    // A chunk that was under way writes its row after the end of the subscription: unseen, and swept.
    db.execute(&format!("INSERT INTO feed_entry VALUES ({reader}, {left})"));
    assert_eq!(feed(&mut conn, reader), [kept]);
    assert!(db.database().transaction(sweep::take).unwrap().is_none(), "nothing is due yet");
    db.execute("UPDATE feed_garbage SET due_at = now()");
    let mut removed = 0;
    while let Some(piece) = db.database().transaction(sweep::take).unwrap() {
        removed += db.database().transaction(|conn| sweep::remove_page(conn, &piece)).unwrap();
    }
    assert_eq!(removed, 2);
    assert_eq!(db.count("SELECT count(*) AS n FROM feed_entry"), 1);

    // Following again shows the newest ones again, and notifies of none of them once more.
    db.database().transaction(|conn| subscriptions::create(conn, author, reader)).unwrap();
    assert_eq!(feed(&mut conn, reader), [left, kept]);
    assert_audit_is_clean(&db);

    // A deleted author's tweets are seen by nobody, and a deleted reader has no feed.
    users::delete(&mut conn, author).unwrap();
    assert_eq!(feed(&mut conn, reader), [kept]);
    users::delete(&mut conn, reader).unwrap();
    assert!(matches!(feeds::page(&mut conn, reader, TweetId(i64::MAX), 9), Err(Error::NotFound("user"))));
}

#[test]
fn whoever_follows_while_others_post_misses_nothing() {
    let db = TestDatabase::new();
    let mut conn = db.database().connection().unwrap();
    let author = user(&mut conn, "author", Channel::Email);
    let readers: Vec<UserId> = (0..40).map(|n| user(&mut conn, &format!("reader{n}"), Channel::ALL[n % 2])).collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..40 {
                post(&db, author);
            }
        });
        scope.spawn(|| {
            for round in 0..3 {
                for reader in &readers {
                    db.database().transaction(|conn| subscriptions::create(conn, author, *reader)).unwrap();
                    if round < 2 {
                        db.database().transaction(|conn| subscriptions::remove(conn, author, *reader)).unwrap();
                    }
                }
            }
        });
    });
    assert_eq!(db.count("SELECT count(*) AS n FROM subscription"), 40);
    assert_audit_is_clean(&db);
}

#[test]
fn an_import_goes_on_where_it_stopped_and_skips_what_is_taken() {
    let db = TestDatabase::new();
    let mut conn = db.database().connection().unwrap();
    let author = user(&mut conn, "author", Channel::Email);
    let taken = user(&mut conn, "fan_3", Channel::Email);
    post(&db, author);
    let plan = ImportPlan::new("fan", 10, 100).unwrap();
    let opened = db.database().transaction(|conn| imports::open(conn, "key", author, &plan)).unwrap();
    let again = db.database().transaction(|conn| imports::open(conn, "key", author, &plan)).unwrap();
    assert_eq!(opened.id, again.id);

    let step = || db.database().transaction(|conn| imports::step(conn, opened.id, 4)).unwrap();
    let first = step();
    assert_eq!((first.created, first.skipped, first.state.as_str()), (3, 1, "running"));
    assert_eq!(step().state, "running");
    for _ in 0..2 {
        let done = step();
        assert_eq!((done.created, done.skipped, done.state.as_str()), (9, 1, "done"));
    }
    assert_eq!(subscriptions::followers_of(&mut conn, author, 100).unwrap().len(), 9);
    assert!(subscriptions::followers_of(&mut conn, author, 100).unwrap().iter().all(|follower| follower.id != taken));
    assert_eq!(
        db.count(r#"SELECT count(*) AS n FROM "user" WHERE email = login || '@example.com' AND import_id IS NOT NULL"#),
        5
    );
    assert_eq!(db.count(r#"SELECT count(*) AS n FROM "user" WHERE phone ~ '^[+]999[0-9]{12}$'"#), 4);
    assert_audit_is_clean(&db);
}

#[test]
fn imported_users_have_addresses_that_the_product_itself_accepts() {
    let db = TestDatabase::new();
    let mut conn = db.database().connection().unwrap();
    let author = user(&mut conn, "author", Channel::Email);
    let emoji = "😀".repeat(26);
    let prefixes = ["fan", "a@b", "\"q", "<s>", ".dot", "a..b", "'; --", emoji.as_str()];
    let prefixes = prefixes.map(|prefix| prefix.replace(' ', ""));
    for (n, prefix) in prefixes.iter().enumerate() {
        let plan = ImportPlan::new(prefix, 12, 100).unwrap();
        let opened = db.database().transaction(|conn| imports::open(conn, &n.to_string(), author, &plan)).unwrap();
        // The second time is a repetition.
        for _ in 0..2 {
            let done = db.database().transaction(|conn| imports::step(conn, opened.id, 100)).unwrap();
            assert_eq!((done.created, done.state.as_str()), (12, "done"), "{prefix}");
        }
    }
    let users = users::page(&mut conn, 1, 1000).unwrap();
    assert_eq!(users.len(), 12 * prefixes.len());
    let mut addresses = std::collections::BTreeSet::new();
    for user in users {
        assert!(Login::parse(&user.login).is_ok(), "{}", user.login);
        let address = match (&user.email, &user.phone) {
            (Some(email), None) => {
                let local = email.strip_suffix("@example.com").expect("an address at example.com");
                let mailbox = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-/=?^_`{|}~.".contains(c);
                assert!(local.chars().all(mailbox) && !local.starts_with('.') && !local.contains(".."), "{email}");
                if user.login.starts_with("fan") {
                    assert_eq!(local, user.login);
                }
                Email::parse(email).map(String::from)
            }
            (None, Some(phone)) => Phone::parse(phone).map(String::from),
            other => panic!("one address, not {other:?}"),
        };
        let address = address.unwrap_or_else(|invalid| panic!("{} {invalid}: {:?}", user.login, user.email));
        assert!(addresses.insert(address), "{} has an address of its own", user.login);
    }
}

#[test]
fn a_batch_with_an_unknown_tweet_or_user_writes_nothing() {
    let db = TestDatabase::new();
    let mut conn = db.database().connection().unwrap();
    let (author, reader) = (user(&mut conn, "author", Channel::Email), user(&mut conn, "reader", Channel::Phone));
    db.database().transaction(|conn| subscriptions::create(conn, author, reader)).unwrap();
    let text = TweetText::parse("hello").unwrap();
    let tweet = db.database().transaction(|conn| tweets::post(conn, author, &text)).unwrap();
    let written =
        db.database().transaction(|conn| feeds::write(conn, &[(tweet.id, EVERYBODY), (TweetId(999), EVERYBODY)]));
    assert!(matches!(written, Err(Error::NotFound("tweet"))));
    let single = |user_id| notifications::Single { user_id, message_id: "m", text: "hello" };
    for (channel, user) in [(Channel::Phone, UserId(999)), (Channel::Email, reader)] {
        let recorded = db
            .database()
            .transaction(|conn| notifications::record_singles(conn, channel, &[single(reader), single(user)]));
        assert!(matches!(recorded, Err(Error::NotFound(_))));
    }
    assert_eq!(db.count("SELECT (SELECT count(*) FROM feed_entry) + (SELECT count(*) FROM sms_notification) AS n"), 0);
    for expected in [1, 0] {
        let recorded = db
            .database()
            .transaction(|conn| notifications::record_singles(conn, Channel::Phone, &[single(reader)]))
            .unwrap();
        assert_eq!(recorded, expected);
    }
}

#[test]
fn migrations_go_down_and_up_again() {
    let db = TestDatabase::new();
    let mut conn = db.database().connection().unwrap();
    assert!(!migrations::are_pending(&mut conn).unwrap());
    let reverted = migrations::revert_all(&mut conn).unwrap();
    assert_eq!(db.count("SELECT count(*) AS n FROM pg_tables WHERE schemaname = 'public'"), 1, "diesel's own");
    let mut ran = migrations::run(&mut conn).unwrap();
    ran.reverse();
    assert_eq!(ran, reverted);
}

#[test]
fn a_chunk_that_comes_again_or_overlaps_adds_only_what_is_missing() {
    let db = TestDatabase::new();
    let mut conn = db.database().connection().unwrap();
    let author = user(&mut conn, "author", Channel::Email);
    let readers: Vec<UserId> = (0..6).map(|n| user(&mut conn, &format!("reader{n}"), Channel::Email)).collect();
    for reader in &readers {
        db.database().transaction(|conn| subscriptions::create(conn, author, *reader)).unwrap();
    }
    let text = TweetText::parse("hello").unwrap();
    let tweet = db.database().transaction(|conn| tweets::post(conn, author, &text)).unwrap();
    let range = |after: usize, upto: usize| FollowerRange { after: readers[after], upto: readers[upto] };
    for (range, new) in [(range(0, 3), 3), (range(0, 3), 0), (range(1, 4), 1), (EVERYBODY, 2)] {
        let written = db.database().transaction(|conn| feeds::write(conn, &[(tweet.id, range), (tweet.id, range)]));
        assert_eq!(written.unwrap(), new);
        let chunk = SendNotificationChunk::of(&tweet, range, Channel::Email);
        let recorded =
            db.database().transaction(|conn| notifications::record_chunks(conn, Channel::Email, &[&chunk, &chunk]));
        assert_eq!(recorded.unwrap(), new);
    }
    assert_audit_is_clean(&db);
}
