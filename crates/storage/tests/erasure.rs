//! What is kept of a deleted user, and for how long.

use domain::{
    UserId,
    message::{FollowerRange, SendNotificationChunk},
    values::{Channel, ImportPlan, Login},
};
use std::slice;
use storage::{
    Error, audit, avatars, dead_letters,
    dead_letters::NewDeadLetter,
    erasure::{self, Erased},
    imports, notifications, tweets, users,
};
use test_support::TestDatabase;

/// What the tests look for everywhere.
const PRIVATE: [&str; 5] = ["zoe-login", "zoe-login@example.com", "zoe-hash", "zoe-says", "zoe-prefix"];

const KEEP_DAYS: u32 = 30;

/// Someone who has left traces wherever one can, and a friend.
fn someone(db: &TestDatabase) -> (UserId, UserId) {
    let (zoe, friend) = (db.user("zoe-login", Channel::Email), db.user("friend", Channel::Email));
    db.execute(&format!(
        "UPDATE \"user\" SET password_hash = 'zoe-hash', age = 44, roles = '[\"zoe-says\"]' WHERE id = {zoe}"
    ));
    let database = db.database();
    database.transaction(|conn| avatars::put(conn, zoe, "image/png", b"zoe-says", "/avatar/zoe-says")).unwrap();
    db.follow(friend, &[zoe]);
    db.follow(zoe, &[friend]);
    db.post(zoe, "zoe-says");
    let tweet = db.post(friend, "hello");
    let all = FollowerRange { after: UserId(0), upto: UserId(i64::MAX) };
    let chunk = SendNotificationChunk::of(&tweet, all, Channel::Email);
    database.transaction(|conn| notifications::record_chunks(conn, Channel::Email, &[&chunk])).unwrap();
    let plan = ImportPlan::new("zoe-prefix", 10, 100).unwrap();
    database.transaction(|conn| imports::open(conn, "zoe-prefix's digest", zoe, &plan)).unwrap();
    letter(db, "a", &format!(r#"{{"id": 1, "author": "zoe-login", "authorId": {zoe}, "text": "zoe-says"}}"#));
    letter(db, "b", &format!(r#"{{"userId": {friend}, "text": "hello"}}"#));
    letter(db, "c", "no JSON \u{0}");
    (zoe, friend)
}

fn letter(db: &TestDatabase, key: &str, body: &str) {
    let letter = NewDeadLetter {
        dedup_key: key.into(),
        queue: "publish_tweet".into(),
        message_id: None,
        kind: None,
        correlation_id: None,
        exchange: "publish_tweet".into(),
        routing_key: String::new(),
        headers: [].into(),
        error: "the query failed".into(),
        attempts: 5,
        body: body.into(),
        failed_at: chrono::Utc::now(),
    };
    db.database().transaction(|conn| dead_letters::record(conn, slice::from_ref(&letter))).unwrap();
}

/// Where anything of [`PRIVATE`] is, in whichever table.
fn traces(db: &TestDatabase) -> Vec<String> {
    let tables = [
        "\"user\"",
        "avatar",
        "tweet",
        "email_notification",
        "sms_notification",
        "follower_import",
        "dead_letter",
        "outbox",
    ];
    let holds = |table: &&str| {
        PRIVATE.iter().any(|text| {
            let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
            db.count(&format!(
                "SELECT count(*) AS n FROM {table} t WHERE t::text LIKE '%{text}%' OR t::text LIKE '%{hex}%'"
            )) > 0
        })
    };
    tables.iter().filter(|table| holds(table)).map(|table| (*table).to_owned()).collect()
}

fn delete(db: &TestDatabase, user: UserId) {
    users::delete(&mut db.database().connection().unwrap(), user).unwrap();
}

fn age(db: &TestDatabase, user: UserId, deleted: &str) {
    db.execute(&format!("UPDATE \"user\" SET deleted_at = now() - interval '{deleted}' WHERE id = {user}"));
}

/// As the sweep does it, until nothing is due.
fn sweep(db: &TestDatabase) -> Erased {
    let mut all = Erased::default();
    while let Some(user) = db.database().transaction(|conn| erasure::take(conn, KEEP_DAYS)).unwrap() {
        all += db.database().transaction(|conn| erasure::step(conn, user)).unwrap().0;
    }
    all
}

#[test]
fn nothing_personal_is_left_of_a_user_deleted_long_ago() {
    let db = TestDatabase::new();
    let (zoe, friend) = someone(&db);
    assert_eq!(traces(&db).len(), 6, "{:?}", traces(&db));
    delete(&db, zoe);
    age(&db, zoe, "30 days 1 second");
    let one_each = Erased { user: 1, avatar: 1, imports: 1, dead_letters: 1, notifications: 1, tweets: 1 };
    assert_eq!(erasure::left(&mut db.database().connection().unwrap(), zoe).unwrap(), one_each);
    assert_eq!(sweep(&db), one_each);
    assert_eq!(traces(&db), Vec::<String>::new());
    assert_eq!(db.count("SELECT count(*) AS n FROM \"user\" WHERE erased_at IS NOT NULL AND erase_at IS NULL"), 1);
    assert_eq!(sweep(&db), Erased::default(), "it's done once");

    // The others' is as it was, and all adds up.
    assert_eq!(users::by_id(&mut db.database().connection().unwrap(), friend).unwrap().login, "friend");
    assert_eq!(db.count("SELECT count(*) AS n FROM dead_letter WHERE state = 'waiting' AND body <> ''"), 2);
    for finding in db.database().transaction(|conn| audit::run(conn, |_| ())).unwrap() {
        // The tweet's chunk wasn't written to feeds here.
        assert!(finding.count == 0 || finding.check == "feed rows missing", "{finding:?}");
    }
}

#[test]
fn a_user_deleted_lately_keeps_everything_and_only_the_login_is_free_again() {
    let db = TestDatabase::new();
    let (zoe, friend) = someone(&db);
    let before = traces(&db);
    delete(&db, zoe);
    age(&db, zoe, "29 days 23 hours");
    assert_eq!(sweep(&db), Erased::default());
    assert_eq!(traces(&db), before);
    let mut conn = db.database().connection().unwrap();
    users::rename(&mut conn, friend, &Login::parse("zoe-login").unwrap()).unwrap();
    // Whoever has the login now keeps it.
    age(&db, zoe, "31 days");
    assert_eq!(sweep(&db).user, 1);
    assert_eq!(users::by_login(&mut conn, "zoe-login").unwrap().id, friend);
}

#[test]
fn a_user_who_is_there_is_never_erased_by_the_sweep() {
    let db = TestDatabase::new();
    let (zoe, _) = someone(&db);
    let step = db.database().transaction(|conn| erasure::step(conn, zoe));
    assert!(matches!(step, Err(Error::NotFound("deleted user"))), "{step:?}");
    let alone = db.count(&format!("SELECT erase_user({zoe})::integer::bigint AS n"));
    assert_eq!((alone, sweep(&db)), (0, Erased::default()));
    // Nor one whom an operator has brought back.
    delete(&db, zoe);
    age(&db, zoe, "31 days");
    db.database().transaction(|conn| erasure::take(conn, KEEP_DAYS)).unwrap().unwrap();
    db.execute("UPDATE \"user\" SET deleted_at = NULL, erase_at = now()");
    assert_eq!(sweep(&db), Erased::default());
}

#[test]
fn an_address_is_missing_only_where_the_user_is_deleted() {
    let db = TestDatabase::new();
    let (zoe, _) = someone(&db);
    let refused = |sql: &str| {
        let mut conn = db.database().connection().unwrap();
        test_support::sql::execute(&mut conn, sql).unwrap_err()
    };
    let without = format!("UPDATE \"user\" SET email = NULL WHERE id = {zoe}");
    assert!(format!("{:?}", refused(&without)).contains("user_contact"));
    delete(&db, zoe);
    age(&db, zoe, "31 days");
    sweep(&db);
    let back = format!("UPDATE \"user\" SET deleted_at = NULL WHERE id = {zoe}");
    assert!(format!("{:?}", refused(&back)).contains("user_contact"), "who was erased can't come back");
}

#[test]
fn a_user_with_thousands_of_rows_is_erased_in_steps_between_which_others_have_their_turn() {
    let db = TestDatabase::new();
    let (zoe, _) = someone(&db);
    let other = db.user("other", Channel::Phone);
    db.execute(&format!(
        "INSERT INTO sms_notification (user_id, source, source_id, phone, text)
         SELECT {zoe}, 'message', n::text, '+1', 'zoe-says' FROM generate_series(1, 2500) n"
    ));
    db.execute(&format!("INSERT INTO tweet (author_id, text) SELECT {zoe}, 'zoe-says' FROM generate_series(1, 1200)"));
    for (user, deleted) in [(zoe, "40 days"), (other, "35 days")] {
        delete(&db, user);
        age(&db, user, deleted);
    }
    let mut turns = Vec::new();
    while let Some(user) = db.database().transaction(|conn| erasure::take(conn, KEEP_DAYS)).unwrap() {
        let (erased, _) = db.database().transaction(|conn| erasure::step(conn, user)).unwrap();
        assert!(erased.notifications <= 2000 && erased.tweets <= 1000, "{erased:?}");
        turns.push(user);
    }
    assert!(turns.len() >= 4 && turns.contains(&other), "{turns:?}");
    assert_eq!(traces(&db), Vec::<String>::new());
}

#[test]
fn a_user_whose_rows_somebody_holds_is_put_off_and_keeps_nobody_waiting() {
    let db = TestDatabase::new();
    let (zoe, _) = someone(&db);
    let other = db.user("other", Channel::Phone);
    for (user, deleted) in [(zoe, "40 days"), (other, "35 days")] {
        delete(&db, user);
        age(&db, user, deleted);
    }
    let mut holder = db.database().connection().unwrap();
    test_support::sql::execute(&mut holder, "BEGIN").unwrap();
    test_support::sql::execute(&mut holder, "SELECT FROM avatar FOR UPDATE").unwrap();
    let mut results = Vec::new();
    while let Some(user) = db.database().transaction(|conn| erasure::take(conn, KEEP_DAYS)).unwrap() {
        results.push((user, db.database().transaction(|conn| erasure::step(conn, user)).is_ok()));
    }
    assert_eq!(results, [(zoe, false), (other, true)]);
    test_support::sql::execute(&mut holder, "ROLLBACK").unwrap();
    db.execute("UPDATE \"user\" SET erase_at = now() WHERE erase_at IS NOT NULL");
    sweep(&db);
    assert_eq!(traces(&db), Vec::<String>::new());
}

#[test]
fn what_was_under_way_when_a_user_was_erased_at_once_is_found_by_a_last_look() {
    let db = TestDatabase::new();
    let (zoe, _) = someone(&db);
    assert!(db.database().transaction(|conn| erasure::begin(conn, zoe)).unwrap(), "this deletes her");
    assert!(!db.database().transaction(|conn| erasure::begin(conn, zoe)).unwrap(), "it was done");
    sweep(&db);
    assert_eq!(traces(&db), Vec::<String>::new());
    // A statement that began before.
    db.execute(&format!(
        "INSERT INTO email_notification (user_id, source, source_id, email, text)
         VALUES ({zoe}, 'tweet', '9', 'zoe-login@example.com', 'hello')"
    ));
    assert_eq!(sweep(&db), Erased::default(), "not yet");
    db.execute(
        "UPDATE \"user\" SET deleted_at = deleted_at - interval '1 hour', erase_at = erase_at - interval '1 hour'",
    );
    assert_eq!(sweep(&db).notifications, 1);
    assert_eq!(traces(&db), Vec::<String>::new());
    assert_eq!(db.count("SELECT count(*) AS n FROM \"user\" WHERE erased_at IS NOT NULL"), 1);
    let unknown = db.database().transaction(|conn| erasure::begin(conn, UserId(999)));
    assert!(matches!(unknown, Err(Error::NotFound("user"))), "{unknown:?}");
}

#[test]
fn users_whose_days_are_over_are_found_by_an_index_and_no_scan() {
    let db = TestDatabase::new();
    db.execute(
        "INSERT INTO \"user\" (login, channel, email) SELECT 'u' || n, 'email', 'x' FROM generate_series(1, 20000) n",
    );
    db.execute("UPDATE \"user\" SET deleted_at = now() - interval '40 days' WHERE id % 5000 = 0");
    db.execute("ANALYZE \"user\"");
    for expected in [true, true, true, true, false] {
        let (taken, scans) = db
            .database()
            .transaction(|conn| {
                let scans = "SELECT seq_scan AS n FROM pg_stat_xact_user_tables WHERE relname = 'user'";
                let before = test_support::sql::count(conn, scans)?;
                let taken = erasure::take(conn, KEEP_DAYS)?;
                Ok((taken, test_support::sql::count(conn, scans)? - before))
            })
            .unwrap();
        assert_eq!((taken.is_some(), scans), (expected, 0));
    }
}

#[test]
fn the_text_of_a_deleted_tweet_is_erased_when_its_days_are_over_and_no_other() {
    let db = TestDatabase::new();
    let author = db.user("author", Channel::Email);
    let [kept, lately, long_ago] = ["kept", "lately", "long ago"].map(|text| db.post(author, text).id);
    for (tweet, deleted) in [(lately, "29 days"), (long_ago, "31 days")] {
        db.database().transaction(|conn| tweets::delete(conn, tweet)).unwrap();
        db.execute(&format!("UPDATE tweet SET deleted_at = now() - interval '{deleted}' WHERE id = {tweet}"));
    }
    let erase = || db.database().transaction(|conn| erasure::deleted_tweets(conn, KEEP_DAYS)).unwrap();
    assert_eq!((erase(), erase()), (1, 0));
    assert_eq!(db.ids("SELECT id AS n FROM tweet WHERE text = '(erased)'"), [long_ago.0]);
    assert_eq!(db.ids("SELECT id AS n FROM tweet WHERE text <> '(erased)' ORDER BY id"), [kept.0, lately.0]);
}
