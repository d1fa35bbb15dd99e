//! The usual life of the fleet, each service with no more rights than it needs: what the other tests of the whole fleet leave out.

use crate::stage::{PATIENCE, PRIVATE, Stage};
use serde_json::{Value, json};
use test_support::eventually_within;

#[test]
fn the_fleet_lives_its_usual_life_with_least_rights() {
    let (vhost, mut stage) = Stage::shared();
    stage.set("MURMURATION__EVENT_PROCESSOR__WORK_MS", "5");
    stage.set("MURMURATION__FEED_UPDATER__SWEEP_INTERVAL_MS", "200");
    stage.set("MURMURATION__USERS__KEEP_DELETED_DAYS", "0");
    stage.start();
    let (none, author) = (Value::Null, stage.api.reader_by_email("author"));
    let reader = stage.api.reader_by_phone("reader", 1);
    let gone = stage.api.reader_by_email("gone");
    for follower in [reader, gone] {
        stage.api.follow(author, follower);
        stage.api.follow(follower, author);
    }
    stage.api.ask("PATCH", &format!("/api/v1/user/{reader}?login=renamed"), &none);
    // Imports and tweets, in the request and by the workers.
    for asynchronous in [0, 1] {
        let order = json!({"followerLoginPrefix": format!("fan{asynchronous}"), "count": 12, "async": asynchronous});
        stage.api.ask("POST", &format!("/api/v1/add-followers/{author}"), &order);
        stage.api.post(author, PRIVATE, asynchronous == 1);
    }
    let theirs = stage.api.post(gone, PRIVATE, true);
    eventually_within(PATIENCE, "the tweet is in the feed", || stage.api.feed(author).contains(&theirs).then_some(()));
    // Events, also one that fails, and messages of the log.
    stage.fleetctl(&["load", "events", "--accounts", "5", "--events", "50", "--prefix", "r-", "--wait", "3m"]);
    stage.fleetctl(&["load", "messages", "--count", "100", "--group", "recorder", "--wait", "3m"]);
    for page in
        ["/api/v1/message?group=recorder", "/api/v1/event/r-1", "/api/v1/results", "/api/v1/user", "/api/v1/get-tweet"]
    {
        stage.api.ask("GET", page, &none);
    }
    // What can't be handled is set aside, and what an operator replays comes back.
    assert!(vhost.publish("publish_tweet", "", &json!({}), b"no JSON"));
    eventually_within(PATIENCE, "it's set aside", || (stage.dead_letters().len() == 1).then_some(()));
    stage.fleetctl(&["dead-letters", "replay", "1"]);
    eventually_within(PATIENCE, "it's set aside again", || (stage.dead_letters().len() == 1).then_some(()));

    // Whatever is deleted is swept, and of a user nothing personal is left.
    stage.await_rest();
    let tweet = stage.api.feed(reader)[0];
    stage.api.ask("DELETE", &format!("/api/v1/tweet/{tweet}"), &none);
    stage.api.ask("DELETE", &format!("/api/v1/subscription/{author}/{reader}"), &none);
    stage.api.ask("DELETE", &format!("/api/v1/user/{gone}"), &none);
    let erased =
        format!("SELECT count(*) AS n FROM \"user\" WHERE id = {gone} AND email IS NULL AND erased_at IS NOT NULL");
    eventually_within(PATIENCE, "the deleted user is erased", || (stage.database.count(&erased) == 1).then_some(()));
    stage.database.execute("UPDATE feed_garbage SET due_at = now()");
    let garbage = "SELECT count(*) AS n FROM feed_garbage";
    eventually_within(PATIENCE, "what nobody sees is swept", || {
        stage.database.execute("UPDATE feed_garbage SET due_at = now()");
        (stage.database.count(garbage) == 0).then_some(())
    });
    assert_eq!(
        stage.database.count(&format!("SELECT count(*) AS n FROM feed_entry WHERE tweet_id IN ({tweet}, {theirs})")),
        0
    );
    let text = format!("SELECT count(*) AS n FROM tweet WHERE id = {tweet} AND text = '(erased)'");
    eventually_within(PATIENCE, "the deleted tweet has lost its text", || {
        (stage.database.count(&text) == 1).then_some(())
    });
    for name in stage.fleet.names() {
        let log = stage.fleet.log(&name).expect("a log");
        for refused in ["permission denied", "ACCESS_REFUSED", "access to"] {
            assert!(!log.contains(refused), "the log of {name}:\n{log}");
        }
    }
    stage.ends_well(1);
}
