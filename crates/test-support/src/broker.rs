use domain::topology::Retention;

/// The section `[broker]` for a test at this URL. Patient, since a test opens its own sessions once, and since a connection
/// that is given up for lost brings messages again.
pub fn broker_settings(url: &str) -> broker::Settings {
    broker::Settings {
        url: url.to_owned().into(),
        connect_timeout_ms: 30_000,
        heartbeat_s: 30,
        confirm_timeout_ms: 30_000,
        window_messages: 1024,
        window_bytes: 1 << 20,
    }
}

/// The section `[message_log]` for a test.
pub fn log_retention() -> Retention {
    Retention { max_bytes: 1 << 30, max_age_s: 3600, segment_bytes: 1 << 20 }
}
