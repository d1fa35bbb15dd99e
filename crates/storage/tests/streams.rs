//! What sequenced streams rest on, on a real database: numbers, cursors, retries, the sweep, the division, leases.

use domain::stream::{ACCOUNT_EVENT, AccountEvent, AccountId, Payload, key_hash, shard, shard_routing_key};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};
use storage::{
    Database, Error, PgConnection, leases, outbox, parked,
    streams::{self, Attempt, Change, Due, Failed, Layout, Position, State},
};
use test_support::{TestDatabase, eventually, sql};

/// More connections than a test's pool usually has.
fn open(db: &TestDatabase) -> Database {
    let mut settings = db.settings();
    settings.pool_size = 12;
    Database::open(&settings, "test").unwrap()
}

fn event(key: &str, payload: usize) -> (AccountId, Payload) {
    (AccountId::parse(key).unwrap(), Payload::parse(payload.to_string()).unwrap())
}

fn append(db: &TestDatabase, events: &[(&str, usize)]) {
    let events: Vec<_> = events.iter().map(|(key, payload)| event(key, *payload)).collect();
    db.database().transaction(|conn| streams::append(conn, ACCOUNT_EVENT, &events, None)).unwrap();
}

fn load(db: &TestDatabase, key: &str) -> State {
    let states = db.database().transaction(|conn| streams::load(conn, ACCOUNT_EVENT, &[key])).unwrap();
    assert_eq!(states.len(), 1);
    states.into_iter().next().unwrap()
}

/// The event that is next for a key that stands so.
fn position(state: &State) -> Position<'_> {
    Position { key: &state.key, seq: state.cursor + 1, revision: state.revision }
}

fn advance(db: &TestDatabase, position: Position<'_>) -> bool {
    let changes = db.database().transaction(|conn| streams::advance(conn, ACCOUNT_EVENT, &[position], "test"));
    changes.unwrap() == [Change::Made]
}

/// The attempts at the event that is next for a key that stands so.
fn attempt(state: &State) -> Attempt<'_> {
    Attempt { position: position(state), attempts: state.attempts, deaths: state.deaths }
}

fn fail(db: &TestDatabase, state: &State, retry_after: Option<Duration>) -> Change {
    let failed = Failed { attempt: attempt(state), error: "told to", retry_after, counts: true };
    db.database().transaction(|conn| streams::fail(conn, ACCOUNT_EVENT, &[failed])).unwrap()[0]
}

fn swept(db: &TestDatabase, held: &[i32]) -> Vec<String> {
    let swept = db.database().transaction(|conn| streams::sweep(conn, ACCOUNT_EVENT, 4, held, "", 1000)).unwrap();
    assert_eq!(swept.after, None);
    swept.keys
}

/// The keys whose time for a retry has come, by pages of `limit`.
fn due(db: &TestDatabase, limit: i64) -> Vec<String> {
    let mut conn = db.database().connection().unwrap();
    let (mut found, mut last) = (Vec::new(), None::<Due>);
    loop {
        let page = streams::due(&mut conn, ACCOUNT_EVENT, last.as_ref(), limit).unwrap();
        assert!(page.len() <= limit as usize && page.is_sorted_by_key(|due| (due.retry_at, due.key.clone())));
        found.extend(page.iter().map(|due| due.key.clone()));
        match page.into_iter().last() {
            Some(due) => last = Some(due),
            None => return found,
        }
    }
}

/// How many sessions of the test's database wait for an advisory lock.
fn waiting_for_advisory_locks(db: &TestDatabase) -> i64 {
    db.count(
        "SELECT count(*) AS n FROM pg_locks JOIN pg_database d ON d.oid = database
         WHERE d.datname = current_database() AND locktype = 'advisory' AND NOT granted",
    )
}

