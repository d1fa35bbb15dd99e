//! Loading the message log.

use crate::{
    NOWHERE, await_activity, checked, complaint, figure, fleetctl,
    gateway::{Gateway, Loser, Lost},
    interrupt, run, spawn,
};
use domain::log::Group;
use std::{
    process::Command,
    time::{Duration, Instant},
};
use storage::{
    consumer_offsets, message_outbox,
    messages::{self, NewMessage},
};
use test_support::{TestDatabase, eventually};

const ACCEPTED: &str = "SELECT count(*) AS n FROM message_outbox";

fn load(database: &TestDatabase, url: &str, args: &[&str]) -> Command {
    fleetctl(database, &[&["load", "messages", "--gateway", url], args].concat())
}

/// A relay's two rounds, after which the outbox is empty; answers how many messages have left it. If there's a group,
/// it has read them by then.
fn publish(database: &TestDatabase, group: Option<&str>) -> usize {
    let round = |conn: &mut _| {
        let taken = message_outbox::taken(conn)?;
        let ids: Vec<Vec<i64>> =
            taken.iter().map(|part| part.messages.iter().map(|message| message.0).collect()).collect();
        let published: Vec<_> = taken
            .iter()
            .zip(&ids)
            .map(|(part, ids)| message_outbox::Published { partition: part.partition, confirmed: ids, left: &[] })
            .collect();
        message_outbox::advance(conn, &published, i64::from(i32::MAX), i64::MAX)?;
        for part in &taken {
            let recorded = part.messages.iter().zip(part.first_seq..).map(|((_, message), seq)| NewMessage {
                group: group.unwrap_or_default(),
                partition: part.partition,
                offset: seq,
                seq: Some(seq),
                message_id: None,
                key: None,
                text: &message.as_ref().expect("nobody has removed one").body.text,
                accepted_at: message.as_ref().and_then(|message| message.body.accepted_at),
                recorded_by: "worker",
            });
            if group.is_some() {
                messages::record(conn, &recorded.collect::<Vec<_>>())?;
            }
        }
        Ok(ids.iter().map(Vec::len).sum())
    };
    let database = database.database();
    database.transaction(round).unwrap();
    database.transaction(round).unwrap()
}

fn create_group(database: &TestDatabase, name: &str) {
    let create = |conn: &mut _| consumer_offsets::create(conn, &Group::parse(name).unwrap(), &[(0, 0)]);
    database.database().transaction(create).unwrap();
}

#[test]
fn messages_are_loaded_with_texts_of_the_asked_size_to_each_partition_in_turn() {
    let database = TestDatabase::new();
    let gateway = Gateway::serve(&database, &[]);
    let summary = run(load(&database, &gateway.url, &["--count", "2500"]), 0);
    assert_eq!((figure(&summary, "accepted"), figure(&summary, "unconfirmed")), (2500, 0));
    let prefix = summary.strip_prefix("texts: ").unwrap().split('*').next().unwrap();
    let of = |condition: &str| database.count(&format!("{ACCEPTED} WHERE {condition}"));
    assert_eq!(of(&format!("text LIKE '{prefix}%' AND length(text) BETWEEN 100 AND 102")), 2500);
    assert_eq!(database.count("SELECT count(DISTINCT text) AS n FROM message_outbox"), 2500);
    // Requests of 1000, 1000 and 500.
    assert_eq!(of(r"text ~ '/[01]\.* #999$'") + of(r"text ~ '/2\.* #499$'"), 3);
    assert_eq!(of("partition = 0"), 625);
    assert_eq!(of("key IS NOT NULL"), 0);

    let started = Instant::now();
    let summary = run(load(&database, &gateway.url, &["--count", "500", "--rate", "1000", "--size", "65532"]), 0);
    // In requests of 100, the last of which is due at 400 ms.
    assert!(started.elapsed() >= Duration::from_millis(400), "{:?}", started.elapsed());
    let prefix = summary.strip_prefix("texts: ").unwrap().split('*').next().unwrap();
    assert_eq!(of(&format!("text LIKE '{prefix}4%' AND length(text) >= 65532")), 100);
}

