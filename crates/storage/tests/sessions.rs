//! Sessions are as the code needs them, whatever the database and the role have for defaults.

use domain::{
    TweetId, UserId,
    message::{FollowerRange, SendNotificationChunk},
    stream::{ACCOUNT_EVENT, AccountId, Payload},
    values::{Channel, Contact, Email, Login, TweetText},
};
use settings::Secret;
use std::{sync::mpsc, thread, time::Duration};
use storage::{
    Database, Error, PgConnection, Settings, audit, feeds, message_outbox, migrations, notifications, results, streams,
    subscriptions, tweets,
    users::{self, NewUser},
};
use test_support::{TestDatabase, eventually, sql};

/// What any role may set for itself, as unlike what the code needs as can be.
const HOSTILE: &[(&str, &str)] = &[
    ("default_transaction_isolation", "repeatable read"),
    ("default_transaction_deferrable", "on"),
    ("statement_timeout", "1ms"),
    ("lock_timeout", "1ms"),
    ("idle_in_transaction_session_timeout", "1ms"),
    ("idle_session_timeout", "1ms"),
    ("synchronous_commit", "off"),
    ("search_path", "nowhere"),
    ("TimeZone", "Asia/Kathmandu"),
    ("DateStyle", "SQL, DMY"),
    ("IntervalStyle", "sql_standard"),
    ("standard_conforming_strings", "off"),
    ("client_encoding", "LATIN1"),
    ("bytea_output", "escape"),
    ("array_nulls", "off"),
    ("row_security", "off"),
    ("exit_on_error", "on"),
    ("session_replication_role", "replica"),
];

/// A pool for a database that has these defaults.
fn with_defaults(db: &TestDatabase, defaults: &[(&str, &str)]) -> Database {
    let name = db.url().rsplit_once('/').unwrap().1;
    for (setting, value) in defaults {
        db.execute(&format!("ALTER DATABASE {name} SET {setting} = '{value}'"));
    }
    Database::open(&db.settings(), "test").unwrap()
}

/// A pool for a role of the test's own, which is no superuser, and the role's name. Roles are the server's, so it has to be
/// [dropped](drop_role).
fn as_role(db: &TestDatabase, defaults: &[(&str, &str)]) -> (Settings, String) {
    let role = format!("role_of_{}", db.url().rsplit_once('/').unwrap().1);
    db.execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'secret'"));
    db.execute(&format!("GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}"));
    for (setting, value) in defaults {
        db.execute(&format!("ALTER ROLE {role} SET {setting} = '{value}'"));
    }
    let server = db.url().rsplit_once('@').unwrap().1;
    let url = Secret::from(format!("postgres://{role}:secret@{server}"));
    (Settings { url, connect_timeout_ms: 1000, ..db.settings() }, role)
}

fn drop_role(db: &TestDatabase, role: &str) {
    db.execute(&format!("DROP OWNED BY {role}"));
    db.execute(&format!("DROP ROLE {role}"));
}

fn refusal(settings: &Settings) -> String {
    match Database::open(settings, "test").unwrap().ping() {
        Err(Error::Unavailable(why)) => why.to_string(),
        other => panic!("{other:?}"),
    }
}

fn user(conn: &mut PgConnection, login: &str) -> UserId {
    let login = Login::parse(login).unwrap();
    let contact = Contact::Email(Email::parse("a@example.com").unwrap());
    let new = NewUser { login: &login, contact: &contact, password_hash: None, age: None, is_active: true, roles: &[] };
    users::create(conn, &new).unwrap().id
}

const EVERYBODY: FollowerRange = FollowerRange { after: UserId(0), upto: UserId(i64::MAX) };

/// What sessions of the pool have for a setting.
fn has(database: &Database, setting: &str, value: &str) -> bool {
    let sql = format!("SELECT count(*) AS n FROM pg_settings WHERE name = '{setting}' AND setting = '{value}'");
    sql::count(&mut database.connection().unwrap(), &sql).unwrap() == 1
}

#[test]
fn whoever_follows_while_the_author_posts_misses_nothing_though_snapshots_are_taken_early_by_default() {
    const FOLLOWERS: i64 = 20;
    let db = TestDatabase::new();
    for isolation in ["repeatable read", "serializable"] {
        let database = with_defaults(&db, &[("default_transaction_isolation", isolation)]);
        let conn = &mut *database.connection().unwrap();
        let prefix = isolation.split(' ').next().unwrap();
        let author = user(conn, prefix);
        let followers: Vec<_> = (0..FOLLOWERS).map(|n| user(conn, &format!("{prefix}_{n}"))).collect();
        let pool = Settings { pool_size: FOLLOWERS as u32 + 1, ..db.settings() };
        let pool = Database::open(&pool, "test").unwrap();
        let (posted, may_follow) = mpsc::channel();
        let tweet = thread::scope(|scope| {
            let poster = scope.spawn(|| {
                let text = TweetText::parse("hello").unwrap();
                database.transaction(|conn| {
                    let tweet = tweets::post(conn, author, &text)?;
                    feeds::write(conn, &[(tweet.id, EVERYBODY)])?;
                    for channel in Channel::ALL {
                        let chunk = SendNotificationChunk::of(&tweet, EVERYBODY, channel);
                        notifications::record_chunks(conn, channel, &[&chunk])?;
                    }
                    posted.send(()).unwrap();
                    let waiting = "SELECT count(*) AS n FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
                                   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
                    eventually("all want to follow", || (db.count(waiting) == FOLLOWERS).then_some(()));
                    Ok(tweet.id)
                })
            });
            may_follow.recv().unwrap();
            for follower in &followers {
                let pool = &pool;
                scope.spawn(move || {
                    pool.transaction(|conn| subscriptions::create(conn, author, *follower)).unwrap();
                });
            }
            poster.join().unwrap().unwrap()
        });
        for follower in followers {
            let feed = feeds::page(conn, follower, TweetId(i64::MAX), 10).unwrap();
            assert_eq!(feed.iter().map(|tweet| tweet.id).collect::<Vec<_>>(), [tweet], "{isolation}");
        }
        for finding in database.transaction(|conn| audit::run(conn, |_| ())).unwrap() {
            assert_eq!(finding.count, 0, "{finding:?}");
        }
    }
}

