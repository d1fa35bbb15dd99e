#![doc = include_str!("../README.md")]

use base64::{Engine as _, prelude::BASE64_STANDARD};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use std::time::Duration;
use ureq::{
    Agent,
    http::{Method, Request},
};
use url::Url;

/// Why a call failed. No text holds the password.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL can't be used.
    #[error("the management URL must look like http://user:password@host:port")]
    Url,
    /// Nobody answers there.
    #[error("RabbitMQ's management API doesn't answer")]
    Unavailable(#[source] Box<ureq::Error>),
    /// The server doesn't do it.
    #[error("RabbitMQ's management API refused to {what}: status {status}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// The HTTP status.
        status: u16,
    },
}

/// The API of one broker, as one user.
pub struct Management {
    agent: Agent,
    base: String,
    user: String,
    authorization: String,
}

fn segment(name: &str) -> String {
    utf8_percent_encode(name, NON_ALPHANUMERIC).to_string()
}

fn policy_path(vhost: &str, name: &str) -> String {
    format!("policies/{}/{}", segment(vhost), segment(name))
}

impl Management {
    /// The API at `http://user:password@host:port`.
    ///
    /// # Errors
    /// When that's no such URL.
    pub fn new(url: &str) -> Result<Self, Error> {
        let mut base = Url::parse(url).map_err(|_| Error::Url)?;
        let user = base.username().to_owned();
        let credentials = format!("{user}:{}", base.password().unwrap_or_default());
        base.set_username("").and_then(|()| base.set_password(None)).map_err(|()| Error::Url)?;
        // The server closes connections when it likes, maybe just when one is used again: so each call has its own.
        let config = Agent::config_builder().timeout_global(Some(Duration::from_secs(60))).max_idle_connections(0);
        Ok(Self {
            agent: config.http_status_as_error(false).build().into(),
            base: base.to_string(),
            user,
            authorization: format!("Basic {}", BASE64_STANDARD.encode(credentials)),
        })
    }

    fn call(&self, what: &'static str, method: Method, path: &str, body: &Value) -> Result<Value, Error> {
        // Put together as text, because joining URLs undoes the encoding of names.
        let request = Request::builder()
            .method(method)
            .uri(format!("{}api/{path}", self.base))
            .header("authorization", &self.authorization)
            .header("content-type", "application/json")
            .body(body.to_string())
            .map_err(|_| Error::Url)?;
        let unavailable = |error| Error::Unavailable(Box::new(error));
        let mut response = self.agent.run(request).map_err(unavailable)?;
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string().map_err(unavailable)?;
        if status < 300 {
            Ok(serde_json::from_str(&text).unwrap_or_default())
        } else {
            Err(Error::Refused { what, status })
        }
    }

    /// Makes a vhost in which this user may do everything.
    pub fn create_vhost(&self, name: &str) -> Result<(), Error> {
        let vhost = segment(name);
        self.call("make a vhost", Method::PUT, &format!("vhosts/{vhost}"), &json!({}))?;
        let path = format!("permissions/{vhost}/{}", segment(&self.user));
        let everything = json!({"configure": ".*", "write": ".*", "read": ".*"});
        self.call("give permissions", Method::PUT, &path, &everything)?;
        Ok(())
    }

    /// Deletes a vhost with all that is in it; connections to it end.
    pub fn delete_vhost(&self, name: &str) -> Result<(), Error> {
        self.call("delete a vhost", Method::DELETE, &format!("vhosts/{}", segment(name)), &Value::Null)?;
        Ok(())
    }

    /// Makes a user without tags, who may not use this API, or gives it this password.
    pub fn put_user(&self, name: &str, password: &str) -> Result<(), Error> {
        let user = json!({"password": password, "tags": ""});
        self.call("make a user", Method::PUT, &format!("users/{}", segment(name)), &user)?;
        Ok(())
    }

