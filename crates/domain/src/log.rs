//! The message log: partitions, the messages on them, and how one that has come before is told.
//!
//! Whoever publishes a partition's messages gives each the next [`seq`](MessageId::seq), publishes them in that order, and
//! after a failure begins again with the first one that isn't known to have arrived. So a stream may hold a message
//! twice, or one whose forerunner is still to come: [`Watermark`] tells both.

pub mod proof;

use crate::{
    Envelope,
    envelope::{identifies, is_blank},
    values::Invalid,
    wire_time,
};
use chrono::{DateTime, Utc};
use proof::Epoch;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// The exchange of the log, and the AMQP `type` of its messages.
pub const MESSAGE: &str = "message";

/// The most partitions.
pub const PARTITIONS_MAX: i32 = 100;

/// The longest text, in bytes.
pub const TEXT_MAX: usize = 65536;

/// The longest key, in bytes.
pub const KEY_MAX: usize = 255;

/// The longest name of a consumer group, in characters.
pub const GROUP_MAX: usize = 64;

/// A partition's routing key: `p00` …
pub fn partition_routing_key(partition: i32) -> String {
    format!("p{partition:02}")
}

/// The stream that holds a partition: `message.p00` …
pub fn partition_queue(partition: i32) -> String {
    format!("{MESSAGE}.{}", partition_routing_key(partition))
}

/// A consumer group's name: 1 to 64 of the characters `A–Z a–z 0–9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Group(String);

impl Group {
    /// The name.
    ///
    /// # Errors
    /// When it's too long, or holds other characters.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        match text.len() {
            0 => Err(Invalid("must not be empty".into())),
            1..=GROUP_MAX if text.bytes().all(valid) => Ok(Self(text.into())),
            1..=GROUP_MAX => Err(Invalid("may hold letters, digits and . _ - only".into())),
            _ => Err(Invalid(format!("must be at most {GROUP_MAX} characters long"))),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name by which the group's members share what there is to share.
    pub fn service(&self) -> String {
        format!("message-recorder/{self}")
    }

    /// The name by which the group's reading of a partition is leased: `message/recorder/p00` …
    pub fn resource(&self, partition: i32) -> String {
        format!("{MESSAGE}/{self}/{}", partition_routing_key(partition))
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Group {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        Self::parse(text)
    }
}

impl TryFrom<String> for Group {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        Self::parse(&text)
    }
}

/// Whether a text may be a message's: 1 to [`TEXT_MAX`] bytes, of any characters but NUL.
///
/// # Errors
/// When it may not.
pub fn check_text(text: &str) -> Result<(), Invalid> {
    bounded(text, TEXT_MAX)
}

/// Whether a text may be a message's key: 1 to [`KEY_MAX`] bytes, of any characters but NUL.
///
/// # Errors
/// When it may not.
pub fn check_key(key: &str) -> Result<(), Invalid> {
    bounded(key, KEY_MAX)
}

/// The id by which a message can be told from others: the one that it has, unless that identifies nothing. The same on both
/// sides of every comparison.
pub fn telling_id(id: Option<&str>) -> Option<&str> {
    id.filter(|id| identifies(id))
}

fn bounded(text: &str, max: usize) -> Result<(), Invalid> {
    if text.is_empty() {
        return Err(Invalid("must not be empty".into()));
    }
    if text.len() > max {
        return Err(Invalid(format!("must be at most {max} bytes long")));
    }
    // Postgres text holds any character but NUL.
    if text.contains('\0') {
        return Err(Invalid("must not contain the NUL character".into()));
    }
    Ok(())
}

/// A message as it travels.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogMessage {
    /// What it says.
    pub text: String,
    /// What it's about: messages of one key are in one partition, in the order in which they were accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// When the gateway accepted it; absent from other programs' messages.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "wire_time::deserialize_optional")]
    pub accepted_at: Option<DateTime<Utc>>,
    /// The sequence with which the run began that it was published in: see [`Watermark`]. In the body, because headers are
    /// what costs the broker most when a stream is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<i64>,
}

