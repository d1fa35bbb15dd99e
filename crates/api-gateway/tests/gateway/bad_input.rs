//! What a client may get wrong: told by name, and nothing is written.

use crate::app::{App, Part};
use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    net::TcpStream,
};
use ureq::http::Method;

/// The rows of every table that a request could write to.
fn rows(app: &App) -> i64 {
    app.db.count(
        r#"SELECT (SELECT count(*) FROM "user") + (SELECT count(*) FROM subscription) + (SELECT count(*) FROM tweet)
             + (SELECT count(*) FROM feed_entry) + (SELECT count(*) FROM follower_import) + (SELECT count(*) FROM avatar)
             + (SELECT count(*) FROM email_notification) + (SELECT count(*) FROM sms_notification)
             + (SELECT count(*) FROM outbox) + (SELECT count(*) FROM message_outbox) AS n"#,
    )
}

#[test]
fn every_wrong_field_is_named_and_nothing_is_written() {
    let app = App::start();
    let id = app.user("ann");
    let before = rows(&app);
    let add = format!("/api/v1/add-followers/{id}");
    let long = "x".repeat(33);
    let cases: Vec<(&str, Value, u16, &[&str])> = vec![
        // Users: missing, wrong-typed, oversized, unknown; both or neither contact; a login taken.
        ("/api/v2/user", json!({}), 400, &["email", "login", "password", "phone"]),
        ("/api/v2/user", json!({"login": 7, "email": [], "password": true}), 400, &["email", "login", "password"]),
        (
            "/api/v2/user",
            json!({"login": long, "phone": "123", "password": "short", "age": 151, "isActive": "yes", "roles": ["a", 1], "x": 1}),
            400,
            &["age", "isActive", "login", "password", "phone", "roles", "x"],
        ),
        (
            "/api/v2/user",
            json!({"login": "a b", "email": "a", "password": "x".repeat(129)}),
            400,
            &["email", "login", "password"],
        ),
        ("/api/v2/user", json!({"login": "", "email": "a@b.cd", "password": "correct horse"}), 400, &["login"]),
        ("/api/v2/user", json!({"login": "a\0b", "email": "a@b.cd", "password": "correct horse"}), 400, &["login"]),
        (
            "/api/v2/user",
            json!({"login": "bob", "email": "a@b.cd", "password": "correct horse", "roles": ["a\0b"]}),
            400,
            &["roles"],
        ),
        ("/api/v2/user", json!({"login": "ann", "email": "a@b.cd", "password": "correct horse"}), 409, &["login"]),
        ("/api/v1/user", json!({"login": "bob"}), 400, &["email", "phone"]),
        ("/api/v1/user", json!({"login": "bob", "email": "a@b.cd", "phone": "+19"}), 400, &["email", "phone"]),
        ("/api/v1/user", json!({"login": "bob", "email": "a@b.cd", "password": "correct horse"}), 400, &["password"]),
        ("/api/v1/user", json!({"login": "ann", "phone": "+19"}), 409, &["login"]),
        // Tweets.
        ("/api/v1/post-tweet", json!({}), 400, &["text", "userId"]),
        ("/api/v1/post-tweet", json!({"userId": "1", "text": 5, "async": "maybe"}), 400, &["async", "text", "userId"]),
        ("/api/v1/post-tweet", json!({"userId": 0, "text": "  "}), 400, &["text", "userId"]),
        ("/api/v1/post-tweet", json!({"userId": 1.5, "text": "x".repeat(141)}), 400, &["text", "userId"]),
        ("/api/v1/post-tweet", json!({"userId": 1e30, "text": "x", "Async": true}), 400, &["Async", "userId"]),
        ("/api/v1/post-tweet", json!({"userId": 999_999, "text": "x"}), 404, &[]),
        ("/api/v1/post-tweet", json!({"userId": 999_999, "text": "x", "async": true}), 404, &[]),
        // Imports: a count of 0, negative, or 10 million; a prefix that doesn't leave room for the number.
        (&add, json!({}), 400, &["count", "followerLoginPrefix"]),
        (&add, json!({"followerLoginPrefix": "f", "count": 0}), 400, &["count"]),
        (&add, json!({"followerLoginPrefix": "f", "count": -1}), 400, &["count"]),
        (&add, json!({"followerLoginPrefix": "f", "count": 10_000_000}), 400, &["count"]),
        (&add, json!({"followerLoginPrefix": "f", "count": 10_000_000, "async": 1}), 400, &["count"]),
        (&add, json!({"followerLoginPrefix": "f", "count": "ten"}), 400, &["count"]),
        (&add, json!({"followerLoginPrefix": "f".repeat(30), "count": 11}), 400, &["followerLoginPrefix"]),
        (&add, json!({"followerLoginPrefix": "a b", "count": 1, "id": 1}), 400, &["followerLoginPrefix", "id"]),
        (&add, json!({"followersLogin": "f", "count": 1}), 400, &["followerLoginPrefix", "followersLogin"]),
        ("/api/v1/add-followers/999999", json!({"followerLoginPrefix": "f", "count": 1}), 404, &[]),
        ("/api/v1/add-followers/999999", json!({"followerLoginPrefix": "f", "count": 1, "async": 1}), 404, &[]),
        ("/api/v1/add-followers/abc", json!({"followerLoginPrefix": "f", "count": 1}), 400, &["id"]),
        ("/api/v1/add-followers", json!({"async": 2}), 400, &["async", "count", "followersLogin", "userId"]),
        (
            "/api/v1/add-followers",
            json!({"userId": id, "followersLogin": "x".repeat(32), "count": 1}),
            400,
            &["followersLogin"],
        ),
        // Avatars.
        ("/api/v1/update-user-avatar-link/1", json!({}), 400, &["image"]),
        ("/api/v1/update-user-avatar-link/x", json!({"image": "R0lGODlh", "name": "x"}), 400, &["id", "image", "name"]),
        ("/api/v1/update-user-avatar-link/999999", json!({"image": "iVBORw0KGgo="}), 404, &[]),
    ];
    for (path, body, status, fields) in cases {
        let answer = app.post(path, body.clone());
        assert_eq!(
            (answer.status, answer.complaints()),
            (status, fields.iter().map(|f| (*f).to_owned()).collect()),
            "{path} {body}"
        );
        assert_eq!(rows(&app), before, "{path} {body}");
    }
    app.assert_audit_is_clean();
}

