//! A run that doesn't come to its end leaves nothing behind, or nothing that the next one doesn't take away.

use crate::stage::{Ended, Stage};
use rustix::process::{Pid, Signal, kill_process};
use test_support::eventually;

/// Work that lasts until it's interrupted.
const LONG: &str = "--work-ms 2000..3000 --out .";

/// Awaits that all processes of an experiment are up: none of them is about to declare something then.
fn begun(stage: &Stage, experiment: &str) {
    let consumers = match experiment {
        "competing" => 4,
        "add-consumers" => 8,
        "killer" => 1,
        // One consumer would take all shards until the other one comes, and both are awaited before there's any event.
        _ => {
            let effects = || stage.database.count("SELECT count(*) AS n FROM balance_delivery");
            return eventually("events take effect", || (effects() > 0).then_some(()));
        }
    };
    eventually("the consumers consume", || (stage.consumers() == consumers).then_some(()));
}

#[test]
fn an_interrupted_run_leaves_no_queue_no_process_and_no_row() {
    let stage = Stage::new();
    for experiment in ["competing", "add-consumers", "killer", "sequenced"] {
        let child = stage.start(&format!("run {experiment} {LONG}"));
        begun(&stage, experiment);
        kill_process(Pid::from_child(&child), Signal::INT).expect("it runs");
        let Ended { status, err, .. } = child.wait_with_output().expect("it ends").into();
        // How far it is, it says every few seconds.
        let said: Vec<_> = err.lines().filter(|line| !line.starts_with(&format!("{experiment}: "))).collect();
        assert_eq!((status, &said[..]), (130, &["ordering-lab: interrupted"][..]), "{experiment}");
        assert_eq!(stage.processes(), 0, "{experiment}");
        assert_eq!(stage.queues(), [""; 0], "{experiment}");
        for table in ["user_balance", "balance_delivery", "stream_event", "stream WHERE stream <> 'account_event'"] {
            assert_eq!(stage.database.count(&format!("SELECT count(*) AS n FROM {table}")), 0, "{experiment}: {table}");
        }
    }
}

#[test]
fn what_a_killed_run_leaves_is_taken_away_by_the_next() {
    let stage = Stage::new();
    let mut child = stage.start(&format!("run sequenced {LONG}"));
    begun(&stage, "sequenced");
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    eventually("its processes end", || (stage.processes() == 0).then_some(()));
    assert!(!stage.queues().is_empty());
    stage.experiment("competing --fresh --messages 2");
    assert_eq!(stage.queues(), [""; 0]);
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM stream WHERE stream <> 'account_event'"), 0);
}

#[test]
fn a_second_run_beside_the_first_is_refused() {
    let stage = Stage::new();
    let mut child = stage.start(&format!("run competing {LONG}"));
    begun(&stage, "competing");
    for arguments in ["run balance --out .", "clean"] {
        let Ended { status, err, .. } = stage.run(arguments);
        assert_eq!(status, 2);
        assert!(err.contains("another ordering-lab is at work"), "{err}");
    }
    kill_process(Pid::from_child(&child), Signal::TERM).expect("it runs");
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
}

#[test]
fn the_fleets_queues_stay_where_they_were_there_before() {
    let stage = Stage::new();
    let mut session = broker::Session::open(&stage.broker(), "test").expect("the broker answers");
    broker::declare(&mut session, &domain::topology::Topology::fleet(&[])).expect("the queues are new");
    stage.experiment("killer --seed 1 --users 2 --messages 2");
    assert_eq!(stage.queues(), ["dead_letter", "publish_tweet", "update_feed.00"]);
}
