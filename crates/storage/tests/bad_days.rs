//! The pool while the database is frozen or away. A relay of TCP stands between: what it stops, the server's kernel
//! goes on acknowledging, as with a frozen server.

use settings::Secret;
use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};
use storage::{Database, Error};
use test_support::{TestDatabase, eventually, sql};

/// Hands bytes to and fro until it's frozen, or cut.
struct Relay {
    port: u16,
    frozen: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Relay {
    fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (frozen, streams) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (seen, kept) = (frozen.clone(), streams.clone());
        thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                let Ok(server) = TcpStream::connect(&target) else { return };
                for stream in [&client, &server] {
                    stream.set_nodelay(true).unwrap();
                    kept.lock().unwrap().push(stream.try_clone().unwrap());
                }
                for (mut from, mut to) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap()),
                    (server.try_clone().unwrap(), client.try_clone().unwrap()),
                ] {
                    let frozen = seen.clone();
                    thread::spawn(move || {
                        let mut buffer = [0; 16384];
                        while let Ok(count @ 1..) = from.read(&mut buffer) {
                            while frozen.load(Ordering::Acquire) {
                                thread::sleep(Duration::from_millis(1));
                            }
                            if to.write_all(&buffer[..count]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        Self { port, frozen, streams }
    }

    fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn through(db: &TestDatabase, relay: &Relay, call_timeout_ms: u64) -> Database {
    let mut settings = db.settings();
    let (head, tail) = db.url().split_once("@127.0.0.1:").expect("a server on loopback");
    let path = tail.split_once('/').unwrap().1;
    settings.url = Secret::from(format!("{head}@127.0.0.1:{}/{path}", relay.port));
    settings.call_timeout_ms = call_timeout_ms;
    settings.pool_size = 2;
    Database::open(&settings, "test").unwrap()
}

fn relay_to_server(db: &TestDatabase) -> Relay {
    let target = db.url().split_once('@').unwrap().1.split_once('/').unwrap().0.to_owned();
    Relay::to(target)
}

#[test]
fn a_call_to_a_frozen_server_ends_and_the_pool_recovers() {
    let db = TestDatabase::new();
    let relay = relay_to_server(&db);
    let database = through(&db, &relay, 3000);
    eventually("the database answers", || database.ping().ok());
    relay.frozen.store(true, Ordering::Release);
    let start = Instant::now();
    assert!(matches!(database.ping(), Err(Error::Unavailable(_))));
    assert!(start.elapsed() < Duration::from_secs(60), "a bound against hanging");
    relay.frozen.store(false, Ordering::Release);
    eventually("the database answers again", || database.ping().ok());
}

#[test]
fn a_frozen_server_ends_a_transaction_without_effect() {
    let db = TestDatabase::new();
    let relay = relay_to_server(&db);
    let database = through(&db, &relay, 3000);
    let result = database.transaction(|conn| {
        sql::execute(conn, "INSERT INTO feed_entry VALUES (1, 1)")?;
        relay.frozen.store(true, Ordering::Release);
        sql::execute(conn, "INSERT INTO feed_entry VALUES (1, 2)")
    });
    assert!(matches!(result, Err(Error::Unavailable(_))));
    relay.frozen.store(false, Ordering::Release);
    eventually("the database answers again", || database.ping().ok());
    assert_eq!(db.count("SELECT count(*) AS n FROM feed_entry"), 0);
}

#[test]
fn after_lost_connections_the_first_call_uses_a_fresh_one() {
    let db = TestDatabase::new();
    let relay = relay_to_server(&db);
    let database = through(&db, &relay, 60_000);
    // Unless a second has gone by: then no connection is handed out without being checked.
    eventually("a connection is lost that was used just now", || {
        let (first, second) = (database.connection().unwrap(), database.connection().unwrap());
        drop((first, second));
        relay.cut();
        // One call finds out; the other connection is checked before it's handed out, though it was used just now.
        match database.ping() {
            Ok(()) => None,
            Err(Error::Unavailable(_)) => Some(()),
            Err(error) => panic!("{error}"),
        }
    });
    for _ in 0..4 {
        database.ping().unwrap();
    }
}

#[test]
fn a_deadlock_is_repeated_until_it_passes() {
    let db = TestDatabase::new();
    db.execute("INSERT INTO feed_entry VALUES (1, 1), (2, 1)");
    let meet = std::sync::Barrier::new(2);
    let crosswise = |first: i64, second: i64| {
        let mut alone = false;
        db.database().transaction(|conn| {
            let lock = |conn: &mut _, id| {
                sql::execute(conn, &format!("SELECT FROM feed_entry WHERE reader_id = {id} FOR UPDATE"))
            };
            lock(conn, first)?;
            if !std::mem::replace(&mut alone, true) {
                meet.wait();
            }
            lock(conn, second)
        })
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| crosswise(2, 1));
        crosswise(1, 2).unwrap();
        other.join().unwrap().unwrap();
    });
}

#[test]
fn an_error_says_why_there_is_no_connection() {
    let db = TestDatabase::new();
    let mut settings = db.settings();
    settings.connect_timeout_ms = 5000;
    settings.url = Secret::from("postgres://somebody:topsecret@127.0.0.1:1/nowhere");
    let Err(Error::Unavailable(source)) = Database::open(&settings, "test").unwrap().ping() else {
        panic!("nobody listens on that port")
    };
    let text = source.to_string();
    assert!(text.contains("Connection refused") && !text.contains("topsecret"), "{text}");
}

#[test]
fn a_statement_past_its_limit_is_told_from_a_database_that_is_away() {
    let db = TestDatabase::new();
    let mut settings = db.settings();
    settings.statement_timeout_ms = 2000;
    let database = Database::open(&settings, "test").unwrap();
    let slow = database.transaction(|conn| sql::execute(conn, "SELECT pg_sleep(30)"));
    assert!(matches!(slow, Err(Error::TooSlow(_))), "{slow:?}");
    database.ping().unwrap();
}

#[test]
fn a_wait_for_a_lock_ends_in_time_and_is_told_from_a_slow_statement() {
    let db = TestDatabase::new();
    db.execute("CREATE TABLE held (id int)");
    db.execute("INSERT INTO held VALUES (1)");
    let mut settings = db.settings();
    settings.lock_timeout_ms = 500;
    let database = Database::open(&settings, "test").unwrap();
    let attempts = [
        "UPDATE held SET id = 1",
        "SELECT FROM held FOR UPDATE NOWAIT",
        "LOCK TABLE held",
        "LOCK TABLE held NOWAIT",
        "SELECT pg_advisory_xact_lock(17)",
    ];
    let held = db.database().transaction(|conn| {
        sql::execute(conn, "SELECT FROM held FOR UPDATE")?;
        sql::execute(conn, "SELECT pg_advisory_xact_lock(17)")?;
        for sql in attempts {
            let waited = database.transaction(|conn| sql::execute(conn, sql));
            assert!(matches!(waited, Err(Error::Locked(_))), "{sql}: {waited:?}");
        }
        Ok(())
    });
    held.unwrap();
    for sql in attempts {
        database.transaction(|conn| sql::execute(conn, sql)).unwrap();
    }
}

#[test]
fn a_transaction_that_stands_still_past_its_limit_lets_go_of_its_rows() {
    let db = TestDatabase::new();
    db.execute("CREATE TABLE held (id int)");
    db.execute("INSERT INTO held VALUES (1)");
    let lock = "SELECT id FROM held FOR UPDATE";
    let (locked, may_wait) = mpsc::channel();
    let result = thread::scope(|scope| {
        // If this one ends early, the other's waiting does.
        let (db, locked) = (&db, locked);
        let other = scope.spawn(move || {
            may_wait.recv().unwrap();
            db.execute(lock)
        });
        db.database().transaction_within(Duration::from_secs(3), |conn| {
            sql::execute(conn, lock)?;
            locked.send(()).unwrap();
            // As if this process were frozen, until the other has the row.
            eventually("the other has the row", || other.is_finished().then_some(()));
            sql::execute(conn, lock)
        })
    });
    assert!(matches!(result, Err(Error::Unavailable(_))), "{result:?}");
}

#[test]
fn a_connection_that_was_lost_is_no_refusal_however_often_it_is_used() {
    let db = TestDatabase::new();
    let mut conn = db.database().connection().unwrap();
    let pid = sql::count(&mut conn, "SELECT pg_backend_pid()::bigint AS n").unwrap();
    db.count(&format!("SELECT pg_terminate_backend({pid})::int::bigint AS n"));
    // The second time there's nothing left to send it to.
    for time in ["first", "second"] {
        let error = sql::count(&mut conn, "SELECT 1::bigint AS n").unwrap_err();
        assert!(matches!(error, Error::Unavailable(_)), "the {time} time: {error:?}");
    }
}
