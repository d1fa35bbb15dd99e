//! A queue that isn't as it must be.

use crate::stage::{PATIENCE, Stage};
use domain::topology::queue;
use serde_json::json;
use test_support::eventually_within;

#[test]
fn one_queue_with_other_arguments_stops_those_who_need_it_and_is_put_right_while_all_runs() {
    let (vhost, mut stage) = Stage::shared();
    vhost.declare_classic(queue::SEND_NOTIFICATION_SMS);
    stage.fleet.start_all().expect("the services' binaries");
    let names = stage.fleet.names();
    let concerned = ["outbox-relay", "feed-updater", "sms-notifier"];
    for name in &names {
        let (status, text) = eventually_within(PATIENCE, "each is ready, or says what is wrong", || {
            let (status, text) = stage.fleet.health(name, "/health/ready").ok()??;
            (status == 200 || text.contains("exists with other arguments")).then_some((status, text))
        });
        assert_eq!(status == 503, concerned.contains(&name.0), "{name:?}: {text}");
        if status == 503 {
            assert!(text.contains("queue `send_notification.sms`"), "{text}");
            assert!(text.contains("fleetctl topology migrate send_notification.sms"), "{text}");
        }
    }
    assert_eq!(names.len(), 10);

    // Whatever doesn't need that queue goes on.
    let author = stage.api.reader_by_phone("author", 0);
    let import = json!({"followerLoginPrefix": "fan", "count": 20, "async": 1});
    stage.api.ask("POST", &format!("/api/v1/add-followers/{author}"), &import);
    eventually_within(PATIENCE, "followers are imported", || {
        (stage.database.count("SELECT count(*) AS n FROM subscription") == 20).then_some(())
    });
    let reader = stage.api.reader_by_phone("reader", 1);
    stage.api.follow(author, reader);
    stage.api.post(author, "hello", true);
    let event = json!({"accountId": "a", "payload": {"amount": 5}});
    stage.api.ask("POST", "/api/v1/event", &event);
    eventually_within(PATIENCE, "the event takes effect", || {
        (stage.database.count("SELECT count(*) AS n FROM stream_event WHERE processed_at IS NOT NULL") == 1)
            .then_some(())
    });

    let mut migrate = stage.command(&["topology", "migrate", queue::SEND_NOTIFICATION_SMS]);
    migrate.env("RABBITMQ_MANAGEMENT_URL", vhost.management_url());
    let output = migrate.output().expect("it runs");
    assert!(output.status.success(), "{output:?}");
    stage.fleet.wait_ready(PATIENCE).expect("all are ready");
    stage.await_rest();
    assert_eq!(stage.api.feed(reader).len(), 1);
    stage.ends_well(0);
}