#[test]
fn wrong_parameters_of_paths_and_queries_are_named() {
    let app = App::start();
    let id = app.user("ann");
    let too_long = format!("/api/v1/user/{id}?login={}", "x".repeat(33));
    let again = format!("/api/v1/user/{id}?login=x&id=5");
    let cases: Vec<(Method, &str, u16, &[&str])> = vec![
        (Method::GET, "/api/v1/get-feed/0", 400, &["id"]),
        (Method::GET, "/api/v1/get-feed/-1?count=0", 400, &["count", "id"]),
        (Method::GET, "/api/v1/get-feed/1x?count=101&cuont=1", 400, &["count", "cuont", "id"]),
        (Method::GET, "/api/v1/get-feed/99999999999999999999", 400, &["id"]),
        (Method::GET, "/api/v1/get-feed/999999", 404, &[]),
        (Method::GET, "/api/v2/feed/1?limit=101&cursor=zzz", 400, &["cursor", "limit"]),
        (Method::GET, "/api/v2/feed/999999", 404, &[]),
        (Method::GET, "/api/v1/get-tweet?page=-1&perPage=101", 400, &["page", "perPage"]),
        (Method::GET, "/api/v1/get-tweet?page=99999999999999999&perPage=x", 400, &["page", "perPage"]),
        (Method::GET, "/api/v1/user?id=abc", 400, &["id"]),
        (Method::GET, "/api/v1/user?id=", 400, &["id"]),
        (Method::GET, "/api/v1/user?perPage=0", 400, &["perPage"]),
        (Method::GET, "/api/v1/get-user-by-login/a%20b", 400, &["login"]),
        (Method::GET, "/api/v1/get-user-by-login/a%00b", 400, &["login"]),
        (Method::GET, "/api/v1/follower-import/0", 400, &["importId"]),
        (Method::GET, "/api/v1/follower-import/999999", 404, &[]),
        (Method::GET, "/avatar/1/none.png", 404, &[]),
        (Method::DELETE, "/api/v1/user", 400, &["id"]),
        (Method::DELETE, "/api/v1/user/x", 400, &["id"]),
        (Method::DELETE, "/api/v1/tweet/0", 400, &["id"]),
        (Method::DELETE, "/api/v1/tweet/999999", 404, &[]),
        (Method::DELETE, "/api/v1/subscription/1/x", 400, &["follower"]),
        (Method::DELETE, "/api/v1/subscription/1/999999", 404, &[]),
        (Method::POST, "/api/v1/create-subscription/0/x", 400, &["author", "follower"]),
        (Method::POST, "/api/v1/create-subscription/1/999999", 404, &[]),
        (Method::PATCH, "/api/v1/user/1", 400, &["login"]),
        (Method::PATCH, &too_long, 400, &["login"]),
        (Method::PATCH, &again, 400, &["id"]),
    ];
    for (method, path, status, fields) in cases {
        let answer = app.send(method, path, &[], None);
        assert_eq!(
            (answer.status, answer.complaints()),
            (status, fields.iter().map(|f| (*f).to_owned()).collect()),
            "{path}"
        );
    }
    assert_eq!(app.get("/api/v1/get-user-by-login/ann").ok()["user"]["id"], id);
}

