//! What is taken as a value, and what a value may cost.

use crate::app::{Answer, App, Part};
use serde_json::{Value, json};
use ureq::http::Method;

const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

fn post_raw(app: &App, path: &str, body: &str) -> Answer {
    app.send(Method::POST, path, &JSON, Some(body.as_bytes()))
}

/// The detail of the only error, which is about `field`.
fn only_error(answer: &Answer, status: u16, field: &str) -> String {
    assert_eq!((answer.status, answer.complaints()), (status, vec![field.to_owned()]), "{answer:?}");
    answer.json()["errors"][0]["detail"].as_str().unwrap().to_owned()
}

fn percent_encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

#[test]
fn a_body_of_very_many_fields_is_refused_at_the_first_one_too_many_in_a_short_answer() {
    let app = App::start();
    let path = format!("/api/v1/update-user-avatar-link/{}", app.user("ann"));
    let names: Vec<_> = (0..80_000).map(|n| format!("k{n}")).collect();
    let json_body = format!("{{{}}}", names.iter().map(|name| format!("\"{name}\":1")).collect::<Vec<_>>().join(","));
    let form = names.iter().map(|name| format!("{name}=1")).collect::<Vec<_>>().join("&");
    let blanks = names.iter().map(|name| format!("{name}=")).collect::<Vec<_>>().join("&");
    let parts: Vec<_> = names[..200].iter().map(|name| Part::Text(name, "1")).collect();
    let long = "n".repeat(10_000);
    let long_names = format!("{{{}}}", (0..60).map(|n| format!("\"{n}{long}\":1")).collect::<Vec<_>>().join(","));
    for answer in [
        post_raw(&app, &path, &json_body),
        app.post_form(&path, &form),
        app.post_form(&path, &blanks),
        app.post_multipart(&path, &parts),
        app.get(&format!("/api/v1/get-tweet?{}", &form[..2000])),
        post_raw(&app, &path, &long_names),
    ] {
        assert_eq!(answer.status, 400);
        let complaints = answer.complaints();
        assert!(complaints.len() <= 20 && answer.body.len() < 8_000, "{} bytes", answer.body.len());
        let problem = answer.json();
        let is_cut = problem["detail"].as_str().unwrap().ends_with("; and more");
        assert_eq!(is_cut, complaints.len() == 20, "{problem}");
        let first = json!({"field": "k64", "detail": "is one too many: a request may have 64 fields"});
        assert!(problem["errors"][0] == first || complaints.len() == 20, "{problem}");
    }
    // What follows the field that is one too many isn't looked at.
    let cut = format!("{} oops", &json_body[..json_body.len() / 2]);
    assert_eq!(post_raw(&app, &path, &cut).json()["errors"][0]["field"], "k64");
}

#[test]
fn of_many_wrong_events_as_many_are_told_as_of_fields() {
    let app = App::start();
    let answer = app.post("/api/v1/event", json!({"events": vec![json!({"accountId": "a b"}); 10_000]}));
    assert_eq!((answer.status, answer.complaints().len()), (400, 20));
    assert!(answer.json()["detail"].as_str().unwrap().ends_with("; and more"));
}

