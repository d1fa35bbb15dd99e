//! Rows that somebody holds, connections that are all in use, answers that are lost.

use crate::support::{ATTEMPTS, Accounts, Running, Stage, events};
use anyhow::anyhow;
use domain::Failure;
use settings::Secret;
use storage::{Connection, Database};
use test_support::{Action, Direction, Proxy, eventually, sql};

/// A session that holds a row until it's dropped.
struct Held(Connection);

impl Held {
    fn new(stage: &Stage, row: &str) -> Self {
        let mut conn = stage.database.database().connection().expect("a connection");
        sql::execute(&mut conn, "BEGIN").expect("it begins");
        let held = sql::execute(&mut conn, &format!("SELECT FROM {row} FOR UPDATE")).expect("it's there");
        assert_eq!(held, 1);
        Self(conn)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // The connection goes back to its pool as it is.
        sql::execute(&mut self.0, "ROLLBACK").expect("it ends");
    }
}

/// What a row in the way of one key's event does to the others, and to that one.
fn with_a_row_held(row: &str, statement_timeout_ms: u64) {
    const OTHERS: usize = 200;
    let stage = Stage::new();
    let accounts = Accounts::prompt();
    stage.database.append_events(&[("held", "1"), ("held", "2")]);
    let held = Held::new(&stage, &format!("{row} AND key = 'held'"));
    let mut processor = stage.processor(&accounts);
    let mut settings = stage.database.settings();
    settings.statement_timeout_ms = statement_timeout_ms;
    processor.database = Database::open(&settings, "test").expect("a usable URL");
    let running = Running::start(processor);
    eventually("it waits for the row", || (accounts.attempts_at("held") >= 1).then_some(()));
    for _ in 0..3 {
        stage.database.append_events(&events(OTHERS, 1, "1"));
        eventually("the others go on", || (stage.database.events_waiting() == 2).then_some(()));
    }
    drop(held);
    stage.await_applied();
    stage.assert_in_order(3 * OTHERS + 2);
    assert_eq!(accounts.attempts_at("held"), 2, "its work wasn't done anew");
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM stream_cursor WHERE last_error IS NOT NULL"), 0);
    running.stop();
}

#[test]
fn a_cursor_that_somebody_holds_stops_its_own_key_alone_and_counts_no_attempt() {
    with_a_row_held("stream_cursor WHERE seq = 0", 600_000);
}

#[test]
fn an_event_that_somebody_holds_stops_its_own_key_alone_and_counts_no_attempt() {
    with_a_row_held("stream_event WHERE seq = 1", 600_000);
}

#[test]
fn leases_are_renewed_while_every_connection_is_in_use() {
    let stage = Stage::new();
    let accounts = Accounts::prompt();
    let processor = stage.processor(&accounts);
    let database = processor.database.clone();
    let running = Running::start(processor);
    eventually("it has all shards", || (stage.shares() == [16]).then_some(()));
    let all: Vec<_> = (0..4).map(|_| database.connection().expect("a connection")).collect();
    let last =
        || stage.database.count("SELECT (extract(epoch FROM min(expires_at)) * 1000000)::bigint AS n FROM lease");
    for _ in 0..3 {
        let before = last();
        eventually("they are renewed", || (last() > before).then_some(()));
    }
    drop(all);
    running.stop();
}

#[test]
fn a_failure_whose_commit_was_not_answered_counts_one_attempt() {
    const WHY: &str = "the third party is out of office";
    let stage = Stage::new();
    let accounts = Accounts::new(|_| Err(Failure::Transient(anyhow!(WHY))));
    let (proxy, url) = Proxy::of(stage.database.url());
    let mut settings = stage.database.settings();
    settings.url = Secret::from(url);
    let mut processor = stage.processor(&accounts);
    processor.database = Database::open(&settings, "test").expect("a usable URL");
    processor.worker.retry_delays_ms = vec![3_600_000; ATTEMPTS as usize];
    // The commit of the transaction that records the failure.
    let recorded = |bytes: &[u8]| {
        let find = |bytes: &[u8], text: &str| bytes.windows(text.len()).position(|window| window == text.as_bytes());
        let why = find(bytes, WHY)?;
        Some(why + find(&bytes[why..], "COMMIT")? + "COMMIT".len())
    };
    let trap = proxy.trap(Direction::ToServer, recorded, Action::CutAnswer);
    let running = Running::start(processor);
    stage.database.append_events(&[("a", "1"), ("a", "2")]);
    eventually("the answer is lost", || trap.sprung().then_some(()));
    // Whoever records one thing after another is through with the first when the next one stands.
    stage.database.append_events(&[("b", "1")]);
    eventually("the next failure stands", || stage.standing("b").retry_at);
    assert_eq!(stage.standing("a").attempts, 1);
    running.stop();
}