#[test]
fn messages_go_to_the_chosen_partitions_and_keep_to_those_of_their_keys() {
    let database = TestDatabase::new();
    let gateway = Gateway::serve(&database, &[]);
    let of = |condition: &str| database.count(&format!("{ACCEPTED} WHERE {condition}"));
    run(load(&database, &gateway.url, &["--count", "50", "--batch", "1", "--partitions", "2"]), 0);
    assert_eq!((of("partition = 0"), of("partition = 1")), (25, 25));
    assert_eq!(of(r"substring(text FROM '/(\d+)')::int % 2 <> partition"), 0);
    database.execute("DELETE FROM message_outbox");

    run(load(&database, &gateway.url, &["--count", "50", "--batch", "20", "--partition", "3"]), 0);
    assert_eq!(of("partition = 3 AND key IS NULL"), 50);
    database.execute("DELETE FROM message_outbox");

    run(load(&database, &gateway.url, &["--count", "100", "--batch", "10", "--key-count", "3"]), 0);
    assert_eq!((of("key = 'key-0'"), of("key = 'key-1'"), of("key = 'key-2'")), (40, 30, 30));
    assert_eq!(of(r"substring(text FROM '/(\d+)')::int % 3 <> substr(key, 5)::int"), 0);
    assert_eq!(database.count("SELECT count(DISTINCT (key, partition)) AS n FROM message_outbox"), 3);
}

#[test]
fn loading_waits_for_the_group_that_its_asked_to_wait_for() {
    let database = TestDatabase::new();
    let gateway = Gateway::serve(&database, &[]);
    let load = |args: &[&str]| load(&database, &gateway.url, &[&["--count", "30", "--batch", "10"], args].concat());
    assert!(complaint(load(&["--group", "g", "--wait", "60s"]), 2).contains("--group g: unknown group"));
    assert_eq!(database.count(ACCEPTED), 0);
    create_group(&database, "g");
    let child = spawn(load(&["--group", "g", "--wait", "60s"]));
    await_activity(&database, "%starts_with%");
    assert_eq!(publish(&database, Some("g")), 30);
    let summary = checked(&child.wait_with_output().unwrap(), 0);
    assert!(summary.contains("\nrecorded: 30 of 30; since the first was accepted "), "{summary}");

    // Other groups and earlier runs don't count.
    let child = spawn(load(&["--group", "g", "--wait", "60s"]));
    eventually("all are accepted", || (database.count(ACCEPTED) == 30).then_some(()));
    assert_eq!(publish(&database, Some("another")), 30);
    await_activity(&database, "%starts_with%");
    interrupt(&child);
    let summary = checked(&child.wait_with_output().unwrap(), 130);
    assert!(summary.contains("\nrecorded: 0 of 30; "), "{summary}");
}

#[test]
fn what_cant_be_loaded_is_refused_before_anything_is_posted() {
    let database = TestDatabase::new();
    for (args, why) in [
        (&[][..], "required"),
        (&["--count", "0"], "0 is not in 1"),
        (&["--count", "1", "--batch", "0"], "0 is not in 1..=100000"),
        (&["--count", "1", "--batch", "10000000"], "10000000 is not in 1..=100000"),
        (&["--count", "1", "--size", "65533"], "65533 is not in 1..=65532"),
        (&["--count", "1", "--key-count", "0"], "0 is not in 1"),
        (&["--count", "1", "--partition", "-1"], "unexpected argument"),
        (&["--count", "1", "--partition", "1", "--partitions", "2"], "cannot be used with"),
        (&["--count", "1", "--partitions", "0"], "0 is not in 1"),
        (&["--count", "1", "--rate", "0"], "0 is not in 1"),
        (&["--count", "1", "--wait", "1s", "--group", "a b"], "may hold letters, digits"),
        (&["--count", "1", "--wait", "1s"], "--group <GROUP>"),
    ] {
        let complaint = complaint(load(&database, "http://127.0.0.1:1", args), 2);
        assert!(complaint.contains(why), "{args:?}: {complaint}");
    }
}

#[test]
fn what_the_gateway_refuses_ends_the_load_with_its_reason() {
    let database = TestDatabase::new();
    let gateway = Gateway::serve(&database, &[]);
    let load = |url: &str, args: &[&str]| {
        run(load(&database, url, &[&["--count", "5000", "--connections", "1"], args].concat()), 1)
    };
    let summary = load(&gateway.url, &["--partition", "4"]);
    assert_eq!((figure(&summary, "accepted"), figure(&summary, "unconfirmed")), (0, 5000));
    assert!(summary.contains("  1000 × 400 Bad Request: partition must be between 0 and 3\n"), "{summary}");
    let summary = load(&gateway.url, &["--size", "65532", "--batch", "2000"]);
    assert!(summary.contains("  2000 × 400 Bad Request: count must be at most "), "{summary}");
    assert_eq!(database.count(ACCEPTED), 0);
    let port = NOWHERE.split(':').next_back().unwrap().split('/').next().unwrap();
    let summary = load(&format!("http://127.0.0.1:{port}"), &["--patience", "500ms"]);
    assert!(summary.contains("  1000 × the gateway didn't answer"), "{summary}");
}

