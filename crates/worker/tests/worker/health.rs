//! What health checks say.

use crate::support::{MemoryLedger, QUEUE, broker_settings, depth, drain, publish, while_running, worker};
use anyhow::anyhow;
use broker::Publisher;
use domain::{Envelope, Failure, topology::queue};
use serde_json::{Value, json};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use test_support::{TestVhost, eventually, free_ports};

pub(crate) fn get(port: u16, path: &str) -> Option<(u16, Value)> {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut response = agent.get(format!("http://127.0.0.1:{port}{path}")).call().ok()?;
    let body = response.body_mut().read_to_string().ok()?;
    Some((response.status().as_u16(), serde_json::from_str(&body).unwrap_or_default()))
}

#[test]
fn without_both_servers_a_worker_waits_and_says_what_is_missing() {
    let [port, nobody] = free_ports();
    let nobody = format!("amqp://guest:guest@127.0.0.1:{nobody}");
    let mut waiting = worker(&nobody, Arc::new(MemoryLedger::default()), |_, _, _| Ok(()));
    waiting.health.port = port;
    waiting.database = Arc::new(|| Err(Failure::Unavailable(anyhow!("the database is not available"))));
    while_running(waiting, || {
        let ready = eventually("an answer", || get(port, "/health/ready"));
        let missing = json!([
            {"what": "broker", "why": "not connected"},
            {"what": "database", "why": "the database is not available"},
        ]);
        assert_eq!(ready, (503, json!({"status": "unavailable", "missing": missing})));
        assert_eq!(get(port, "/health/live"), Some((200, json!({"status": "ok"}))));
        assert_eq!(get(port, "/health/other").expect("an answer").0, 404);
    });
    assert_eq!(get(port, "/health/live"), None, "nothing listens any more");
}

#[test]
fn a_worker_is_ready_once_it_consumes_and_the_database_answers() {
    let vhost = TestVhost::new();
    publish(vhost.url(), []);
    let database = Arc::new(AtomicBool::new(false));
    let mut starting = worker(vhost.url(), Arc::new(MemoryLedger::default()), |_, _, _| Ok(()));
    let [port] = free_ports();
    starting.health.port = port;
    let answers = database.clone();
    starting.database = Arc::new(move || {
        let away = || Failure::Unavailable(anyhow!("the database is not available"));
        answers.load(Ordering::Relaxed).then_some(()).ok_or_else(away)
    });
    while_running(starting, || {
        assert_eq!(eventually("an answer", || get(port, "/health/ready")).0, 503);
        database.store(true, Ordering::Relaxed);
        eventually("it is ready", || (get(port, "/health/ready")? == (200, json!({"status": "ok"}))).then_some(()));
        database.store(false, Ordering::Relaxed);
        assert_eq!(get(port, "/health/ready").expect("an answer").0, 503);
    });
}

#[test]
fn a_worker_whose_messages_no_queue_takes_says_which_and_goes_on_once_one_does() {
    let vhost = TestVhost::new();
    publish(vhost.url(), ["a"]);
    let follows = || Envelope::new("send_notification", "email", b"{}".to_vec());
    vhost.limit(queue::SEND_NOTIFICATION_EMAIL, 1);
    let mut publisher = Publisher::new(&broker_settings(vhost.url()), "test");
    let mut filling = 0;
    eventually("the queue is full", || {
        let published = publisher.publish_all(&[follows()], Instant::now() + Duration::from_secs(20));
        published.map(|_| filling += 1).err()
    });
    let mut held_up = worker(vhost.url(), Arc::new(MemoryLedger::default()), move |batch, out, _| {
        batch.iter().for_each(|item| out.publish(&item.received, follows()));
        Ok(())
    });
    let [port] = free_ports();
    held_up.health.port = port;
    let drained = while_running(held_up, || {
        let why = eventually("it says so", || {
            let (status, answer) = get(port, "/health/ready")?;
            let why = answer["missing"][0]["why"].as_str()?.to_owned();
            (status == 503 && answer["missing"][0]["what"] == "broker" && why != "not connected").then_some(why)
        });
        let expected = "exchange `send_notification`, routing key `email` takes no messages since ";
        assert!(why.starts_with(expected), "{why}");
        vhost.no_limit(queue::SEND_NOTIFICATION_EMAIL);
        let drained = drain(vhost.url(), queue::SEND_NOTIFICATION_EMAIL).len();
        eventually("it is ready", || (get(port, "/health/ready")? == (200, json!({"status": "ok"}))).then_some(()));
        drained
    });
    assert_eq!(depth(vhost.url(), QUEUE), 0, "its message is acknowledged");
    // What follows from it may have come as soon as there was room.
    assert!(drained + drain(vhost.url(), queue::SEND_NOTIFICATION_EMAIL).len() > filling);
}
