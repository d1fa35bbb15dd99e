//! Sequenced streams: keys, shards, and the message that wakes; and those of them that hold account events.

use crate::{Envelope, values::Invalid, wire_time};
use chrono::{DateTime, Utc};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, DeserializeOwned},
};
use serde_json::value::RawValue;
use std::fmt;

/// The stream of account events, which is also its exchange and the AMQP `type`.
pub const ACCOUNT_EVENT: &str = "account_event";

/// The most shards of a stream.
pub const SHARDS_MAX: i32 = 256;

/// Longest account id, in bytes.
pub const ACCOUNT_ID_MAX: usize = 64;

/// The largest payload, in bytes of its JSON text.
pub const PAYLOAD_MAX: usize = 65536;

/// How deep a payload may nest. Parsers have limits, Postgres' and the handlers': this is below all of them.
pub const PAYLOAD_DEPTH_MAX: usize = 100;

/// An account that events belong to: 1 to 64 of the characters `A–Z a–z 0–9 . _ : -`. In JSON it may be a whole number
/// as well: `17` and `"17"` are the same account, and it's written as a number where it looks like one that any reader of
/// JSON keeps (RFC 8259: below 2^53).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AccountId(String);

impl AccountId {
    /// The id as text.
    ///
    /// # Errors
    /// When it's too long, or holds other characters.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
        match text.len() {
            0 => Err(Invalid("must not be empty".into())),
            1..=ACCOUNT_ID_MAX if text.bytes().all(valid) => Ok(Self(text.into())),
            1..=ACCOUNT_ID_MAX => Err(Invalid("may hold letters, digits and . _ : - only".into())),
            _ => Err(Invalid(format!("must be at most {ACCOUNT_ID_MAX} characters long"))),
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The whole number whose usual way of writing this is, if it's safe.
    fn as_number(&self) -> Option<u64> {
        const SAFE: u64 = (1 << 53) - 1;
        let number: u64 = self.0.parse().ok()?;
        (number <= SAFE && number.to_string() == self.0).then_some(number)
    }
}

impl fmt::Display for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for AccountId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.as_number() {
            Some(number) => serializer.serialize_u64(number),
            None => serializer.serialize_str(&self.0),
        }
    }
}

impl<'de> Deserialize<'de> for AccountId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = AccountId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an account id: a whole number of at least 0, or a string")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<AccountId, E> {
                Ok(AccountId(number.to_string()))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<AccountId, E> {
                AccountId::parse(text).map_err(E::custom)
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

/// An event's content: any JSON value, kept as it was sent, of at most [`PAYLOAD_MAX`] bytes and [`PAYLOAD_DEPTH_MAX`]
/// levels.
#[derive(Clone)]
pub struct Payload(Box<RawValue>);

impl Payload {
    /// The JSON text.
    ///
    /// # Errors
    /// When it's no JSON, too large, or nests too deep.
    pub fn parse(text: impl Into<String>) -> Result<Self, Invalid> {
        let raw = RawValue::from_string(text.into()).map_err(|error| Invalid(format!("must be JSON: {error}")))?;
        Self::from_raw(raw)
    }

    fn from_raw(raw: Box<RawValue>) -> Result<Self, Invalid> {
        if raw.get().len() > PAYLOAD_MAX {
            return Err(Invalid(format!("must be at most {PAYLOAD_MAX} bytes of JSON")));
        }
        if depth(raw.get()) > PAYLOAD_DEPTH_MAX {
            return Err(Invalid(format!("must nest at most {PAYLOAD_DEPTH_MAX} levels deep")));
        }
        Ok(Self(raw))
    }

    /// The JSON text.
    pub fn as_str(&self) -> &str {
        self.0.get()
    }
}

impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for Payload {}

// It holds what users wrote, which stays out of logs.
impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Payload({} bytes)", self.as_str().len())
    }
}

impl Serialize for Payload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_raw(Box::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// How deep well-formed JSON nests, told without recursion.
fn depth(json: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut in_text, mut escaped) = (false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => in_text = !in_text,
            b'[' | b'{' if !in_text => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_text => depth -= 1,
            _ => {}
        }
    }
    deepest
}

/// What the events of a stream belong to. As text it's at most 64 bytes, all of characters that sort before `~`: prefixes are
/// looked for by that.
pub trait StreamKey: Clone + Ord + fmt::Display {
    /// Its events as they travel.
    type Event: StreamEvent<Key = Self>;

    /// The key as text, as rows hold it.
    fn as_str(&self) -> &str;
}

/// An event as it travels. The row in Postgres is the truth: the message says that it's there, and carries a copy.
pub trait StreamEvent: Serialize + DeserializeOwned {
    /// What it belongs to.
    type Key: StreamKey<Event = Self>;

    /// The event of this place among the key's, which counts from 1.
    fn new(key: Self::Key, seq: i64, payload: Payload, generated_at: DateTime<Utc>) -> Self;

    /// What it belongs to.
    fn key(&self) -> &Self::Key;

    /// Its place among the key's events, from 1.
    fn seq(&self) -> i64;

    /// The message for a stream's shard.
    fn envelope(&self, stream: &str, shard: i32) -> Envelope {
        let body = serde_json::to_vec(self).expect("a wire message is plain data, which always has a JSON form");
        let mut envelope = Envelope::new(stream, shard_routing_key(shard), body);
        envelope.kind = Some(stream.into());
        envelope.message_id = format!("{stream}/{}/{}", self.key(), self.seq());
        envelope
    }
}