#[test]
fn forms_are_held_to_the_same_rules_as_json() {
    let app = App::start();
    app.user("ann");
    let before = rows(&app);
    for answer in [
        app.post_form("/api/v1/user", "login=+&email=x&login=b&other=1"),
        app.post_multipart(
            "/api/v1/user",
            &[
                Part::Text("login", " "),
                Part::Text("email", "x"),
                Part::Text("login", "b"),
                Part::Text("login", "c"),
                Part::Text("other", "1"),
            ],
        ),
    ] {
        assert_eq!(answer.status, 400);
        let mut named = answer.complaints();
        named.dedup();
        assert!(named == ["email", "login", "other"] || named == ["email", "other"], "{named:?}");
    }
    let file = app.post_multipart("/api/v1/user", &[Part::File("login", b"bob"), Part::Text("email", "a@b.cd")]);
    assert_eq!(file.complaints(), ["login"]);
    assert_eq!(rows(&app), before);
}

#[test]
fn texts_that_arent_utf8_are_refused_rather_than_changed() {
    let app = App::start();
    let id = app.user("ann");
    let form = [("content-type", "application/x-www-form-urlencoded")];
    for answer in [
        app.send(Method::PATCH, &format!("/api/v1/user/{id}?login=caf%E9"), &[], None),
        app.get("/api/v1/get-user-by-login?login=caf%E9"),
        app.post_form("/api/v1/user", "login=caf%E9&email=a%40example.com"),
        app.send(Method::POST, "/api/v1/user", &form, Some(b"login=caf\xe9&email=a%40example.com")),
        app.post_multipart("/api/v1/user", &[Part::Bytes("login", b"caf\xe9"), Part::Text("email", "a@example.com")]),
    ] {
        assert_eq!((answer.status, answer.complaints()), (400, vec!["login".to_owned()]), "{answer:?}");
    }
    // What isn't encoded wrongly stays as it is.
    app.post_form("/api/v1/user", "login=caf%C3%A9&email=a%2Bb%40example.com&").ok();
    assert_eq!(app.get("/api/v1/get-user-by-login/caf%C3%A9").ok()["user"]["email"], "a+b@example.com");
    assert_eq!(app.get("/api/v1/get-user-by-login/ann").status, 200);
}

#[test]
fn an_id_that_a_client_chooses_is_neither_blank_nor_too_long_nor_holds_control_characters() {
    let app = App::start();
    let [long_key, long_id] = [256, 65].map(|length| "x".repeat(length));
    for bad in ["", " ", "\u{a0}", "a\0b", "a\nb", "a\u{7f}b", "a\u{85}b", &long_key] {
        let message = app.post("/api/v1/message", json!({"text": "hello", "key": bad}));
        assert_eq!((message.status, message.complaints()), (400, vec!["key".to_owned()]), "{bad:?}");
    }
    for bad in ["", " ", "a\0b", "a\nb", &long_id] {
        let event = app.post("/api/v1/event", json!({"accountId": bad, "payload": 1}));
        assert_eq!((event.status, event.complaints()), (400, vec!["accountId".to_owned()]), "{bad:?}");
        let encoded: String = bad.bytes().map(|byte| format!("%{byte:02x}")).collect();
        for (path, field) in [("event?accountId", "accountId"), ("message?group", "group")] {
            let answer = app.get(&format!("/api/v1/{path}={encoded}"));
            assert_eq!((answer.status, answer.complaints()), (400, vec![field.to_owned()]), "{bad:?}");
        }
    }
    app.post("/api/v1/message", json!({"text": "hello", "key": " é 1 "})).ok();
    assert_eq!(app.db.count("SELECT count(*) AS n FROM message_outbox WHERE key = 'é 1'"), 1);
    assert_eq!(
        app.db.count("SELECT (SELECT count(*) FROM message_outbox) + (SELECT count(*) FROM stream_event) AS n"),
        1
    );
}

