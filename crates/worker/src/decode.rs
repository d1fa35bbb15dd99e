//! Decoding deliveries, with reasons that an operator can act on and that repeat nothing of what users wrote.

use anyhow::{anyhow, bail};
use broker::Delivery;
use serde::de::DeserializeOwned;
use serde_json::error::Category;

/// Which of the `known` shapes the AMQP `type` names. The first one where there is no type.
///
/// # Errors
/// When it names another.
pub fn kind(delivery: &Delivery, known: &[&'static str]) -> anyhow::Result<&'static str> {
    let Some(kind) = &delivery.kind else {
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
pub fn json<T: DeserializeOwned>(delivery: &Delivery) -> anyhow::Result<T> {
    let text =
        str::from_utf8(&delivery.body).map_err(|error| anyhow!("not UTF-8 after byte {}", error.valid_up_to()))?;
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
    &text[..text.floor_char_boundary(limit)]
}