    /// Deletes a user; its connections end.
    pub fn delete_user(&self, name: &str) -> Result<(), Error> {
        self.call("delete a user", Method::DELETE, &format!("users/{}", segment(name)), &Value::Null)?;
        Ok(())
    }

    /// Lets a user do in a vhost what is to names that match these patterns, and nothing else.
    pub fn set_permissions(
        &self,
        vhost: &str,
        user: &str,
        configure: &str,
        write: &str,
        read: &str,
    ) -> Result<(), Error> {
        let path = format!("permissions/{}/{}", segment(vhost), segment(user));
        let permissions = json!({"configure": configure, "write": write, "read": read});
        self.call("give permissions", Method::PUT, &path, &permissions)?;
        Ok(())
    }

    /// Declares a durable queue with these arguments.
    pub fn declare_queue(&self, vhost: &str, queue: &str, arguments: &Value) -> Result<(), Error> {
        let path = format!("queues/{}/{}", segment(vhost), segment(queue));
        self.call("declare a queue", Method::PUT, &path, &json!({"durable": true, "arguments": arguments}))?;
        Ok(())
    }

    /// Declares a durable exchange of this type.
    pub fn declare_exchange(&self, vhost: &str, exchange: &str, kind: &str) -> Result<(), Error> {
        let path = format!("exchanges/{}/{}", segment(vhost), segment(exchange));
        self.call("declare an exchange", Method::PUT, &path, &json!({"durable": true, "type": kind}))?;
        Ok(())
    }

    /// What is known about a queue, or `None` if it isn't there.
    pub fn queue(&self, vhost: &str, queue: &str) -> Result<Option<Value>, Error> {
        let path = format!("queues/{}/{}", segment(vhost), segment(queue));
        match self.call("look at a queue", Method::GET, &path, &Value::Null) {
            Err(Error::Refused { status: 404, .. }) => Ok(None),
            told => told.map(Some),
        }
    }

    /// Closes every connection to a vhost from the server's side, and returns how many.
    pub fn close_connections(&self, vhost: &str) -> Result<usize, Error> {
        let path = format!("vhosts/{}/connections", segment(vhost));
        let connections = self.call("list connections", Method::GET, &path, &Value::Null)?;
        let names = connections.as_array().into_iter().flatten().filter_map(|connection| connection["name"].as_str());
        let close = |name| {
            self.call("close a connection", Method::DELETE, &format!("connections/{}", segment(name)), &Value::Null)
        };
        // One that has gone by itself meanwhile is no error.
        Ok(names.map(close).filter(Result::is_ok).count())
    }

    /// Sets a policy for the queues of a vhost whose names match the pattern.
    pub fn set_policy(&self, vhost: &str, name: &str, pattern: &str, definition: &Value) -> Result<(), Error> {
        let policy = json!({"pattern": pattern, "apply-to": "queues", "definition": definition});
        self.call("set a policy", Method::PUT, &policy_path(vhost, name), &policy)?;
        Ok(())
    }

    /// Deletes a policy.
    pub fn delete_policy(&self, vhost: &str, name: &str) -> Result<(), Error> {
        self.call("delete a policy", Method::DELETE, &policy_path(vhost, name), &Value::Null)?;
        Ok(())
    }

    /// Publishes a message with these properties, and returns whether it reached a queue.
    pub fn publish(
        &self,
        vhost: &str,
        exchange: &str,
        routing_key: &str,
        properties: &Value,
        body: &[u8],
    ) -> Result<bool, Error> {
        let exchange = if exchange.is_empty() { "amq.default" } else { exchange };
        let message = json!({
            "properties": properties,
            "routing_key": routing_key,
            "payload": BASE64_STANDARD.encode(body),
            "payload_encoding": "base64",
        });
        let path = format!("exchanges/{}/{}/publish", segment(vhost), segment(exchange));
        let answer = self.call("publish", Method::POST, &path, &message)?;
        Ok(answer["routed"].as_bool().unwrap_or(false))
    }
}