/// An account's event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AccountEvent {
    /// The account.
    pub account_id: AccountId,
    /// Its place among the account's events, from 1.
    pub seq: i64,
    /// What happened.
    pub payload: Payload,
    /// When it was accepted.
    #[serde(deserialize_with = "wire_time::deserialize")]
    pub generated_at: DateTime<Utc>,
}

impl StreamKey for AccountId {
    type Event = AccountEvent;

    fn as_str(&self) -> &str {
        self.as_str()
    }
}

impl StreamEvent for AccountEvent {
    type Key = AccountId;

    fn new(account_id: AccountId, seq: i64, payload: Payload, generated_at: DateTime<Utc>) -> Self {
        Self { account_id, seq, payload, generated_at }
    }

    fn key(&self) -> &AccountId {
        &self.account_id
    }

    fn seq(&self) -> i64 {
        self.seq
    }
}

/// A hash of the key, from 0 to 2^31 - 1, the same for ever: rows hold it. FNV-1a of 64 bits (Fowler, Noll and Vo; RFC
/// 9923), folded.
pub fn key_hash(key: &str) -> i32 {
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let hash = key.bytes().fold(OFFSET_BASIS, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
    ((hash ^ (hash >> 32)) & 0x7fff_ffff) as i32
}

/// The shard of a key with this hash.
pub fn shard(key_hash: i32, shards: i32) -> i32 {
    key_hash % shards
}

/// The routing key of a shard: `s000` …
pub fn shard_routing_key(shard: i32) -> String {
    format!("s{shard:03}")
}

/// The queue of a stream's shard: `account_event.s000` …
pub fn shard_queue(stream: &str, shard: i32) -> String {
    format!("{stream}.{}", shard_routing_key(shard))
}

/// The name by which a stream's shard is leased: `account_event/000` …
pub fn shard_resource(stream: &str, shard: i32) -> String {
    format!("{stream}/{shard:03}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn account_ids_are_numbers_or_plain_strings() {
        for (json, text, back) in [
            ("17", "17", "17"),
            ("\"17\"", "17", "17"),
            ("0", "0", "0"),
            ("\"017\"", "017", "\"017\""),
            ("\"ab:c-1_2.3\"", "ab:c-1_2.3", "\"ab:c-1_2.3\""),
            ("9007199254740991", "9007199254740991", "9007199254740991"),
            ("9007199254740992", "9007199254740992", "\"9007199254740992\""),
            ("18446744073709551615", "18446744073709551615", "\"18446744073709551615\""),
            ("\"18446744073709551616\"", "18446744073709551616", "\"18446744073709551616\""),
        ] {
            let id: AccountId = serde_json::from_str(json).expect(json);
            assert_eq!((id.as_str(), &*serde_json::to_string(&id).unwrap()), (text, back));
        }
        let long = format!("\"{}\"", "x".repeat(65));
        for json in ["-1", "1.5", "true", "null", "[1]", "{}", "\"\"", "\"a b\"", "\"é\"", "\"a/b\"", &long] {
            assert!(serde_json::from_str::<AccountId>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn a_payload_stays_as_it_was_written_up_to_its_limit() {
        let text = r#"{"b":1.50,"a": [1,2]}"#;
        assert_eq!(serde_json::to_string(&serde_json::from_str::<Payload>(text).unwrap()).unwrap(), text);
        let quoted = |bytes: usize| format!("\"{}\"", "x".repeat(bytes - 2));
        assert!(Payload::parse(quoted(PAYLOAD_MAX)).is_ok());
        assert!(Payload::parse(quoted(PAYLOAD_MAX + 1)).is_err() && Payload::parse("{").is_err());
        assert_eq!(format!("{:?}", Payload::parse(text).unwrap()), "Payload(21 bytes)");
    }

    #[test]
    fn depth_is_told_apart_from_brackets_in_texts() {
        for (json, levels) in
            [("1", 0), (r#""[[{""#, 0), ("[]", 1), (r#"[{"a]":"\\\"[[["},[]]"#, 2), (r#"{"a":[[],[[1]]],"b":{}}"#, 4)]
        {
            assert_eq!(depth(json), levels, "{json}");
        }
    }

    #[test]
    fn the_hash_never_changes_and_spreads_keys_evenly() {
        // Reference values of FNV-1a: "" is the offset basis, "a" is af63dc4c8601ec8c.
        assert_eq!(key_hash(""), ((0xcbf2_9ce4_u32 ^ 0x8422_2325) & 0x7fff_ffff) as i32);
        assert_eq!(key_hash("a"), ((0xaf63_dc4c_u32 ^ 0x8601_ec8c) & 0x7fff_ffff) as i32);
        for shards in [8, 16, 32, 100] {
            let mut counts = vec![0u32; shards as usize];
            (0..100_000).for_each(|n| counts[shard(key_hash(&n.to_string()), shards) as usize] += 1);
            let mean = 100_000.0 / f64::from(shards);
            assert!(
                counts.iter().all(|count| (0.8..1.2).contains(&(f64::from(*count) / mean))),
                "{shards}: {counts:?}"
            );
        }
    }
}
