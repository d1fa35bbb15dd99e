//! Account events: in order while shards come and go, and when an operator has to help.

use crate::stage::{PATIENCE, Stage};
use harness::Name;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use std::process::Stdio;
use test_support::eventually_within;

const PROCESSOR: &str = "event-processor";

/// What events need, with so many processors.
fn start(stage: &mut Stage, processors: u32) -> Vec<Name> {
    for service in ["api-gateway", "outbox-relay", "dead-letter-recorder"] {
        stage.fleet.start(service, &[]).expect("its binary");
    }
    let names = (0..processors).map(|_| stage.fleet.start(PROCESSOR, &[]).expect("its binary")).collect();
    stage.fleet.wait_ready(PATIENCE).expect("all services are ready");
    names
}

fn applied(stage: &Stage) -> i64 {
    stage.database.count("SELECT count(*) AS n FROM account_effect")
}

fn await_applied(stage: &Stage, count: i64) {
    eventually_within(PATIENCE, "events take effect", || (applied(stage) >= count).then_some(()));
}

#[test]
fn resharding_under_load_loses_doubles_and_disorders_nothing() {
    let (_vhost, mut stage) = Stage::shared();
    stage.set("MURMURATION__EVENT_PROCESSOR__WORK_MS", "5..20");
    let processors = start(&mut stage, 2);
    // More than there's time for.
    let load = ["load", "events", "--accounts", "300", "--events", "1000000", "--rate", "400", "--prefix", "p-"];
    let mut loading = stage.command(&load).stdout(Stdio::piped()).spawn().expect("the operator's tool runs");
    await_applied(&stage, 300);
    for shards in ["32", "8", "8", "12"] {
        let before = applied(&stage);
        let report = stage.fleetctl(&["reshard", "--shards", shards]);
        assert!(report.ends_with(&format!("account_event: {shards} shards in {shards} queues\n")), "{report}");
        await_applied(&stage, before + 1);
    }
    // As a process dies in the midst of it.
    stage.fleet.signal(&processors[0], Signal::KILL).expect("it runs");
    stage.fleetctl(&["reshard", "--shards", "3"]);
    assert!(loading.try_wait().expect("it can be looked after").is_none(), "it was under load");
    kill_process(Pid::from_child(&loading), Signal::INT).expect("it runs");
    let output = loading.wait_with_output().expect("it can be looked after");
    assert_eq!(output.status.code(), Some(130));
    let summary = String::from_utf8(output.stdout).expect("it prints UTF-8");
    let accepted = summary.split(" accepted").next().and_then(|text| text.rsplit(' ').next()).expect("a number");

    let report = stage.fleetctl(&["events", "verify", "--prefix", "p-", "--wait", "5m"]);
    let last = report.lines().last().expect("totals");
    assert!(last.starts_with(&format!("{accepted} events of ")), "{report}{summary}");
    assert!(last.ends_with(&format!(": {accepted} applied, 0 skipped, 0 parked")), "{report}{summary}");
    let ended = stage.fleet.restart_ended().expect("the fleet can be looked after");
    assert_eq!(ended.len(), 1);
    stage.fleet.wait_ready(PATIENCE).expect("all services are ready");
    stage.ends_well(0);
}

#[test]
fn parked_accounts_go_on_as_the_operator_says_and_others_dont_wait_for_them() {
    let (_vhost, mut stage) = Stage::shared();
    stage.set("MURMURATION__EVENT_PROCESSOR__WORK_MS", "1");
    stage.set("MURMURATION__EVENT_PROCESSOR__SIMULATE_FAILURES", "true");
    start(&mut stage, 1);
    let event = |account: &str, payload| json!({"accountId": account, "payload": payload});
    let fine = |n: i32| json!({"n": n});
    let events: Vec<_> = ["retried", "skipped", "replaced"]
        .iter()
        .flat_map(|account| {
            [event(account, fine(1)), event(account, json!({"simulate": "permanent"})), event(account, fine(3))]
        })
        .chain((0..10).map(|n| event("other", fine(n))))
        .collect();
    stage.api.ask("POST", "/api/v1/event", &json!({"events": events}));
    let parked = |stage: &Stage| stage.fleetctl(&["keys", "list", "--json"]).matches("\"parkedAt\"").count();
    eventually_within(PATIENCE, "they are parked", || (parked(&stage) == 3).then_some(()));
    await_applied(&stage, 13);

    stage.fleetctl(&["keys", "retry", "retried"]);
    stage.fleetctl(&["keys", "skip", "skipped", "--seq", "2"]);
    stage.fleetctl(&["keys", "replace", "replaced", "--seq", "2", "--payload", r#"{"n": 2}"#]);
    // Two and three of the others; the one that is retried fails again.
    await_applied(&stage, 13 + 1 + 2);
    eventually_within(PATIENCE, "it's parked again", || (parked(&stage) == 1).then_some(()));
    let report = stage.fleetctl(&["events", "verify"]);
    assert!(report.ends_with("19 events of 4 keys: 16 applied, 1 skipped, 2 parked\n"), "{report}");

    stage.fleetctl(&["keys", "replace", "retried", "--payload", "null"]);
    let report = stage.fleetctl(&["events", "verify", "--wait", "3m"]);
    assert!(report.ends_with("19 events of 4 keys: 18 applied, 1 skipped, 0 parked\n"), "{report}");
    stage.ends_well(0);
}
