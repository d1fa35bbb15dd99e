//! What to do about a failure: a pure function, and the messages that follow from what it decides.

use crate::{Death, Received, decode::shorten, header};
use chrono::{DateTime, Utc};
use domain::{
    Envelope, Failure,
    envelope::header::{ATTEMPTS, ERROR, FAILED_AT},
    topology::{exchange, queue, retry_name},
};
use std::time::Duration;
use uuid::Uuid;

/// The longest reason in a header, in bytes.
const ERROR_MAX: usize = 500;

/// What of a body is kept when the whole can't be published.
const BODY_KEPT: usize = 65536;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Course {
    /// Wait, then the same again: no attempt was made.
    Wait,
    /// Handle each half by itself, to find the message that it's because of.
    Divide,
    /// Send it on to come back after this delay.
    Retry(Duration),
    /// Set it aside for an operator.
    DeadLetter,
}

/// What to do about a failure of this many messages from `queue`. For a single one, `failed` attempts have failed,
/// this one included, if it [counts](counts). What can't be recorded as a dead letter must not become one again, so that queue's messages
/// are retried for ever.
pub(crate) fn course(failure: &Failure, messages: usize, queue: &str, failed: u32, delays: &[Duration]) -> Course {
    let delay = match failure {
        Failure::Unavailable(_) => return Course::Wait,
        _ if messages > 1 => return Course::Divide,
        // It makes room for those behind it meanwhile.
        Failure::Busy(_) => delays.first(),
        _ if queue == queue::DEAD_LETTER => delays.last(),
        Failure::Transient(_) => usize::try_from(failed.saturating_sub(1)).ok().and_then(|index| delays.get(index)),
        Failure::Permanent(_) => None,
    };
    delay.map_or(Course::DeadLetter, |delay| Course::Retry(*delay))
}

/// Whether this failure is an attempt of the message's. Waiting for what somebody else holds isn't. A statement that took too
/// long is: whether the server is slow or the message asks too much can't be told, and the latter must come to an end.
pub(crate) fn counts(failure: &Failure) -> bool {
    !matches!(failure, Failure::Unavailable(_) | Failure::Busy(_))
}

/// Whether a message that has had this many attempts gets no further one.
pub(crate) fn is_last(attempts: u32, delays: &[Duration]) -> bool {
    usize::try_from(attempts).is_ok_and(|attempts| attempts > delays.len())
}

/// The message, to come back to its queue after `delay`.
pub(crate) fn retry(received: &Received, failed: u32, delay: Duration) -> Envelope {
    let mut envelope = onward(received, retry_name(delay));
    if &*received.queue == queue::DEAD_LETTER {
        // Not what became of it here, but what it died of.
        Death::of(received).write(&mut envelope.headers);
    } else {
        envelope.headers.insert(ATTEMPTS.into(), failed.to_string());
    }
    envelope
}

/// The message that has waited, to the queue that it failed in.
pub(crate) fn back(received: &Received) -> Envelope {
    // Another program may have said that it's to come here, where it would go round for ever.
    let exchange = if &*received.queue == queue::RETURN { exchange::DEAD_LETTER } else { "" };
    let mut envelope = onward(received, exchange.into());
    let known = [ATTEMPTS, ERROR, FAILED_AT, header::DIED_IN].map(|name| received.headers.get_key_value(name));
    envelope.headers.extend(known.into_iter().flatten().map(|(name, value)| (name.clone(), value.clone())));
    envelope
}

/// The message that has waited, to wait as long as before.
pub(crate) fn wait_again(received: &Received, delays: &[Duration]) -> Envelope {
    let attempts = usize::try_from(received.attempts()).unwrap_or(usize::MAX);
    let last = delays.len().saturating_sub(1);
    // What comes from there always waits longest.
    let at = if &*received.queue == queue::DEAD_LETTER { last } else { attempts.saturating_sub(1).min(last) };
    Envelope { exchange: retry_name(delays.get(at).copied().unwrap_or_default()), ..back(received) }
}

/// The message, set aside for this reason.
pub(crate) fn dead_letter(received: &Received, failed: u32, error: &anyhow::Error, now: DateTime<Utc>) -> Envelope {
    let mut envelope = onward(received, exchange::DEAD_LETTER.into());
    let death = Death {
        queue: received.queue.to_string(),
        error: reason(error),
        attempts: failed,
        failed_at: Some(now),
        set_aside: Some(Uuid::new_v4().to_string()),
    };
    death.write(&mut envelope.headers);
    envelope
}

