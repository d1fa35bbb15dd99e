//! What is produced: for each user a run of changes, each with the total that it leads to.

use crate::balances::Change;
use chrono::{DateTime, TimeDelta, Utc};
use domain::Envelope;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, ops::Range};

/// A message, as it's in the queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Message {
    pub(crate) user_id: i64,
    pub(crate) value_change: i64,
    /// The total of what was produced for the user, this included.
    pub(crate) expected_value: i64,
    /// A second after that of the message produced before.
    pub(crate) processed_at: DateTime<Utc>,
    pub(crate) version: i32,
}

impl From<&Message> for Change {
    fn from(message: &Message) -> Self {
        let Message { user_id, value_change, expected_value, processed_at, version } = *message;
        Self { user_id, value_change, expected_value, processed_at, version }
    }
}

/// What a consumer does at a message instead of handling it well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Fails, which ends it.
    Fail,
    /// Never ends.
    Hang,
    /// Ends between the effect and its acknowledgement, the first time that it has the message.
    AfterEffect,
}

impl Fault {
    /// The message's header that asks for it.
    pub(crate) const HEADER: &str = "x-lab-fault";

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::Hang => "hang",
            Self::AfterEffect => "after-effect",
        }
    }

    /// What a message's headers ask for.
    pub(crate) fn asked_for(headers: &BTreeMap<String, String>) -> Option<Self> {
        let text = headers.get(Self::HEADER)?;
        [Self::Fail, Self::Hang, Self::AfterEffect].into_iter().find(|fault| fault.as_str() == text)
    }
}

/// The messages of some users, user by user; the same for the same seed.
pub(crate) fn messages(seed: u64, users: Range<i64>, each: u32, version: i32) -> Vec<Message> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut processed_at = DateTime::UNIX_EPOCH + TimeDelta::days(365 * 50);
    let mut messages = Vec::new();
    for user_id in users {
        let mut expected_value = 0;
        for _ in 0..each {
            let value_change = random.random_range(-100..=100);
            expected_value += value_change;
            processed_at += TimeDelta::seconds(1);
            messages.push(Message { user_id, value_change, expected_value, processed_at, version });
        }
    }
    messages
}

/// The first half of each user's messages, and the second one, of the next version: what is produced before something
/// changes, and after it.
pub(crate) fn halves(messages: Vec<Message>, each: u32) -> (Vec<Message>, Vec<Message>) {
    let each = each as usize;
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for (index, mut message) in messages.into_iter().enumerate() {
        if index % each < each.div_ceil(2) {
            first.push(message);
        } else {
            message.version += 1;
            second.push(message);
        }
    }
    (first, second)
}

/// The message on its way to an exchange, under its user as the routing key.
pub(crate) fn envelope(exchange: &str, message: &Message, fault: Option<Fault>) -> Envelope {
    let body = serde_json::to_vec(message).expect("numbers and times can be written as JSON");
    let mut envelope = Envelope::new(exchange, message.user_id.to_string(), body);
    if let Some(fault) = fault {
        envelope.headers.insert(Fault::HEADER.into(), fault.as_str().into());
    }
    envelope
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_written_as_the_producers_agreed() {
        let message = &messages(7, 3..4, 1, 2)[0];
        let text = serde_json::to_string(message).unwrap();
        let expected = format!(
            r#"{{"userId":3,"valueChange":{0},"expectedValue":{0},"processedAt":"2019-12-20T00:00:01Z","version":2}}"#,
            message.value_change
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn each_users_messages_add_up_and_their_times_go_on() {
        let all = messages(1, 5..25, 10, 1);
        assert_eq!(all.len(), 200);
        assert!(all.is_sorted_by_key(|message| (message.user_id, message.processed_at)), "user by user");
        for user in all.chunk_by(|a, b| a.user_id == b.user_id) {
            let mut total = 0;
            for message in user {
                assert!((-100..=100).contains(&message.value_change));
                total += message.value_change;
                assert_eq!(message.expected_value, total);
            }
        }
        assert_eq!(all, messages(1, 5..25, 10, 1));
        assert_ne!(all, messages(2, 5..25, 10, 1));
    }

    #[test]
    fn the_halves_go_on_from_each_other() {
        let all = messages(1, 0..3, 5, 1);
        let (first, second) = halves(all.clone(), 5);
        assert_eq!((first.len(), second.len()), (9, 6));
        assert!(first.iter().all(|message| message.version == 1) && second.iter().all(|message| message.version == 2));
        let mut together: Vec<_> = first.into_iter().chain(second).collect();
        together.sort_by_key(|message| message.processed_at);
        let values = |messages: &[Message]| messages.iter().map(|message| message.expected_value).collect::<Vec<_>>();
        assert_eq!(values(&together), values(&all));
    }
}