#[test]
fn everything_works_where_every_default_is_unlike_what_the_code_needs() {
    let db = TestDatabase::new();
    let database = with_defaults(&db, HOSTILE);
    let conn = &mut *database.connection().unwrap();
    // An error leaves the session in use, and its kind is known.
    let ann = user(conn, "ann\\é");
    let other = user(conn, "other");
    let login = Login::parse("ann\\é").unwrap();
    let twice = users::rename(conn, other, &login);
    assert!(matches!(twice, Err(Error::Taken("login"))), "{twice:?}");
    assert_eq!(users::by_login(conn, "ann\\é").unwrap().id, ann);
    // Longer than any of the defaults allow.
    sql::execute(conn, "SELECT pg_sleep(0.1)").unwrap();
    database
        .transaction(|conn| {
            sql::execute(conn, "SELECT 1")?;
            thread::sleep(Duration::from_millis(100));
            sql::execute(conn, "SELECT 1")
        })
        .unwrap();

    let account = AccountId::parse("a").unwrap();
    let event = (account.clone(), Payload::parse(r#"{"path": "C:\\dir\\é"}"#).unwrap());
    database.transaction(|conn| streams::append(conn, ACCOUNT_EVENT, std::slice::from_ref(&event), Some("é"))).unwrap();
    let (standing, events) = results::account(conn, &account, 0, 10, 1 << 20).unwrap();
    assert_eq!((standing.head, &*events[0].payload), (1, event.1.as_str()));
    let age = chrono::Utc::now() - events[0].event.generated_at;
    assert!(age.num_minutes().abs() < 5, "times are what they were: {age}");

    let new = message_outbox::New { text: "a\\b é", key: Some("k"), partition: None, count: Some(3) };
    assert_eq!(database.transaction(|conn| message_outbox::append(conn, &new, None)).unwrap(), 3);
    assert_eq!(db.count("SELECT count(*) AS n FROM message_outbox WHERE text LIKE 'a\\\\b é #_'"), 3);
    // What refers to nobody is refused by a trigger.
    sql::execute(conn, "INSERT INTO avatar VALUES (-1, 'image/png', '')").unwrap_err();
    assert!(has(&database, "synchronous_commit", "on"));
}

#[test]
fn a_commit_waits_for_the_disk_and_for_more_where_the_operator_says_so() {
    let db = TestDatabase::new();
    for (default, expected) in
        [("off", "on"), ("local", "on"), ("remote_write", "on"), ("on", "on"), ("remote_apply", "remote_apply")]
    {
        let database = with_defaults(&db, &[("synchronous_commit", default)]);
        assert!(has(&database, "synchronous_commit", expected), "{default}");
    }
}

#[test]
fn what_a_role_may_not_set_is_refused_and_named() {
    let db = TestDatabase::new();
    let (settings, role) = as_role(&db, &[("session_replication_role", "replica")]);
    let why = refusal(&settings);
    assert!(why.contains("session_replication_role is `replica`"), "{why}");
    assert!(!why.contains("secret"), "{why}");
    db.execute(&format!("ALTER ROLE {role} RESET session_replication_role"));
    Database::open(&settings, "test").unwrap().ping().unwrap();
    drop_role(&db, &role);
}

#[test]
fn a_database_that_an_operator_has_made_read_only_counts_as_away() {
    let db = TestDatabase::new();
    let mut settings = db.settings();
    settings.connect_timeout_ms = 1000;
    let name = db.url().rsplit_once('/').unwrap().1;
    with_defaults(&db, &[("default_transaction_read_only", "on")]);
    let why = refusal(&settings);
    assert!(why.contains("transaction_read_only is `on`"), "{why}");
    db.execute(&format!("ALTER DATABASE {name} RESET default_transaction_read_only"));
    Database::open(&settings, "test").unwrap().ping().unwrap();
}

#[test]
fn the_tables_are_in_the_schema_of_the_settings_and_never_made_twice() {
    let db = TestDatabase::new();
    db.execute("CREATE SCHEMA fleet");
    let in_fleet = || Database::open(&Settings { schema: "fleet".into(), ..db.settings() }, "test").unwrap();
    let elsewhere = migrations::run(&mut in_fleet().connection().unwrap());
    assert!(matches!(elsewhere, Err(Error::Conflict(_))), "{elsewhere:?}");
    db.execute("DROP SCHEMA public CASCADE");
    let database = with_defaults(&db, &[("search_path", "public")]);
    migrations::run(&mut in_fleet().connection().unwrap()).unwrap();
    assert!(!migrations::are_pending(&mut in_fleet().connection().unwrap()).unwrap());
    user(&mut in_fleet().connection().unwrap(), "ann");
    let missing = migrations::run(&mut database.connection().unwrap());
    assert!(matches!(missing, Err(Error::Conflict(_))), "{missing:?}");
}
