//! Times as `YYYY-MM-DD HH:MM:SS` in UTC: the form of every wire message and of the older HTTP answers.
//! For serde: `#[serde(with = "domain::wire_time")]`.

use chrono::{DateTime, NaiveDateTime, Utc};
use serde::{Deserialize, Deserializer, Serializer, de::Error};

const FORMAT: &str = "%Y-%m-%d %H:%M:%S";

/// The text of `time`, cut to whole seconds.
pub fn format(time: DateTime<Utc>) -> String {
    time.format(FORMAT).to_string()
}

/// Writes `time` as text.
///
/// # Errors
/// The serializer's own.
pub fn serialize<S: Serializer>(time: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&time.format(FORMAT))
}

/// Reads a time from text.
///
/// # Errors
/// When the value isn't a string of that form.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DateTime<Utc>, D::Error> {
    let text = String::deserialize(deserializer)?;
    NaiveDateTime::parse_from_str(&text, FORMAT)
        .map(|time| time.and_utc())
        .map_err(|_| D::Error::custom("expected a UTC time as `YYYY-MM-DD HH:MM:SS`"))
}