#[test]
fn the_order_in_the_list_is_the_order_of_each_key_and_each_key_has_one_message() {
    let db = TestDatabase::new();
    append(&db, &[("b", 1)]);
    let events = [event("b", 2), event("a", 3), event("b", 4), event("10", 5), event("9", 6)];
    let heads = db
        .database()
        .transaction(|conn| streams::append(conn, ACCOUNT_EVENT, &events, Some("request")))
        .unwrap()
        .into_iter()
        .map(|head| (head.key.to_string(), head.seq))
        .collect::<Vec<_>>();
    let expected = [("10", 1), ("9", 1), ("a", 1), ("b", 3)];
    assert_eq!(heads, expected.map(|(key, seq)| (key.to_owned(), seq)));

    let rows = db.database().transaction(|conn| outbox::take(conn, 100)).unwrap();
    let messages: Vec<_> = rows
        .iter()
        .map(|row| {
            let event: AccountEvent = serde_json::from_slice(&row.envelope.body).unwrap();
            let key = event.account_id.to_string();
            assert_eq!(row.envelope.exchange, ACCOUNT_EVENT);
            assert_eq!(row.envelope.routing_key, shard_routing_key(shard(key_hash(&key), 16)));
            (
                key,
                event.seq,
                event.payload.as_str().to_owned(),
                row.envelope.correlation_id.as_deref() == Some("request"),
            )
        })
        .collect();
    let expected = [("b", 1, "1"), ("b", 2, "2"), ("a", 1, "3"), ("10", 1, "5"), ("9", 1, "6")];
    let expected = expected.map(|(key, seq, payload)| (key.to_owned(), seq, payload.to_owned(), payload != "1"));
    assert_eq!(messages, expected);
    for (key, seq, payload, _) in expected.into_iter().chain([("b".into(), 3, "4".into(), true)]) {
        let rows = format!(
            "SELECT count(*) AS n FROM stream_event WHERE key = '{key}' AND seq = {seq} AND payload::text = '{payload}'
             AND key_hash = {} AND processed_at IS NULL",
            key_hash(&key)
        );
        assert_eq!(db.count(&rows), 1, "{key} {seq}");
    }
}

#[test]
fn a_rollback_leaves_neither_events_nor_a_gap() {
    let db = TestDatabase::new();
    append(&db, &[("known", 1)]);
    let given_up: Result<(), Error> = db.database().transaction(|conn| {
        streams::append(conn, ACCOUNT_EVENT, &[event("known", 2), event("new", 1)], None)?;
        Err(Error::Conflict("given up"))
    });
    assert!(matches!(given_up, Err(Error::Conflict("given up"))));
    assert_eq!((load(&db, "known").head, load(&db, "new").head), (1, 0));
    append(&db, &[("new", 1), ("known", 2)]);
    assert_eq!((load(&db, "known").head, load(&db, "new").head), (2, 1));
    assert_eq!(db.count("SELECT count(*) AS n FROM outbox"), 3);
}

#[test]
fn an_unknown_stream_takes_no_events() {
    let db = TestDatabase::new();
    let layout = Layout { shards: 1, queues: 1 };
    let unknown = db.database().transaction(|conn| streams::append(conn, "unknown", &[event("a", 1)], None));
    assert!(matches!(unknown, Err(Error::NotFound("stream"))));
    let unknown = db.database().transaction(|conn| streams::divide(conn, "unknown", layout));
    assert!(matches!(unknown, Err(Error::NotFound("stream"))));
}

/// Eight transactions at a time, each of several keys in an order of its own, a quarter of them rolled back. Whoever looks
/// meanwhile sees of each key the first events without a gap: that is what dense and in the order of commits means.
#[test]
fn at_every_moment_the_events_of_a_key_are_numbered_without_a_gap() {
    const THREADS: usize = 8;
    const BATCHES: usize = 40;
    const GAPS: &str = "SELECT count(*) AS n FROM
        (SELECT FROM stream_event GROUP BY key HAVING count(*) <> max(seq) OR min(seq) <> 1) gap";
    let db = TestDatabase::new();
    let database = open(&db);
    let (over, looks) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let looker = scope.spawn(|| {
            let mut conn = database.connection().unwrap();
            while !over.load(Ordering::Acquire) {
                assert_eq!(sql::count(&mut conn, GAPS).unwrap(), 0);
                looks.fetch_add(1, Ordering::Release);
            }
        });
        let producers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (database, looks) = (&database, &looks);
                scope.spawn(move || {
                    for batch in 0..BATCHES {
                        // Again and again while they are at it.
                        let seen = || (looks.load(Ordering::Acquire) >= batch / 3).then_some(());
                        eventually("somebody looks", seen);
                        let keys = (0..5).map(|n| (thread * 7 + batch * 3 + n * (1 + thread % 4)) % 8);
                        let events: Vec<_> = keys.map(|key| event(&key.to_string(), thread * 1000 + batch)).collect();
                        let mut attempts = 0;
                        let result = database.transaction(|conn| {
                            attempts += 1;
                            streams::append(conn, ACCOUNT_EVENT, &events, None)?;
                            if batch % 4 == 3 { Err(Error::Conflict("given up")) } else { Ok(()) }
                        });
                        assert_eq!(result.is_ok(), batch % 4 != 3, "{result:?}");
                        assert_eq!(attempts, 1, "two batches were at a deadlock");
                    }
                })
            })
            .collect();
        let ended: Vec<_> = producers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        over.store(true, Ordering::Release);
        looker.join().unwrap();
        ended.into_iter().for_each(Result::unwrap);
    });
    let accepted = (THREADS * BATCHES * 5 * 3 / 4) as i64;
    assert_eq!(db.count("SELECT count(*) AS n FROM stream_event"), accepted);
    assert_eq!(db.count("SELECT sum(seq)::bigint AS n FROM stream_head"), accepted);
    // Every event belongs to a request whose first one of its key has a message.
    let messages = db.count("SELECT count(*) AS n FROM outbox");
    assert!((1..=accepted).contains(&messages), "{messages}");
    assert_eq!(db.count("SELECT count(*) AS n FROM outbox WHERE message_id LIKE '%/1'"), 8);
    assert_eq!(db.count("SELECT count(*) AS n FROM stream_cursor WHERE seq = 0"), 8);
    // One producer's batches come one after another, and so do a batch's events.
    assert_eq!(
        db.count(
            "SELECT count(*) AS n FROM (
                 SELECT payload::text::integer < lag(payload::text::integer)
                     OVER (PARTITION BY key, payload::text::integer / 1000 ORDER BY seq) AS late FROM stream_event) e
             WHERE late"
        ),
        0
    );
}

