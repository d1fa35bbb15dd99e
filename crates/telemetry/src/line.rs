//! A log record as one line of text.

use std::fmt::{Display, Write as _};

use log::Record;
use log::kv::{self, Key, Value, VisitSource, VisitValue};

/// The time, the level, the service, the message and then the pairs, with whatever could break the line escaped.
pub(crate) fn format(time: &dyn Display, service: &str, record: &Record<'_>) -> String {
    let mut line = format!("{time} {:5} {service} ", record.level());
    for character in record.args().to_string().chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    // Neither visitor returns an error.
    let _ = record.key_values().visit(&mut Pairs(&mut line));
    line.push('\n');
    line
}

struct Pairs<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for Pairs<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        let mut text = Text(None);
        value.visit(&mut text)?;
        if let Text(Some(text)) = text {
            // What isn't seen for what it is, such as a mark of direction, is escaped in quotes.
            let plain = |c: char| !c.is_whitespace() && c != '=' && c.escape_debug().eq([c]);
            let _ = if !text.is_empty() && text.chars().all(plain) {
                write!(self.0, " {key}={text}")
            } else {
                write!(self.0, " {key}={text:?}")
            };
        }
        Ok(())
    }
}

/// The text of a value, or nothing of an absent one.
struct Text(Option<String>);

impl VisitValue<'_> for Text {
    fn visit_any(&mut self, value: Value<'_>) -> Result<(), kv::Error> {
        self.0 = Some(value.to_string());
        Ok(())
    }

    fn visit_null(&mut self) -> Result<(), kv::Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::format;
    use log::{Level, Record};

    fn line(message: &str, pairs: &[(&str, Option<&str>)]) -> String {
        let time = "2026-01-02T03:04:05.678Z";
        let record = |args| Record::builder().args(args).level(Level::Info).key_values(&pairs).build();
        format(&time, "feed-updater", &record(format_args!("{message}")))
    }

    #[test]
    fn a_line_has_the_time_the_level_the_service_the_message_and_the_pairs() {
        assert_eq!(
            line("handled a batch", &[("queue", Some("update_feed.00")), ("correlation_id", Some("c-1"))]),
            "2026-01-02T03:04:05.678Z INFO  feed-updater handled a batch queue=update_feed.00 correlation_id=c-1\n"
        );
    }

    #[test]
    fn an_absent_value_leaves_no_pair() {
        assert_eq!(line("done", &[("a", None), ("b", Some(""))]), line("done", &[("b", Some(""))]));
        assert!(line("done", &[("b", Some(""))]).ends_with(" done b=\"\"\n"));
    }

    #[test]
    fn nothing_breaks_a_line_or_passes_for_another_pair() {
        let written = line("one\ntwo\r\u{1b}[31m", &[("error", Some("a b\nc=\"d\"\t\\ \u{85}\u{2028}"))]);
        assert_eq!(written.matches(char::is_control).collect::<String>(), "\n");
        assert!(written.ends_with("\n"));
        assert!(written.contains(r#"one\ntwo\r\u{1b}[31m error="a b\nc=\"d\"\t\\ \u{85}\u{2028}""#), "{written}");
        let hidden = line("done", &[("message_id", Some("a\u{202e}\u{61c}\u{200b}b")), ("key", Some("žluť"))]);
        assert!(hidden.ends_with(" message_id=\"a\\u{202e}\\u{61c}\\u{200b}b\" key=žluť\n"), "{hidden}");
    }
}
