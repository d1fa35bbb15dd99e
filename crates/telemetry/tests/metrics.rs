//! Every documented metric reaches a statsd server, and no other. One test: telemetry starts once in a process.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use telemetry::metrics::{self, Kind, Metric};
use telemetry::{emit, *};

const SECOND: Duration = Duration::from_secs(1);

fn emit_every_event() {
    let (message_id, correlation_id) = (Some("m-1"), Some("c-1"));
    for queue in ["send_notification.email", "update_feed.07"] {
        emit(WorkerStarted { queue, prefetch: 64 });
        emit(BatchReceived { queue, messages: 16 });
        emit(MessagesSuspected { queue, messages: 3 });
        emit(MessageHandled { queue, message_id, correlation_id });
        emit(BatchHandled { queue, messages: 14, duration: SECOND, lag: Some(2 * SECOND) });
        emit(MessageRetried { queue, message_id, correlation_id, attempt: 1, delay: SECOND, error: &"away" });
        emit(MessageDeadLettered { queue, message_id, correlation_id, attempts: 5, error: &"no such user" });
        emit(TimeLimitExceeded { queue, message_id, correlation_id, limit: SECOND });
        emit(WorkerStopped { queue, handled: 14 });
    }
    emit(DatabaseUnavailable { error: &"connection refused", retry_in: Some(SECOND) });
    emit(DatabaseAvailable { after: SECOND });
    emit(BrokerConnected { purpose: "publish", again: false });
    emit(BrokerLost { purpose: "publish", error: &"reset", retry_in: SECOND });
    emit(BrokerConnected { purpose: "publish", again: true });
    emit(BrokerBlocked { reason: "low on memory" });
    emit(DestinationRefusing { exchange: "publish_tweet", routing_key: "publish_tweet", since: SECOND });
    emit(BrokerUnblocked);
    for status in [101, 200, 302, 404, 503] {
        let route = "/api/v1/user/{id}";
        emit(RequestServed { method: "GET", route, status, duration: SECOND, correlation_id: "c-1" });
    }
    emit(OutboxRelayed { messages: 9, duration: SECOND, lag: SECOND });
    emit(LogRelayed { messages: 7, duration: SECOND, lag: SECOND });
    emit(PartitionUnavailable { partition: 3, error: &"no route", retry_in: SECOND });
    emit(PartitionAvailable { partition: 3, after: SECOND });
    let (group, partition) = ("recorder", 3);
    let lag = Some(SECOND);
    emit(MessagesRecorded { group, partition, messages: 5, repeated: 2, missing: 1, duration: SECOND, lag });
    emit(MessageSkipped { group, partition, offset: 17, reason: &"no JSON" });
    emit(ReadingStopped { group, partition, reason: &"its next message is gone" });
    emit(PartitionsChanged { group, held: 2, taken: 1, taken_over: 1, given_up: 0, members: 2 });
    let import_id = &7;
    emit(ImportProgressed { import_id, correlation_id, requested: 10, done: 10, created: 8, skipped: 2 });
    let stream = "account_event";
    emit(EventsApplied { stream, events: 5, late: 1, duration: SECOND, lag: Some(SECOND) });
    for delay in [Some(SECOND), None] {
        emit(EventFailed { stream, key: "a-1", seq: 3, attempt: 2, delay, error: &"away" });
    }
    emit(EventOverran { stream, key: "a-1", seq: 3, limit: SECOND });
    emit(EventsSwept { stream, keys: 4 });
    emit(EventsPutOff { stream, events: 2, key: "k", waited: SECOND, say: true });
    emit(ClockSetBack { of: stream, leases: 1, members: 1, waits: 1 });
    emit(ShardsChanged { stream, held: 8, taken: 2, taken_over: 6, given_up: 0, members: 2 });
    let errors =
        BalanceChanged { consumer: 5, user: 7, version: 2, order_error: true, value_error: true, consumer_error: true };
    emit(errors);
    emit(BalanceChanged { order_error: false, value_error: false, ..errors });
    emit(UserErased { rows: 7, done: true });
    emit(TweetsErased { texts: 3 });
    emit(SweepDone { removed: 11, duration: SECOND });
}

/// The lines that come in until none comes for as long as the flushing takes, at the longest.
fn receive(server: &UdpSocket, mut enough: impl FnMut(&[String]) -> bool) -> Vec<String> {
    server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let (deadline, mut buffer, mut lines) = (Instant::now() + 60 * SECOND, [0; 65536], Vec::new());
    while !enough(&lines) {
        assert!(Instant::now() < deadline, "received no more than {lines:#?}");
        if let Ok(length) = server.recv(&mut buffer) {
            assert!(length <= 1432, "a packet of {length} bytes");
            lines.extend(std::str::from_utf8(&buffer[..length]).unwrap().lines().map(str::to_owned));
        }
    }
    lines
}

fn metric_of(line: &str) -> &'static Metric {
    let name = line.strip_prefix("murmuration.").and_then(|line| line.split(':').next()).unwrap();
    let metrics: Vec<_> = metrics::ALL.iter().filter(|metric| metric.matches(name)).collect();
    assert_eq!(metrics.len(), 1, "{line} is a line of {metrics:?}");
    metrics[0]
}

#[test]
fn every_documented_metric_arrives_and_no_other() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let settings = Settings {
        log: "trace".to_owned(),
        statsd: server.local_addr().unwrap().to_string(),
        metrics_prefix: "murmuration".to_owned(),
    };
    let guard = telemetry::init("telemetry-test", &settings).unwrap();
    assert!(matches!(telemetry::init("again", &settings), Err(Error::Twice(_))));

    emit_every_event();
    // The last event's metric: it comes when the buffer is flushed, which nobody asks for here.
    let lines = receive(&server, |lines| lines.iter().any(|line| line.starts_with("murmuration.sweep.removed:")));

    for line in &lines {
        let statsd_type = match metric_of(line).kind {
            Kind::Counter => "c",
            Kind::Timer | Kind::Histogram => "ms",
        };
        assert_eq!(line.rsplit('|').next(), Some(statsd_type), "{line}");
    }
    let arrived: BTreeSet<_> = lines.iter().map(|line| metric_of(line).name).collect();
    let documented: BTreeSet<_> = metrics::ALL.iter().map(|metric| metric.name).collect();
    assert_eq!(arrived, documented);

    for expected in [
        "murmuration.queue.send_notification_email.received:16|c",
        "murmuration.queue.update_feed_07.handled:14|c",
        "murmuration.queue.update_feed_07.batch_size:16|ms",
        "murmuration.queue.update_feed_07.handling_ms:1000|ms",
        "murmuration.queue.update_feed_07.lag_ms:2000|ms",
        "murmuration.update_feed_7:14|c",
        "murmuration.http.requests.4xx:1|c",
        "murmuration.broker.reconnected:1|c",
        "murmuration.import.created:8|c",
        "murmuration.value_error:1|c",
    ] {
        assert_eq!(lines.iter().filter(|line| *line == expected).count(), 1, "{expected} in {lines:#?}");
    }

    emit(SweepDone { removed: 12, duration: SECOND });
    drop(guard);
    let rest = receive(&server, |lines| !lines.is_empty());
    assert_eq!(rest, ["murmuration.sweep.removed:12|c"]);
}

#[test]
fn the_readme_lists_every_metric() {
    let documented = metrics::ALL
        .iter()
        .map(|metric| format!("| `{}` | {:?} | {} |\n", metric.name, metric.kind, metric.help).to_lowercase())
        .collect::<String>();
    assert!(include_str!("../README.md").to_lowercase().contains(&documented), "expected in README.md:\n{documented}");
}
