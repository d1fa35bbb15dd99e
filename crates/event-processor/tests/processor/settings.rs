//! Whoever starts it wrongly is told what is wrong.

use std::process::{Command, Output};

fn run(arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_event-processor"))
        .args(arguments)
        // Nobody listens there.
        .env("MURMURATION__DATABASE__URL", "postgres://nobody@127.0.0.1:1/nowhere")
        .env("MURMURATION__DATABASE__CONNECT_TIMEOUT_MS", "100")
        .env("MURMURATION__BROKER__URL", "amqp://nobody:nothing@127.0.0.1:1/nowhere")
        .env("MURMURATION__HEALTH__PORT", "0")
        .envs(settings.iter().copied())
        .output()
        .expect("the binary runs")
}

#[test]
fn it_says_what_it_is_for() {
    let output = run(&["--help"], &[]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).expect("it prints UTF-8");
    assert!(
        text.starts_with("Handles account events, in order per account") && text.contains("Usage: event-processor")
    );
    assert_eq!(run(&["--lanes"], &[]).status.code(), Some(2));
}

#[test]
fn settings_that_can_not_be_used_are_named() {
    const OWN: &str = "MURMURATION__EVENT_PROCESSOR__";
    const SEQUENCED: &str = "MURMURATION__SEQUENCED__";
    let work_ms = "must be milliseconds such as 1000, or a range such as 200..1500, and not";
    for (section, key, value, said) in [
        (OWN, "WORK_MS", "x", work_ms),
        (OWN, "WORK_MS", "5..2", work_ms),
        (OWN, "LANES", "0", "lanes must be above 0"),
        (OWN, "LANES", "-1", "MURMURATION__EVENT_PROCESSOR__LANES"),
        (OWN, "BATCH", "0", "batch must be above 0"),
        (OWN, "LANE", "5", "did you mean `event_processor.lanes`?"),
        (OWN, "SIMULATE_FAILURES", "often", "`event_processor.simulate_failures`"),
        (SEQUENCED, "LEASE_TTL_MS", "500", "sequenced.lease_ttl_ms must be at least twice sequenced.lease_renew_ms"),
        (SEQUENCED, "LEASE_RENEW_MS", "0", "sequenced.lease_renew_ms must be above 0"),
        (SEQUENCED, "SWEEP_MS", "0", "sequenced.sweep_ms must be above 0"),
        ("MURMURATION__WORKER__", "RETRY_DELAYS_MS", "[]", "worker.retry_delays_ms must hold at least one delay"),
    ] {
        let output = run(&[], &[(&format!("{section}{key}"), value)]);
        let error = String::from_utf8(output.stderr).expect("it prints UTF-8");
        assert_eq!(output.status.code(), Some(1), "{key}={value}: {error}");
        assert!(error.contains(said), "{key}={value}: {error}");
    }
}
