use crate::servers::variable;
use management::Management;
use serde_json::Value;
use url::Url;
use uuid::Uuid;

/// A vhost of its own, deleted with the value.
pub struct TestVhost {
    name: String,
    url: String,
    management: Management,
    management_url: String,
}

impl TestVhost {
    /// A new, empty vhost in which the fleet's user may do everything.
    ///
    /// # Panics
    /// When the server isn't there.
    #[expect(clippy::new_without_default, reason = "making a vhost is no default")]
    pub fn new() -> Self {
        Self::on(&variable("AMQP_URL"), &variable("RABBITMQ_MANAGEMENT_URL"))
    }

    /// The same on the node of these URLs.
    ///
    /// # Panics
    /// When it isn't there.
    pub fn on(amqp_url: &str, management_url: &str) -> Self {
        let name = format!("test-{}", Uuid::new_v4().simple());
        let management = Management::new(management_url).expect("a usable URL");
        management.create_vhost(&name).expect("RabbitMQ answers: run `make servers` first");
        let mut url = Url::parse(amqp_url).expect("an AMQP URL");
        url.set_path(&name);
        Self { name, url: url.to_string(), management, management_url: management_url.to_owned() }
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The management API's URL.
    pub fn management_url(&self) -> &str {
        &self.management_url
    }

    /// Closes every connection to this vhost from the server's side, and returns how many there were.
    ///
    /// # Panics
    /// When the server doesn't answer.
    pub fn close_connections(&self) -> usize {
        self.management.close_connections(&self.name).expect("the server answers")
    }

    /// Declares a queue as nobody in the fleet would.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn declare_classic(&self, queue: &str) {
        self.declare_queue(queue, &serde_json::json!({"x-queue-type": "classic"}));
    }

    /// Declares a queue with any arguments.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn declare_queue(&self, queue: &str, arguments: &Value) {
        self.management.declare_queue(&self.name, queue, arguments).expect("the server takes it");
    }

    /// Declares an exchange of any type.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn declare_exchange(&self, exchange: &str, kind: &str) {
        self.management.declare_exchange(&self.name, exchange, kind).expect("the server takes it");
    }

    /// Lets the queue keep so many messages at most, by a policy of the queue's name.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn limit(&self, queue: &str, messages: u32) {
        let definition = serde_json::json!({"max-length": messages});
        let pattern = format!("^{}$", queue.replace('.', r"\."));
        self.management.set_policy(&self.name, queue, &pattern, &definition).expect("the server takes it");
    }

    /// Lets the queue keep as many messages as come.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn no_limit(&self, queue: &str) {
        self.management.delete_policy(&self.name, queue).expect("the server takes it");
    }

    /// Publishes a message as another program might, with whatever properties. Returns whether it reached a queue.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn publish(&self, exchange: &str, routing_key: &str, properties: &Value, body: &[u8]) -> bool {
        self.management.publish(&self.name, exchange, routing_key, properties, body).expect("the server takes it")
    }
}

impl Drop for TestVhost {
    fn drop(&mut self) {
        if let Err(error) = self.management.delete_vhost(&self.name) {
            eprintln!("the test's vhost {} stays behind: {error}", self.name);
        }
    }
}
