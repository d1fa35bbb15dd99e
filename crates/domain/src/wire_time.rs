//! Times in wire messages. `YYYY-MM-DD HH:MM:SS` in UTC is the form of every wire message and of the older HTTP answers;
//! other programs may write RFC 3339 with any offset as well. For serde: `#[serde(with = "domain::wire_time")]`, which
//! reads both and writes the former.

use crate::values::Invalid;
use chrono::{DateTime, Datelike as _, NaiveDateTime, Utc};
use serde::{Deserialize, Deserializer, Serializer, de::Error};

const FORMAT: &str = "%Y-%m-%d %H:%M:%S";

/// The text of `time`, cut to whole seconds.
pub fn format(time: DateTime<Utc>) -> String {
    time.format(FORMAT).to_string()
}

/// The time that `text` says in either form, cut to microseconds, which is what a column of the database holds.
///
/// # Errors
/// When it's of neither form, or its year in UTC has other than four digits: both forms have no more, and the database
/// wouldn't hold every other.
pub fn parse(text: &str) -> Result<DateTime<Utc>, Invalid> {
    let plain = || NaiveDateTime::parse_from_str(text, FORMAT).map(|time| time.and_utc());
    let rfc_3339 = || DateTime::parse_from_rfc3339(text).map(Into::into);
    // An attempt that fails costs as much as one that doesn't.
    let is_plain = text.as_bytes().get(10) == Some(&b' ') && !text.ends_with(['Z', 'z']);
    let time = if is_plain { plain().or_else(|_| rfc_3339()) } else { rfc_3339() }
        .map_err(|_| Invalid("must be a time as `YYYY-MM-DD HH:MM:SS` in UTC or as RFC 3339 has it".into()))?;
    DateTime::from_timestamp_micros(time.timestamp_micros())
        .filter(|time| (0..=9999).contains(&time.year()))
        .ok_or_else(|| Invalid("must be a time of the years 0000 to 9999".into()))
}

/// Writes `time` as text.
///
/// # Errors
/// The serializer's own.
pub fn serialize<S: Serializer>(time: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&time.format(FORMAT))
}

/// Reads a time from text as [`parse`] does.
///
/// # Errors
/// When the value isn't a string of such a form.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DateTime<Utc>, D::Error> {
    parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
}

/// Reads a time, if there is one, from text as [`parse`] does.
///
/// # Errors
/// When the value is neither null nor a string of such a form.
pub fn deserialize_optional<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<DateTime<Utc>>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.as_deref().map(parse).transpose().map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_read_in_every_form_that_rfc_3339_has() {
        for (text, expected) in [
            ("2026-11-28 12:00:00", "2026-11-28T12:00:00Z"),
            ("2026-11-28T12:00:00+00:00", "2026-11-28T12:00:00Z"),
            ("2026-11-28T12:00:00-00:00", "2026-11-28T12:00:00Z"),
            ("2026-11-28t12:00:00z", "2026-11-28T12:00:00Z"),
            ("2026-11-28 12:00:00Z", "2026-11-28T12:00:00Z"),
            ("2026-11-28T14:30:00+02:30", "2026-11-28T12:00:00Z"),
            ("2026-11-28T00:30:00.5-11:30", "2026-11-28T12:00:00.500Z"),
            ("2026-11-28T12:00:00.123456789123Z", "2026-11-28T12:00:00.123456Z"),
            ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00Z"),
            ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z"),
            ("0000-01-01T00:00:00Z", "0000-01-01T00:00:00Z"),
        ] {
            let expected: DateTime<Utc> = expected.parse().unwrap();
            let read = parse(text).unwrap_or_else(|invalid| panic!("{text}: {invalid}"));
            assert_eq!(read, expected, "{text}");
            // What is written is read again as the same, to the second.
            assert_eq!(parse(&format(read)).unwrap().timestamp(), expected.timestamp(), "{text}");
        }
    }

    #[test]
    fn a_time_beyond_the_forms_or_without_an_offset_is_refused() {
        for text in [
            "",
            "yesterday",
            "2026-11-28",
            "2026-11-28T12:00:00",
            "2026-11-28T12:00Z",
            "2026-02-30T12:00:00Z",
            "2026-11-28T24:00:00Z",
            "2026-11-28T12:00:00+0000",
            "-5000-01-01T00:00:00Z",
            "-5000-01-01 00:00:00",
            "+10000-01-01 00:00:00",
            "+262142-01-01 00:00:00",
            "0000-01-01T00:00:00+00:01",
            "9999-12-31T23:59:59-00:01",
            "2026-11-28T12:00:00Z\0",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }
}
