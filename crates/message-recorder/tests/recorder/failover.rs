//! A database that isn't any more what it was.

use crate::stage::Stage;
use domain::log::MessageId;
use std::collections::BTreeMap;
use storage::log_audit;
use test_support::{PrivatePostgres, TestDatabase, TestVhost};

const GROUP: &str = "recorder";

#[test]
fn after_a_failover_to_a_standby_that_lagged_nothing_is_taken_for_what_the_old_server_has_lost() {
    let mut postgres = PrivatePostgres::new();
    postgres.start();
    let vhost = TestVhost::new();
    let mut stage = Stage::at(TestDatabase::on(&postgres.url()), vhost.url());
    stage.relay();
    stage.member(GROUP);
    stage.producer("before").spread(40);
    stage.await_recorded(GROUP);
    postgres.leave_standby_behind();
    // These are in the streams, and then nothing but the streams knows of them. A group that begins late reads them, too.
    stage.producer("lost").spread(80);
    stage.await_recorded(GROUP);
    postgres.fail_over();
    assert_eq!(stage.accepted(), 40);

    stage.producer("after").spread(200);
    stage.member("late");
    for group in [GROUP, "late"] {
        stage.await_count(group, 40 + 80 + 200);
        let mut texts = BTreeMap::<String, usize>::new();
        let mut newest = BTreeMap::<i32, i64>::new();
        for message in stage.messages(group) {
            *texts.entry(message.text).or_default() += 1;
            let id = message.message_id.as_deref().and_then(MessageId::parse).expect("an id of the log's");
            let before = newest.insert(message.partition, id.seq);
            assert!(before < Some(id.seq), "{group}: {id} behind {before:?}");
        }
        assert!(texts.len() == 320 && texts.values().all(|count| *count == 1), "{group}: {texts:?}");
        // What was left out on purpose isn't missing.
        let (totals, findings) = stage.transaction(|conn| log_audit::run(conn, &crate::stage::group(group)));
        assert!(findings.iter().all(|finding| finding.count == 0), "{group}: {findings:?}");
        assert!(totals.iter().all(|totals| totals.recorded == 80 && totals.foreign == 0), "{group}: {totals:?}");
    }
    let missing = "SELECT sum(missing)::bigint AS n FROM consumer_offset";
    assert_eq!(stage.database.count(missing), 0);
    // Once, and never again.
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM message_unused"), 4);
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM message_epoch"), 1);
    stage.stop_all();
}
