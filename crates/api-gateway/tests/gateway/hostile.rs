//! Every path of the router with hostile values in every place of it: the answer is a problem with a 4xx, or a success, and never
//! late.

use crate::app::{Answer, App, send};
use domain::log::Group;
use serde_json::{Value, json};
use std::{
    cell::Cell,
    collections::BTreeSet,
    fmt,
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};
use storage::consumer_offsets;
use ureq::{Agent, http::Method};
use uuid::Uuid;

const ROUTES: &str = include_str!("../../src/routes.rs");

/// Every path and method that the router has.
fn routes() -> BTreeSet<(String, String)> {
    let mut routes = BTreeSet::new();
    for path in ROUTES.split("path(\"").skip(1) {
        let (pattern, methods) = path.split_once('"').unwrap();
        let methods = methods.split("];").next().unwrap();
        if methods.contains(".get(") {
            routes.insert(("GET".into(), pattern.into()));
        }
        for method in methods.split("Method::").skip(1) {
            let name: String = method.chars().take_while(char::is_ascii_uppercase).collect();
            routes.insert((name, pattern.into()));
        }
    }
    routes
}

/// A request that is well-formed, in parts that can be exchanged.
#[derive(Clone)]
struct Example {
    method: Method,
    pattern: &'static str,
    /// What stands in the path, by name.
    path: Vec<(&'static str, String)>,
    query: Vec<(&'static str, String)>,
    body: Vec<(&'static str, Value)>,
    takes_forms: bool,
}

impl Example {
    fn new(method: Method, pattern: &'static str) -> Self {
        Self { method, pattern, path: Vec::new(), query: Vec::new(), body: Vec::new(), takes_forms: false }
    }

    fn get(pattern: &'static str) -> Self {
        Self::new(Method::GET, pattern)
    }

    fn post(pattern: &'static str) -> Self {
        Self::new(Method::POST, pattern)
    }

    fn path(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.path.push((name, value.to_string()));
        self
    }

    fn query(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.query.push((name, value.to_string()));
        self
    }

    fn body<const N: usize>(mut self, body: [(&'static str, Value); N]) -> Self {
        self.body = body.into();
        self
    }

    fn form<const N: usize>(self, body: [(&'static str, Value); N]) -> Self {
        Self { takes_forms: true, ..self.body(body) }
    }

    /// The path and query, percent-encoded.
    fn target(&self) -> String {
        let mut target = self.pattern.to_owned();
        for (name, value) in &self.path {
            target = target.replace(&format!("{{{name}}}"), &encoded(value));
        }
        let query: Vec<_> = self.query.iter().map(|(name, value)| format!("{name}={}", encoded(value))).collect();
        if query.is_empty() { target } else { format!("{target}?{}", query.join("&")) }
    }

    /// The members of a JSON body as they are written.
    fn members(&self) -> Vec<(&'static str, String)> {
        self.body.iter().map(|(name, value)| (*name, value.to_string())).collect()
    }

    /// The fields of an urlencoded body.
    fn pairs(&self) -> Vec<String> {
        self.body.iter().map(|(name, value)| format!("{name}={}", encoded(&plain(value)))).collect()
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn encoded(text: &str) -> String {
    text.bytes().map(|b| if b.is_ascii_alphanumeric() { char::from(b).into() } else { format!("%{b:02x}") }).collect()
}

/// One of each route, of what the app has. No value is too many for a second one like it.
fn examples(app: &App) -> Vec<Example> {
    let (author, follower, doomed, doomed_too) =
        (app.user("author"), app.user("fan"), app.user("gone"), app.user("over"));
    app.follow(author, follower);
    let tweet = app.tweet(author, "hello");
    let avatar = app.post(&format!("/api/v1/update-user-avatar-link/{author}"), json!({"image": "iVBORw0KGgo="})).ok();
    let avatar = avatar["user"]["avatarLink"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
    let import = json!({"followerLoginPrefix": "crowd", "count": 1, "async": 1});
    let import = app.post(&format!("/api/v1/add-followers/{author}"), import).ok()["importId"].clone();
    app.post("/api/v1/event", json!({"accountId": "a", "payload": 1})).ok();
    let group = Group::parse("recorder").unwrap();
    app.db.database().transaction(|conn| consumer_offsets::create(conn, &group, &[(0, 0)])).unwrap();
    let cursor = "f_________8";
    vec![
        Example::get("/api/v1/get-feed/{id}").path("id", follower).query("count", 5),
        Example::get("/api/v2/feed/{id}").path("id", follower).query("limit", 5).query("cursor", cursor),
        Example::post("/api/v1/post-tweet").body([
            ("userId", json!(author)),
            ("text", json!("hello")),
            ("async", json!(true)),
        ]),
        Example::get("/api/v1/get-tweet").query("page", 0).query("perPage", 5),
        Example::get("/api/v1/event").query("accountId", "a").query("after", 0),
        Example::get("/api/v1/event/{accountId}").path("accountId", "a").query("after", 0),
        Example::post("/api/v1/event").body([("accountId", json!("a")), ("payload", json!({"amount": 5}))]),
        Example::get("/api/v1/message")
            .query("group", "recorder")
            .query("partition", 0)
            .query("after", 0)
            .query("limit", 5),
        Example::post("/api/v1/message").form([
            ("text", json!("hello")),
            ("count", json!(2)),
            ("key", json!("k")),
            ("partition", json!(0)),
        ]),
        Example::post("/api/v1/create-subscription/{author}/{follower}")
            .path("author", follower)
            .path("follower", author),
        Example::new(Method::DELETE, "/api/v1/subscription/{author}/{follower}")
            .path("author", follower)
            .path("follower", author),
        Example::post("/api/v2/user").body([
            ("login", json!("new")),
            ("email", json!("a@example.com")),
            ("password", json!("correct horse")),
            ("age", json!(25)),
            ("isActive", json!(true)),
            ("roles", json!(["admin"])),
        ]),
        Example::get("/api/v1/user").query("page", 0).query("perPage", 5),
        Example::post("/api/v1/user").form([("login", json!("newer")), ("phone", json!("+19"))]),
        Example::new(Method::PATCH, "/api/v1/user").form([("id", json!(follower)), ("login", json!("fan"))]),
        Example::new(Method::DELETE, "/api/v1/user").query("id", doomed),
        Example::new(Method::PATCH, "/api/v1/user/{id}").path("id", follower).query("login", "fan"),
        Example::new(Method::DELETE, "/api/v1/user/{id}").path("id", doomed_too),
        Example::get("/api/v1/get-user-by-login").query("login", "fan"),
        Example::get("/api/v1/get-user-by-login/{login}").path("login", "fan"),
        Example::get("/api/v1/get-json-schema/user"),
        Example::post("/api/v1/update-user-avatar-link/{id}")
            .path("id", author)
            .form([("image", json!("iVBORw0KGgo="))]),
        Example::get("/avatar/{id}/{file}").path("id", author).path("file", avatar),
        Example::post("/api/v1/add-followers").form([
            ("userId", json!(author)),
            ("followersLogin", json!("pack")),
            ("count", json!(1)),
            ("async", json!(0)),
        ]),
        Example::post("/api/v1/add-followers/{id}").path("id", author).form([
            ("followerLoginPrefix", json!("herd")),
            ("count", json!(1)),
            ("async", json!(1)),
        ]),
        Example::get("/api/v1/follower-import/{importId}").path("importId", import),
        Example::get("/api/v1/results")
            .query("prefix", "a")
            .query("only", "all")
            .query("sort", "id")
            .query("page", 0)
            .query("perPage", 5),
        Example::get("/results"),
        Example::get("/results/page.css"),
        Example::get("/results/page.js"),
        Example::get("/health/live"),
        Example::get("/health/ready"),
        Example::new(Method::DELETE, "/api/v1/tweet/{id}").path("id", tweet),
    ]
}

/// An app, and a client that gives up where it hangs.
struct Target {
    app: App,
    agent: Agent,
    sent: Cell<usize>,
}

const PATIENCE: Duration = Duration::from_secs(60);

impl Target {
    fn start() -> Self {
        let agent = Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE)).build().into();
        Self { app: App::start(), agent, sent: Cell::new(0) }
    }

    fn send(&self, example: &Example, content_type: &str, body: Option<&[u8]>) -> Answer {
        let url = format!("http://{}{}", self.app.address(), example.target());
        let headers = [("content-type", content_type)];
        let headers = if body.is_some() { &headers[..] } else { &[] };
        self.sent.set(self.sent.get() + 1);
        let answer = send(&self.agent, example.method.clone(), &url, headers, body);
        check(&answer, &format!("{} {url:.300}", example.method));
        answer
    }

    fn send_json(&self, example: &Example, members: &[(&str, String)]) -> Answer {
        if members.is_empty() {
            return self.send(example, "", None);
        }
        let members: Vec<_> = members.iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
        self.send(example, "application/json", Some(format!("{{{}}}", members.join(", ")).as_bytes()))
    }
}

/// A success or a problem of the client's, of the published form, with no header that isn't ours.
fn check(answer: &Answer, what: &str) {
    const HEADERS: [&str; 11] = [
        "allow",
        "cache-control",
        "connection",
        "content-length",
        "content-security-policy",
        "content-type",
        "date",
        "link",
        "referrer-policy",
        "x-content-type-options",
        "x-correlation-id",
    ];
    assert!((200..500).contains(&answer.status), "{what}: {} {}", answer.status, String::from_utf8_lossy(&answer.body));
    for name in answer.headers.keys() {
        assert!(HEADERS.contains(&name.as_str()), "{what}: {name}");
    }
    if answer.status >= 400 {
        answer.complaints();
        assert!(answer.body.len() < 8_000, "{what}: {} bytes", answer.body.len());
    }
}

/// Texts that were somebody else's downfall.
fn texts() -> Vec<String> {
    let mut texts: Vec<String> = [
        "' OR '1'='1",
        "'; DROP TABLE \"user\"; --",
        "\\'; SELECT pg_sleep(600); --",
        "$1",
        "%s%n",
        "1; COMMIT; --",
        "{{7*7}}",
        "x\r\nX-Injected: 1\r\n\r\nHTTP/1.1 200 OK",
        "%0d%0aSet-Cookie: a=b",
        "\n",
        "\0",
        "a\0b",
        "\u{7f}",
        "\u{85}",
        "../../etc/passwd",
        "..",
        "<script>alert(1)</script>",
        "${jndi:ldap://x}",
        "\u{202e}gnp.exe",
        "\u{200b}",
        "\u{feff}",
        "\u{fffd}",
        "\u{10ffff}",
        "\u{fdd0}",
        "I\u{307}ı",
        "",
        " ",
        "null",
        "true",
        "[]",
        "-1",
        "0",
        "1e3",
        "0x10",
        "٣",
        "9223372036854775807",
        "9223372036854775808",
        "-9223372036854775808",
        "NaN",
        "Infinity",
        "2147483648",
        "1.0",
    ]
    .map(String::from)
    .into();
    texts.extend(["x".repeat(5_000), "👩\u{200d}".repeat(500), "\u{301}".repeat(5_000), "(".repeat(5_000)]);
    texts
}

/// Values of JSON that are no texts, or that no text can be, as they are written.
fn values() -> Vec<String> {
    let mut values: Vec<String> = [
        r#""\ud800""#,
        r#""\udc00\ud800""#,
        r#""\u0000""#,
        "null",
        "true",
        "{}",
        "[]",
        "[[]]",
        r#"{"a": 1, "a": 2}"#,
        "-0",
        "0.1",
        "1e400",
        "-1e400",
        "1e-400",
        "1e99999999999999999999",
        "9007199254740993.0",
        "9223372036854775808",
        "18446744073709551616",
        r#"["\ud800"]"#,
    ]
    .map(String::from)
    .into();
    values.extend([
        "9".repeat(10_000),
        format!("0.{}1", "0".repeat(10_000)),
        format!("{}{}", "[".repeat(10_000), "]".repeat(10_000)),
        format!("{}1{}", r#"{"a":"#.repeat(5_000), "}".repeat(5_000)),
        format!("[{}1]", "1,".repeat(10_000)),
    ]);
    values
}

#[test]
fn every_route_has_an_example_which_is_well_formed() {
    let target = Target::start();
    let examples = examples(&target.app);
    let shown: BTreeSet<_> = examples.iter().map(|e| (e.method.to_string(), e.pattern.to_owned())).collect();
    assert_eq!(shown, routes());
    for example in &examples {
        let answer = target.send_json(example, &example.members());
        assert!(answer.status < 300, "{} {}: {answer:?}", example.method, example.pattern);
    }
}

#[test]
fn no_text_in_any_place_does_harm() {
    let target = Target::start();
    let examples = examples(&target.app);
    for (example, text) in examples.iter().flat_map(|example| texts().into_iter().map(move |text| (example, text))) {
        // A path has no empty part, and clients take dots out of it.
        for at in (0..example.path.len()).filter(|_| !["", ".."].contains(&text.as_str())) {
            let mut example = example.clone();
            example.path[at].1.clone_from(&text);
            target.send_json(&example, &example.members());
        }
        for at in 0..example.query.len() {
            let mut example = example.clone();
            example.query[at].1.clone_from(&text);
            target.send_json(&example, &example.members());
        }
        for at in 0..example.body.len() {
            let mut members = example.members();
            members[at].1 = json!(text).to_string();
            target.send_json(example, &members);
            if example.takes_forms {
                let mut pairs = example.pairs();
                pairs[at] = format!("{}={}", example.body[at].0, encoded(&text));
                target.send(example, "application/x-www-form-urlencoded", Some(pairs.join("&").as_bytes()));
            }
        }
    }
    assert!(target.sent.get() > 1000, "{}", target.sent.get());
    assert_eq!(target.app.get("/api/v1/get-user-by-login/author").status, 200);
}

#[test]
fn no_value_of_json_in_any_field_does_harm() {
    let target = Target::start();
    let examples = examples(&target.app);
    for example in examples.iter().filter(|example| !example.body.is_empty()) {
        for (at, value) in (0..example.body.len()).flat_map(|at| values().into_iter().map(move |value| (at, value))) {
            let mut members = example.members();
            members[at].1 = value;
            target.send_json(example, &members);
        }
        for body in
            ["", "null", "[]", "1", "\"x\"", "{", "{}}", "{\"a\":}", "\u{feff}{}", "{\"a\":1,}", "{'a': 1}", "NaN"]
        {
            let answer = target.send(example, "application/json", Some(body.as_bytes()));
            assert_eq!(answer.status, 400, "{} {body}", example.pattern);
        }
        for deep in ["[".repeat(50_000), "{\"a\":".repeat(10_000)] {
            assert_eq!(
                target.send(example, "application/json", Some(deep.as_bytes())).status,
                400,
                "{}",
                example.pattern
            );
        }
        for body in [&b"{\"\xff\": 1}"[..], b"{\"a\": \"\xc3\x28\"}", b"\xff\xfe{\0}\0", b"\0"] {
            assert_eq!(target.send(example, "application/json", Some(body)).status, 400, "{}", example.pattern);
        }
    }
}

#[test]
fn what_is_given_twice_is_refused_by_name_wherever_it_is_given() {
    let target = Target::start();
    let refused = |answer: &Answer, name: &str| {
        assert_eq!((answer.status, answer.complaints()), (400, vec![name.to_owned()]), "{answer:?}");
    };
    for example in examples(&target.app) {
        for at in 0..example.query.len() {
            let mut twice = example.clone();
            twice.query.push(twice.query[at].clone());
            refused(&target.send_json(&twice, &twice.members()), example.query[at].0);
        }
        // In the path and beside it.
        for (name, value) in &example.path {
            let name = *name;
            if example.takes_forms {
                let mut members = example.members();
                members.push((name, value.clone()));
                refused(&target.send_json(&example, &members), name);
            } else if example.method != Method::POST || example.body.is_empty() {
                refused(&target.send_json(&example.clone().query(name, value), &example.members()), name);
            }
        }
        for at in 0..example.body.len() {
            let mut members = example.members();
            members.push(members[at].clone());
            refused(&target.send_json(&example, &members), example.body[at].0);
        }
        if example.takes_forms {
            let name = example.body[0].0;
            let mut pairs = example.pairs();
            pairs.push(pairs[0].clone());
            refused(
                &target.send(&example, "application/x-www-form-urlencoded", Some(pairs.join("&").as_bytes())),
                name,
            );
        }
    }
}

/// The part of a form that `disposition` describes.
fn part(disposition: &[u8], content: &[u8]) -> Vec<u8> {
    [b"--XX\r\nContent-Disposition: ", disposition, b"\r\n\r\n", content, b"\r\n"].concat()
}

#[test]
fn no_multipart_form_does_harm_however_it_is_broken() {
    const END: &[u8] = b"--XX--\r\n";
    const TYPE: &str = "multipart/form-data; boundary=XX";
    let target = Target::start();
    let field = |name: &str, content: &[u8]| part(format!("form-data; name=\"{name}\"").as_bytes(), content);
    let refused: Vec<(&str, Vec<u8>)> = vec![
        (TYPE, Vec::new()),
        (TYPE, b"--XX".to_vec()),
        (TYPE, b"\r\n\r\n".to_vec()),
        (TYPE, field("login", b"x")),
        (TYPE, b"--XX\r\nContent-Disposition: form-data; name=\"login\"\r\n\r\nx".to_vec()),
        (TYPE, b"--XX\r\nContent-Disposition: form-data; name=\"login\"".to_vec()),
        (TYPE, [b"--XX\r\n\r\nx\r\n", END].concat()),
        (TYPE, [&part(b"form-data", b"x"), END].concat()),
        (TYPE, [&part(b"form-data; name", b"x"), END].concat()),
        (TYPE, [&part(b"form-data; name=\"a", b"x"), END].concat()),
        (TYPE, [&part(b"form-data; filename=\"a\"", b"x"), END].concat()),
        (TYPE, [&part(b"attachment; name=\"a\"", b"x"), END].concat()),
        (TYPE, [&part(b"form-data; name=\"\"", b"x"), END].concat()),
        (TYPE, [&part(b"form-data; name=\"\xff\xfe\"", b"x"), END].concat()),
        (TYPE, [&part(b"form-data; name=\"a\0\"", b"x"), END].concat()),
        (TYPE, [&field(&"n".repeat(100_000), b"x"), END].concat()),
        (TYPE, [&b"--XX\r\n"[..], &b"X-Y: z\r\n".repeat(1_000), b"\r\n", END].concat()),
        (TYPE, [&(0..1_000).flat_map(|n| field(&format!("f{n}"), b"x")).collect::<Vec<_>>()[..], END].concat()),
        (TYPE, [&(0..100).flat_map(|_| field("login", b"")).collect::<Vec<_>>()[..], END].concat()),
        (TYPE, [b"--XX\r\nContent-Disposition: form-data; name=\"a\"\r\nContent-Length: 99999\r\n\r\nx\r\n", END].concat()),
        (TYPE, [b"--XX\r\nContent-Disposition: form-data; name=\"a\"\r\nContent-Length: -1\r\n\r\nx\r\n", END].concat()),
        (TYPE, [b"--XX\r\nContent-Disposition: form-data; name=\"a\"\r\nContent-Type: multipart/mixed; boundary=YY\r\n\r\n--YY--\r\n", END].concat()),
        (TYPE, [&field("a", &b"\r--".repeat(15_000)), END].concat()),
        (TYPE, [&field("a", &b"\r\n--X".repeat(12_000)), END].concat()),
        (TYPE, [&field("a", &b"\r".repeat(60_000)), END].concat()),
        ("multipart/form-data", [&field("a", b"x"), END].concat()),
        ("multipart/form-data; boundary=", [&field("a", b"x"), END].concat()),
        ("multipart/form-data; boundary=\"\"", [&field("a", b"x"), END].concat()),
        ("multipart/form-data; boundary=YY", [&field("a", b"x"), END].concat()),
        ("multipart/form-data; boundary=XX; boundary=YY; charset=utf-7", [&field("a", b"+AGE-"), END].concat()),
    ];
    for example in examples(&target.app).iter().filter(|example| example.takes_forms) {
        for (content_type, body) in &refused {
            let answer = target.send(example, content_type, Some(body));
            assert!([400, 413].contains(&answer.status), "{} {answer:?}", body.escape_ascii());
        }
        // Of files only the content counts.
        let names: [&[u8]; 7] = [
            b"filename=\"caf\xe9\"",
            b"filename=\"\x83\x5c\"",
            b"filename*=utf-16''%FF%FE",
            b"filename=\"../../etc/passwd\"",
            b"filename=\"a\\\"; name=\\\"id\"",
            b"filename=\"\xff\xff\"",
            b"filename=x; filename=y; filename*=UTF-8''%00",
        ];
        for name in names {
            let disposition = [b"form-data; name=\"image\"; ", name].concat();
            let body = [&part(&disposition, b"\x89PNG\r\n\x1a\n"), END].concat();
            let answer = target.send(example, TYPE, Some(&body));
            let takes_it = example.pattern.starts_with("/api/v1/update-user-avatar-link");
            assert_eq!(answer.status, if takes_it { 200 } else { 400 }, "{} {}", example.pattern, name.escape_ascii());
        }
    }
}

#[test]
fn a_header_that_comes_back_brings_nothing_with_it() {
    let app = App::start();
    for value in ["a b", "a\tb", "a\u{e9}", "x; y", "\"", "a%0d%0aX-Injected: 1", &"x".repeat(65), "<script>"] {
        let mut stream = TcpStream::connect(app.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(
            stream,
            "GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Correlation-Id: {value}\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let mut ids = answer.lines().filter_map(|line| line.strip_prefix("x-correlation-id: "));
        assert!(ids.next().is_some_and(|id| id.parse::<Uuid>().is_ok()) && ids.next().is_none(), "{answer}");
        assert!(answer.starts_with("HTTP/1.1 200 ") && !answer.contains("njected"), "{answer}");
    }
}
