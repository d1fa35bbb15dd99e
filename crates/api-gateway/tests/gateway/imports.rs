use crate::app::{App, Part};
use domain::message::{AddFollowers, Message};
use serde_json::json;
use storage::{imports, outbox};

#[test]
fn followers_are_added_in_the_request_by_both_paths_and_every_kind_of_body() {
    let app = App::start_with(|settings| settings.api_gateway.import_step = 10);
    let author = app.user("author");
    let (by_id, plain) = (format!("/api/v1/add-followers/{author}"), "/api/v1/add-followers");
    let answers = [
        app.post(&by_id, json!({"followerLoginPrefix": " a ", "count": 25, "async": 0})),
        app.post_form(&by_id, "followerLoginPrefix=b&count=+25+&async=false"),
        app.post_multipart(&by_id, &[Part::Text("followerLoginPrefix", "c"), Part::Text("count", "25")]),
    ];
    for answer in answers {
        assert_eq!(answer.ok(), json!({"count": 25}));
    }
    let answers = [
        app.post(plain, json!({"userId": author, "followersLogin": "d", "count": 25, "async": false})),
        app.post_form(plain, &format!("userId={author}&followersLogin=e&count=25&async=0")),
    ];
    for answer in answers {
        assert_eq!(answer.ok(), json!({"created": 25}));
    }
    assert_eq!(app.db.count("SELECT count(*) AS n FROM subscription"), 125);
    assert_eq!(app.db.count(r#"SELECT count(*) AS n FROM "user" WHERE login IN ('a_0', 'a_24', 'e_0', 'e_24')"#), 4);
    let id = app.get("/api/v1/get-user-by-login/c_24").ok()["user"]["id"].as_i64().unwrap();
    let tweet = app.tweet(author, "hello, all");
    assert_eq!(app.feed(id), [tweet]);
    app.assert_audit_is_clean();
}

#[test]
fn an_import_for_a_worker_commits_with_its_message_and_shows_its_progress() {
    let app = App::start();
    let author = app.user("author");
    app.user("f_1");
    let body = json!({"followerLoginPrefix": "f", "count": 3, "async": "1"});
    let answer = app.post(&format!("/api/v1/add-followers/{author}"), body).ok();
    assert_eq!(answer["count"], 3);
    let first = answer["importId"].as_i64().unwrap();
    let form = format!("userId={author}&followersLogin=f&count=3&async=true");
    let answer = app.post_form("/api/v1/add-followers", &form).ok();
    assert_eq!(answer["success"], true);
    assert_ne!(answer["importId"], first, "the same again is asked for again");

    let progress = || app.get(&format!("/api/v1/follower-import/{first}")).ok();
    let shape = |state: &str, created: i32, skipped: i32| json!({"requested": 3, "created": created, "skipped": skipped, "state": state, "error": null});
    assert_eq!(progress(), shape("pending", 0, 0));
    let rows = app.db.database().transaction(|conn| outbox::take(conn, 10)).unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0].envelope.kind.as_deref(), Some(AddFollowers::TYPE));
    let message: AddFollowers = serde_json::from_slice(&rows[0].envelope.body).unwrap();
    assert_eq!((message.user_id.0, message.follower_login.as_str(), message.count), (author, "f", 3));

    // What the worker does with it.
    let id = message.import_id.unwrap();
    let step = || app.db.database().transaction(|conn| imports::step(conn, id, 2)).unwrap();
    step();
    assert_eq!(progress(), shape("running", 1, 1));
    step();
    assert_eq!(progress(), shape("done", 2, 1));
    app.assert_audit_is_clean();
}

#[test]
fn an_interrupted_import_goes_on_when_it_is_asked_for_again_and_a_finished_one_does_not() {
    let app = App::start_with(|settings| settings.api_gateway.import_step = 10);
    let author = app.user("author");
    app.db.execute(r#"ALTER TABLE "user" ADD CONSTRAINT interrupted CHECK (login <> 'f_15')"#);
    let ask = || app.post(&format!("/api/v1/add-followers/{author}"), json!({"followerLoginPrefix": "f", "count": 25}));
    assert_eq!(ask().status, 500);
    assert_eq!(app.db.count(r#"SELECT count(*) AS n FROM "user" WHERE login LIKE 'f\_%'"#), 10, "one step is done");

    app.db.execute(r#"ALTER TABLE "user" DROP CONSTRAINT interrupted"#);
    assert_eq!(ask().ok(), json!({"count": 25}));
    assert_eq!(app.db.count("SELECT count(*) AS n FROM follower_import"), 1);
    assert_eq!(app.db.count("SELECT skipped::bigint AS n FROM follower_import"), 0);

    assert_eq!(ask().ok(), json!({"count": 0}));
    assert_eq!(app.db.count("SELECT count(*) AS n FROM follower_import WHERE state = 'done'"), 2);
    assert_eq!(app.db.count("SELECT count(*) AS n FROM subscription"), 25);
    app.assert_audit_is_clean();
}

#[test]
fn an_import_whose_author_goes_away_meanwhile_has_failed() {
    let app = App::start_with(|settings| settings.api_gateway.import_step = 10);
    let author = app.user("author");
    app.db.execute(r#"ALTER TABLE "user" ADD CONSTRAINT interrupted CHECK (login <> 'f_15')"#);
    let ask = || app.post(&format!("/api/v1/add-followers/{author}"), json!({"followerLoginPrefix": "f", "count": 25}));
    assert_eq!(ask().status, 500);
    app.delete(&format!("/api/v1/user/{author}")).ok();
    assert_eq!(ask().status, 404);
    let import = app.db.count("SELECT id AS n FROM follower_import");
    let progress = app.get(&format!("/api/v1/follower-import/{import}")).ok();
    assert_eq!((&progress["state"], &progress["created"]), (&json!("failed"), &json!(10)));
    assert_eq!(progress["error"], "the author was deleted");
}