#[test]
fn a_body_that_cant_be_taken_apart_is_refused_without_being_quoted() {
    let app = App::start();
    let json = [("content-type", "application/json")];
    let secret = "hunter2hunter2";
    for body in [
        format!(r#"{{"login": "bob", "password": "{secret}" oops"#),
        format!(r#"["{secret}"]"#),
        format!(r#""{secret}""#),
        format!(r#"{{"password": "{secret}", "\ud800": 1}}"#),
        "[".repeat(10_000),
        String::new(),
    ] {
        let answer = app.send(Method::POST, "/api/v2/user", &json, Some(body.as_bytes()));
        assert_eq!(answer.status, 400, "{body:.40}");
        assert!(answer.complaints().is_empty());
        assert!(!String::from_utf8_lossy(&answer.body).contains(secret));
    }
    let answer = app.send(Method::POST, "/api/v2/user", &json, Some(b"{\"login\":\n  oops}"));
    assert!(answer.json()["detail"].as_str().unwrap().contains("line 2 column 3"), "{answer:?}");
    let not_utf8 = app.send(Method::POST, "/api/v2/user", &json, Some(b"{\"login\": \"\xff\"}"));
    assert_eq!(not_utf8.status, 400);

    let cut = [("content-type", "multipart/form-data; boundary=XX")];
    let answer = app.send(
        Method::POST,
        "/api/v1/user",
        &cut,
        Some(b"--XX\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nb"),
    );
    assert_eq!(answer.status, 400);
    let no_boundary = [("content-type", "multipart/form-data")];
    assert_eq!(app.send(Method::POST, "/api/v1/user", &no_boundary, Some(b"--XX--")).status, 400);
    assert_eq!(rows(&app), 0);
}

#[test]
fn a_content_type_that_isnt_taken_is_415() {
    let app = App::start();
    for (path, content_type) in [
        ("/api/v1/user", "text/xml"),
        ("/api/v2/user", "application/x-www-form-urlencoded"),
        ("/api/v1/post-tweet", "multipart/form-data; boundary=XX"),
    ] {
        let answer = app.send(Method::POST, path, &[("content-type", content_type)], Some(b"a=b"));
        assert_eq!((answer.status, answer.complaints().len()), (415, 0), "{path}");
    }
}

#[test]
fn ten_megabytes_are_refused_before_they_are_read_declared_or_not() {
    let app = App::start();
    let body = vec![b' '; 10_000_000];
    for path in ["/api/v2/user", "/api/v1/user", "/api/v1/update-user-avatar-link/1", "/api/v1/message"] {
        let declared = app.send(Method::POST, path, &[("content-type", "application/json")], Some(&body));
        assert_eq!((declared.status, declared.complaints().len()), (413, 0), "{path}");
        // The answer comes while the client still holds most of the body back, so nobody can have waited for it.
        for content_type in ["application/json", "multipart/form-data; boundary=XX"] {
            if path == "/api/v2/user" && content_type != "application/json" {
                continue;
            }
            let answer = stream_in_part(&app, path, content_type, 2_000_000);
            assert!(answer.starts_with("HTTP/1.1 413 "), "{path} {content_type}: {answer}");
        }
    }
    assert_eq!(rows(&app), 0);
}

/// Sends the first `sent` bytes of a chunked body that never ends, and returns the head of what comes back.
fn stream_in_part(app: &App, path: &str, content_type: &str, sent: usize) -> String {
    let mut stream = TcpStream::connect(app.address()).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    .unwrap();
    let start = b"--XX\r\nContent-Disposition: form-data; name=\"image\"; filename=\"f\"\r\n\r\n";
    write!(stream, "{:x}\r\n", start.len()).unwrap();
    stream.write_all(start).unwrap();
    write!(stream, "\r\n{sent:x}\r\n").unwrap();
    stream.write_all(&vec![b' '; sent]).unwrap();
    let mut head = [0; 64];
    let count = stream.read(&mut head).unwrap();
    String::from_utf8_lossy(&head[..count]).into_owned()
}