/// What is left to send on of a message that the publisher refuses.
pub(crate) fn cut(mut envelope: Envelope, refusal: &str) -> Envelope {
    let whole = envelope.body.len();
    envelope.body.truncate(BODY_KEPT);
    let error = envelope.headers.entry(ERROR.into()).or_default();
    let note = format!("only {} of its {whole} bytes are kept: {refusal}; ", envelope.body.len());
    error.insert_str(0, &note);
    const KEPT: [&str; 5] = [ATTEMPTS, ERROR, FAILED_AT, header::DIED_IN, header::SET_ASIDE];
    envelope.headers.retain(|name, _| KEPT.contains(&&**name));
    envelope
}

/// The message as it came, but to another exchange. A message without an id gets one here: two that are alike may be
/// meant twice, so it's no digest of them.
fn onward(received: &Received, exchange: String) -> Envelope {
    let mut headers = received.own_headers();
    headers.insert(header::ORIGINAL_EXCHANGE.into(), received.exchange.clone());
    headers.insert(header::ORIGINAL_ROUTING_KEY.into(), received.routing_key.clone());
    Envelope {
        exchange,
        routing_key: received.queue.to_string(),
        kind: received.kind.clone(),
        message_id: received.message_id.clone().unwrap_or_else(|| Uuid::new_v4().to_string()),
        correlation_id: received.correlation_id.clone(),
        headers,
        created_at: received.published_at.unwrap_or_else(Utc::now),
        body: received.body.clone(),
    }
}

