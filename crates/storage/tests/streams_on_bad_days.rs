//! Sequenced streams, leases and the ledger of attempts where a row is held by somebody, the answer to a `COMMIT` is lost,
//! or the clock was set back.

use domain::{
    AttemptLedger as _, Failure, Suspect,
    stream::{ACCOUNT_EVENT, AccountId, Payload},
};
use settings::Secret;
use std::time::Duration;
use storage::{
    Connection, Database, PgConnection,
    attempts::Ledger,
    leases::{self, Shortened},
    parked,
    streams::{self, Attempt, Change, Failed, Position, State},
};
use test_support::{Action, Direction, Proxy, TestDatabase, after, sql};

const TTL: Duration = Duration::from_secs(600);
const SERVICE: &str = "service";

fn append(db: &TestDatabase, keys: &[&str]) {
    let event = |key: &&str| (AccountId::parse(key).unwrap(), Payload::parse("1").unwrap());
    let events: Vec<_> = keys.iter().map(event).collect();
    db.database().transaction(|conn| streams::append(conn, ACCOUNT_EVENT, &events, None)).unwrap();
}

fn load(db: &TestDatabase, key: &str) -> State {
    let states = db.database().transaction(|conn| streams::load(conn, ACCOUNT_EVENT, &[key])).unwrap();
    states.into_iter().next().unwrap()
}

fn attempt(state: &State) -> Attempt<'_> {
    let position = Position { key: &state.key, seq: state.cursor + 1, revision: state.revision };
    Attempt { position, attempts: state.attempts, deaths: state.deaths }
}

/// A session that holds rows until it's dropped.
struct Held(Connection);

fn hold(db: &TestDatabase, rows: &str) -> Held {
    let mut conn = db.database().connection().unwrap();
    sql::execute(&mut conn, "BEGIN").unwrap();
    assert_eq!(sql::execute(&mut conn, &format!("SELECT FROM {rows} FOR UPDATE")).unwrap(), 1);
    Held(conn)
}

impl Drop for Held {
    fn drop(&mut self) {
        // The connection goes back to its pool as it is.
        sql::execute(&mut self.0, "ROLLBACK").unwrap();
    }
}

/// A database that whoever waits for a lock soon hears of.
fn impatient(db: &TestDatabase) -> Database {
    let mut settings = db.settings();
    settings.statement_timeout_ms = 2000;
    Database::open(&settings, "test").unwrap()
}

/// Does the same twice, since the answer to the first `COMMIT` was lost.
fn twice(db: &TestDatabase, mut work: impl FnMut(&Database) -> Result<(), Failure>) {
    let (proxy, url) = Proxy::of(db.url());
    let mut settings = db.settings();
    settings.url = Secret::from(url);
    let database = Database::open(&settings, "test").unwrap();
    let trap = proxy.trap(Direction::ToServer, after("COMMIT"), Action::CutAnswer);
    let lost = work(&database);
    assert!(matches!(lost, Err(Failure::Unavailable(_))), "{lost:?}");
    assert!(trap.sprung());
    work(&database).unwrap();
}

#[test]
fn attempts_and_failures_whose_commit_was_not_answered_count_once() {
    let db = TestDatabase::new();
    append(&db, &["a"]);
    let settle = |change: &dyn Fn(&mut PgConnection) -> storage::Result<Vec<Change>>| {
        let mut last = Vec::new();
        twice(&db, |database| {
            last = database.transaction(change)?;
            Ok(())
        });
        let state = load(&db, "a");
        (last[0], state.attempts, state.deaths)
    };
    let fresh = load(&db, "a");
    let attempt = |deaths| Attempt { deaths, ..attempt(&fresh) };
    let begin = |deaths| settle(&|conn| streams::begin(conn, ACCOUNT_EVENT, &[attempt(deaths)]));
    // It's on record, so it may begin.
    assert_eq!(begin(0), (Change::Made, 0, 1));
    // Another process, which knows of that one's death.
    assert_eq!(begin(1), (Change::Made, 0, 2));
    assert_eq!(settle(&|conn| streams::take_back(conn, ACCOUNT_EVENT, &[attempt(2)])), (Change::Late, 0, 1));
    let fail = |state: &State, counts| {
        let attempt = self::attempt(state);
        let failed = Failed { attempt, error: "told to", retry_after: Some(Duration::ZERO), counts };
        settle(&|conn| streams::fail(conn, ACCOUNT_EVENT, &[failed]))
    };
    assert_eq!(begin(1), (Change::Made, 0, 2));
    assert_eq!(fail(&load(&db, "a"), false), (Change::Late, 0, 1));
    assert_eq!(fail(&load(&db, "a"), true), (Change::Late, 1, 0));
    assert_eq!(fail(&load(&db, "a"), true), (Change::Late, 2, 0));
}