#[test]
fn a_key_is_loaded_with_what_is_next_and_an_unknown_one_as_empty() {
    let db = TestDatabase::new();
    append(&db, &[("a", 1), ("a", 2)]);
    let state = load(&db, "a");
    assert_eq!((state.head, state.cursor, state.revision, state.attempts, state.deaths), (2, 0, 0, 0, 0));
    assert!(!state.parked && state.wait.is_zero());
    let next = state.next.as_ref().unwrap();
    assert_eq!((next.seq, &*next.payload), (1, "1"));
    assert!(advance(&db, position(&state)));
    assert!(advance(&db, position(&load(&db, "a"))));
    let state = load(&db, "a");
    assert_eq!((state.head, state.cursor, state.next), (2, 2, None));
    let state = load(&db, "unknown");
    assert_eq!((state.head, state.cursor, state.next), (0, 0, None));
}

#[test]
fn of_all_who_apply_an_event_at_once_one_wins() {
    const WORKERS: usize = 6;
    const KEYS: usize = 40;
    let db = TestDatabase::new();
    let database = open(&db);
    let keys: Vec<String> = (0..KEYS).map(|key| key.to_string()).collect();
    append(&db, &keys.iter().map(|key| (key.as_str(), 0)).collect::<Vec<_>>());
    let together = Barrier::new(WORKERS);
    let wins: Vec<usize> = thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let (database, keys, together) = (&database, &keys, &together);
                scope.spawn(move || {
                    // Each in an order of its own.
                    let mut positions: Vec<_> = keys.iter().map(|key| Position { key, seq: 1, revision: 0 }).collect();
                    positions.rotate_left(worker * 5);
                    if worker % 2 == 1 {
                        positions.reverse();
                    }
                    let mut attempts = 0;
                    together.wait();
                    let changes = database.transaction(|conn| {
                        attempts += 1;
                        streams::advance(conn, ACCOUNT_EVENT, &positions, &worker.to_string())
                    });
                    assert_eq!(attempts, 1, "two batches were at a deadlock");
                    let changes = changes.unwrap();
                    // What is told of a position is so.
                    for (position, change) in positions.iter().zip(&changes) {
                        let mut conn = database.connection().unwrap();
                        let mine = format!(
                            "SELECT count(*) AS n FROM stream_event WHERE key = '{}' AND worker = '{worker}'
                             AND outcome = 'applied'",
                            position.key
                        );
                        assert_eq!(sql::count(&mut conn, &mine).unwrap(), i64::from(*change == Change::Made));
                    }
                    changes.into_iter().filter(|change| *change == Change::Made).count()
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    assert_eq!(wins.iter().sum::<usize>(), KEYS, "{wins:?}");
    assert_eq!(db.count("SELECT count(*) AS n FROM stream_cursor WHERE seq = 1"), KEYS as i64);
}

#[test]
fn only_what_is_next_can_be_applied() {
    let db = TestDatabase::new();
    append(&db, &[("a", 1), ("a", 2), ("a", 3)]);
    for (seq, applied) in [(2, false), (3, false), (1, true), (1, false), (3, false), (2, true), (1, false), (3, true)]
    {
        assert_eq!(advance(&db, Position { key: "a", seq, revision: 0 }), applied, "{seq}");
    }
    assert!(!advance(&db, Position { key: "unknown", seq: 1, revision: 0 }));
    assert_eq!(load(&db, "a").cursor, 3);
}

#[test]
fn nobody_waits_for_a_cursor_and_whoever_comes_back_to_it_decides_by_what_was_committed_meanwhile() {
    let db = TestDatabase::new();
    let database = open(&db);
    append(&db, &[("a", 1), ("a", 2), ("a", 3), ("a", 4), ("a", 5)]);
    let settle = |conn: &mut PgConnection, state: &State, succeeds: bool| {
        if succeeds {
            return Ok(streams::advance(conn, ACCOUNT_EVENT, &[position(state)], "test")?[0]);
        }
        let failed =
            Failed { attempt: attempt(state), error: "told to", retry_after: Some(Duration::ZERO), counts: true };
        Ok::<_, Error>(streams::fail(conn, ACCOUNT_EVENT, &[failed])?[0])
    };
    // Whether the first one succeeds, how its transaction ends, whether the second one succeeds; what becomes of that,
    // where the cursor is then, and the attempts.
    for (first, end, second, became, cursor, attempts) in [
        (false, "COMMIT", true, Change::Made, 1, 0),
        (true, "ROLLBACK", true, Change::Made, 2, 0),
        (true, "COMMIT", true, Change::Late, 3, 0),
        (true, "COMMIT", false, Change::Late, 4, 0),
        // Of two attempts at once one counts.
        (false, "COMMIT", false, Change::Late, 4, 1),
    ] {
        let state = load(&db, "a");
        let mut conn = database.connection().unwrap();
        sql::execute(&mut conn, "BEGIN").unwrap();
        assert_eq!(settle(&mut conn, &state, first).unwrap(), Change::Made);
        let settle_second = || database.transaction(|conn| settle(conn, &state, second)).unwrap();
        assert_eq!(settle_second(), Change::Busy, "at event {}", state.cursor + 1);
        sql::execute(&mut conn, end).unwrap();
        assert_eq!(settle_second(), became, "at event {}", state.cursor + 1);
        let state = load(&db, "a");
        assert_eq!((state.cursor, state.attempts), (cursor, attempts), "at event {}", state.cursor + 1);
    }
}

/// Two recorders, each of which has failed at one event and is done with the other's.
#[test]
fn transactions_that_change_the_same_cursors_in_opposite_orders_are_at_no_deadlock() {
    let db = TestDatabase::new();
    let database = open(&db);
    append(&db, &[("a", 1), ("b", 1)]);
    let (a, b) = (load(&db, "a"), load(&db, "b"));
    let record = |first: &State, second: &State, conn: &mut PgConnection, meet: &dyn Fn()| {
        let failed =
            Failed { attempt: attempt(first), error: "told to", retry_after: Some(Duration::ZERO), counts: true };
        let failed = streams::fail(conn, ACCOUNT_EVENT, &[failed])?[0];
        meet();
        Ok::<_, Error>((failed, streams::advance(conn, ACCOUNT_EVENT, &[position(second)], "test")?[0]))
    };
    let meeting = Barrier::new(2);
    let both = |first, second| {
        let mut tries = 0;
        let recorded = database.transaction(|conn| {
            tries += 1;
            record(first, second, conn, &|| {
                if tries == 1 {
                    meeting.wait();
                }
            })
        });
        (recorded.unwrap(), tries)
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| both(&b, &a));
        let made = ((Change::Made, Change::Busy), 1);
        // Whoever is through first may leave its row to the other.
        let one = both(&a, &b);
        let other = other.join().unwrap();
        assert!([one, other].contains(&made) && one.1 == 1 && other.1 == 1, "{one:?} {other:?}");
    });
}

