use domain::topology::Retention;

/// The section `[broker]` for a test at this URL: less patient than a fleet is.
pub fn broker_settings(url: &str) -> broker::Settings {
    broker::Settings {
        url: url.to_owned().into(),
        connect_timeout_ms: 3000,
        heartbeat_s: 5,
        confirm_timeout_ms: 5000,
        window_messages: 1024,
        window_bytes: 1 << 20,
    }
}

/// The section `[message_log]` for a test.
pub fn log_retention() -> Retention {
    Retention { max_bytes: 1 << 30, max_age_s: 3600, segment_bytes: 1 << 20 }
}
