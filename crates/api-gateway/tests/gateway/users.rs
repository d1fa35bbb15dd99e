use crate::app::{App, Part, has_form, ids, keys};
use serde_json::{Value, json};
use ureq::http::Method;

const SHAPE: [&str; 8] = ["avatarLink", "createdAt", "email", "id", "login", "phone", "roles", "updatedAt"];

#[test]
fn a_user_with_everything_has_the_published_shape_and_a_hashed_password() {
    let app = App::start();
    let body = json!({
        "login": "ann", "phone": "+14155550123", "password": "correct horse", "age": 42, "isActive": false,
        "roles": ["admin", "writer"],
    });
    let answer = app.post("/api/v2/user", body);
    assert_eq!(answer.status, 201);
    let user = answer.json();
    assert_eq!(keys(&user), SHAPE);
    assert_eq!(user["login"], "ann");
    assert_eq!(user["phone"], "+14155550123");
    assert_eq!(user["email"], Value::Null);
    assert_eq!(user["avatarLink"], Value::Null);
    assert_eq!(user["roles"], json!(["admin", "writer"]));
    for time in ["createdAt", "updatedAt"] {
        assert!(has_form(&user[time], "0000-00-00 00:00:00"), "{user}");
    }
    let rows = app.db.count(
        r#"SELECT count(*) AS n FROM "user" WHERE login = 'ann' AND channel = 'phone' AND age = 42 AND NOT is_active
           AND password_hash LIKE '$argon2id$%' AND password_hash NOT LIKE '%horse%'"#,
    );
    assert_eq!(rows, 1);
}

