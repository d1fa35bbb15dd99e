//! `rights`: roles and users of the services.

use crate::{bare, complaint, fleetctl, run};
use broker::{Publisher, Session, Settings};
use domain::{Envelope, access::Permissions};
use management::Management;
use std::{
    env, fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};
use storage::rights::{self, SERVICES};
use test_support::{TestDatabase, TestVhost, broker_settings};

const DOCUMENT: &str = "../../docs/security.md";
const BEGIN: &str = "<!-- Written by a test: UPDATE_GOLDEN=1 cargo test -p fleetctl --test fleetctl rights -->\n";
const END: &str = "<!-- The end of what the test has written. -->\n";

fn variable(service: &str) -> String {
    format!("{}_PASSWORD", service.replace('-', "_").to_uppercase())
}

/// Servers on which the services have their roles and users, gone with this.
struct Stage {
    database: TestDatabase,
    vhost: TestVhost,
    management: Management,
}

impl Stage {
    fn new() -> Self {
        let vhost = TestVhost::new();
        let management = Management::new(vhost.management_url()).unwrap();
        let stage = Self { database: TestDatabase::new(), vhost, management };
        // Again changes nothing.
        for _ in 0..2 {
            let said = run(stage.apply(), 0);
            assert_eq!(said, "10 roles in PostgreSQL\n9 users at RabbitMQ\n");
        }
        stage
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = fleetctl(&self.database, args);
        command.env("AMQP_URL", self.vhost.url()).env("RABBITMQ_MANAGEMENT_URL", self.vhost.management_url());
        command
    }

    fn apply(&self) -> Command {
        let mut command = self.command(&["rights", "apply", "--prefix", self.vhost.name()]);
        command.envs(SERVICES.iter().map(|rights| (variable(rights.service), "of-this-test")));
        command
    }

    fn user(&self, service: &str) -> String {
        rights::role(self.vhost.name(), service)
    }

    /// The broker as a service sees it.
    fn broker_of(&self, service: &str) -> Settings {
        let (_, server) = self.vhost.url().rsplit_once('@').unwrap();
        broker_settings(&format!("amqp://{}:of-this-test@{server}", self.user(service)))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for rights in &SERVICES {
            let user = self.user(rights.service);
            self.database.execute(&format!("DROP OWNED BY \"{user}\""));
            self.database.execute(&format!("DROP ROLE \"{user}\""));
            if Permissions::of(rights.service).is_some() {
                self.management.delete_user(&user).unwrap();
            }
        }
    }
}

#[test]
fn the_table_in_the_document_is_what_holds() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(DOCUMENT);
    let document = fs::read_to_string(&path).unwrap();
    let (before, rest) = document.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let expected = format!("{before}{BEGIN}\n{}\n{END}{after}", run(bare_show(), 0));
    if env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &expected).unwrap();
    } else {
        assert!(document == expected, "docs/security.md isn't what holds: UPDATE_GOLDEN=1 cargo test -p fleetctl");
    }
}

fn bare_show() -> Command {
    let mut command = bare();
    command.args(["rights", "show"]);
    command
}

#[test]
fn without_every_services_password_nothing_is_changed() {
    let db = TestDatabase::new();
    let mut command = fleetctl(&db, &["rights", "apply", "--prefix", "of_nobody"]);
    for rights in SERVICES.iter().filter(|rights| rights.service != "feed-fanout") {
        command.env(variable(rights.service), "of-this-test");
    }
    command.env("SMS_NOTIFIER_PASSWORD", "");
    let said = complaint(command, 2);
    assert!(said.contains("nothing was changed: FEED_FANOUT_PASSWORD, SMS_NOTIFIER_PASSWORD"), "{said}");
    assert_eq!(db.count("SELECT count(*) AS n FROM pg_roles WHERE rolname LIKE 'of_nobody%'"), 0);
}

#[test]
fn a_service_does_at_the_broker_what_it_has_to_and_is_refused_the_rest() {
    let stage = Stage::new();
    run(stage.command(&["topology", "declare"]), 0);
    let deadline = || Instant::now() + Duration::from_secs(30);
    let read = |service: &str, queue: &str| {
        let mut session = Session::open(&stage.broker_of(service), "test").unwrap();
        let read = broker::drain(&mut session, queue, 10, |_| Ok(()));
        read.map_err(|error| error.to_string())
    };
    let delete = |service: &str, queue: &str| {
        let mut session = Session::open(&stage.broker_of(service), "test").unwrap();
        broker::delete_queues(&mut session, &[queue.to_owned()]).map_err(|error| error.to_string())
    };
    let publish = |service: &str, exchange: &str| {
        let message = [Envelope::new(exchange, exchange, b"{}".to_vec())];
        Publisher::new(&stage.broker_of(service), "test")
            .publish_all(&message, deadline())
            .map_err(|error| error.to_string())
    };
    read("email-notifier", "send_notification.email").unwrap();
    read("message-recorder", "message.p00").err();
    publish("outbox-relay", "publish_tweet").unwrap();
    assert_eq!(read("feed-fanout", "publish_tweet"), Ok(1));
    for refused in [
        read("email-notifier", "publish_tweet").map(drop),
        read("email-notifier", "send_notification.sms").map(drop),
        read("feed-fanout", "add_followers").map(drop),
        read("message-recorder", "dead_letter").map(drop),
        delete("email-notifier", "publish_tweet").map(drop),
        delete("message-recorder", "return").map(drop),
    ] {
        let refused = refused.expect_err("it's refused");
        assert!(refused.to_lowercase().contains("access"), "{refused}");
    }
    publish("sms-notifier", "publish_tweet").expect_err("it's refused");

    // Nor has a service anything to say in the management API, or the gateway a user.
    let (_, server) = stage.vhost.management_url().rsplit_once('@').unwrap();
    for service in ["outbox-relay", "api-gateway"] {
        let url = format!("http://{}:of-this-test@{server}", stage.user(service));
        let refused = Management::new(&url).unwrap().queue(stage.vhost.name(), "publish_tweet").map(drop);
        assert!(refused.unwrap_err().to_string().contains("status 401"));
    }
    Session::open(&stage.broker_of("api-gateway"), "test").map(drop).expect_err("there's no such user");
}

#[test]
fn what_a_migration_adds_is_theirs_who_need_it_afterwards() {
    let stage = Stage::new();
    let role = stage.user("feed-fanout");
    let may = || {
        let may = format!("SELECT has_column_privilege('{role}', 'tweet', 'id', 'SELECT')::integer::bigint AS n");
        stage.database.count(&may) == 1
    };
    assert!(may());
    // As if the table had just been made.
    stage.database.execute(&format!("REVOKE ALL ON tweet FROM \"{role}\""));
    assert!(!may());
    run(stage.command(&["migrate", "--prefix", stage.vhost.name()]), 0);
    assert!(may());
}
