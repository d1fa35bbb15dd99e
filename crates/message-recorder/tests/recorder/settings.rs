//! Whoever starts it wrongly is told what is wrong.

use std::process::{Command, Output};

fn run(arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    // Else it would run until it's told to stop.
    Command::new("timeout")
        .args(["120", env!("CARGO_BIN_EXE_message-recorder")])
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

fn said(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("it prints UTF-8")
}

#[test]
fn it_says_what_it_is_for() {
    let output = run(&["--help"], &[]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).expect("it prints UTF-8");
    assert!(text.starts_with("Records what a consumer group reads of the message log"), "{text}");
    for option in ["Usage: message-recorder", "--group <GROUP>", "--from <FROM>"] {
        assert!(text.contains(option), "{text}");
    }
}

#[test]
fn arguments_that_can_not_be_used_are_named() {
    let long = "x".repeat(65);
    for (arguments, why) in [
        (&["--group", "a b"][..], "letters, digits and . _ - only"),
        (&["--group", "a/b"], "letters, digits and . _ - only"),
        (&["--group", ""], "must not be empty"),
        (&["--group", &long], "at most 64 characters"),
        (&["--from", "last"], "[possible values: first, next]"),
        (&["--groups", "a"], "--groups"),
        (&["recorder"], "recorder"),
    ] {
        let output = run(arguments, &[]);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", said(&output));
        assert!(said(&output).contains(why), "{arguments:?}: {}", said(&output));
    }
}

#[test]
fn settings_that_can_not_be_used_are_named() {
    const OWN: &str = "MURMURATION__MESSAGE_RECORDER__";
    for (section, key, value, why) in [
        (OWN, "PREFETCH", "1999", "message_recorder.prefetch must be at least twice message_recorder.batch"),
        (OWN, "PREFETCH", "70000", "MURMURATION__MESSAGE_RECORDER__PREFETCH"),
        (OWN, "BATCH", "0", "message_recorder.batch must be above 0"),
        (OWN, "BATCH", "-1", "MURMURATION__MESSAGE_RECORDER__BATCH"),
        (OWN, "LEASE_RENEW_MS", "0", "message_recorder.lease_renew_ms must be above 0"),
        (
            OWN,
            "LEASE_TTL_MS",
            "700",
            "message_recorder.lease_ttl_ms must be at least twice message_recorder.lease_renew_ms",
        ),
        (OWN, "GROUP", "a b", "letters, digits and . _ - only"),
        (OWN, "FROM", "last", "MURMURATION__MESSAGE_RECORDER__FROM"),
        (OWN, "TRIMMED", "go", "MURMURATION__MESSAGE_RECORDER__TRIMMED"),
        (OWN, "GROUPS", "a", "did you mean `message_recorder.group`?"),
    ] {
        let output = run(&[], &[(&format!("{section}{key}"), value)]);
        assert_eq!(output.status.code(), Some(1), "{key}={value}: {}", said(&output));
        assert!(said(&output).contains(why), "{key}={value}: {}", said(&output));
    }
}
