//! A gateway on a port and a database of its own.

use actix_web::{dev::ServerHandle, rt};
use api_gateway::Settings;
use serde_json::Value;
use std::{
    net::TcpListener,
    sync::mpsc,
    thread::{self, JoinHandle},
};
use storage::audit;
use test_support::TestDatabase;
use ureq::{
    Agent,
    http::{HeaderMap, Method, Request},
};

pub(crate) struct App {
    pub(crate) db: TestDatabase,
    base: String,
    agent: Agent,
    handle: ServerHandle,
    thread: Option<JoinHandle<()>>,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    /// The JSON of an answer that says it went well.
    pub(crate) fn ok(self) -> Value {
        assert!((200..300).contains(&self.status), "{} {}", self.status, String::from_utf8_lossy(&self.body));
        self.json()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The names of the fields that a problem complains of, after checking its form.
    pub(crate) fn complaints(&self) -> Vec<String> {
        assert_eq!(self.header("content-type"), "application/problem+json");
        let problem = self.json();
        assert_eq!(problem["status"], self.status);
        for key in ["type", "title", "detail"] {
            assert!(problem[key].as_str().is_some_and(|text| !text.is_empty()), "{problem}");
        }
        let errors = problem["errors"].as_array().cloned().unwrap_or_default();
        assert!(errors.iter().all(|error| error["detail"].as_str().is_some_and(|text| !text.is_empty())), "{problem}");
        let mut fields: Vec<_> = errors.iter().map(|error| error["field"].as_str().unwrap().to_owned()).collect();
        fields.sort();
        fields
    }
}

impl App {
    pub(crate) fn start() -> Self {
        Self::start_with(|_| ())
    }

    pub(crate) fn start_with(adjust: impl FnOnce(&mut Settings)) -> Self {
        Self::start_on(TestDatabase::new(), adjust)
    }

    pub(crate) fn start_on(db: TestDatabase, adjust: impl FnOnce(&mut Settings)) -> Self {
        let mut settings: Settings =
            settings::load_from("api-gateway", [("MURMURATION__DATABASE__URL", db.url())]).unwrap();
        settings.database = db.settings();
        // No test is about these unless it says so.
        settings.api_gateway.request_timeout_ms = 60_000;
        settings.api_gateway.long_request_timeout_ms = 300_000;
        settings.api_gateway.workers = 1;
        settings.api_gateway.blocking_threads = 4;
        adjust(&mut settings);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (started, handle) = mpsc::channel();
        let thread = thread::spawn(move || {
            rt::System::new().block_on(async {
                let server = api_gateway::serve(listener, settings).unwrap();
                started.send(server.handle()).unwrap();
                server.await.unwrap();
            });
        });
        Self { db, base, agent: agent(), handle: handle.recv().unwrap(), thread: Some(thread) }
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> &str {
        self.base.trim_start_matches("http://")
    }

    pub(crate) fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Option<&[u8]>) -> Answer {
        send(&self.agent, method, &format!("{}{path}", self.base), headers, body)
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, &[], None)
    }

    pub(crate) fn delete(&self, path: &str) -> Answer {
        self.send(Method::DELETE, path, &[], None)
    }

    #[expect(clippy::needless_pass_by_value, reason = "a body is made for its request")]
    pub(crate) fn post(&self, path: &str, body: Value) -> Answer {
        self.send(Method::POST, path, &[("content-type", "application/json")], Some(body.to_string().as_bytes()))
    }

    pub(crate) fn post_form(&self, path: &str, body: &str) -> Answer {
        let headers = [("content-type", "application/x-www-form-urlencoded")];
        self.send(Method::POST, path, &headers, Some(body.as_bytes()))
    }