#[test]
fn a_field_that_a_body_has_twice_is_refused_however_it_is_written() {
    let app = App::start();
    let (ann, bob) = (app.user("ann"), app.user("bob"));
    for (path, body, field) in [
        ("/api/v1/post-tweet", format!(r#"{{"userId": {ann}, "userId": {bob}, "text": "hello"}}"#), "userId"),
        ("/api/v1/post-tweet", format!(r#"{{"userId": {ann}, "text": "hello", "te\u0078t": "hello"}}"#), "text"),
        ("/api/v1/user", r#"{"login": "cleo", "phone": "+19", "phone": null}"#.into(), "phone"),
        ("/api/v1/message", r#"{"text": "hello", "key": "a", "key": "a"}"#.into(), "key"),
        ("/api/v1/event", r#"{"accountId": 1, "accountId": 2, "payload": 1}"#.into(), "accountId"),
        ("/api/v1/event", r#"{"events": [{"accountId": 1, "payload": 1, "payload": 2}]}"#.into(), "events[0].payload"),
    ] {
        assert_eq!(only_error(&post_raw(&app, path, &body), 400, field), "is given more than once", "{body}");
    }
    let left = app.db.count(
        "SELECT (SELECT count(*) FROM tweet) + (SELECT count(*) FROM message_outbox) + (SELECT count(*) FROM stream_event) AS n",
    );
    assert_eq!(left, 0);
}

#[test]
fn nothing_that_is_no_unicode_text_is_taken_wherever_it_stands() {
    let app = App::start();
    let id = app.user("ann");
    // A login that has the character which stands for what can't be read, made before this was refused.
    app.db.execute(r#"INSERT INTO "user" (login, channel, phone) VALUES (U&'M\FFFDller', 'phone', '+19')"#);
    for answer in [
        app.get("/api/v1/get-user-by-login/M%FCller"),
        app.get("/api/v1/get-user-by-login?login=M%FCller"),
        app.send(Method::PATCH, &format!("/api/v1/user/{id}?login=M%FCller"), &[], None),
        app.post_form("/api/v1/user", "login=M%FCller&phone=%2B19"),
        app.post_form("/api/v1/user", "login=%ED%A0%80&phone=%2B19"),
        app.post_multipart("/api/v1/user", &[Part::Bytes("login", b"M\xfcller"), Part::Text("phone", "+19")]),
        post_raw(&app, "/api/v1/user", r#"{"login": "M\ud800ller", "phone": "+19"}"#),
        post_raw(&app, "/api/v2/user", r#"{"login": "\udc00\ud800", "phone": "+19", "password": "correct horse"}"#),
    ] {
        only_error(&answer, 400, "login");
    }
    assert_eq!(app.get("/api/v1/get-user-by-login/M%EF%BF%BDller").status, 200);
    let role = r#"{"login": "bob", "phone": "+19", "password": "correct horse", "roles": ["\ud83d"]}"#;
    only_error(&post_raw(&app, "/api/v2/user", role), 400, "roles");
    only_error(&post_raw(&app, "/api/v1/message", r#"{"text": "a\udfff"}"#), 400, "text");
    only_error(&post_raw(&app, "/api/v1/event", r#"{"accountId": "\ud800", "payload": 1}"#), 400, "accountId");
    // In a name it's an unknown field, or no JSON at all.
    for answer in [
        app.post_form("/api/v1/user", "%FC=x&login=bob&phone=%2B19"),
        app.get("/api/v1/user?%FC=1"),
        post_raw(&app, "/api/v1/user", r#"{"\ud800": 1, "login": "bob", "phone": "+19"}"#),
    ] {
        assert_eq!(answer.status, 400, "{answer:?}");
        answer.complaints();
    }
    // A pair of them is a character.
    let text = post_raw(&app, "/api/v1/post-tweet", &format!(r#"{{"userId": {id}, "text": "\ud83d\ude00"}}"#));
    assert_eq!(text.status, 200);
    assert_eq!(app.db.count(r#"SELECT count(*) AS n FROM "user""#), 2);
}

/// Logins that nobody may choose any more: not to be seen, not to be told apart, or no text.
const ODD: [&str; 8] = ["\u{200b}", "\u{feff}ann", "a\u{202e}b", "аdmin", "a@b", "zoe\u{308}", "\u{3164}", "a/b%?#"];

#[test]
fn a_login_that_misleads_cant_be_chosen_by_any_path() {
    let app = App::start();
    let id = app.user("ann");
    for login in ODD.into_iter().filter(|login| *login != "zoe\u{308}") {
        for answer in [
            app.post("/api/v1/user", json!({"login": login, "phone": "+19"})),
            app.post("/api/v2/user", json!({"login": login, "phone": "+19", "password": "correct horse"})),
            app.post_form("/api/v1/user", &format!("login={}&phone=%2B19", percent_encoded(login))),
            app.send(Method::PATCH, &format!("/api/v1/user/{id}?login={}", percent_encoded(login)), &[], None),
            app.send(
                Method::PATCH,
                "/api/v1/user",
                &JSON,
                Some(json!({"id": id, "login": login}).to_string().as_bytes()),
            ),
        ] {
            only_error(&answer, 400, "login");
        }
        for asynchronous in [0, 1] {
            let import = json!({"followerLoginPrefix": login, "count": 2, "async": asynchronous});
            only_error(&app.post(&format!("/api/v1/add-followers/{id}"), import), 400, "followerLoginPrefix");
            let import = json!({"userId": id, "followersLogin": login, "count": 2, "async": asynchronous});
            only_error(&app.post("/api/v1/add-followers", import), 400, "followersLogin");
        }
    }
    assert_eq!(app.db.count(r#"SELECT count(*) AS n FROM "user""#), 1);
}

#[test]
fn the_composed_and_the_decomposed_form_of_a_login_are_one() {
    let app = App::start();
    let id = app.user("zoë");
    only_error(&app.post("/api/v1/user", json!({"login": "zoe\u{308}", "phone": "+19"})), 409, "login");
    let other = app.user("ann");
    let path = format!("/api/v1/user/{other}?login={}", percent_encoded("zoe\u{308}"));
    only_error(&app.send(Method::PATCH, &path, &[], None), 409, "login");
    for login in ["zoë", "zoe\u{308}"] {
        assert_eq!(app.get(&format!("/api/v1/get-user-by-login/{}", percent_encoded(login))).ok()["user"]["id"], id);
    }
}

#[test]
fn who_has_an_odd_login_still_posts_follows_is_found_renamed_and_deleted() {
    let app = App::start();
    for (n, login) in ODD.into_iter().enumerate() {
        app.db.execute(&format!(
            r#"INSERT INTO "user" (login, channel, email) VALUES ('{login}', 'email', 'odd,<{n}@x.yz>')"#
        ));
        let found = app.get(&format!("/api/v1/get-user-by-login?login={}", percent_encoded(login))).ok();
        assert_eq!(found["user"]["login"], login);
        let id = found["user"]["id"].as_i64().unwrap();
        let other = app.user(&format!("other{n}"));
        app.follow(id, other);
        app.follow(other, id);
        app.tweet(id, "hello");
        let tweet = app.post("/api/v1/post-tweet", json!({"userId": id, "text": "hello", "async": true}));
        assert_eq!(tweet.status, 200);
        app.post(&format!("/api/v1/add-followers/{id}"), json!({"followerLoginPrefix": format!("fan{n}"), "count": 2}))
            .ok();
        if n % 2 == 0 {
            app.send(Method::PATCH, &format!("/api/v1/user/{id}?login=good{n}"), &[], None).ok();
            assert_eq!(app.get(&format!("/api/v1/get-user-by-login/good{n}")).ok()["user"]["id"], id);
        }
        app.delete(&format!("/api/v1/user/{id}")).ok();
    }
}

#[test]
fn a_text_of_which_nothing_can_be_seen_is_refused() {
    let app = App::start();
    let id = app.user("ann");
    for text in ["\u{200b}", "\u{feff} \u{2060}", "\u{3164}", "\u{2800}", "\u{200d}\u{fe0f}", "\u{202e}\u{202c}"] {
        for by_workers in [false, true] {
            let tweet = json!({"userId": id, "text": text, "async": by_workers});
            only_error(&app.post("/api/v1/post-tweet", tweet), 400, "text");
        }
        only_error(&app.post("/api/v1/message", json!({"text": text})), 400, "text");
        only_error(&app.post("/api/v1/message", json!({"text": "x", "key": text})), 400, "key");
        let user = json!({"login": "bob", "phone": "+19", "password": "correct horse", "roles": [text]});
        only_error(&app.post("/api/v2/user", user), 400, "roles");
    }
    let family = "👨\u{200d}👩\u{200d}👧 می\u{200c}خواهم ☺\u{fe0f}";
    app.tweet(id, &format!("\u{feff} {family} \u{200b}"));
    assert_eq!(app.get("/api/v1/get-tweet").ok()["tweets"][0]["text"], family);
}

#[test]
fn an_address_that_no_server_takes_is_refused_and_an_unusual_one_taken() {
    let app = App::start();
    let long = format!("{}@example.com", "a".repeat(65));
    for email in [
        "<a@b.cd>",
        "a,b@c.de",
        "mailto:a@b.cd",
        ".a@b.cd",
        "a.@b.cd",
        "a..b@c.de",
        "a@b.cd\r\nBcc: x@y.zz",
        "a@[127.0.0.1]",
        "a@b.cd,x@y.zz",
        "Ann <a@b.cd>",
        "a@\u{200b}b.cd",
        &long,
    ] {
        let user = json!({"login": "ann", "email": email});
        only_error(&app.post("/api/v1/user", user), 400, "email");
        only_error(
            &app.post_form("/api/v1/user", &format!("login=ann&email={}", percent_encoded(email))),
            400,
            "email",
        );
    }
    for (n, email) in ["\"a b\"@example.com", "ann@müller.de", "o'hara+x@example.com"].into_iter().enumerate() {
        let user = app.post("/api/v1/user", json!({"login": format!("ann{n}"), "email": email})).ok();
        assert_eq!(user["email"], email);
    }
}

#[test]
fn nobody_follows_themselves_and_who_does_already_can_leave() {
    let app = App::start();
    let id = app.user("fan_1");
    let path = format!("/api/v1/create-subscription/{id}/{id}");
    only_error(&app.send(Method::POST, &path, &[], None), 400, "follower");
    assert_eq!(app.db.count("SELECT count(*) AS n FROM subscription"), 0);
    // Of an import's users, the one who is the author already counts as skipped.
    let import =
        app.post(&format!("/api/v1/add-followers/{id}"), json!({"followerLoginPrefix": "fan", "count": 3})).ok();
    assert_eq!(import["count"], 2);
    assert_eq!(app.db.count("SELECT skipped::bigint AS n FROM follower_import"), 1);
    assert_eq!(app.db.count("SELECT count(*) AS n FROM subscription WHERE author_id = follower_id"), 0);
    // A row from before this was refused.
    app.db.execute(&format!(
        "INSERT INTO subscription (author_id, follower_id, since_tweet_id, after_tweet_id) VALUES ({id}, {id}, 0, 0)"
    ));
    let tweet = app.tweet(id, "hello");
    assert_eq!(app.feed(id), [tweet]);
    let user = app.get(&format!("/api/v1/user?id={id}")).ok();
    assert_eq!(user["subscriptionAuthors"], json!([{"id": id, "login": "fan_1"}]));
    app.delete(&format!("/api/v1/subscription/{id}/{id}")).ok();
    assert_eq!(app.feed(id), [0; 0]);
}

#[test]
fn a_password_that_is_guessed_first_is_refused_in_words_and_one_of_six_characters_taken() {
    let app = App::start();
    let sign_up = |login: &str, password: &str| {
        let email = format!("{login}.smith@example.com");
        app.post("/api/v2/user", json!({"login": login, "email": email, "password": password}))
    };
    for password in [
        "123456",
        "password",
        "Password",
        "p4ssw0rd",
        "qwerty",
        "iloveyou",
        "aaaaaa",
        "abcdef",
        "12345678",
        "annabella",
        "ANNABELLA",
        "allebanna",
        "annabella.smith@example.com",
        "annabella.smith",
        "dragon",
        "      ",
    ] {
        let detail = only_error(&sign_up("annabella", password), 400, "password");
        assert!(detail.starts_with("is too easy to guess: ") && !detail.contains("annabella"), "{detail}");
    }
    for (n, password) in
        ["kV7#qz", "wqz8xk", "correct horse", "žluťoučký kůň", &"long ".repeat(25)].into_iter().enumerate()
    {
        let answer = sign_up(&format!("user{n}"), password);
        assert_eq!(answer.status, 201, "{password} {answer:?}");
    }
    for password in ["kV7#q", &"kV7#qz".repeat(22)] {
        assert_eq!(only_error(&sign_up("bob", password), 400, "password"), "must be 6 to 128 characters long");
    }
}

#[test]
fn a_whole_number_may_be_written_in_any_way_of_json() {
    let app = App::start();
    let id = app.user("ann");
    let make = |n: usize, age: &str| {
        let body = format!(r#"{{"login": "u{n}", "phone": "+19", "password": "correct horse", "age": {age}}}"#);
        post_raw(&app, "/api/v2/user", &body)
    };
    for (n, age) in ["25.0", "2.5e1", "250e-1", "25", "0.25E+2"].into_iter().enumerate() {
        assert_eq!(make(n, age).status, 201, "{age}");
    }
    assert_eq!(app.db.count(r#"SELECT count(*) AS n FROM "user" WHERE age = 25"#), 5);
    for age in ["25.5", "2.55e1", "1e400", "1e-400", "-1.0", "151.0", "\"25\""] {
        only_error(&make(9, age), 400, "age");
    }
    post_raw(&app, "/api/v1/post-tweet", &format!(r#"{{"userId": {id}.0, "text": "hello"}}"#)).ok();
    // Beyond 2^53 no digit is lost.
    app.db.execute(
        r#"INSERT INTO "user" (id, login, channel, phone) OVERRIDING SYSTEM VALUE VALUES (9007199254740993, 'big', 'phone', '+19')"#,
    );
    for id in ["9007199254740993", "9007199254740993.0", "9007199254740.993e3"] {
        post_raw(&app, "/api/v1/post-tweet", &format!(r#"{{"userId": {id}, "text": "hello"}}"#)).ok();
    }
    assert_eq!(app.db.count("SELECT count(*) AS n FROM tweet WHERE author_id = 9007199254740993"), 3);
    for id in ["9007199254740992.0", "9007199254740993.5"] {
        let answer = post_raw(&app, "/api/v1/post-tweet", &format!(r#"{{"userId": {id}, "text": "hello"}}"#));
        assert!([400, 404].contains(&answer.status), "{id}");
    }
}

#[test]
fn a_login_that_is_taken_is_told_whether_it_is_chosen_or_changed_to() {
    let app = App::start();
    let (ann, bob) = (app.user("ann"), app.user("bob"));
    let rename = |id: i64, login: &str| app.send(Method::PATCH, &format!("/api/v1/user/{id}?login={login}"), &[], None);
    only_error(&app.post("/api/v1/user", json!({"login": "ann", "phone": "+19"})), 409, "login");
    only_error(&rename(bob, "ann"), 409, "login");
    assert_eq!(rename(ann, "ann").status, 200, "it's the user's own");
    assert_eq!(rename(999_999, "ann").status, 404);
    app.delete(&format!("/api/v1/user/{ann}")).ok();
    assert_eq!(rename(ann, "cleo").status, 404);
    assert_eq!(rename(bob, "ann").ok(), json!({"success": true}));
    let user: Value = app.get("/api/v1/get-user-by-login/ann").ok();
    assert_eq!(user["user"]["id"], bob);
}