#[test]
fn what_may_be_left_out_has_its_default() {
    let app = App::start();
    let body =
        json!({"login": "ann", "email": "ann@example.com", "phone": null, "password": "correct horse", "age": null});
    assert_eq!(app.post("/api/v2/user", body).ok()["roles"], json!([]));
    assert_eq!(app.db.count(r#"SELECT count(*) AS n FROM "user" WHERE is_active AND age IS NULL"#), 1);
}

#[test]
fn a_plain_user_comes_as_json_urlencoded_or_multipart_with_blanks_trimmed() {
    let app = App::start();
    let answers = [
        app.post("/api/v1/user", json!({"login": " one ", "email": " one@example.com "})),
        app.post_form("/api/v1/user", "login=+two++&email=&phone=%2B999123456"),
        app.post_multipart(
            "/api/v1/user",
            &[Part::Text("login", " three "), Part::Text("email", "three@example.com"), Part::Text("phone", "")],
        ),
        app.send(
            Method::POST,
            "/api/v1/user",
            &[("content-type", "application/vnd.api+json")],
            Some(br#"{"login": "four", "phone": "+999123456"}"#),
        ),
        app.send(
            Method::POST,
            "/api/v1/user",
            &[("content-type", "Application/JSON; charset=utf-8")],
            Some(br#"{"login": "five", "phone": "+999123456"}"#),
        ),
    ];
    let logins: Vec<_> = answers
        .into_iter()
        .map(|answer| {
            assert_eq!(answer.status, 201);
            let user = answer.json();
            assert_eq!(keys(&user), SHAPE);
            user["login"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(logins, ["one", "two", "three", "four", "five"]);
    assert_eq!(app.db.count(r#"SELECT count(*) AS n FROM "user" WHERE password_hash IS NULL"#), 5);
}

#[test]
fn a_user_is_found_by_login_whatever_its_letters() {
    let app = App::start();
    let id = app.user("zoë+100");
    for path in ["zo%C3%AB+100", "zo%c3%ab%2B100", "zoe%CC%88+100"] {
        assert_eq!(app.get(&format!("/api/v1/get-user-by-login/{path}")).ok()["user"]["id"], id, "{path}");
    }
    assert_eq!(app.get("/api/v1/get-user-by-login/nobody").status, 404);
}

#[test]
fn users_come_page_by_page_and_one_comes_in_full() {
    let app = App::start();
    let users: Vec<_> = (0..5).map(|i| app.user(&format!("user{i}"))).collect();
    let page = app.get("/api/v1/user?page=1&perPage=2").ok();
    assert_eq!(ids(&page["users"]), users[2..4]);
    assert_eq!(keys(&page["users"][0]), SHAPE);
    assert_eq!(ids(&app.get("/api/v1/user").ok()["users"]), users);

    app.follow(users[0], users[1]);
    app.follow(users[0], users[2]);
    app.follow(users[3], users[0]);
    let tweets = [app.tweet(users[0], "first"), app.tweet(users[0], "second")];
    let user = app.get(&format!("/api/v1/user?id={}", users[0])).ok();
    assert_eq!(user["login"], "user0");
    assert_eq!(ids(&user["tweets"]), [tweets[1], tweets[0]]);
    assert_eq!(
        user["subscriptionFollowers"],
        json!([
            {"id": users[1], "login": "user1"}, {"id": users[2], "login": "user2"}
        ])
    );
    assert_eq!(user["subscriptionAuthors"], json!([{"id": users[3], "login": "user3"}]));
    assert_eq!(app.get("/api/v1/user?id=999999").status, 404);
}

#[test]
fn the_lists_of_a_user_in_full_are_bounded() {
    let app = App::start();
    let author = app.user("author");
    app.post(&format!("/api/v1/add-followers/{author}"), json!({"followerLoginPrefix": "f", "count": 150})).ok();
    app.db.execute(&format!("INSERT INTO tweet (author_id, text) SELECT {author}, 'x' FROM generate_series(1, 150)"));
    let user = app.get(&format!("/api/v1/user?id={author}")).ok();
    for list in ["tweets", "subscriptionFollowers"] {
        assert_eq!(user[list].as_array().unwrap().len(), 100, "{list}");
    }
}

#[test]
fn a_user_is_renamed_by_path_or_by_form() {
    let app = App::start();
    let id = app.user("ann");
    let renamed = app.send(Method::PATCH, &format!("/api/v1/user/{id}?login=beth"), &[], None);
    assert_eq!(renamed.ok(), json!({"success": true}));
    assert_eq!(app.get("/api/v1/get-user-by-login/beth").ok()["user"]["id"], id);

    let form = format!("id={id}&login=+cleo+");
    let headers = [("content-type", "application/x-www-form-urlencoded")];
    let renamed = app.send(Method::PATCH, "/api/v1/user", &headers, Some(form.as_bytes()));
    assert_eq!(renamed.ok(), json!({"success": true}));
    assert_eq!(app.get("/api/v1/get-user-by-login/cleo").ok()["user"]["id"], id);

    app.user("dora");
    let taken = app.send(Method::PATCH, &format!("/api/v1/user/{id}?login=dora"), &[], None);
    assert_eq!((taken.status, taken.complaints()), (409, vec!["login".to_owned()]));
    assert_eq!(app.send(Method::PATCH, "/api/v1/user/999999?login=x", &[], None).status, 404);
}

#[test]
fn a_deleted_user_is_gone_and_the_login_is_free_again() {
    let app = App::start();
    let (one, two) = (app.user("one"), app.user("two"));
    assert_eq!(app.delete(&format!("/api/v1/user/{one}")).ok(), json!({"success": true}));
    assert_eq!(app.delete(&format!("/api/v1/user?id={two}")).ok(), json!({"success": true}));
    for gone in [one, two] {
        assert_eq!(app.delete(&format!("/api/v1/user/{gone}")).status, 404);
        assert_eq!(app.get(&format!("/api/v1/user?id={gone}")).status, 404);
    }
    assert_ne!(app.user("one"), one);
}

/// Small images: only the first bytes are looked at.
const PNG: &[u8] = b"\x89PNG\r\n\x1a\n and so on";
const JPEG: &[u8] = b"\xff\xd8\xff\xe0 and so on";
const WEBP: &[u8] = b"RIFF\x10\0\0\0WEBPVP8 and so on";

#[test]
fn an_avatar_is_served_as_it_was_uploaded_until_it_is_replaced() {
    let app = App::start();
    let id = app.user("ann");
    let path = format!("/api/v1/update-user-avatar-link/{id}");
    let mut earlier: Option<String> = None;
    for (image, content_type) in [(PNG, "image/png"), (JPEG, "image/jpeg"), (WEBP, "image/webp")] {
        let user = app.post_multipart(&path, &[Part::File("image", image)]).ok()["user"].clone();
        assert_eq!(keys(&user), SHAPE);
        let link = user["avatarLink"].as_str().unwrap().to_owned();
        let served = app.get(&link);
        assert_eq!((served.status, served.body.as_slice()), (200, image));
        assert_eq!(served.header("content-type"), content_type);
        assert_eq!(served.header("x-content-type-options"), "nosniff");
        assert_eq!(served.header("cache-control"), "public, max-age=31536000, immutable");
        if let Some(earlier) = earlier.replace(link) {
            assert_eq!(app.get(&earlier).status, 404);
        }
    }
    app.delete(&format!("/api/v1/user/{id}")).ok();
    assert_eq!(app.get(&earlier.unwrap()).status, 404);
}

#[test]
fn an_avatars_file_may_be_called_anything() {
    let app = App::start();
    let path = format!("/api/v1/update-user-avatar-link/{}", app.user("ann"));
    for disposition in [
        &b"name=\"image\"; filename=\"caf\xe9.png\""[..],
        b"name=\"image\"; filename=\"caf\xc3\xa9.png\"",
        b"name=\"image\"; filename*=windows-1252''caf%E9.png",
        b"filename=\"\"; NAME=image",
        b"name=\"image\"; filename=\"a \\\"quoted; name=x\\\" one.png\"; size=9",
    ] {
        let head = [b"--XX\r\nContent-Disposition: form-data; ", disposition, b"\r\n\r\n"].concat();
        let body = [&head, PNG, b"\r\n--XX--\r\n"].concat();
        let headers = [("content-type", "multipart/form-data; boundary=XX")];
        let user = app.send(Method::POST, &path, &headers, Some(&body)).ok()["user"].clone();
        assert_eq!(app.get(user["avatarLink"].as_str().unwrap()).body, PNG);
    }
}

#[test]
fn a_user_is_found_by_a_login_that_a_path_cannot_carry() {
    let app = App::start();
    for (login, encoded) in
        [(".", "."), ("..", ".."), ("a/b", "a%2Fb"), ("a%2Fb", "a%252Fb"), ("a+b?c#d;é", "a%2Bb%3Fc%23d%3B%C3%A9")]
    {
        // Most of these can't be chosen any more.
        app.db.execute(&format!(r#"INSERT INTO "user" (login, channel, phone) VALUES ('{login}', 'phone', '+19')"#));
        let id = app.db.count(&format!(r#"SELECT id AS n FROM "user" WHERE login = '{login}'"#));
        let by_query = app.get(&format!("/api/v1/get-user-by-login?login={encoded}")).ok();
        assert_eq!(by_query["user"]["id"], id, "{login}");
        if !encoded.starts_with('.') {
            let by_path = app.get(&format!("/api/v1/get-user-by-login/{encoded}")).ok();
            assert_eq!(by_path["user"]["id"], id, "{login}");
        }
    }
    assert_eq!(app.get("/api/v1/get-user-by-login").complaints(), ["login"]);
    assert_eq!(app.get("/api/v1/get-user-by-login/ann?login=bob").complaints(), ["login"]);
}

#[test]
fn an_avatar_may_come_as_base64_in_json() {
    let app = App::start();
    let id = app.user("ann");
    // The Base64 of the bytes that every PNG starts with.
    let user = app.post(&format!("/api/v1/update-user-avatar-link/{id}"), json!({"image": "iVBORw0KGgo="})).ok();
    assert_eq!(app.get(user["user"]["avatarLink"].as_str().unwrap()).body, PNG[..8]);
}

#[test]
fn an_avatar_may_have_a_megabyte_and_no_more() {
    let app = App::start();
    let path = format!("/api/v1/update-user-avatar-link/{}", app.user("ann"));
    let mut image = vec![0; 1_048_576];
    image[..PNG.len()].copy_from_slice(PNG);
    assert_eq!(app.post_multipart(&path, &[Part::File("image", &image)]).status, 200);
    image.push(0);
    assert_eq!(app.post_multipart(&path, &[Part::File("image", &image)]).status, 413);
    assert_eq!(app.post_multipart(&path, &[Part::File("image", &vec![0; 3_000_000])]).status, 413);
    assert_eq!(app.db.count("SELECT octet_length(image)::bigint AS n FROM avatar"), 1_048_576);
}

/// What a text of the JSON Schema allows, at its limits and past them.
fn samples(schema: &Value) -> (Vec<Value>, Vec<Value>) {
    let limit = |key: &str| usize::try_from(schema[key].as_u64().unwrap()).unwrap();
    match schema["type"].as_str().unwrap() {
        "string" if schema["format"] == "email" => {
            // A local part has no more than 64 bytes, and a label 63.
            let of_length = |length: usize| {
                let labels = ["x".repeat(63), "x".repeat(63), "x".repeat(length - 64 - 1 - 2 * 64 - 4)].join(".");
                json!(format!("{}@{labels}.com", "x".repeat(64)))
            };
            (vec![of_length(limit("maxLength"))], vec![of_length(limit("maxLength") + 1), json!("x"), json!(1)])
        }
        "string" if schema["pattern"].as_str().is_some_and(|pattern| pattern.starts_with(r"^\+")) => {
            assert!(limit("maxLength") >= 16, "the pattern's longest number");
            (
                vec![json!("+19"), json!("+123456789012345")],
                vec![json!("+1"), json!("+1234567890123456"), json!("123"), json!("+012"), json!(19)],
            )
        }
        // A secret that nobody guesses first.
        "string" if schema["writeOnly"] == true => {
            let of_length = |length: usize| json!("kV7#qz".chars().cycle().take(length).collect::<String>());
            (
                vec![of_length(limit("minLength")), of_length(limit("maxLength"))],
                vec![
                    of_length(limit("minLength") - 1),
                    of_length(limit("maxLength") + 1),
                    json!("x".repeat(8)),
                    json!(1),
                ],
            )
        }
        "string" => (
            vec![json!("x".repeat(limit("minLength"))), json!("ü".repeat(limit("maxLength")))],
            vec![json!("x".repeat(limit("minLength") - 1)), json!("x".repeat(limit("maxLength") + 1)), json!(12345678)],
        ),
        "integer" => {
            let (least, most) = (schema["minimum"].as_i64().unwrap(), schema["maximum"].as_i64().unwrap());
            (
                vec![json!(least), json!(most), json!(most as f64)],
                vec![json!(least - 1), json!(most + 1), json!("1"), json!(1.5)],
            )
        }
        "boolean" => (vec![json!(true), json!(false)], vec![json!("true"), json!(1)]),
        "array" => {
            let (good, mut bad) = samples(&schema["items"]);
            bad = bad.into_iter().map(|item| json!([item])).collect();
            bad.push(json!(vec!["x"; limit("maxItems") + 1]));
            bad.push(json!("x"));
            (vec![json!([]), json!(vec!["x"; limit("maxItems")]), json!(good)], bad)
        }
        other => panic!("no samples of type {other}"),
    }
}

#[test]
fn the_json_schema_says_what_the_gateway_accepts() {
    let app = App::start();
    let schema = app.get("/api/v1/get-json-schema/user").ok();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert_eq!(schema["type"], "object");
    let properties = schema["properties"].as_object().unwrap();
    assert_eq!(
        keys(&schema["properties"]),
        ["age", "email", "isActive", "login", "password", "phone", "roles"],
        "the fields that the interface names"
    );

    let mut made = 0;
    let mut make = |field: &str, value: &Value| {
        let mut body = json!({"login": format!("user{made}"), "password": "correct horse"});
        made += 1;
        body[if field == "email" { "email" } else { "phone" }] =
            if field == "email" { json!("a@example.com") } else { json!("+19") };
        body[field] = value.clone();
        app.post("/api/v2/user", body)
    };
    for (field, schema) in properties {
        let (good, bad) = samples(schema);
        for value in good {
            let answer = make(field, &value);
            assert_eq!(answer.status, 201, "{field} {value}: {answer:?}");
        }
        for value in bad {
            let answer = make(field, &value);
            assert_eq!((answer.status, answer.complaints()), (400, vec![field.clone()]), "{field} {value}");
        }
    }

    // Nothing else is allowed, and what is required is.
    assert_eq!(schema["unevaluatedProperties"], false);
    assert_eq!(make("other", &json!(1)).complaints(), ["other"]);
    let required: Vec<_> = schema["required"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let missing = app.post("/api/v2/user", json!({"phone": "+19"})).complaints();
    assert_eq!(missing, required);
    assert_eq!(schema["oneOf"], json!([{"required": ["email"]}, {"required": ["phone"]}]));
    assert_eq!(
        app.post("/api/v2/user", json!({"login": "x", "password": "correct horse"})).complaints(),
        ["email", "phone"]
    );
    assert_eq!(make("email", &json!("a@example.com")).status, 201);
    let both = json!({"login": "x", "password": "correct horse", "email": "a@example.com", "phone": "+19"});
    assert_eq!(app.post("/api/v2/user", both).complaints(), ["email", "phone"]);
}