#[test]
fn an_operators_change_takes_the_event_from_those_who_read_it_before() {
    let db = TestDatabase::new();
    append(&db, &[("a", 1), ("a", 2), ("a", 3)]);
    let order = parked::Order { stream: ACCOUNT_EVENT, key: "a", seq: None, by: "operator" };
    let change = |change: &dyn Fn(&mut PgConnection) -> storage::Result<i64>| {
        let before = load(&db, "a");
        assert_eq!(fail(&db, &before, None), Change::Made);
        assert!(load(&db, "a").parked);
        db.database().transaction(change).unwrap();
        assert!(!advance(&db, position(&before)), "it was read before the change");
        fail(&db, &before, None);
        let after = load(&db, "a");
        assert_eq!(after.revision, before.revision + 1);
        assert!(!after.parked && after.attempts == 0, "an attempt before the change doesn't count");
        after
    };
    let state = change(&|conn| parked::retry(conn, &order));
    assert_eq!((state.cursor, &*state.next.unwrap().payload), (0, "1"));
    let state = change(&|conn| parked::replace(conn, &order, &Payload::parse("10").unwrap()));
    assert_eq!((state.cursor, &*state.next.as_ref().unwrap().payload), (0, "10"));
    assert!(advance(&db, position(&state)));
    let state = change(&|conn| parked::skip(conn, &order));
    assert_eq!((state.cursor, &*state.next.as_ref().unwrap().payload), (2, "3"));
    assert!(advance(&db, position(&state)));
    assert_eq!(db.count("SELECT count(*) AS n FROM stream_event WHERE outcome = 'skipped' AND seq = 2"), 1);
}

