//! What operators rely on: ids, health, limits, and a database that is away or slow.

use crate::app::{Answer, App};
use serde_json::{Value, json};
use settings::Secret;
use std::{
    thread,
    time::{Duration, Instant},
};
use storage::{Connection, Database};
use test_support::{TestDatabase, eventually, sql};
use ureq::http::Method;

#[test]
fn a_correlation_id_is_taken_from_the_client_if_well_formed_and_made_up_otherwise() {
    let app = App::start();
    let id_for = |headers: &[(&str, &str)]| {
        app.send(Method::GET, "/health/live", headers, None).header("x-correlation-id").to_owned()
    };
    let longest = "x".repeat(64);
    for good in ["a", "Az09._-", &longest] {
        assert_eq!(id_for(&[("x-correlation-id", good)]), good);
    }
    let too_long = "x".repeat(65);
    for bad in ["", "a b", "a;b", "ü", &too_long] {
        let id = id_for(&[("x-correlation-id", bad)]);
        assert!(id.len() == 36 && id != bad, "{bad}: {id}");
    }
    assert_ne!(id_for(&[]), id_for(&[]));
}

#[test]
fn other_methods_and_paths_are_refused_with_a_hint() {
    let app = App::start();
    let cases = [
        (Method::PUT, "/api/v1/user", "GET, HEAD, POST, PATCH, DELETE"),
        (Method::GET, "/api/v2/user", "POST"),
        (Method::POST, "/api/v1/get-feed/1", "GET, HEAD"),
        (Method::HEAD, "/api/v1/tweet/1", "DELETE"),
    ];
    for (method, path, allow) in cases {
        let body = (method == Method::PUT || method == Method::POST).then_some(&b""[..]);
        let answer = app.send(method, path, &[], body);
        assert_eq!((answer.status, answer.header("allow")), (405, allow), "{path}");
    }
    for path in ["/", "/api/v1", "/api/v1/get-feed", "/api/v1/get-feed/1/2", "/api/v1/get-feed/"] {
        let answer = app.get(path);
        assert_eq!((answer.status, answer.complaints().len()), (404, 0), "{path}");
    }
}

#[test]
fn head_answers_as_get_does_without_the_body() {
    let app = App::start();
    let path = format!("/api/v1/get-feed/{}", app.user("ann"));
    let (get, head) = (app.get(&path), app.send(Method::HEAD, &path, &[], None));
    assert_eq!((get.status, head.status), (200, 200));
    assert_eq!((head.body.len(), head.header("content-length")), (0, get.header("content-length")));
    assert_eq!(get.header("cache-control"), "no-store");
    assert_eq!(get.header("x-content-type-options"), "nosniff");
    assert_eq!(app.send(Method::HEAD, "/api/v1/get-feed/999999", &[], None).status, 404);
}

fn assert_unavailable(answer: &Answer, kind: &str) {
    assert_eq!((answer.status, answer.complaints().len()), (503, 0), "{answer:?}");
    assert_eq!(answer.header("retry-after"), "2");
    assert_eq!(answer.json()["type"], format!("urn:murmuration:problem:{kind}"));
}

#[test]
fn a_gateway_is_ready_once_the_database_has_every_migration() {
    let db = TestDatabase::new();
    db.execute("CREATE TABLE kept AS SELECT * FROM __diesel_schema_migrations");
    db.execute("DELETE FROM __diesel_schema_migrations");
    let app = App::start_on(db, |_| ());
    let answer = app.get("/health/ready");
    assert_unavailable(&answer, "unavailable");
    assert_eq!(answer.json()["detail"], "the database lacks migrations");
    assert_eq!(app.get("/health/live").status, 200);
    app.db.execute("INSERT INTO __diesel_schema_migrations SELECT * FROM kept");
    assert_eq!(app.get("/health/ready").ok(), json!({"status": "ok"}));
}

/// A pool for the server's own database, from which others can be closed.
fn elsewhere(app: &App) -> Database {
    let mut settings = app.db.settings();
    let (server, _) = app.db.url().rsplit_once('/').unwrap();
    settings.url = Secret::from(format!("{server}/postgres"));
    Database::open(&settings, "test").unwrap()
}