    pub(crate) fn post_multipart(&self, path: &str, parts: &[Part<'_>]) -> Answer {
        let headers = [("content-type", "multipart/form-data; boundary=XX")];
        self.send(Method::POST, path, &headers, Some(&multipart(parts)))
    }

    /// Makes a user with an e-mail address.
    pub(crate) fn user(&self, login: &str) -> i64 {
        let user = serde_json::json!({"login": login, "email": format!("{login}@example.com")});
        self.post("/api/v1/user", user).ok()["id"].as_i64().unwrap()
    }

    /// Makes a user with a phone.
    pub(crate) fn phone_user(&self, login: &str) -> i64 {
        let user = serde_json::json!({"login": login, "phone": "+99912345678"});
        self.post("/api/v1/user", user).ok()["id"].as_i64().unwrap()
    }

    pub(crate) fn follow(&self, author: i64, follower: i64) {
        let path = format!("/api/v1/create-subscription/{author}/{follower}");
        assert_eq!(self.send(Method::POST, &path, &[], None).status, 201);
    }

    /// Posts in the request, and returns the tweet's id.
    pub(crate) fn tweet(&self, author: i64, text: &str) -> i64 {
        let tweet = serde_json::json!({"userId": author, "text": text});
        self.post("/api/v1/post-tweet", tweet).ok()["id"].as_i64().unwrap()
    }

    /// The ids in a reader's feed, the oldest first.
    pub(crate) fn feed(&self, reader: i64) -> Vec<i64> {
        ids(&self.get(&format!("/api/v1/get-feed/{reader}?count=100")).ok()["tweets"])
    }

    /// What was derived is exactly what had to be.
    pub(crate) fn assert_audit_is_clean(&self) {
        for finding in self.db.database().transaction(|conn| audit::run(conn, |_| ())).unwrap() {
            assert_eq!(finding.count, 0, "{finding:?}");
        }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        // Stopping takes effect without the future's being awaited.
        drop(self.handle.stop(false));
        let joined = self.thread.take().unwrap().join();
        if !thread::panicking() {
            joined.unwrap();
        }
    }
}

pub(crate) fn agent() -> Agent {
    Agent::config_builder().http_status_as_error(false).build().into()
}

pub(crate) fn send(agent: &Agent, method: Method, url: &str, headers: &[(&str, &str)], body: Option<&[u8]>) -> Answer {
    let mut request = Request::builder().method(method).uri(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut response = match body {
        Some(body) => agent.run(request.body(body).unwrap()).unwrap(),
        None => agent.run(request.body(()).unwrap()).unwrap(),
    };
    let body = response.body_mut().read_to_vec().unwrap();
    Answer { status: response.status().as_u16(), headers: response.headers().clone(), body }
}

pub(crate) enum Part<'a> {
    Text(&'a str, &'a str),
    /// A text in whatever encoding.
    Bytes(&'a str, &'a [u8]),
    File(&'a str, &'a [u8]),
}

fn multipart(parts: &[Part<'_>]) -> Vec<u8> {
    let mut body = Vec::new();
    for part in parts {
        let (name, rest, content) = match part {
            Part::Text(name, text) => (name, "", text.as_bytes()),
            Part::Bytes(name, text) => (name, "", *text),
            Part::File(name, content) => (name, "; filename=\"f\"\r\nContent-Type: application/octet-stream", *content),
        };
        body.extend_from_slice(
            format!("--XX\r\nContent-Disposition: form-data; name=\"{name}\"{rest}\r\n\r\n").as_bytes(),
        );
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--XX--\r\n");
    body
}

/// The ids of a list of objects.
pub(crate) fn ids(list: &Value) -> Vec<i64> {
    list.as_array().unwrap().iter().map(|item| item["id"].as_i64().unwrap()).collect()
}

/// The names of an object's keys, in alphabetical order.
pub(crate) fn keys(object: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = object.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

/// Whether a text has the form in which `0` stands for a digit.
pub(crate) fn has_form(text: &Value, form: &str) -> bool {
    let text = text.as_str().unwrap();
    text.len() == form.len()
        && text.chars().zip(form.chars()).all(|(c, f)| if f == '0' { c.is_ascii_digit() } else { c == f })
}