#[test]
fn a_failed_attempt_is_due_again_later_and_the_last_one_parks_its_key() {
    let db = TestDatabase::new();
    append(&db, &[("a", 1), ("b", 1)]);
    let first = load(&db, "a");
    assert_eq!(fail(&db, &first, Some(Duration::from_secs(600))), Change::Made);
    let state = load(&db, "a");
    assert_eq!((state.attempts, state.parked), (1, false));
    assert!(state.wait > Duration::from_secs(500) && state.wait <= Duration::from_secs(600), "{:?}", state.wait);
    assert_eq!((swept(&db, &[0, 1, 2, 3]), due(&db, 9)), (vec!["b".into()], vec![]));
    assert_eq!(fail(&db, &first, None), Change::Late, "another attempt has failed since");

    let away = Failed { attempt: attempt(&state), error: "away", retry_after: Some(Duration::ZERO), counts: false };
    db.database().transaction(|conn| streams::fail(conn, ACCOUNT_EVENT, &[away])).unwrap();
    let state = load(&db, "a");
    assert_eq!((state.attempts, state.parked, state.wait), (1, false, Duration::ZERO));
    assert_eq!((swept(&db, &[0, 1, 2, 3]), due(&db, 9)), (vec!["b".into()], vec!["a".into()]));

    assert_eq!(fail(&db, &state, None), Change::Made);
    let state = load(&db, "a");
    assert_eq!((state.attempts, state.parked), (2, true));
    assert_eq!((swept(&db, &[0, 1, 2, 3]), due(&db, 9)), (vec!["b".into()], vec![]));
    assert_eq!(db.count("SELECT count(*) AS n FROM stream_cursor WHERE last_error = 'told to'"), 1);

    // A worker that believed it to be its own and succeeds after all: that settles it.
    assert!(advance(&db, position(&first)));
    let after = load(&db, "a");
    assert_eq!((after.cursor, after.attempts, after.parked), (1, 0, false));
    assert_eq!(fail(&db, &state, None), Change::Late);
    assert!(!load(&db, "a").parked, "what has taken effect doesn't fail");
}