#[test]
fn an_attempt_of_the_ledger_whose_commit_was_not_answered_counts_once() {
    let db = TestDatabase::new();
    let suspects = [Suspect { queue: "q", message_id: "m" }];
    twice(&db, |database| Ledger::new(database.clone()).begin(&[(suspects[0], 1)]));
    let ledger = Ledger::new(db.database().clone());
    assert_eq!(ledger.counts(&suspects).unwrap(), [2], "one beyond the one that was known of");
    ledger.begin(&[(suspects[0], 0)]).unwrap();
    assert_eq!(ledger.counts(&suspects).unwrap(), [2]);
}

#[test]
fn the_ledger_forgets_what_it_is_told_to_and_nothing_of_the_same_id_elsewhere() {
    let db = TestDatabase::new();
    let ledger = Ledger::new(db.database().clone());
    let suspect = |queue, message_id| Suspect { queue, message_id };
    let all = [suspect("q1", "m1"), suspect("q1", "m2"), suspect("q2", "m1"), suspect("q2", "m2")];
    ledger.begin(&all.map(|suspect| (suspect, 0))).unwrap();
    ledger.clear(&[all[0], all[3]]).unwrap();
    assert_eq!(ledger.counts(&all).unwrap(), [0, 1, 1, 0]);
}

#[test]
fn a_lease_or_a_member_that_somebody_holds_keeps_nobody_from_the_others() {
    let db = TestDatabase::new();
    let database = impatient(&db);
    let claim = |holder: &str, resources: &[&str]| {
        let claimed = database.transaction(|conn| leases::claim(conn, holder, TTL, resources, 9));
        let mut claimed: Vec<_> = claimed.unwrap().into_iter().map(|claimed| claimed.resource).collect();
        claimed.sort();
        claimed
    };
    let attend = |holder: &str| database.transaction(|conn| leases::attend(conn, SERVICE, holder, TTL));
    assert_eq!(attend("first").unwrap(), ["first"]);
    assert_eq!(claim("first", &["r0", "r1", "r2"]), ["r0", "r1", "r2"]);
    db.execute("UPDATE lease SET expires_at = clock_timestamp() + interval '1 second'");
    let _held = [hold(&db, "lease WHERE resource = 'r1'"), hold(&db, "member WHERE holder = 'first'")];
    assert_eq!(attend("first").unwrap(), ["first"]);
    assert_eq!(attend("second").unwrap(), ["first", "second"]);
    let mut renewed = database.transaction(|conn| leases::renew(conn, "first", TTL)).unwrap();
    renewed.sort();
    assert_eq!(renewed, ["r0", "r1", "r2"], "nobody can take one that somebody holds");
    assert_eq!(db.count("SELECT count(*) AS n FROM lease WHERE expires_at > now() + interval '1 minute'"), 2);
    assert_eq!(claim("second", &["r0", "r1", "r2", "r3"]), ["r3"]);
    database.transaction(|conn| leases::leave(conn, SERVICE, "first")).unwrap();
    assert_eq!(claim("second", &["r0", "r1", "r2", "r3"]), ["r0", "r2"]);
}

