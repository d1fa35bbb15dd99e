//! Account events, accepted and applied by the functions that the fleet does it by.

use domain::stream::{ACCOUNT_EVENT, AccountId, Payload};
use storage::{
    account_effects::{self, Effect},
    streams::{self, Attempt, Change, Failed, Position, State},
};
use test_support::TestDatabase;

pub(crate) fn accept(database: &TestDatabase, account: &str, payloads: &[&str]) {
    let event = |payload: &&str| (AccountId::parse(account).unwrap(), Payload::parse(*payload).unwrap());
    let events: Vec<_> = payloads.iter().map(event).collect();
    database.database().transaction(|conn| streams::append(conn, ACCOUNT_EVENT, &events, None)).unwrap();
}

pub(crate) fn state(database: &TestDatabase, account: &str) -> State {
    streams::load(&mut database.database().connection().unwrap(), ACCOUNT_EVENT, &[account]).unwrap().remove(0)
}

/// Applies the event that is next in this state, as a worker does that has seen it; answers whether it took effect.
pub(crate) fn apply_as_seen(database: &TestDatabase, state: &State) -> bool {
    let position = Position { key: &state.key, seq: state.cursor + 1, revision: state.revision };
    database
        .database()
        .transaction(|conn| {
            let won = streams::advance(conn, ACCOUNT_EVENT, &[position], "worker")?[0] == Change::Made;
            if won {
                account_effects::record(
                    conn,
                    "worker",
                    &[Effect { account: &state.key, seq: position.seq, work_ms: 1 }],
                )?;
            }
            Ok(won)
        })
        .unwrap()
}

/// Applies the event that is next.
pub(crate) fn apply(database: &TestDatabase, account: &str) {
    assert!(apply_as_seen(database, &state(database, account)), "nobody else is at it");
}

/// Fails the event that is next, for good.
pub(crate) fn park(database: &TestDatabase, account: &str, error: &str) {
    let state = state(database, account);
    let position = Position { key: account, seq: state.cursor + 1, revision: state.revision };
    let attempt = Attempt { position, attempts: state.attempts, deaths: state.deaths };
    let failed = Failed { attempt, error, retry_after: None, counts: true };
    database.database().transaction(|conn| streams::fail(conn, ACCOUNT_EVENT, &[failed])).unwrap();
    assert!(self::state(database, account).parked);
}
