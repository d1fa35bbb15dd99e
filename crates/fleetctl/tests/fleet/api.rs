//! The gateway as a client sees it.

use serde_json::{Value, json};
use std::time::Duration;
use ureq::http::Request;

pub(crate) struct Api {
    agent: ureq::Agent,
    base: String,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) retry_after: Option<String>,
    pub(crate) body: Value,
}

impl Api {
    pub(crate) fn new(base: String) -> Self {
        let config = ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(60)));
        Self { agent: config.http_status_as_error(false).build().into(), base }
    }

    /// An error says that there was no answer: whether the request took place is unknown.
    pub(crate) fn call(&self, method: &str, path: &str, body: &Value) -> Result<Answer, ureq::Error> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        let request = request.header("content-type", "application/json").body(body).expect("a valid request");
        let mut response = self.agent.run(request)?;
        let retry_after = response.headers().get("retry-after").and_then(|value| value.to_str().ok()).map(Into::into);
        let text = response.body_mut().read_to_string()?;
        let body = serde_json::from_str(&text).unwrap_or_default();
        Ok(Answer { status: response.status().as_u16(), retry_after, body })
    }

    /// The answer to a request that has to succeed.
    #[track_caller]
    pub(crate) fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        let answer = self.call(method, path, body).expect("the gateway answers");
        assert!((200..300).contains(&answer.status), "{method} {path}: {answer:?}");
        answer.body
    }

    /// A new user with an e-mail address.
    #[track_caller]
    pub(crate) fn reader_by_email(&self, login: &str) -> i64 {
        self.user(&json!({"login": login, "email": format!("{login}@example.com")}))
    }

    /// A new user with a phone.
    #[track_caller]
    pub(crate) fn reader_by_phone(&self, login: &str, number: usize) -> i64 {
        self.user(&json!({"login": login, "phone": format!("+9995550{number:04}")}))
    }

    #[track_caller]
    fn user(&self, fields: &Value) -> i64 {
        number(&self.ask("POST", "/api/v1/user", fields)["id"])
    }

    #[track_caller]
    pub(crate) fn follow(&self, author: i64, reader: i64) {
        self.ask("POST", &format!("/api/v1/create-subscription/{author}/{reader}"), &Value::Null);
    }

    #[track_caller]
    pub(crate) fn post(&self, author: i64, text: &str, by_workers: bool) -> i64 {
        let tweet = json!({"userId": author, "text": text, "async": by_workers});
        number(&self.ask("POST", "/api/v1/post-tweet", &tweet)["id"])
    }

    /// The ids of the newest tweets in a feed, the newest last.
    #[track_caller]
    pub(crate) fn feed(&self, reader: i64) -> Vec<i64> {
        let feed = self.ask("GET", &format!("/api/v1/get-feed/{reader}?count=100"), &Value::Null);
        feed["tweets"].as_array().expect("a list").iter().map(|tweet| number(&tweet["id"])).collect()
    }
}

#[track_caller]
pub(crate) fn number(value: &Value) -> i64 {
    value.as_i64().unwrap_or_else(|| panic!("no number: {value}"))
}