#[test]
fn attempts_on_record_are_counted_until_they_end() {
    let db = TestDatabase::new();
    append(&db, &[("a", 1), ("a", 2)]);
    type Changing = fn(&mut PgConnection, &str, &[Attempt<'_>]) -> storage::Result<Vec<Change>>;
    let change = |change: Changing, attempt| {
        let changes = db.database().transaction(|conn| change(conn, ACCOUNT_EVENT, &[attempt])).unwrap();
        (changes[0], load(&db, "a").deaths)
    };
    let state = load(&db, "a");
    let first = attempt(&state);
    let on_record = |deaths| Attempt { deaths, ..first };
    assert_eq!(change(streams::begin, first), (Change::Made, 1));
    assert_eq!(change(streams::begin, first), (Change::Made, 1), "the same again");
    assert_eq!(change(streams::begin, on_record(1)), (Change::Made, 2), "another one, which knows of it");
    assert_eq!(change(streams::begin, first), (Change::Late, 2));
    assert_eq!(change(streams::take_back, on_record(1)), (Change::Late, 2));
    assert_eq!(change(streams::take_back, on_record(2)), (Change::Made, 1));
    assert_eq!(change(streams::take_back, on_record(2)), (Change::Late, 1), "the same again");
    let elsewhere = |position| Attempt { position, ..on_record(1) };
    let other_revision = elsewhere(Position { revision: 1, ..first.position });
    assert_eq!(change(streams::begin, other_revision), (Change::Late, 1));
    assert_eq!(change(streams::begin, elsewhere(Position { seq: 2, ..first.position })), (Change::Late, 1));
    assert!(advance(&db, first.position));
    let state = load(&db, "a");
    assert_eq!(state.deaths, 0);
    let second = attempt(&state);
    assert_eq!(change(streams::begin, second), (Change::Made, 1));
    assert_eq!(fail(&db, &State { deaths: 1, ..state.clone() }, Some(Duration::ZERO)), Change::Made);
    assert_eq!((load(&db, "a").deaths, load(&db, "a").attempts), (0, 1));
}

#[test]
fn the_sweep_finds_what_may_go_on_in_its_shards_page_by_page() {
    let db = TestDatabase::new();
    let keys: Vec<String> = (0..60).map(|key| format!("key-{key:02}")).collect();
    for _ in 0..3 {
        append(&db, &keys.iter().map(|key| (key.as_str(), 0)).collect::<Vec<_>>());
    }
    let (mut expected, mut retried) = (BTreeMap::<i32, BTreeSet<String>>::new(), BTreeSet::new());
    for (number, key) in keys.iter().enumerate() {
        match number % 6 {
            // Done.
            0 => (0..3).for_each(|_| assert!(advance(&db, position(&load(&db, key))))),
            1 => _ = fail(&db, &load(&db, key), None),
            2 => _ = fail(&db, &load(&db, key), Some(Duration::from_secs(600))),
            3 => {
                fail(&db, &load(&db, key), Some(Duration::ZERO));
                retried.insert(key.clone());
            }
            kind => {
                if kind == 4 {
                    assert!(advance(&db, position(&load(&db, key))));
                }
                expected.entry(shard(key_hash(key), 4)).or_default().insert(key.clone());
            }
        }
    }
    assert_eq!(expected.len(), 4, "every shard has some");
    for limit in [1, 3, 10, 11] {
        assert_eq!(due(&db, limit).into_iter().collect::<BTreeSet<_>>(), retried, "pages of {limit}");
    }
    for held in [&[][..], &[0], &[1, 3], &[0, 1, 2, 3]] {
        let expected: BTreeSet<&String> = held.iter().flat_map(|shard| &expected[shard]).collect();
        assert_eq!(swept(&db, held).iter().collect::<BTreeSet<_>>(), expected);
        for limit in [1, 7, 50, 51] {
            let (mut found, mut after, mut pages) = (Vec::new(), Some(String::new()), 0);
            while let Some(from) = after {
                let swept = db
                    .database()
                    .transaction(|conn| streams::sweep(conn, ACCOUNT_EVENT, 4, held, &from, limit))
                    .unwrap();
                assert!(swept.keys.len() <= limit as usize);
                found.extend(swept.keys);
                after = swept.after;
                pages += 1;
            }
            assert!(found.is_sorted());
            assert_eq!(found.iter().collect::<BTreeSet<_>>(), expected);
            // Fifty keys have events that wait, and a full page may be the last.
            assert_eq!(pages, 50 / limit + 1, "pages of {limit}");
        }
    }
}

#[test]
fn dividing_waits_for_those_who_are_appending_and_others_wait_for_it() {
    let db = TestDatabase::new();
    let database = open(&db);
    let key =
        (0..).map(|n: u32| n.to_string()).find(|key| shard(key_hash(key), 2) != shard(key_hash(key), 16)).unwrap();
    let layout = Layout { shards: 2, queues: 16 };
    let mut early = database.connection().unwrap();
    sql::execute(&mut early, "BEGIN").unwrap();
    streams::append(&mut early, ACCOUNT_EVENT, &[event("other", 0)], None).unwrap();
    thread::scope(|scope| {
        let divider = scope.spawn(|| database.transaction(|conn| streams::divide(conn, ACCOUNT_EVENT, layout)));
        eventually("dividing waits", || (waiting_for_advisory_locks(&db) == 1).then_some(()));
        let late = scope.spawn(|| {
            database.transaction(|conn| streams::append(conn, ACCOUNT_EVENT, &[event(&key, 1)], None)).map(drop)
        });
        eventually("appending waits", || (waiting_for_advisory_locks(&db) == 2).then_some(()));
        // It's still appending by the old division.
        streams::append(&mut early, ACCOUNT_EVENT, &[event(&key, 0)], None).unwrap();
        sql::execute(&mut early, "COMMIT").unwrap();
        divider.join().unwrap().unwrap();
        late.join().unwrap().unwrap();
    });
    let mut conn = database.connection().unwrap();
    assert_eq!(streams::layout(&mut conn, ACCOUNT_EVENT).unwrap(), layout);
    let rows = database.transaction(|conn| outbox::take(conn, 100)).unwrap();
    let routed: Vec<&str> = rows[1..].iter().map(|row| row.envelope.routing_key.as_str()).collect();
    let expected = [16, 2].map(|shards| shard_routing_key(shard(key_hash(&key), shards)));
    assert_eq!(routed, expected);
}

const TTL: Duration = Duration::from_secs(600);
const SERVICE: &str = "service";

fn claim(db: &TestDatabase, holder: &str, resources: &[&str], limit: i64) -> Vec<(String, bool)> {
    let mut claimed: Vec<_> = db
        .database()
        .transaction(|conn| leases::claim(conn, holder, TTL, resources, limit))
        .unwrap()
        .into_iter()
        .map(|claimed| (claimed.resource, claimed.taken_over_at.is_some()))
        .collect();
    claimed.sort();
    claimed
}

fn renew(db: &TestDatabase, holder: &str) -> BTreeSet<String> {
    db.database().transaction(|conn| leases::renew(conn, holder, TTL)).unwrap().into_iter().collect()
}

fn let_run_out(db: &TestDatabase, resource: &str) {
    let sql =
        format!("UPDATE lease SET expires_at = clock_timestamp() - interval '1 ms' WHERE resource = '{resource}'");
    assert_eq!(db.execute(&sql), 1);
}

fn owned<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(String::from).into()
}

#[test]
fn a_lease_is_had_by_one_until_it_is_given_back_or_runs_out() {
    let db = TestDatabase::new();
    let resources = ["r0", "r1", "r2"];
    assert_eq!(claim(&db, "first", &resources, 2), [("r0".into(), false), ("r1".into(), false)]);
    assert_eq!(claim(&db, "second", &resources, 3), [("r2".into(), false)]);
    assert_eq!(claim(&db, "third", &resources, 3), []);
    assert_eq!(claim(&db, "first", &resources, 3), [], "one's own is renewed, not claimed");

    // One that has run out is its holder's until somebody takes it.
    let_run_out(&db, "r0");
    assert_eq!(claim(&db, "first", &resources, 3), []);
    assert_eq!(renew(&db, "first"), owned(["r0", "r1"]));
    assert_eq!(claim(&db, "second", &resources, 3), []);
    let_run_out(&db, "r0");
    assert_eq!(claim(&db, "second", &resources, 3), [("r0".into(), true)]);
    assert_eq!(renew(&db, "first"), owned(["r1"]));
    assert_eq!(renew(&db, "second"), owned(["r0", "r2"]));

    // Nobody gives back what is another's.
    db.database().transaction(|conn| leases::release(conn, "first", &["r0", "r1"])).unwrap();
    assert_eq!(claim(&db, "third", &resources, 3), [("r1".into(), false)]);
    let held: Vec<_> = db
        .database()
        .transaction(|conn| leases::list(conn, &resources))
        .unwrap()
        .into_iter()
        .map(|lease| (lease.resource, lease.holder, lease.expired))
        .collect();
    let expected = [("r0", "second"), ("r1", "third"), ("r2", "second")];
    assert_eq!(held, expected.map(|(resource, holder)| (resource.into(), Some(holder.into()), false)));
}

#[test]
fn of_all_who_claim_a_lease_at_once_one_gets_it() {
    const HOLDERS: usize = 8;
    let db = TestDatabase::new();
    let database = open(&db);
    let names: Vec<String> = (0..16).map(|n| format!("r{n:02}")).collect();
    let resources: Vec<&str> = names.iter().map(String::as_str).collect();
    let together = Barrier::new(HOLDERS);
    // New ones, and then such as have run out: the second time, nobody gets what is his own.
    for _ in 0..2 {
        let claimed: Vec<String> = thread::scope(|scope| {
            let holders: Vec<_> = (0..HOLDERS)
                .map(|holder| {
                    let (database, resources, together) = (&database, &resources, &together);
                    scope.spawn(move || {
                        together.wait();
                        let holder = format!("holder-{holder}");
                        let claim = |conn: &mut PgConnection| leases::claim(conn, &holder, TTL, resources, 16);
                        database.transaction(claim).unwrap()
                    })
                })
                .collect();
            holders.into_iter().flat_map(|holder| holder.join().unwrap()).map(|claimed| claimed.resource).collect()
        });
        assert_eq!(claimed.len(), claimed.iter().collect::<BTreeSet<_>>().len(), "{claimed:?}");
        let held = "SELECT count(*) AS n FROM lease WHERE holder IS NOT NULL AND expires_at > clock_timestamp()";
        assert_eq!(db.count(held), claimed.len() as i64);
        db.execute("UPDATE lease SET expires_at = clock_timestamp() - interval '1 ms'");
    }
    assert_eq!(db.count("SELECT count(*) AS n FROM lease"), 16);
}

#[test]
fn members_are_those_who_have_been_there_lately() {
    let db = TestDatabase::new();
    let attend = |service: &str, holder: &str| {
        db.database().transaction(|conn| leases::attend(conn, service, holder, TTL)).unwrap()
    };
    assert_eq!(attend(SERVICE, "b"), ["b"]);
    assert_eq!(attend(SERVICE, "a"), ["a", "b"]);
    assert_eq!(attend("other", "c"), ["c"]);
    db.execute("UPDATE member SET seen_at = clock_timestamp() - interval '601 seconds' WHERE holder IN ('b', 'c')");
    assert_eq!(attend(SERVICE, "a"), ["a"]);
    assert_eq!(attend("other", "c"), ["c"], "whoever comes back in time is still a member");

    assert_eq!(attend(SERVICE, "b"), ["a", "b"]);
    claim(&db, "a", &["r0"], 1);
    claim(&db, "b", &["r1"], 1);
    db.database().transaction(|conn| leases::depart(conn, SERVICE, "a")).unwrap();
    assert_eq!(renew(&db, "a"), owned(["r0"]), "whoever departs has his leases to the end of his work");
    assert_eq!(attend(SERVICE, "b"), ["b"]);
    db.database().transaction(|conn| leases::leave(conn, SERVICE, "b")).unwrap();
    assert_eq!(renew(&db, "b"), owned([]));
    assert_eq!(claim(&db, "a", &["r0", "r1"], 2), [("r1".into(), false)]);
    assert_eq!(attend(SERVICE, "a"), ["a"]);
}

/// Workers that believe the same keys to be theirs, in batches of any kind, each in an order of its own.
#[test]
fn overlapping_batches_of_all_kinds_are_at_no_deadlock() {
    const WORKERS: usize = 6;
    let db = TestDatabase::new();
    let database = open(&db);
    let mut keys: Vec<String> = (0..300).map(|key| (key * 7919 % 1000).to_string()).collect();
    append(&db, &keys.iter().map(|key| (key.as_str(), 0)).collect::<Vec<_>>());
    keys.sort_by_key(|key| key.bytes().rev().collect::<Vec<_>>());
    thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (database, keys) = (&database, &keys);
            scope.spawn(move || {
                for round in 0..60 {
                    let mut positions: Vec<_> = keys.iter().map(|key| Position { key, seq: 1, revision: 0 }).collect();
                    positions.rotate_left((worker * 50 + round * 17) % 300);
                    positions.truncate(100 + 100 * (round % 3));
                    let attempt = |position| Attempt { position, attempts: 0, deaths: 0 };
                    let attempts: Vec<_> = positions.iter().copied().map(attempt).collect();
                    let failed =
                        |attempt| Failed { attempt, error: "told to", retry_after: Some(Duration::ZERO), counts: true };
                    let mut tries = 0;
                    let result = database.transaction(|conn| {
                        tries += 1;
                        match (worker + round) % 4 {
                            0 => streams::begin(conn, ACCOUNT_EVENT, &attempts).map(drop),
                            1 => streams::take_back(conn, ACCOUNT_EVENT, &attempts).map(drop),
                            2 => {
                                let failed: Vec<_> = attempts.iter().copied().map(failed).collect();
                                streams::fail(conn, ACCOUNT_EVENT, &failed).map(drop)
                            }
                            _ => {
                                streams::advance(conn, ACCOUNT_EVENT, &positions, "test")?;
                                Err(Error::Conflict("given up"))
                            }
                        }
                    });
                    assert!(matches!(result, Ok(()) | Err(Error::Conflict("given up"))), "{result:?}");
                    assert_eq!(tries, 1, "two batches were at a deadlock");
                }
            });
        }
    });
}
