//! Workers that come and go.

use crate::{
    load::Load,
    stage::{PATIENCE, PRIVATE, Stage},
};
use harness::Name;
use rustix::process::Signal;
use test_support::{eventually, eventually_within, sql};

const UPDATER: &str = "feed-updater";

#[test]
fn feed_updaters_come_and_go_under_load_and_nothing_is_lost() {
    let (_vhost, mut stage) = Stage::shared();
    stage.start();
    let load = Load::start(&stage, 8);
    load.await_more(30);
    let more: Vec<_> = (0..3).map(|_| stage.fleet.start(UPDATER, &[]).expect("its binary")).collect();
    stage.fleet.wait_ready(PATIENCE).expect("all are ready");
    for name in &more {
        eventually_within(PATIENCE, "each takes its share", || {
            stage.fleet.log(name).expect("a log").contains("handled a batch").then_some(())
        });
    }
    for name in more {
        load.await_more(10);
        let status = stage.fleet.stop(&name, PATIENCE).expect("it stops");
        assert_eq!(status.code(), Some(0), "{name:?}");
    }
    load.await_more(30);
    let accepted = load.stop();
    stage.await_rest();
    accepted.is_all_there(&stage);
    stage.ends_well(0);
}

#[test]
fn a_worker_that_is_told_to_stop_amid_a_batch_finishes_it() {
    let (_vhost, mut stage) = Stage::shared();
    stage.start();
    let author = stage.api.reader_by_email("author");
    let readers: Vec<_> = (0..12).map(|n| stage.api.reader_by_email(&format!("reader{n}"))).collect();
    readers.iter().for_each(|reader| stage.api.follow(author, *reader));
    let updater = Name(UPDATER, 0);

    // Nobody can write feeds until this connection lets go.
    let mut lock = stage.database.database().connection().expect("a connection");
    sql::execute(&mut lock, "BEGIN").expect("it begins");
    sql::execute(&mut lock, "LOCK TABLE feed_entry IN SHARE MODE").expect("it's locked");
    let tweet = stage.api.post(author, PRIVATE, true);
    eventually("the batch waits for the lock", || {
        let waiting = "SELECT count(*) AS n FROM pg_stat_activity
                       WHERE datname = current_database() AND application_name = 'feed-updater' AND wait_event_type = 'Lock'";
        (stage.database.count(waiting) > 0).then_some(())
    });
    stage.fleet.signal(&updater, Signal::TERM).expect("it runs");
    eventually("it has heard", || stage.fleet.log(&updater).expect("a log").contains("SIGTERM").then_some(()));
    sql::execute(&mut lock, "ROLLBACK").expect("it ends");
    let status = stage.fleet.wait_end(&updater, PATIENCE).expect("it ends");
    assert_eq!(status.code(), Some(0));
    // What it hadn't begun waits for another.
    stage.fleet.start(UPDATER, &[]).expect("its binary");
    for reader in readers {
        eventually("the tweet is in every feed", || (stage.api.feed(reader) == [tweet]).then_some(()));
    }
    stage.ends_well(0);
}
