//! What can be told of messages of the log by one who has marked what he sent.

use domain::log::Group;
use storage::{
    message_audit::{self, Found},
    message_outbox::{self, New, Published},
    messages::{self, NewMessage},
    partitions,
};
use test_support::{TestDatabase, sql};

struct Log {
    db: TestDatabase,
}

impl Log {
    fn accept(&self, text: &str, count: i64) {
        let new = New { text, key: None, partition: Some(1), count: Some(count) };
        self.db.database().transaction(|conn| message_outbox::append(conn, &new, None)).unwrap();
    }

    /// A relay's round, of which the first so many are confirmed, with what the round before has taken.
    fn round(&self, confirmed: usize) {
        let round = |conn: &mut _| {
            let taken = message_outbox::taken(conn)?;
            let ids: Vec<Vec<i64>> = taken.iter().map(|part| part.messages.iter().map(|m| m.0).collect()).collect();
            let published: Vec<_> = taken
                .iter()
                .zip(&ids)
                .map(|(part, ids)| {
                    let (confirmed, left) = ids.split_at(confirmed.min(ids.len()));
                    Published { partition: part.partition, confirmed, left }
                })
                .collect();
            message_outbox::advance(conn, &published, 100, i64::MAX)
        };
        self.db.database().transaction(round).unwrap();
    }

    /// The group has recorded partition 1's messages with these sequences and texts.
    fn record(&self, group: &str, messages: &[(i64, &str)]) {
        let new = messages.iter().map(|&(seq, text)| NewMessage {
            group,
            partition: 1,
            offset: 10 + seq,
            seq: Some(seq),
            message_id: None,
            key: None,
            text,
            accepted_at: Some("2024-05-06T07:08:09Z".parse().unwrap()),
            recorded_by: "worker",
        });
        let new: Vec<_> = new.collect();
        messages::record(&mut self.db.database().connection().unwrap(), &new).unwrap();
    }

    fn since(&self) -> Vec<(i32, i64)> {
        let list = partitions::list(&mut self.db.database().connection().unwrap()).unwrap();
        list.iter().map(|partition| (partition.partition, partition.seq)).collect()
    }

    fn found(&self, text: &str, since: &[(i32, i64)]) -> (i64, bool) {
        let mut conn = self.db.database().connection().unwrap();
        let Found { times, is_complete } = message_audit::times_accepted(&mut conn, text, since).unwrap();
        (times, is_complete)
    }
}

#[test]
fn a_message_is_found_once_wherever_it_is_and_what_nobody_has_recorded_is_told() {
    let log = Log { db: TestDatabase::new() };
    // Before the client came: published, and recorded by nobody.
    log.accept("old", 2);
    log.round(0);
    log.round(2);
    let since = log.since();
    assert_eq!(since, [(0, 0), (1, 2), (2, 0), (3, 0)]);
    assert_eq!(log.found("a #0", &since), (0, true));
    assert_eq!(log.found("a #0", &[]), (0, false), "it could be one of the old ones");

    // In the outbox, waiting or taken.
    log.accept("a", 3);
    assert_eq!((log.found("a #0", &since), log.found("a #3", &since)), ((1, true), (0, true)));
    log.round(0);
    assert_eq!(log.found("a #0", &since), (1, true));
    // Read before the relay has deleted it.
    log.record("g", &[(3, "a #0")]);
    assert_eq!(log.found("a #0", &since), (1, true));
    // Two have left: one was recorded, of the other nobody knows.
    log.round(2);
    assert_eq!((log.found("a #0", &since), log.found("a #1", &since)), ((1, false), (0, false)));
    assert_eq!(log.found("a #2", &since), (1, false), "one may be in the stream as well");
    // Two groups that have each read a part don't make one that has read all.
    log.record("late", &[(4, "a #1")]);
    assert_eq!((log.found("a #1", &since), log.found("b #0", &since)), ((1, false), (0, false)));
    log.record("g", &[(4, "a #1")]);
    assert_eq!((log.found("a #1", &since), log.found("b #0", &since)), ((1, true), (0, true)));
    // The same once more, as a request that comes through late.
    log.accept("a", 3);
    assert_eq!((log.found("a #0", &since), log.found("a #2", &since)), ((2, true), (2, true)));
}

#[test]
fn looking_waits_for_a_request_that_is_being_accepted() {
    let log = Log { db: TestDatabase::new() };
    let mut accepting = log.db.database().connection().unwrap();
    sql::execute(&mut accepting, "BEGIN").unwrap();
    let new = New { text: "a", key: None, partition: None, count: None };
    message_outbox::append(&mut accepting, &new, None).unwrap();
    std::thread::scope(|scope| {
        let found = scope.spawn(|| log.found("a", &[]));
        let waiting = "SELECT count(*) AS n FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event_type = 'Lock'";
        test_support::eventually("it waits", || (log.db.count(waiting) == 1).then_some(()));
        sql::execute(&mut accepting, "COMMIT").unwrap();
        assert_eq!(found.join().unwrap(), (1, true));
    });
}

#[test]
fn what_a_group_has_recorded_is_counted_by_what_the_texts_start_with() {
    let log = Log { db: TestDatabase::new() };
    log.record("g", &[(1, "a/1"), (2, "a/2"), (3, "a%"), (4, "b/1")]);
    log.record("h", &[(1, "a/1")]);
    let recorded = |prefix| {
        let mut conn = log.db.database().connection().unwrap();
        message_audit::recorded(&mut conn, &Group::parse("g").unwrap(), prefix).unwrap()
    };
    assert_eq!((recorded("a/").messages, recorded("a%").messages, recorded("c").messages), (2, 1, 0));
    assert!(recorded("a/").first_accepted_at < recorded("a/").last_recorded_at);
    assert_eq!((recorded("c").first_accepted_at, recorded("c").last_recorded_at), (None, None));
}
