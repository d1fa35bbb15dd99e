//! What each experiment shows.

use crate::stage::Stage;
use serde_json::Value;
use test_support::PrivateRabbitmq;

fn errors(report: &Value) -> [i64; 3] {
    ["order", "value", "consumer"].map(|kind| report["errors"][kind].as_i64().expect("a number of errors"))
}

fn figure(report: &Value, name: &str) -> f64 {
    report["figures"][name].as_f64().unwrap_or_else(|| panic!("no figure {name} in {report}"))
}

/// As wide a range as a test has time for; the command in docs/lab.md goes through twenty.
const SEEDS: [u64; 3] = [1, 2, 3];

#[test]
fn consumers_that_compete_break_the_order_with_every_seed_and_a_queue_for_each_keeps_it() {
    let stage = Stage::new();
    for seed in SEEDS {
        let [order, value, _] = errors(&stage.experiment(&format!("competing --seed {seed}")));
        assert!(order > 0 && value > 0, "seed {seed}: {order} {value}");
        assert_eq!(errors(&stage.experiment(&format!("consistent-hash --seed {seed}"))), [0; 3], "seed {seed}");
    }
    assert_eq!(stage.queues(), [""; 0]);
}

#[test]
fn adding_consumers_breaks_the_order_with_every_seed_in_every_way() {
    let stage = Stage::new();
    for seed in SEEDS {
        // The second half has to come while much of the first one waits.
        let errors = errors(&stage.experiment_with_work("100..300", &format!("add-consumers --seed {seed}")));
        assert!(errors.iter().all(|count| *count > 0), "seed {seed}: {errors:?}");
    }
}

#[test]
fn a_sequenced_stream_keeps_the_order_with_every_seed_whatever_happens_meanwhile() {
    let stage = Stage::new();
    for seed in SEEDS {
        let report = stage.experiment(&format!("sequenced --seed {seed}"));
        assert_eq!(errors(&report), [0; 3], "seed {seed}");
        assert_eq!((&report["published"], &report["effects"]), (&200.into(), &200.into()));
        assert!(figure(&report, "moves") > 0.0, "{report}");
    }
    assert_eq!(stage.queues(), [""; 0], "not even the fleet's, which weren't there before");
    for table in ["user_balance", "balance_delivery", "stream_event WHERE stream LIKE 'lab%'", "lease", "member"] {
        assert_eq!(stage.database.count(&format!("SELECT count(*) AS n FROM {table}")), 0, "{table}");
    }
}

#[test]
fn draining_first_leaves_consumer_errors_that_may_be_tolerated() {
    let stage = Stage::new();
    let strict = stage.experiment("drain-first --seed 1");
    let [order, value, consumer] = errors(&strict);
    assert_eq!((order, value), (0, 0));
    assert!(consumer > 0);
    assert_eq!(errors(&stage.experiment("drain-first --seed 1 --tolerate-new")), [0; 3]);
}

#[test]
fn one_consumer_alone_keeps_the_order_of_one_queue() {
    assert_eq!(errors(&Stage::new().experiment("competing --consumers 1 --users 4")), [0; 3]);
}

#[test]
fn keys_are_spread_as_by_lot_whatever_the_weights() {
    let report = Stage::new().experiment("balance --seed 1");
    for weight in ["variation_weight_1", "variation_weight_20"] {
        let variation = figure(&report, weight);
        assert!(variation > 0.0 && variation < 0.2, "{variation}");
    }
}

#[test]
fn message_versions_cost_deliveries_and_can_lose_messages_or_stand_still() {
    let report = Stage::new().experiment("message-version --seed 1");
    let [order, value, consumer] = errors(&report);
    assert_eq!((order, value), (0, 0));
    assert!(consumer > 0);
    assert!(figure(&report, "turned_away") > 0.0 && figure(&report, "turned_away_in_livelock") > 0.0, "{report}");
    let anomalies = report["anomalies"].to_string();
    assert!(anomalies.contains("never raises its version"), "{anomalies}");
    assert_eq!(figure(&report, "lost_at_delivery_limit") > 0.0, anomalies.contains("lost at the delivery limit"));
}

#[test]
fn prefetched_messages_come_to_the_other_consumer_late_and_it_fails_at_the_same_one() {
    // Both have to have been sent what they may be before one comes to it.
    let report = Stage::new().experiment_with_work("100..200", "prefetch --seed 1 --users 8");
    assert!(figure(&report, "jumps") > 0.0 && figure(&report, "longest_jump") > 10.0, "{report}");
    assert!(errors(&report)[0] > 0);
}

#[test]
fn a_message_that_never_ends_is_set_aside_by_the_fleets_worker_alone() {
    let stage = Stage::new();
    let report = stage.experiment("killer --seed 1 --users 4 --messages 6");
    assert_eq!(figure(&report, "stood_still"), 11.0);
    assert!(figure(&report, "deaths") > 0.0 && figure(&report, "attempts") > 0.0, "{report}");
    assert_eq!((&report["published"], &report["effects"]), (&24.into(), &23.into()));
    assert_eq!(stage.queues(), [""; 0]);
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM dead_letter"), 0);
}

#[test]
fn a_redelivered_message_doubles_its_effect_unless_that_is_idempotent() {
    let report = Stage::new().experiment("redelivery --seed 1 --users 5");
    assert!(figure(&report, "doubled") > 0.0 && figure(&report, "repeated_idempotent") > 0.0, "{report}");
    assert_eq!(figure(&report, "doubled_idempotent"), 0.0);
}

#[test]
fn a_restart_moves_the_keys_of_queues_bound_out_of_order() {
    let report = Stage::new().experiment("restart --seed 1");
    if PrivateRabbitmq::is_installed() {
        let (sorted, shuffled) = (figure(&report, "moved_in_order"), figure(&report, "moved_out_of_order"));
        assert!((0.0..=1.0).contains(&sorted) && (0.0..=1.0).contains(&shuffled), "{report}");
    } else {
        assert_eq!(report["verdict"], "skipped");
    }
}
