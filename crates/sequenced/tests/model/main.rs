//! The protocol of sequenced streams, in every state that a small case can get into: order holds in each, and from each
//! there is a way to the end without any further fault. With one of its guards taken away it doesn't hold, and the
//! exploration says how.

mod explorer;
mod protocol;

use explorer::{Finding, explore};
use protocol::{ALL_GUARDS, Action, Case, Guards, Violation};

/// One key with two events, one shard, two workers.
const SMALL: Case = Case { events: [0, 2], changes: 0, shards: (1, 1), gaps: true, guards: ALL_GUARDS };

/// The number of states is exact, so that an exploration which ends early doesn't pass.
#[track_caller]
fn assert_holds(case: &Case, states: usize) {
    let explored = explore(case);
    eprintln!("{} states, {} steps", explored.states, explored.steps);
    if let Some(finding) = explored.finding {
        panic!("{finding:?}");
    }
    assert_eq!(explored.states, states);
}

#[track_caller]
fn assert_breaks(case: &Case) -> Finding<Case> {
    let finding = explore(case).finding.expect("it goes wrong without its guard");
    eprintln!("{finding:?}");
    finding
}

#[test]
fn with_all_faults_an_operator_and_more_shards_at_once_order_and_progress_hold() {
    assert_holds(&Case { changes: 1, shards: (1, 2), ..SMALL }, 1_776_544);
}

#[test]
fn with_fewer_shards_order_and_progress_hold() {
    assert_holds(&Case { shards: (2, 1), ..SMALL }, 805_824);
}

#[test]
fn with_a_longer_backlog_and_more_changes_by_an_operator_order_and_progress_hold() {
    assert_holds(&Case { events: [0, 3], changes: 2, ..SMALL }, 345_144);
}

#[test]
fn with_two_keys_in_shared_transactions_and_workers_that_heed_no_lease_order_and_progress_hold() {
    assert_holds(&Case { events: [2, 2], guards: Guards { leases: false, ..ALL_GUARDS }, ..SMALL }, 632_025);
}

#[test]
#[ignore = "takes minutes, and gigabytes"]
fn in_larger_cases_order_and_progress_hold() {
    assert_holds(&Case { events: [0, 3], changes: 1, shards: (1, 2), ..SMALL }, 6_137_376);
    assert_holds(&Case { events: [1, 1], shards: (1, 2), ..SMALL }, 15_005_792);
}

#[test]
fn without_the_comparison_of_the_cursor_an_event_takes_effect_twice() {
    let found = assert_breaks(&Case { guards: Guards { cursor: false, ..ALL_GUARDS }, ..SMALL });
    assert_eq!(found.violation, Some(Violation::Doubled));
}

#[test]
fn without_the_comparison_of_the_revision_a_zombie_applies_what_was_replaced() {
    let found = assert_breaks(&Case { changes: 1, guards: Guards { revision: false, ..ALL_GUARDS }, ..SMALL });
    assert_eq!(found.violation, Some(Violation::Stale));
    assert!(found.trace.contains(&Action::Replace { key: 1 }));
}

#[test]
fn with_the_effect_outside_the_transaction_an_event_takes_effect_twice() {
    let found = assert_breaks(&Case { guards: Guards { one_transaction: false, ..ALL_GUARDS }, ..SMALL });
    assert_eq!(found.violation, Some(Violation::Doubled));
    assert!(found.trace.iter().any(|action| matches!(action, Action::Crash { .. })));
}

#[test]
fn with_numbers_from_a_sequence_one_is_missing_and_its_key_stops() {
    let case = Case { guards: Guards { locked_head: false, ..ALL_GUARDS }, ..SMALL };
    assert_eq!(assert_breaks(&case).violation, Some(Violation::Gap));
    let found = assert_breaks(&Case { gaps: false, ..case });
    assert_eq!(found.violation, None);
    assert!(found.trace.iter().any(|action| matches!(action, Action::RollBack { .. })));
}

#[test]
fn without_rousing_a_key_that_goes_on_its_later_events_stop() {
    let found = assert_breaks(&Case { guards: Guards { rouse: false, ..ALL_GUARDS }, ..SMALL });
    assert_eq!(found.violation, None);
    assert!(found.trace.contains(&Action::Rest { key: 1 }));
}

#[test]
fn without_the_sweep_a_message_that_the_broker_loses_stops_its_key() {
    let found = assert_breaks(&Case { guards: Guards { sweep: false, ..ALL_GUARDS }, ..SMALL });
    assert_eq!(found.violation, None);
    assert!(found.trace.contains(&Action::Lose { key: 1, queue: 0 }));
}