#[test]
fn a_gateway_serves_without_its_database_and_with_it_once_it_is_there() {
    let app = App::start_with(|settings| settings.database.connect_timeout_ms = 1000);
    let name = app.db.url().rsplit_once('/').unwrap().1;
    let admin = elsewhere(&app);
    let mut admin = admin.connection().unwrap();
    let mut admin = |sql: &str| sql::execute(&mut admin, sql).unwrap();
    app.db.execute(r#"INSERT INTO "user" (login, channel, email) VALUES ('ann', 'email', 'ann@example.com')"#);
    // Connecting may take longer than the gateway waits for it here.
    eventually("the gateway has a connection", || (app.get("/api/v1/user?id=1").status == 200).then_some(()));
    admin(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false"));
    admin(&format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"));

    // The first ones may meet the connections that were just lost.
    eventually("503", || {
        let answer = app.get("/api/v1/user?id=1");
        (answer.status == 503).then(|| assert_unavailable(&answer, "unavailable"))
    });
    for (path, body) in [
        ("/api/v1/post-tweet", json!({"userId": 1, "text": "hello", "async": true})),
        ("/api/v1/post-tweet", json!({"userId": 1, "text": "hello"})),
        ("/api/v1/add-followers/1", json!({"followerLoginPrefix": "f", "count": 1})),
        ("/api/v2/user", json!({"login": "bob", "phone": "+19", "password": "correct horse"})),
        ("/api/v1/message", json!({"text": "hello", "count": 2000})),
    ] {
        assert_unavailable(&app.post(path, body), "unavailable");
    }
    assert_eq!(app.post("/api/v1/post-tweet", Value::Null).status, 400, "no database is needed to tell that");
    assert_unavailable(&app.get("/api/v1/message?group=g"), "unavailable");
    assert_unavailable(&app.get("/health/ready"), "unavailable");
    assert_eq!(app.get("/health/live").status, 200);

    admin(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true"));
    eventually("the gateway is ready", || (app.get("/health/ready").status == 200).then_some(()));
    eventually("the user is there", || (app.get("/api/v1/user?id=1").status == 200).then_some(()));
    assert_eq!(app.db.count("SELECT count(*) AS n FROM tweet"), 0);
}

/// Keeps everybody else from writing tweets.
fn lock_tweets(app: &App) -> Connection {
    let mut conn = app.db.database().connection().unwrap();
    sql::execute(&mut conn, "BEGIN").unwrap();
    sql::execute(&mut conn, "LOCK TABLE tweet IN EXCLUSIVE MODE").unwrap();
    conn
}

fn unlock(mut conn: Connection) {
    sql::execute(&mut conn, "ROLLBACK").unwrap();
}

#[test]
fn a_request_for_what_somebody_holds_is_told_to_try_again_and_others_are_served() {
    let app = App::start_with(|settings| settings.database.lock_timeout_ms = 300);
    let (ann, bob, cid) = (app.user("ann"), app.user("bob"), app.user("cid"));
    app.follow(ann, bob);
    let event =
        |account: &str| json!({"events": [{"accountId": "z", "payload": 0}, {"accountId": account, "payload": 1}]});
    app.post("/api/v1/event", event("held")).ok();
    let tweet = |author, by_workers| json!({"userId": author, "text": "hello", "async": by_workers});
    let subscription = |follower| format!("/api/v1/create-subscription/{ann}/{follower}");
    let posts = [
        ("/api/v1/post-tweet".to_owned(), tweet(ann, true)),
        ("/api/v1/post-tweet".to_owned(), tweet(ann, false)),
        (format!("/api/v1/add-followers/{ann}"), json!({"followerLoginPrefix": "f", "count": 1})),
    ];
    let rename = format!("/api/v1/user/{ann}?login=anna");
    let author = || {
        let mut answers: Vec<_> = posts.iter().map(|(path, body)| app.post(path, body.clone())).collect();
        answers.push(app.send(Method::POST, &subscription(cid), &[], None));
        answers.push(app.delete(&format!("/api/v1/subscription/{ann}/{bob}")));
        answers
    };
    let user = || vec![app.send(Method::PATCH, &rename, &[], None), app.post("/api/v1/post-tweet", tweet(ann, true))];
    let head = || vec![app.post("/api/v1/event", event("held"))];
    type Requests<'a> = &'a dyn Fn() -> Vec<Answer>;
    let cases: [(&str, String, Requests<'_>); 3] = [
        ("the author's lock", format!("SELECT pg_advisory_xact_lock({ann})"), &author),
        ("the user's row", format!(r#"SELECT FROM "user" WHERE id = {ann} FOR UPDATE"#), &user),
        ("the account's head", "SELECT FROM stream_head WHERE key = 'held' FOR UPDATE".into(), &head),
    ];
    for (what, hold, requests) in cases {
        let mut conn = app.db.database().connection().unwrap();
        sql::execute(&mut conn, "BEGIN").unwrap();
        sql::execute(&mut conn, &hold).unwrap();
        for answer in requests() {
            assert_unavailable(&answer, "busy");
        }
        app.post("/api/v1/post-tweet", tweet(bob, true)).ok();
        app.post("/api/v1/event", event(what.split(' ').next_back().unwrap())).ok();
        unlock(conn);
        for answer in requests() {
            assert!(answer.status < 300, "{what}: {answer:?}");
        }
    }
    // What was refused left nothing.
    assert_eq!(app.db.count("SELECT count(*) AS n FROM tweet WHERE author_id <> 2"), 3);
    assert_eq!(app.db.count("SELECT count(*) AS n FROM stream_event WHERE key = 'held'"), 2);
}

#[test]
fn requests_give_up_on_a_slow_database_and_what_nobody_waits_for_any_more_isnt_begun() {
    let app = App::start_with(|settings| {
        settings.api_gateway.blocking_threads = 2;
        settings.database.statement_timeout_ms = 600_000;
        settings.database.call_timeout_ms = 600_000;
        settings.api_gateway.request_timeout_ms = 5000;
    });
    let authors: Vec<_> = (0..6).map(|i| app.user(&format!("author{i}"))).collect();
    let lock = lock_tweets(&app);
    let start = Instant::now();
    let app = &app;
    thread::scope(|scope| {
        let requests: Vec<_> = authors
            .into_iter()
            .map(|author| {
                let tweet = json!({"userId": author, "text": "hello", "async": true});
                scope.spawn(move || app.post("/api/v1/post-tweet", tweet))
            })
            .collect();
        let waiting = "SELECT count(*) AS n FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event_type = 'Lock'";
        eventually("as many are under way as there are threads", || (app.db.count(waiting) == 2).then_some(()));
        // Whoever has no thread is told sooner than those who have.
        let answers: Vec<_> = requests.into_iter().map(|request| request.join().unwrap()).collect();
        let is_overloaded = |answer: &&Answer| answer.json()["type"] == "urn:murmuration:problem:overloaded";
        let (refused, late): (Vec<_>, Vec<_>) = answers.iter().partition(is_overloaded);
        assert_eq!((refused.len(), late.len()), (4, 2));
        refused.iter().for_each(|answer| assert_unavailable(answer, "overloaded"));
        late.iter().for_each(|answer| assert_unavailable(answer, "timed-out"));
    });
    // Neither the statement's nor the call's limit.
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    assert_eq!(app.get("/health/live").status, 200);
    unlock(lock);
    // This waits in the same line, behind what is given up.
    eventually("others are served again", || (app.get("/api/v1/get-tweet").status == 200).then_some(()));
    let others = "SELECT count(*) AS n FROM pg_stat_activity
                  WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'";
    eventually("nothing goes on", || (app.db.count(others) == 0).then_some(()));
    // Two were under way, and took place.
    assert_eq!(app.db.count("SELECT count(*) AS n FROM tweet"), 2);
    assert_eq!(app.db.count("SELECT count(*) AS n FROM outbox"), 2);
}