impl LogMessage {
    /// The message that an AMQP `type` and a body make, whoever published it.
    ///
    /// # Errors
    /// When they make none: why, in words that quote nothing of it.
    pub fn decode(kind: Option<&str>, body: &[u8]) -> Result<Self, Invalid> {
        if kind.is_some_and(|kind| kind != MESSAGE && !is_blank(kind)) {
            return Err(Invalid(format!("its type isn't `{MESSAGE}`")));
        }
        let message: Self = serde_json::from_slice(body).map_err(|error| {
            let what = if error.is_data() { "its body isn't {text, key?}" } else { "its body is no JSON" };
            Invalid(format!("{what}: line {}, column {}", error.line(), error.column()))
        })?;
        let field = |name: &str, invalid: Invalid| Invalid(format!("{name} {}", invalid.0));
        check_text(&message.text).map_err(|invalid| field("text", invalid))?;
        message.key.as_deref().map_or(Ok(()), check_key).map_err(|invalid| field("key", invalid))?;
        Ok(message)
    }

    /// The message, ready to be published in a run that began with the sequence `run`, with a proof of whose it is: `epoch`'s.
    pub fn envelope(mut self, id: &MessageId<'_>, run: i64, epoch: &Epoch) -> Envelope {
        self.run = Some(run);
        let mut body = serde_json::to_vec(&self).expect("a wire message is plain data, which always has a JSON form");
        let message_id = id.to_string();
        epoch.prove(&message_id, &mut body);
        let mut envelope = Envelope::new(MESSAGE, partition_routing_key(id.partition), body);
        envelope.kind = Some(MESSAGE.into());
        envelope.message_id = message_id;
        envelope.created_at = self.accepted_at.unwrap_or(envelope.created_at);
        envelope
    }
}

// It holds what users wrote, which stays out of logs.
impl fmt::Debug for LogMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LogMessage({} bytes)", self.text.len())
    }
}

/// What identifies a message that came in over HTTP: `<log>/<partition>/<seq>`. Other programs' have other ids, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageId<'a> {
    /// The log: messages of another fleet that were copied here aren't this one's.
    pub log: &'a str,
    /// The partition that it was published to.
    pub partition: i32,
    /// Its place among the partition's, from 1.
    pub seq: i64,
}

impl<'a> MessageId<'a> {
    /// The id that an AMQP message id stands for, if it's one.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (log, rest) = text.split_once('/')?;
        let (partition, seq) = rest.split_once('/')?;
        // One way of writing it, no other.
        let is_plain = |number: &str, zeros: usize| {
            number.bytes().all(|byte| byte.is_ascii_digit()) && (number.len() == zeros || !number.starts_with('0'))
        };
        let is_written_so = partition.len() >= 2 && is_plain(partition, 2) && is_plain(seq, 0);
        is_written_so.then(|| Some(Self { log, partition: partition.parse().ok()?, seq: seq.parse().ok()? }))?
    }
}

impl fmt::Display for MessageId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:02}/{}", self.log, self.partition, self.seq)
    }
}

/// How far a reader of a partition has come, in sequences.
///
/// The publisher's promise: in a run that begins with sequence `run`, every sequence up to the message's own was sent
/// before it, in order and on the same channel; everything below `run` had been confirmed when the run began; and a run
/// whose confirms aren't complete is followed by another one from the first that lacks its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watermark {
    newest: i64,
    /// Whether the newest was read just before: else there may be any others in between.
    follows: bool,
}

/// What a message is to a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The next one, to be taken.
    Next {
        /// How many before it will never come: the broker confirmed them and has lost them since.
        missing: i64,
    },
    /// It has been here.
    Again,
    /// One that belongs before it failed, and comes later, followed by this one once more.
    Early,
}

impl Watermark {
    /// Of a reader that goes on after the message with the sequence `newest`; 0 if there was none.
    pub fn after(newest: i64) -> Self {
        Self { newest, follows: true }
    }

    /// Of a reader that begins somewhere, and has read up to the sequence `newest` elsewhere; 0 if it hasn't.
    pub fn beginning(newest: i64) -> Self {
        Self { newest, follows: false }
    }

    /// The newest sequence taken.
    pub fn newest(self) -> i64 {
        self.newest
    }

    /// Whether it has begun.
    pub fn follows(self) -> bool {
        self.follows
    }