#[test]
fn messages_whose_answer_is_lost_are_not_posted_again_if_they_were_accepted() {
    let database = TestDatabase::new();
    let gateway = Gateway::serve(&database, &[]);
    let loser = Loser::start(&gateway, Lost::Answers, 5);
    let summary = run(load(&database, &loser.url, &["--count", "1000", "--batch", "100"]), 0);
    assert_eq!(loser.lost(), 5);
    assert_eq!((figure(&summary, "accepted"), figure(&summary, "unconfirmed")), (1000, 0));
    assert_eq!(database.count(ACCEPTED), 1000);
}

#[test]
fn whether_messages_that_have_left_were_accepted_is_told_by_a_group_that_has_read_all() {
    let database = TestDatabase::new();
    let gateway = Gateway::serve(&database, &[]);
    let loser = Loser::start(&gateway, Lost::Answers, 1);
    // As if relay and group were faster than the answer to the first request.
    database.execute(
        r#"CREATE FUNCTION leave() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN
             INSERT INTO message ("group", partition, "offset", seq, text, recorded_by)
             SELECT ''g'', partition, seq, seq, text, ''worker'' FROM (
                 SELECT partition, p.seq + row_number() OVER (PARTITION BY partition ORDER BY n.id) AS seq, n.text
                 FROM new n JOIN message_partition p USING (partition) WHERE n.text LIKE ''%/0.%'') gone;
             UPDATE message_partition p SET seq = seq + (SELECT count(*) FROM new n
                 WHERE n.partition = p.partition AND n.text LIKE ''%/0.%'');
             DELETE FROM message_outbox WHERE text LIKE ''%/0.%''; RETURN NULL; END'"#,
    );
    database.execute(
        "CREATE TRIGGER relay AFTER INSERT ON message_outbox REFERENCING NEW TABLE AS new EXECUTE FUNCTION leave()",
    );
    let summary = run(load(&database, &loser.url, &["--count", "100", "--batch", "50", "--connections", "1"]), 0);
    assert_eq!(loser.lost(), 1);
    assert_eq!((figure(&summary, "accepted"), figure(&summary, "unconfirmed")), (100, 0));
    assert_eq!(database.count("SELECT count(*) AS n FROM message"), 50);
    assert_eq!(database.count(ACCEPTED), 50);
}

#[test]
fn a_load_ends_where_nobody_can_tell_whether_messages_were_accepted() {
    let database = TestDatabase::new();
    let gateway = Gateway::serve(&database, &[]);
    let loser = Loser::start(&gateway, Lost::Answers, 1);
    // As if the relay were faster than the answer.
    database.execute(
        "CREATE FUNCTION leave() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN
             UPDATE message_partition p SET seq = seq + (SELECT count(*) FROM new n WHERE n.partition = p.partition);
             DELETE FROM message_outbox; RETURN NULL; END'",
    );
    database.execute(
        "CREATE TRIGGER relay AFTER INSERT ON message_outbox REFERENCING NEW TABLE AS new EXECUTE FUNCTION leave()",
    );
    let args = ["--count", "1000", "--batch", "100", "--connections", "1", "--patience", "1s"];
    let summary = run(load(&database, &loser.url, &args), 1);
    assert_eq!((figure(&summary, "accepted"), figure(&summary, "unconfirmed")), (0, 1000));
    assert!(summary.contains("  100 × the gateway didn't answer"), "{summary}");
    assert!(summary.contains("; it may have been accepted all the same\n"), "{summary}");
    assert_eq!(database.count("SELECT sum(seq)::bigint AS n FROM message_partition"), 100);
}

#[test]
fn messages_that_were_accepted_twice_are_told() {
    let database = TestDatabase::new();
    let gateway = Gateway::serve(&database, &[]);
    let loser = Loser::start(&gateway, Lost::Requests, 1);
    // As if the request that was given up came through as well.
    database.execute(
        "CREATE FUNCTION twice() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN
             IF pg_trigger_depth() = 1 THEN
                 INSERT INTO message_outbox (partition, id, text)
                 SELECT partition, nextval(''message_outbox_id''), text FROM new WHERE text LIKE ''%/0.%'';
             END IF;
             RETURN NULL; END'",
    );
    database.execute(
        "CREATE TRIGGER late AFTER INSERT ON message_outbox REFERENCING NEW TABLE AS new EXECUTE FUNCTION twice()",
    );
    let args = ["--count", "1000", "--batch", "100", "--connections", "1"];
    let summary = run(load(&database, &loser.url, &args), 1);
    assert_eq!(loser.lost(), 1);
    assert_eq!((figure(&summary, "accepted, "), figure(&summary, "unconfirmed")), (1000, 0));
    assert_eq!(figure(&summary, "were accepted twice"), 100);
    assert_eq!(database.count(ACCEPTED), 1100);
}
