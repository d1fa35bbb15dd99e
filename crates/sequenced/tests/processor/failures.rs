//! Events that fail. Their keys wait or are parked, others go on.

use crate::support::{ATTEMPTS, Accounts, Running, Stage, events};
use anyhow::anyhow;
use domain::{Failure, stream::Payload};
use std::sync::{Arc, Mutex};
use storage::parked;
use test_support::{eventually, sql};

/// Fails for as long as its payload says how.
fn as_the_payload_says() -> Accounts {
    Accounts::new(|event| match &*event.payload {
        "\"transient\"" => Err(Failure::Transient(anyhow!("the third party is out of office"))),
        "\"permanent\"" => Err(Failure::permanent("the third party has closed down")),
        "\"panic\"" => panic!("no luck with {}", event.payload),
        _ => Ok(()),
    })
}

#[test]
fn a_key_whose_event_always_fails_is_parked_after_its_attempts_and_no_other() {
    let stage = Stage::new();
    let accounts = as_the_payload_says();
    let _processor = stage.start(&accounts);
    for (key, payload) in [("transient", "\"transient\""), ("permanent", "\"permanent\""), ("panic", "\"panic\"")] {
        stage.database.append_events(&[(key, "1"), (key, payload), (key, "3"), (key, "4")]);
    }
    stage.database.append_events(&events(20, 10, "1"));
    stage.await_applied();
    stage.assert_in_order(203);

    for (key, attempts, error) in [
        ("transient", ATTEMPTS, "the third party is out of office"),
        ("permanent", 1, "the third party has closed down"),
        ("panic", ATTEMPTS, "its handler panicked at "),
    ] {
        let standing = stage.await_parked(key);
        assert_eq!((standing.cursor, standing.attempts, standing.deaths), (1, attempts, 0), "{key}");
        let last_error = standing.last_error.expect("a reason");
        assert!(last_error.starts_with(error), "{last_error}");
        assert!(!last_error.contains("no luck"), "it may repeat what users wrote");
        assert_eq!(accounts.attempts_at(key), 1 + attempts as usize);
    }
    accounts.assert_one_at_a_time();
}

#[test]
fn a_parked_key_goes_on_in_order_when_an_operator_has_put_it_right() {
    let stage = Stage::new();
    let accounts = as_the_payload_says();
    let _processor = stage.start(&accounts);
    let keys = ["retried", "replaced", "skipped"];
    for key in keys {
        stage.database.append_events(&[(key, "1"), (key, "\"permanent\""), (key, "3")]);
    }
    stage.await_applied();
    keys.iter().for_each(|key| _ = stage.await_parked(key));

    stage.operate("retried", parked::retry);
    eventually("it fails once more", || (accounts.attempts_at("retried") == 3).then_some(()));
    assert_eq!(stage.await_parked("retried").attempts, 1, "counted afresh");
    let good = Payload::parse("2").expect("JSON");
    for key in ["retried", "replaced"] {
        stage.operate(key, |conn, order| parked::replace(conn, order, &good));
    }
    stage.operate("skipped", parked::skip);
    stage.await_applied();
    assert_eq!(stage.database.event_errors(), [""; 0]);
    for (key, effects) in [("retried", 3), ("replaced", 3), ("skipped", 2)] {
        let applied = format!("SELECT count(*) AS n FROM account_effect WHERE account_id = '{key}'");
        assert_eq!(stage.database.count(&applied), effects, "{key}");
    }
    accounts.assert_one_at_a_time();
}