    /// Says what the next message of the stream is, and moves on if it's to be taken.
    pub fn meet(&mut self, seq: i64, run: i64) -> Arrival {
        let expected = if self.follows { self.newest + 1 } else { seq };
        let arrival = match seq {
            _ if seq <= self.newest => Arrival::Again,
            // Whatever is missing before a run was confirmed.
            _ if seq == expected.max(run) => Arrival::Next { missing: seq - expected },
            _ => Arrival::Early,
        };
        if matches!(arrival, Arrival::Next { .. }) {
            *self = Self::after(seq);
        }
        arrival
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Arrival::{Again, Early, Next};

    const NEXT: Arrival = Next { missing: 0 };

    /// What a reader makes of runs, each given by its first sequence and what of it arrived.
    fn met(mut watermark: Watermark, runs: &[(i64, &[i64])]) -> Vec<Arrival> {
        runs.iter()
            .flat_map(|(run, seqs)| seqs.iter().map(|seq| (*seq, *run)))
            .map(|(s, r)| watermark.meet(s, r))
            .collect()
    }

    #[test]
    fn a_run_that_is_sent_again_is_taken_once() {
        assert_eq!(
            met(Watermark::after(0), &[(1, &[1, 2, 3]), (2, &[2, 3, 4])]),
            [NEXT, NEXT, NEXT, Again, Again, NEXT]
        );
    }

    #[test]
    fn what_follows_one_that_failed_waits_for_it() {
        let arrivals = met(Watermark::after(0), &[(1, &[1, 2, 4, 5]), (3, &[3, 4, 5])]);
        assert_eq!(arrivals, [NEXT, NEXT, Early, Early, NEXT, NEXT, NEXT]);
    }

    #[test]
    fn a_frozen_publishers_rest_amid_its_successors_changes_nothing() {
        let mut watermark = Watermark::after(3);
        // The old run sent 5 and 6 while 4 was still on its way; the new run brings all of them.
        let arrivals = [(5, 1), (4, 4), (6, 1), (5, 4), (4, 1), (6, 4)].map(|(seq, run)| watermark.meet(seq, run));
        assert_eq!(arrivals, [Early, NEXT, Early, NEXT, Again, NEXT]);
    }

    #[test]
    fn what_the_broker_confirmed_and_lost_is_counted_and_not_waited_for() {
        assert_eq!(met(Watermark::after(10), &[(14, &[14, 15])]), [Next { missing: 3 }, NEXT]);
        // The run's own first one failed as well: that will come again, and then the loss is told.
        assert_eq!(met(Watermark::after(10), &[(14, &[15]), (14, &[14, 15])]), [Early, Next { missing: 3 }, NEXT]);
    }

    #[test]
    fn whoever_begins_takes_the_first_that_comes() {
        let runs: [(i64, &[i64]); 2] = [(1, &[700, 701]), (700, &[700, 701, 702])];
        assert_eq!(met(Watermark::beginning(0), &runs), [NEXT, NEXT, Again, Again, NEXT]);
        // What was read before isn't read again.
        assert_eq!(met(Watermark::beginning(700), &runs), [Again, NEXT, Again, Again, NEXT]);
    }

    #[test]
    fn what_is_no_message_is_told_without_being_quoted() {
        let decode = |kind, body: &str| LogMessage::decode(kind, body.as_bytes()).map_err(|invalid| invalid.0);
        assert_eq!(decode(None, r#"{"text":"a","other":1}"#).unwrap().text, "a");
        assert_eq!(decode(Some(""), r#"{"text":"a"}"#).unwrap().text, "a");
        assert_eq!(decode(Some(MESSAGE), r#"{"text":"a","key":"k"}"#).unwrap().key.as_deref(), Some("k"));
        let long = format!(r#"{{"text":"{}"}}"#, "x".repeat(TEXT_MAX + 1));
        for (kind, body, why) in [
            (Some("secret"), "{}", "type"),
            (None, "secret", "no JSON"),
            (None, r#"{"text":["secret"]}"#, "isn't {text, key?}"),
            (None, r#"{"text":"secret","key":""}"#, "key must not be empty"),
            (None, "{\"text\":\"secret\\u0000\"}", "text must not contain the NUL"),
            (None, &long, "text must be at most"),
        ] {
            let error = decode(kind, body).unwrap_err();
            assert!(error.contains(why) && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn ids_have_one_way_of_writing() {
        let id = MessageId { log: "ab12", partition: 3, seq: 17 };
        assert_eq!((id.to_string().as_str(), MessageId::parse("ab12/03/17")), ("ab12/03/17", Some(id)));
        for other in
            ["", "ab12", "ab12/3/17", "ab12/03/017", "ab12/03/0", "ab12/03/-1", "ab12/03/17/", "a/b/c", "x/03/1 "]
        {
            assert_eq!(MessageId::parse(other), None, "{other}");
        }
    }

    #[test]
    fn groups_have_plain_names() {
        assert!(Group::parse("a.B_1-c").is_ok() && Group::parse(&"x".repeat(64)).is_ok());
        for bad in ["", "a b", "a/b", "é", &"x".repeat(65)] {
            assert!(Group::parse(bad).is_err(), "{bad}");
        }
    }
}