#[test]
fn what_lasts_for_too_long_since_the_clock_was_set_back_is_shortened() {
    let db = TestDatabase::new();
    append(&db, &["waits", "soon"]);
    let database = db.database();
    for holder in ["dead", "alive"] {
        database.transaction(|conn| leases::attend(conn, SERVICE, holder, TTL)).unwrap();
        let resource = format!("of the {holder}");
        database.transaction(|conn| leases::claim(conn, holder, TTL, &[&resource], 1)).unwrap();
    }
    let fail = |key, wait| {
        let state = load(&db, key);
        let failed = Failed { attempt: attempt(&state), error: "told to", retry_after: Some(wait), counts: true };
        assert_eq!(database.transaction(|conn| streams::fail(conn, ACCOUNT_EVENT, &[failed])).unwrap(), [Change::Made]);
    };
    fail("waits", Duration::from_secs(60));
    fail("soon", Duration::from_secs(10));
    let shorten = || {
        let resources = ["of the dead", "of the alive"];
        database.transaction(|conn| leases::shorten(conn, SERVICE, TTL, &resources)).unwrap()
    };
    let hasten = || database.transaction(|conn| streams::hasten(conn, ACCOUNT_EVENT, Duration::from_secs(60))).unwrap();
    assert_eq!((shorten(), hasten()), (Shortened::default(), 0), "nothing is wrong");

    // As if they had been written an hour ahead.
    db.execute("UPDATE lease SET expires_at = expires_at + interval '1 hour'");
    db.execute("UPDATE member SET seen_at = seen_at + interval '1 hour'");
    db.execute("UPDATE stream_cursor SET retry_at = retry_at + interval '1 hour' WHERE key = 'waits'");
    let held = hold(&db, "lease WHERE resource = 'of the alive'");
    assert_eq!((shorten(), hasten()), (Shortened { leases: 1, members: 2 }, 1), "one is held by somebody");
    drop(held);
    assert_eq!((shorten(), hasten()), (Shortened { leases: 1, members: 0 }, 0));
    assert!(load(&db, "waits").wait.is_zero());
    let beyond = "SELECT (SELECT count(*) FROM lease WHERE expires_at > now() + interval '10 minutes')
                      + (SELECT count(*) FROM member WHERE seen_at > now()) AS n";
    assert_eq!(db.count(beyond), 0, "whoever has died is missed as usual");
}

#[test]
fn what_is_parked_or_waits_for_long_rests_until_it_goes_on() {
    let db = TestDatabase::new();
    let keys = ["parked", "late", "waits", "soon", "many"];
    append(&db, &keys);
    append(&db, &keys);
    (0..100).for_each(|_| append(&db, &["many"]));
    let fail = |key, wait| {
        let state = load(&db, key);
        let failed = Failed { attempt: attempt(&state), error: "told to", retry_after: wait, counts: true };
        let changes = db.database().transaction(|conn| streams::fail(conn, ACCOUNT_EVENT, &[failed]));
        assert_eq!(changes.unwrap(), [Change::Made]);
        state
    };
    let sweep = || {
        let sweep = |conn: &mut PgConnection| streams::sweep(conn, ACCOUNT_EVENT, 1, &[0], "", 100);
        let swept = db.database().transaction(sweep).unwrap();
        let rested = db.database().transaction(|conn| streams::rest(conn, ACCOUNT_EVENT, &swept.resting)).unwrap();
        (swept.keys, swept.resting, rested)
    };
    fn names<const N: usize>(names: [&str; N]) -> Vec<String> {
        names.map(String::from).into()
    }
    fail("parked", None);
    fail("many", None);
    let before = fail("late", None);
    fail("waits", Some(Duration::from_secs(600)));
    fail("soon", Some(Duration::from_secs(10)));
    let held = hold(&db, "stream_cursor WHERE key = 'waits'");
    assert_eq!(sweep(), (vec![], names(["late", "many", "parked", "waits"]), 4), "one is held by somebody");
    drop(held);
    assert_eq!(sweep(), (vec![], names(["many", "waits"]), 2), "of one there are too many");
    append(&db, &["parked"]);
    assert_eq!(sweep(), (vec![], names(["many", "parked"]), 1));
    assert_eq!(sweep(), (vec![], names(["many"]), 0));

    // An operator, a worker that was late, and the time.
    let order = parked::Order { stream: ACCOUNT_EVENT, key: "parked", seq: None, by: "test" };
    db.database().transaction(|conn| parked::skip(conn, &order)).unwrap();
    let advance = |state: &State| {
        let advance =
            |conn: &mut PgConnection| streams::advance(conn, ACCOUNT_EVENT, &[attempt(state).position], "test");
        assert_eq!(db.database().transaction(advance).unwrap(), [Change::Made]);
    };
    advance(&before);
    db.execute("UPDATE stream_cursor SET retry_at = now() WHERE key = 'waits'");
    let mut conn = db.database().connection().unwrap();
    let due = |conn: &mut PgConnection| {
        streams::due(conn, ACCOUNT_EVENT, None, 100).unwrap().into_iter().map(|due| due.key).collect::<Vec<_>>()
    };
    assert_eq!(due(&mut conn), ["waits"]);
    assert_eq!(sweep(), (names(["late", "parked"]), names(["many"]), 0));
    advance(&load(&db, "waits"));
    assert_eq!(sweep(), (names(["late", "parked", "waits"]), names(["many"]), 0));
    assert_eq!(due(&mut conn), [""; 0]);
    assert_eq!(db.count("SELECT count(*) AS n FROM stream_event WHERE rests AND processed_at IS NULL"), 0);
}
