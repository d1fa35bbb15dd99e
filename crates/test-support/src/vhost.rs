use crate::servers::variable;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use std::time::Duration;
use ureq::{Agent, http::Method};
use url::Url;
use uuid::Uuid;

/// A vhost of its own, deleted with the value.
pub struct TestVhost {
    name: String,
    url: String,
    management: Management,
}

/// The broker's management API.
struct Management {
    agent: Agent,
    base: Url,
    authorization: String,
}

impl Management {
    fn new() -> Self {
        let mut base = Url::parse(&variable("RABBITMQ_MANAGEMENT_URL")).expect("RABBITMQ_MANAGEMENT_URL is a URL");
        let credentials = format!("{}:{}", base.username(), base.password().unwrap_or_default());
        base.set_username("").and_then(|()| base.set_password(None)).expect("a URL with a host");
        let agent = Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(60)))
            .http_status_as_error(false)
            .build()
            .into();
        Self { agent, base, authorization: format!("Basic {}", base64(credentials.as_bytes())) }
    }

    /// Answers the status and the body.
    fn call(&self, method: Method, path: &str, body: &serde_json::Value) -> (u16, serde_json::Value) {
        // Not `join`, which would undo the encoding of names.
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}api/{path}", self.base))
            .header("authorization", &self.authorization)
            .header("content-type", "application/json")
            .body(body.to_string())
            .expect("a valid request");
        let mut response =
            self.agent.run(request).expect("RabbitMQ's management API answers: run `make servers` first");
        let text = response.body_mut().read_to_string().expect("a readable answer");
        (response.status().as_u16(), serde_json::from_str(&text).unwrap_or_default())
    }
}

impl TestVhost {
    /// A new, empty vhost in which the fleet's user may do everything.
    ///
    /// # Panics
    /// When the server isn't there.
    #[expect(clippy::new_without_default, reason = "making a vhost is no default")]
    pub fn new() -> Self {
        let name = format!("test-{}", Uuid::new_v4().simple());
        let management = Management::new();
        let mut url = Url::parse(&variable("AMQP_URL")).expect("AMQP_URL is a URL");
        url.set_path(&name);
        let (status, _) = management.call(Method::PUT, &format!("vhosts/{name}"), &serde_json::json!({}));
        assert!(status < 300, "making a vhost was refused with {status}");
        let everything = serde_json::json!({"configure": ".*", "write": ".*", "read": ".*"});
        let (status, _) = management.call(Method::PUT, &format!("permissions/{name}/{}", url.username()), &everything);
        assert!(status < 300, "giving permissions was refused with {status}");
        Self { name, url: url.to_string(), management }
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Closes every connection to this vhost from the server's side, and answers how many there were.
    ///
    /// # Panics
    /// When the server doesn't answer.
    pub fn close_connections(&self) -> usize {
        let path = format!("vhosts/{}/connections", self.name);
        let (_, connections) = self.management.call(Method::GET, &path, &serde_json::Value::Null);
        let names = connections.as_array().into_iter().flatten().filter_map(|connection| connection["name"].as_str());
        names
            .map(|name| {
                let path = format!("connections/{}", utf8_percent_encode(name, NON_ALPHANUMERIC));
                self.management.call(Method::DELETE, &path, &serde_json::Value::Null)
            })
            .filter(|(status, _)| *status < 300)
            .count()
    }

    /// Publishes a message as another program might, with whatever properties. Answers whether it reached a queue.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn publish(&self, exchange: &str, routing_key: &str, properties: &serde_json::Value, body: &[u8]) -> bool {
        let exchange = if exchange.is_empty() { "amq.default" } else { exchange };
        let (status, answer) = self.management.call(
            Method::POST,
            &format!("exchanges/{}/{exchange}/publish", self.name),
            &serde_json::json!({
                "properties": properties,
                "routing_key": routing_key,
                "payload": base64(body),
                "payload_encoding": "base64",
            }),
        );
        assert!(status < 300, "publishing was refused with {status}");
        answer["routed"].as_bool().unwrap_or(false)
    }
}

impl Drop for TestVhost {
    fn drop(&mut self) {
        let (status, _) =
            self.management.call(Method::DELETE, &format!("vhosts/{}", self.name), &serde_json::Value::Null);
        if status >= 300 {
            eprintln!("the test's vhost {} stays behind: {status}", self.name);
        }
    }
}

fn base64(bytes: &[u8]) -> String {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    BASE64_STANDARD.encode(bytes)
}
