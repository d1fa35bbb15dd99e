//! Events that end their process.

use crate::stage::{ATTEMPTS, Stage, events};
use std::os::unix::process::ExitStatusExt as _;

const SIGABRT: i32 = 6;

/// How a process ends whose work ran past its time limit.
const TIME_LIMIT_EXCEEDED: i32 = 75;

/// A key's events, of which the second is this.
fn second(key: &str, payload: &str) -> [(String, String); 3] {
    ["1", payload, "3"].map(|payload| (key.to_owned(), payload.to_owned()))
}

#[test]
fn an_event_that_kills_its_process_parks_its_key_and_none_that_was_in_hand_with_it() {
    let mut stage = Stage::new();
    let (before, after) = (events(60, 2), events(100, 2));
    let killer = second("killer", r#"{"simulate": "kill"}"#);
    stage.database.append_events(&[&before[..], &killer, &after].concat());
    stage.start(&[]);
    let ended = stage.supervise();
    assert!(ended.iter().all(|status| status.signal() == Some(SIGABRT)), "{ended:?}");
    // The first, when nothing was known of it, isn't on record.
    assert_eq!(ended.len(), 1 + ATTEMPTS as usize);
    let parked = stage.parked();
    let [killer] = &parked[..] else { panic!("{parked:?}") };
    assert_eq!((&*killer.key, killer.cursor), ("killer", 1));
    assert_eq!(killer.last_error.as_deref(), Some("its process died while handling it (3 times)"));
    stage.ends_well(60 * 2 + 1 + 100 * 2);
}

#[test]
fn several_events_that_kill_their_processes_park_their_own_keys_alone() {
    let mut stage = Stage::new();
    // One after another, as their keys come to them.
    let killers = [2, 4, 6];
    let backlog = |n: &usize| {
        let payload = |seq: usize| if seq == *n { r#"{"simulate": "kill"}"# } else { "1" };
        (1..=8).map(|seq| (format!("killer-{n}"), payload(seq).to_owned())).collect::<Vec<_>>()
    };
    let killers_events: Vec<_> = killers.iter().flat_map(backlog).collect();
    stage.database.append_events(&[&killers_events[..], &events(30, 8)].concat());
    // Many are in hand when one of them strikes, and two deaths park whoever was there.
    let (delays, work) = ("MURMURATION__WORKER__RETRY_DELAYS_MS", "MURMURATION__EVENT_PROCESSOR__WORK_MS");
    stage.start(&[(delays, "50"), (work, "30..60")]);
    stage.supervise();
    let parked: Vec<_> = stage.parked().into_iter().map(|parked| (parked.key, parked.cursor)).collect();
    assert_eq!(parked, killers.map(|n| (format!("killer-{n}"), n as i64 - 1)));
    stage.ends_well(1 + 3 + 5 + 30 * 8);
}

#[test]
fn an_event_that_runs_past_its_time_limit_parks_its_key_and_none_that_was_in_hand_with_it() {
    let mut stage = Stage::new();
    let hangs = second("hangs", r#"{"simulate": "hang"}"#);
    // Some of the others are in hand whenever it strikes.
    stage.database.append_events(&[&hangs[..], &events(80, 10)].concat());
    let (limit, work) = ("MURMURATION__WORKER__TIME_LIMIT_MS", "MURMURATION__EVENT_PROCESSOR__WORK_MS");
    stage.start(&[(limit, "1500"), (work, "200..300")]);
    let ended = stage.supervise();
    assert!(ended.iter().all(|status| status.code() == Some(TIME_LIMIT_EXCEEDED)), "{ended:?}");
    let parked = stage.parked();
    let [hangs] = &parked[..] else { panic!("{parked:?}") };
    assert_eq!((&*hangs.key, hangs.cursor, hangs.attempts), ("hangs", 1, ATTEMPTS));
    assert_eq!(hangs.last_error.as_deref(), Some("its handling ran past the time limit of 1.5s"));
    stage.ends_well(1 + 80 * 10);
}
