//! Decoding deliveries, with reasons that an operator can act on and that repeat nothing of what users wrote.

use crate::Received;
use anyhow::{anyhow, bail};
use serde::de::DeserializeOwned;
use serde_json::error::Category;

/// Which of the `known` shapes the AMQP `type` names. The first one where there is no type.
///
/// # Errors
/// When it names another.
pub fn kind(received: &Received, known: &[&'static str]) -> anyhow::Result<&'static str> {
    let Some(kind) = &received.kind else {
        return known.first().copied().ok_or_else(|| anyhow!("no type is known here"));
    };
    match known.iter().find(|known| *known == kind) {
        Some(known) => Ok(known),
        None => bail!("unknown type {:?}, expected {}", shorten(kind, 60), known.join(" or ")),
    }
}

/// Decodes the body as JSON of the shape `T`.
///
/// # Errors
/// When it isn't UTF-8, isn't JSON, or has another shape. Says where, and never what the body says there.
pub fn json<T: DeserializeOwned>(received: &Received) -> anyhow::Result<T> {
    let text =
        str::from_utf8(&received.body).map_err(|error| anyhow!("not UTF-8 after byte {}", error.valid_up_to()))?;
    serde_json::from_str(text).map_err(|error| match error.classify() {
        Category::Data => anyhow!("wrong shape: {}", without_value(&error.to_string())),
        Category::Eof if text.trim().is_empty() => anyhow!("empty body, expected JSON"),
        Category::Eof | Category::Syntax | Category::Io => anyhow!("not JSON: {error}"),
    })
}

/// serde's message without the value that it found, which is a user's: `invalid type: string "…", expected i64 at line 1
/// column 9` keeps the kind of value and what was expected.
fn without_value(message: &str) -> String {
    let Some((found, expected)) = message.rsplit_once(", expected ") else { return message.to_owned() };
    let found = found.split(['"', '`']).next().unwrap_or_default().trim_end();
    format!("{found}, expected {expected}")
}

/// At most `limit` bytes of `text`.
pub(crate) fn shorten(text: &str, limit: usize) -> &str {
    let end = (0..=limit.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::message::{PublishTweet, UpdateFeed, UpdateFeedChunk};

    fn refusal(body: impl Into<Vec<u8>>) -> String {
        json::<PublishTweet>(&Received::new("publish_tweet", body)).expect_err("it's refused").to_string()
    }

    #[test]
    fn a_refusal_says_what_is_wrong_and_repeats_nothing_of_the_body() {
        let tweet = r#""id": 1, "author": "ann", "text": "my secret", "createdAt": "2024-05-01 10:00:00""#;
        for (body, expected) in [
            (&b""[..], "empty body, expected JSON"),
            (b"secret", "not JSON: expected value at line 1 column 1"),
            (b"{\"id\": 1", "not JSON: EOF while parsing an object at line 1 column 8"),
            (b"{\"id\": \xff}", "not UTF-8 after byte 7"),
            (b"[1]", "wrong shape: invalid length 1, expected struct Tweet with 5 elements at line 1"),
            (b"{}", "wrong shape: missing field `id` at line 1 column 2"),
            (format!("{{{tweet}}}").as_bytes(), "wrong shape: missing field `authorId` at line 1 column 83"),
            (
                format!("{{{tweet}, \"authorId\": \"the, expected secret\"}}").as_bytes(),
                "wrong shape: invalid type: string, expected i64",
            ),
            (b"{\"id\": 99999999999999999999}", "wrong shape: invalid type: floating point, expected i64"),
        ] {
            let refusal = refusal(body);
            assert!(refusal.starts_with(expected), "{refusal}");
            assert!(!refusal.contains("secret"), "{refusal}");
        }
    }

    #[test]
    fn values_are_refused_by_their_own_rules() {
        let text = "x".repeat(141);
        let body =
            format!(r#"{{"id":1,"author":"ann","authorId":2,"text":"{text}","createdAt":"2024-05-01 10:00:00"}}"#);
        let error = json::<PublishTweet>(&Received::new("publish_tweet", body)).expect_err("too long");
        assert_eq!(error.to_string(), "wrong shape: must be at most 140 characters long at line 1 column 186");
    }

    #[test]
    fn no_type_means_the_first_shape_and_an_unknown_one_is_refused() {
        use domain::message::Message as _;
        let known = &[UpdateFeed::TYPE, UpdateFeedChunk::TYPE];
        let mut received = Received::new("update_feed.00", "{}");
        assert_eq!(kind(&received, known).unwrap(), UpdateFeed::TYPE);
        received.kind = Some("update_feed.chunk".into());
        assert_eq!(kind(&received, known).unwrap(), UpdateFeedChunk::TYPE);
        received.kind = Some("é".repeat(100));
        let error = kind(&received, known).unwrap_err().to_string();
        assert_eq!(error, format!("unknown type {:?}, expected update_feed or update_feed.chunk", "é".repeat(30)));
    }
}
