//! A message that kills whoever handles it.

use crate::stage::{PATIENCE, PRIVATE, Stage};
use harness::Name;
use serde_json::json;
use test_support::{eventually_within, sql};

/// How the process of a handler that ran past its time limit ends.
const TIME_LIMIT_EXCEEDED: i32 = 75;

#[test]
fn a_message_that_kills_its_worker_is_set_aside_and_its_neighbours_are_not() {
    const MESSAGES: usize = 14;
    const NOTIFIER: &str = "email-notifier";
    const QUEUE: &str = "send_notification.email";
    const LIMITS: [(&str, &str); 4] = [
        // Only what waits for the lock takes so long.
        ("MURMURATION__WORKER__TIME_LIMIT_MS", "6000"),
        // Else the database ends the wait, or the statement, before the watchdog ends the process.
        ("MURMURATION__DATABASE__LOCK_TIMEOUT_MS", "60000"),
        ("MURMURATION__DATABASE__STATEMENT_TIMEOUT_MS", "60000"),
        ("MURMURATION__DATABASE__CALL_TIMEOUT_MS", "70000"),
    ];
    let (vhost, mut stage) = Stage::shared();
    stage.set("MURMURATION__WORKER__RETRY_DELAYS_MS", "200,500");
    stage.start();
    let reader = stage.api.reader_by_email("reader");
    stage.fleet.stop(&Name(NOTIFIER, 0), PATIENCE).expect("it stops");

    // Whoever writes the same row waits for what becomes of this one.
    let mut lock = stage.database.database().connection().expect("a connection");
    sql::execute(&mut lock, "BEGIN").expect("it begins");
    let row = format!(
        "INSERT INTO email_notification (user_id, source, source_id, email, text)
         VALUES ({reader}, 'message', 'poison', 'reader@example.com', '{PRIVATE}')"
    );
    sql::execute(&mut lock, &row).expect("the row is held");

    let text = json!({"userId": reader, "text": PRIVATE}).to_string();
    for n in 0..MESSAGES {
        let id = if n == MESSAGES / 2 { "poison".into() } else { format!("neighbour{n}") };
        assert!(vhost.publish("send_notification", "email", &json!({"message_id": id}), text.as_bytes()));
    }

    // All of them wait for it when it starts, so they're in one batch.
    stage.fleet.start(NOTIFIER, &LIMITS).expect("its binary");
    let mut deaths = 0;
    let letter = eventually_within(PATIENCE, "the message is set aside", || {
        for (name, status) in stage.fleet.restart_ended().expect("the fleet can be looked after") {
            assert_eq!((name.0, status.code()), (NOTIFIER, Some(TIME_LIMIT_EXCEEDED)));
            deaths += 1;
        }
        stage.dead_letters().pop()
    });
    assert_eq!((letter.queue.as_str(), letter.message_id.as_deref()), (QUEUE, Some("poison")));
    assert!(letter.error.starts_with("its worker died while handling it"), "{}", letter.error);
    // One for each attempt that the retry delays allow; the first, when nothing was known of it, isn't on record.
    assert_eq!((letter.attempts, deaths), (3, 4));
    sql::execute(&mut lock, "ROLLBACK").expect("it ends");

    let recorded = || stage.database.count("SELECT count(*) AS n FROM email_notification WHERE source = 'message'");
    let all_of = |count: usize| (recorded() == count as i64).then_some(());
    eventually_within(PATIENCE, "the neighbours are handled", || all_of(MESSAGES - 1));
    stage.fleet.wait_ready(PATIENCE).expect("all services are ready");
    // Its cause is gone, so once more it takes effect.
    stage.fleetctl(&["dead-letters", "replay", &letter.id.to_string(), "--by", "test"]);
    eventually_within(PATIENCE, "the message is handled", || all_of(MESSAGES));
    stage.ends_well(0);
}