/// The whole chain of an error on one bounded line.
pub fn reason(error: &anyhow::Error) -> String {
    let line: String = format!("{error:#}").chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match shorten(&line, ERROR_MAX) {
        whole if whole.len() == line.len() => line,
        cut => format!("{cut}…"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    const DELAYS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];
    const FIRST: Course = Course::Retry(DELAYS[0]);
    const SECOND: Course = Course::Retry(DELAYS[1]);

    #[test]
    fn a_failure_takes_its_course() {
        type Kind = fn(anyhow::Error) -> Failure;
        const T: (&str, Kind) = ("transient", Failure::Transient);
        const P: (&str, Kind) = ("permanent", Failure::Permanent);
        const U: (&str, Kind) = ("unavailable", Failure::Unavailable);
        const B: (&str, Kind) = ("busy", Failure::Busy);
        for ((name, kind), messages, queue, failed, expected) in [
            (T, 1, "update_feed.00", 1, FIRST),
            (T, 1, "update_feed.00", 2, SECOND),
            (T, 1, "update_feed.00", 3, Course::DeadLetter),
            (T, 1, "update_feed.00", u32::MAX, Course::DeadLetter),
            (P, 1, "update_feed.00", 1, Course::DeadLetter),
            (U, 1, "update_feed.00", 1, Course::Wait),
            (U, 1, "update_feed.00", 9, Course::Wait),
            // Which one it's because of isn't known yet.
            (T, 2, "update_feed.00", 1, Course::Divide),
            (P, 500, "update_feed.00", 1, Course::Divide),
            (U, 500, "update_feed.00", 1, Course::Wait),
            // However often: it comes back when it's free.
            (B, 1, "update_feed.00", 0, FIRST),
            (B, 1, "update_feed.00", 9, FIRST),
            (B, 2, "update_feed.00", 0, Course::Divide),
            (B, 1, "dead_letter", 0, FIRST),
            // A dead letter never becomes one again.
            (T, 1, "dead_letter", 1, SECOND),
            (T, 1, "dead_letter", 9, SECOND),
            (P, 1, "dead_letter", 1, SECOND),
            (P, 2, "dead_letter", 1, Course::Divide),
            (U, 1, "dead_letter", 1, Course::Wait),
        ] {
            let course = course(&kind(anyhow!("why")), messages, queue, failed, &DELAYS);
            assert_eq!(course, expected, "{name}, {messages} from {queue}, {failed} failed");
        }
    }

    #[test]
    fn there_is_one_attempt_more_than_there_are_delays() {
        assert_eq!([0, 1, 2, 3, 4].map(|attempts| is_last(attempts, &DELAYS)), [false, false, false, true, true]);
    }

    fn received() -> Received {
        let mut received = Received::new("send_notification.sms", "{}");
        received.exchange = "send_notification".into();
        received.routing_key = "phone".into();
        received.kind = Some("send_notification".into());
        received.message_id = Some("m1".into());
        received.correlation_id = Some("c1".into());
        received.headers = [("x-attempts", "1"), ("x-published-at-ms", "5"), ("own", "kept"), ("x-error", "old")]
            .into_iter()
            .chain([("x-death.queue", "retry.1s"), ("x-first-death-reason", "expired")])
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        received
    }

    /// But for the id of the setting aside, which is always another.
    fn headers(envelope: &Envelope) -> Vec<(&str, &str)> {
        let headers = envelope.headers.iter().filter(|(name, _)| *name != header::SET_ASIDE);
        headers.map(|(name, value)| (&**name, &**value)).collect()
    }

    #[test]
    fn a_retry_keeps_the_message_and_counts_the_attempt() {
        let received = received();
        let envelope = retry(&received, received.attempts() + 1, DELAYS[1]);
        assert_eq!((&*envelope.exchange, &*envelope.routing_key), ("wait.10s", "send_notification.sms"));
        assert_eq!((envelope.kind.as_deref(), &*envelope.message_id), (Some("send_notification"), "m1"));
        assert_eq!((envelope.correlation_id.as_deref(), &*envelope.body), (Some("c1"), &b"{}"[..]));
        assert_eq!(
            headers(&envelope),
            [
                ("own", "kept"),
                ("x-attempts", "2"),
                ("x-original-exchange", "send_notification"),
                ("x-original-routing-key", "phone"),
                ("x-published-at-ms", "5"),
            ]
        );
    }

    #[test]
    fn a_dead_letter_says_why_when_and_where() {
        let received = received();
        let error = anyhow!("the database\nrefused").context("storing");
        let envelope = dead_letter(&received, 3, &error, DateTime::from_timestamp_millis(1_700_000_000_123).unwrap());
        assert_eq!((&*envelope.exchange, &*envelope.routing_key), ("dead_letter", "send_notification.sms"));
        assert_eq!(
            headers(&envelope),
            [
                ("own", "kept"),
                ("x-attempts", "3"),
                ("x-died-in", "send_notification.sms"),
                ("x-error", "storing: the database refused"),
                ("x-failed-at", "2023-11-14T22:13:20.123Z"),
                ("x-original-exchange", "send_notification"),
                ("x-original-routing-key", "phone"),
                ("x-published-at-ms", "5"),
            ]
        );
    }

    #[test]
    fn each_setting_aside_of_a_message_is_another_and_a_retry_of_the_dead_letter_is_the_same() {
        let died = || dead_letter(&received(), 3, &anyhow!("unknown user"), DateTime::UNIX_EPOCH);
        let (one, other) = (died(), died());
        assert_ne!(one.headers[header::SET_ASIDE], other.headers[header::SET_ASIDE]);
        let mut arrived = Received::new("dead_letter", one.body.clone());
        arrived.headers = one.headers.clone();
        let again = retry(&arrived, 1, DELAYS[1]);
        assert_eq!(again.headers[header::SET_ASIDE], one.headers[header::SET_ASIDE]);
        // But a message that was replayed from there is set aside anew, even by the broker.
        assert!(!arrived.own_headers().contains_key(header::SET_ASIDE));
        assert!(cut(one, "too large").headers.contains_key(header::SET_ASIDE));
    }

    #[test]
    fn messages_without_an_id_stay_apart() {
        let mut received = received();
        received.message_id = None;
        assert_ne!(retry(&received, 1, DELAYS[0]).message_id, retry(&received, 1, DELAYS[0]).message_id);
    }

    #[test]
    fn a_dead_letter_that_is_retried_keeps_what_it_died_of() {
        let died = dead_letter(&received(), 3, &anyhow!("unknown user"), DateTime::UNIX_EPOCH);
        let mut arrived = Received::new("dead_letter", died.body);
        arrived.headers = died.headers.clone();
        assert_eq!(retry(&arrived, 1, DELAYS[1]).headers["x-error"], "unknown user");

        let mut arrived = Received::new("dead_letter", "{}");
        arrived.headers =
            [("x-death.reason", "delivery_limit"), ("x-death.queue", "publish_tweet"), ("x-attempts", "2")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into();
        let headers = retry(&arrived, 1, DELAYS[1]).headers;
        assert_eq!((&*headers["x-died-in"], &*headers["x-attempts"]), ("publish_tweet", "2"));
        assert_eq!(headers["x-error"], "the broker gave it up: delivery_limit");
    }

    #[test]
    fn a_reason_fits_a_header() {
        let reason = reason(&anyhow!("é".repeat(400)));
        assert_eq!(reason, format!("{}…", "é".repeat(250)));
    }

    #[test]
    fn what_is_too_large_is_cut_and_says_so() {
        let mut received = received();
        received.body = vec![b'x'; 5_000_000];
        let envelope = dead_letter(&received, 1, &anyhow!("not JSON"), Utc::now());
        let cut = cut(envelope, "the body is too large");
        assert_eq!(cut.body.len(), BODY_KEPT);
        assert_eq!(cut.headers["x-error"], "only 65536 of its 5000000 bytes are kept: the body is too large; not JSON");
        assert_eq!(cut.headers["x-died-in"], "send_notification.sms");
    }
}