#[test]
fn while_a_key_waits_for_its_next_attempt_others_go_on() {
    let stage = Stage::new();
    let accounts = as_the_payload_says();
    let mut processor = stage.processor(&accounts);
    processor.worker.retry_delays_ms = vec![3_600_000];
    let _processor = Running::start(processor);
    stage.database.append_events(&[("bad", "\"transient\""), ("bad", "2")]);
    eventually("it waits", || stage.standing("bad").retry_at);
    stage.database.append_events(&events(20, 20, "1"));
    eventually("only it is left", || (stage.database.events_waiting() == 2).then_some(()));
    let standing = stage.standing("bad");
    assert_eq!((standing.attempts, standing.parked_at), (1, None));
    // Its time has come, and its cause is gone.
    stage.database.execute("UPDATE stream_event SET payload = '1' WHERE key = 'bad' AND seq = 1");
    stage.database.execute("UPDATE stream_cursor SET retry_at = now() WHERE key = 'bad'");
    stage.await_applied();
    stage.assert_in_order(402);
}

#[test]
fn what_every_event_needs_is_waited_for_without_counting() {
    const TIMES: usize = 10;
    assert!(TIMES > ATTEMPTS as usize);
    let stage = Stage::new();
    let left = Mutex::new(TIMES);
    let counted = Arc::new(Mutex::new(0));
    let most = counted.clone();
    let accounts = Accounts::new(move |event| {
        let mut most = most.lock().unwrap();
        *most = event.attempts.max(*most);
        let mut left = left.lock().unwrap();
        if &*event.key == "a" && *left > 0 {
            *left -= 1;
            return Err(Failure::Unavailable(anyhow!("the key store is away")));
        }
        Ok(())
    });
    let _processor = stage.start(&accounts);
    stage.database.append_events(&[("a", "1"), ("a", "2"), ("b", "1")]);
    stage.await_applied();
    stage.assert_in_order(3);
    assert_eq!((accounts.attempts_at("a"), *counted.lock().unwrap()), (TIMES + 2, 0));
}

/// The effects of many events wait to be written, and one of them can't be.
#[test]
fn an_effect_that_is_refused_fails_its_own_key_alone() {
    const KEYS: usize = 40;
    let stage = Stage::new();
    let batches = Arc::new(Mutex::new(Vec::new()));
    let noted = batches.clone();
    let accounts = Accounts::prompt().on_apply(move |events| {
        noted.lock().unwrap().push(events.iter().map(|event| event.key.to_string()).collect::<Vec<_>>());
        if events.iter().any(|event| &*event.key == "panics" && event.seq == 2) {
            panic!("no luck");
        }
    });
    stage.database.execute("ALTER TABLE account_effect ADD CHECK (account_id <> 'refused' OR seq <> 2)");
    let _processor = stage.start(&accounts);
    stage.database.append_events(&[("refused", "1"), ("panics", "1")]);
    stage.await_applied();

    let mut lock = stage.database.database().connection().expect("a connection");
    sql::execute(&mut lock, "BEGIN").expect("it begins");
    sql::execute(&mut lock, "LOCK TABLE account_effect IN EXCLUSIVE MODE").expect("it's locked");
    let mut all = events(KEYS, 1, "1");
    all.extend(["refused", "refused", "panics", "panics"].map(|key| (key.into(), "1".into())));
    stage.database.append_events(&all);
    eventually("all have been worked on", || (accounts.attempts().len() == 2 + KEYS + 2).then_some(()));
    sql::execute(&mut lock, "ROLLBACK").expect("it ends");

    stage.await_applied();
    stage.assert_in_order(2 + KEYS);
    let refused = stage.await_parked("refused");
    assert_eq!((refused.cursor, refused.attempts), (1, ATTEMPTS));
    assert!(refused.last_error.expect("a reason").contains("violates check constraint"));
    let panics = stage.await_parked("panics");
    assert_eq!((panics.cursor, panics.attempts), (1, ATTEMPTS));
    assert!(panics.last_error.expect("a reason").contains("no luck"), "a literal repeats nothing of users");
    let batches = batches.lock().unwrap();
    for key in ["refused", "panics"] {
        let shared = |batch: &Vec<String>| batch.len() > 2 && batch.iter().any(|other| other == key);
        assert!(batches.iter().any(shared), "{key} was in hand with others: {batches:?}");
    }
}
