use std::fmt;

use amiquip::{
    AmqpValue,
    AmqpValue::{LongInt, LongLongInt, LongString},
    ExchangeDeclareOptions, ExchangeType, FieldTable, QueueDeclareOptions, QueueDeleteOptions,
};
use domain::topology::{Binding, DELIVERY_LIMIT, Exchange, ExchangeKind, Expiry, Queue, Retention, Topology, exchange};

use std::sync::Arc;

use crate::{Delivery, Error, Session, session::Channel};

// AMQP's reply codes.
const NOT_FOUND: u16 = 404;
const RESOURCE_LOCKED: u16 = 405;
const PRECONDITION_FAILED: u16 = 406;

/// How full a queue is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueDepth {
    /// Its name.
    pub name: String,
    /// Messages that are ready to be delivered.
    pub messages: u32,
    /// Consumers on it.
    pub consumers: u32,
}

/// Declares streams, exchanges, other queues and bindings, each kind in the order in which it's given. What is there already
/// stays as it is: a stream with another retention is no conflict.
///
/// # Errors
/// [`Error::MissingPlugin`], [`Error::Conflict`], [`Error::Refused`], or one that [is lost](Error::is_lost).
pub fn declare(session: &mut Session, topology: &Topology) -> Result<(), Error> {
    let (streams, queues): (Vec<_>, Vec<_>) =
        topology.queues.iter().partition(|queue| matches!(queue.expiry, Expiry::Retain(_)));
    for stream in streams {
        // Each on a channel of its own, which a refusal closes.
        match session.on_channel(|channel| declare_queue(channel, stream)) {
            // A queue of another kind has no such argument.
            Err(Error::Conflict { difference, .. }) if !difference.has.is_empty() => {
                log::debug!("stream `{}` keeps the retention that it was declared with: {difference}", stream.name);
            }
            declared => declared?,
        }
    }
    session.on_channel(|channel| {
        topology.exchanges.iter().try_for_each(|exchange| declare_exchange(channel, exchange))?;
        queues.iter().try_for_each(|queue| declare_queue(channel, queue))?;
        topology.bindings.iter().try_for_each(|binding| bind(channel, binding))
    })
}

/// What the broker didn't let be declared.
#[derive(Debug)]
pub struct Refused {
    /// The exchange's name, or the queue's.
    pub name: String,
    /// Whether it's a queue.
    pub is_queue: bool,
    /// Why.
    pub error: Error,
}

/// The same, but what is refused keeps nobody from the rest. Nothing is bound to or from what is refused.
///
/// # Errors
/// One that [is lost](Error::is_lost).
pub fn declare_each(session: &mut Session, topology: &Topology) -> Result<Vec<Refused>, Error> {
    match declare(session, topology) {
        Err(error) if !error.is_lost() => {}
        declared => return declared.map(|()| Vec::new()),
    }
    let mut all = Vec::new();
    // Each on a channel of its own, which a refusal closes.
    for exchange in &topology.exchanges {
        let declared = session.on_channel(|channel| declare_exchange(channel, exchange));
        note(&mut all, &exchange.name, false, declared)?;
    }
    for queue in &topology.queues {
        let topology = Topology { queues: vec![queue.clone()], ..Topology::default() };
        note(&mut all, &queue.name, true, declare(session, &topology))?;
    }
    for binding in &topology.bindings {
        let is_end =
            |refused: &Refused| refused.name == if refused.is_queue { &*binding.queue } else { &*binding.exchange };
        if !all.iter().any(is_end) {
            let bound = session.on_channel(|channel| bind(channel, binding));
            note(&mut all, &binding.queue, true, bound)?;
        }
    }
    Ok(all)
}

fn note(refused: &mut Vec<Refused>, name: &str, is_queue: bool, declared: Result<(), Error>) -> Result<(), Error> {
    match declared {
        Err(error) if !error.is_lost() => refused.push(Refused { name: name.into(), is_queue, error }),
        declared => declared?,
    }
    Ok(())
}

fn declare_exchange(channel: &Channel, exchange: &Exchange) -> Result<(), Error> {
    let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel
        .call("declaring an exchange", |raw| {
            raw.exchange_declare(exchange_type(exchange.kind), &exchange.name, options).map(drop)
        })
        .map_err(|error| explain_exchange(error, exchange))
}

fn bind(channel: &Channel, binding: &Binding) -> Result<(), Error> {
    channel.call("binding a queue", |raw| {
        raw.queue_bind(&binding.queue, &binding.exchange, &binding.routing_key, FieldTable::new())
    })
}

fn declare_queue(channel: &Channel, queue: &Queue) -> Result<(), Error> {
    let options = QueueDeclareOptions { durable: true, arguments: arguments(queue), ..Default::default() };
    channel
        .call("declaring a queue", |raw| raw.queue_declare(&queue.name, options).map(drop))
        .map_err(|error| explain_conflict(error, "queue", &queue.name))
}

/// How full the queues are, in the same order.
///
/// # Errors
/// [`Error::MissingQueue`] for the first one that isn't there, or one that [is lost](Error::is_lost).
pub fn depths(session: &mut Session, names: &[String]) -> Result<Vec<QueueDepth>, Error> {
    session.on_channel(|channel| {
        let depth = |name: &String| {
            let (messages, consumers) = channel
                .call("asking for a queue's depth", |raw| {
                    let queue = raw.queue_declare_passive(name)?;
                    Ok((queue.declared_message_count(), queue.declared_consumer_count()))
                })
                .map_err(|error| explain_missing(error, name))?;
            Ok(QueueDepth {
                name: name.clone(),
                messages: messages.unwrap_or_default(),
                consumers: consumers.unwrap_or_default(),
            })
        };
        names.iter().map(depth).collect()
    })
}

/// How full those of the queues are that there are, in the same order.
///
/// # Errors
/// One that [is lost](Error::is_lost).
pub fn existing(session: &mut Session, names: &[String]) -> Result<Vec<QueueDepth>, Error> {
    let mut there = Vec::new();
    for name in names {
        // Each on a channel of its own, which ends where the queue is missing.
        match depths(session, std::slice::from_ref(name)) {
            Ok(depth) => there.extend(depth),
            Err(Error::MissingQueue { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(there)
}

/// Asks a queue for a message, and gives it back at once, which counts as a delivery. That there's one or none is an answer; a
/// quorum queue without a leader gives none, whatever a declaration says of it.
///
/// # Errors
/// [`Error::MissingQueue`], [`Error::Refused`], or one that [is lost](Error::is_lost): most of all [`Error::TimedOut`].
pub fn ask(session: &mut Session, queue: &str) -> Result<(), Error> {
    session.on_channel(|channel| {
        let got = channel.call("asking a queue for a message", |raw| raw.basic_get(queue, false));
        match got.map_err(|error| explain_missing(error, queue))? {
            Some(got) => channel.call("giving a message back", |raw| got.delivery.nack(raw, true)),
            None => Ok(()),
        }
    })
}

/// Takes everything out of a queue: up to `batch` messages at a time, which are gone once `keep` has them safely elsewhere.
/// Returns how many that was. That nothing is left says the queue itself, which is asked for one more message: a count would be
/// 0 as well where a quorum queue is too busy to answer. A queue that isn't there has none.
///
/// Messages that another consumer has in hand are no longer in the queue, and come back if it's lost with them.
///
/// # Errors
/// Those of `keep`, [`Error::Refused`], or one that [is lost](Error::is_lost): then the messages in hand go back.
pub fn drain(
    session: &mut Session,
    queue: &str,
    batch: usize,
    mut keep: impl FnMut(Vec<Delivery>) -> Result<(), Error>,
) -> Result<u64, Error> {
    let (name, mut taken) = (Arc::from(queue), 0);
    let drained = session.on_channel(|channel| {
        loop {
            let (mut deliveries, mut last) = (Vec::new(), None);
            while deliveries.len() < batch {
                let got = channel.call("taking a message out of a queue", |raw| raw.basic_get(queue, false));
                let Some(mut got) = got.map_err(|error| explain_missing(error, queue))? else { break };
                deliveries.push(Delivery::take(&mut got.delivery, &name, 0));
                last = Some(got.delivery);
            }
            let Some(last) = last else { return Ok(()) };
            taken += deliveries.len() as u64;
            keep(deliveries)?;
            channel.call("acknowledging", |raw| last.ack_multiple(raw))?;
        }
    });
    match drained {
        Err(Error::MissingQueue { .. }) => Ok(taken),
        drained => drained.map(|()| taken),
    }
}

/// Takes bindings away. One that isn't there, or whose queue isn't, is no error.
///
/// # Errors
/// [`Error::Refused`], or one that [is lost](Error::is_lost).
pub fn unbind(session: &mut Session, bindings: &[Binding]) -> Result<(), Error> {
    session.on_channel(|channel| {
        bindings.iter().try_for_each(|binding| {
            channel.call("unbinding a queue", |raw| {
                raw.queue_unbind(&binding.queue, &binding.exchange, &binding.routing_key, FieldTable::new())
            })
        })
    })
}

/// Deletes queues with whatever is in them, and returns how many messages that was. One that isn't there is no error.
///
/// Nothing may publish to them any more: what the broker has just confirmed would be gone, and a quorum queue can't be
/// deleted on the condition that it's empty. See [`drain`].
///
/// # Errors
/// [`Error::Refused`], or one that [is lost](Error::is_lost).
pub fn delete_queues(session: &mut Session, names: &[String]) -> Result<u64, Error> {
    session.on_channel(|channel| {
        let delete = |name| {
            channel.call("deleting a queue", |raw| raw.queue_delete(name, QueueDeleteOptions::default())).map(u64::from)
        };
        names.iter().map(delete).sum()
    })
}

/// Deletes exchanges, with their bindings. One that isn't there is no error.
///
/// # Errors
/// [`Error::Refused`], or one that [is lost](Error::is_lost).
pub fn delete_exchanges(session: &mut Session, names: &[String]) -> Result<(), Error> {
    session.on_channel(|channel| {
        names.iter().try_for_each(|name| channel.call("deleting an exchange", |raw| raw.exchange_delete(name, false)))
    })
}

fn exchange_type(kind: ExchangeKind) -> ExchangeType {
    match kind {
        ExchangeKind::Direct => ExchangeType::Direct,
        ExchangeKind::Fanout => ExchangeType::Fanout,
        ExchangeKind::Topic => ExchangeType::Topic,
        ExchangeKind::ConsistentHash => ExchangeType::Custom(kind.as_str().into()),
    }
}

/// A queue's arguments.
fn arguments(queue: &Queue) -> FieldTable {
    let text = |text: &str| LongString(text.into());
    let mut arguments = FieldTable::new();
    let mut set = |key: &str, value: AmqpValue| arguments.insert(key.into(), value);
    if let Expiry::Retain(Retention { max_bytes, max_age_s, segment_bytes }) = queue.expiry {
        let number = |number: u64| LongLongInt(number.try_into().unwrap_or(i64::MAX));
        set("x-queue-type", text("stream"));
        set("x-max-length-bytes", number(max_bytes));
        set("x-max-age", text(&format!("{max_age_s}s")));
        set("x-stream-max-segment-size-bytes", number(segment_bytes));
        return arguments;
    }
    set("x-queue-type", text("quorum"));
    // A full queue refuses, instead of dropping its oldest message.
    set("x-overflow", text("reject-publish"));
    let delivery_limit = match queue.expiry {
        Expiry::DeadLetter => DELIVERY_LIMIT,
        // Without a dead-letter exchange the message would be gone.
        Expiry::ReturnAfter(_) | Expiry::Never | Expiry::Retain(_) => i32::MAX,
        Expiry::LoseAfter(deliveries) => deliveries,
    };
    set("x-delivery-limit", LongInt(delivery_limit));
    // Keeps the message until the queue that it goes to has confirmed it.
    let at_least_once = text("at-least-once");
    match &queue.expiry {
        Expiry::DeadLetter => {
            set("x-dead-letter-exchange", text(exchange::DEAD_LETTER));
            set("x-dead-letter-routing-key", text(&queue.name));
            set("x-dead-letter-strategy", at_least_once);
        }
        Expiry::ReturnAfter(delay) => {
            set("x-message-ttl", LongLongInt(delay.as_millis().try_into().unwrap_or(i64::MAX)));
            set("x-dead-letter-exchange", text(exchange::RETURN));
            // The routing key is kept.
            set("x-dead-letter-strategy", at_least_once);
        }
        Expiry::Never | Expiry::LoseAfter(_) | Expiry::Retain(_) => {}
    }
    arguments
}

fn explain_exchange(error: Error, exchange: &Exchange) -> Error {
    match &error {
        Error::Closed { text, .. } | Error::Refused { text, .. } if text.contains("exchange type") => {
            Error::MissingPlugin { exchange: exchange.name.clone() }
        }
        _ => explain_conflict(error, "exchange", &exchange.name),
    }
}

fn explain_conflict(error: Error, kind: &str, name: &str) -> Error {
    match error {
        Error::Refused { code: PRECONDITION_FAILED, text, .. } => Error::Conflict {
            what: format!("{kind} `{name}`"),
            name: name.into(),
            difference: Difference::parse(&text).into(),
        },
        // Its connection is the only one that may use it, or its declaration.
        Error::Refused { code: RESOURCE_LOCKED, .. } => Error::Conflict {
            what: format!("{kind} `{name}`"),
            name: name.into(),
            difference: Difference::new("exclusive", "true", "false").into(),
        },
        other => other,
    }
}

/// Tells a queue that isn't there from one that can't be reached for the moment, which has the same code.
pub(crate) fn explain_missing(error: Error, queue: &str) -> Error {
    match &error {
        Error::Refused { code: NOT_FOUND, text, .. } if text.contains("no queue") => {
            Error::MissingQueue { queue: queue.into() }
        }
        Error::Refused { code: NOT_FOUND, doing, text } => Error::lost(doing, text.clone()),
        _ => error,
    }
}

/// In what something differs from what is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// The argument.
    pub argument: String,
    /// What it is; empty if it isn't set.
    pub has: String,
    /// What it should be; empty if it shouldn't be set.
    pub wanted: String,
}

impl Difference {
    fn new(argument: &str, has: &str, wanted: &str) -> Self {
        Self { argument: argument.into(), has: has.into(), wanted: wanted.into() }
    }

    /// Understands `inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received the value 'quorum' of type 'longstr' but
    /// current is none`. What it doesn't understand, it keeps as what there is.
    fn parse(text: &str) -> Self {
        let argument = text.split_once("arg '").and_then(|(_, rest)| rest.split_once('\''));
        let values = text.split_once("received ").and_then(|(_, rest)| rest.split_once(" but current is "));
        match (argument, values) {
            (Some((argument, _)), Some((wanted, has))) => Self::new(argument, value(has), value(wanted)),
            _ => Self::new("something", text, ""),
        }
    }
}

/// `'topic'`, `the value 'quorum' of type 'longstr'`, or `none`.
fn value(told: &str) -> &str {
    told.split('\'').nth(1).unwrap_or_default()
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A queue without a type is a classic one.
        let named = |value: &str| match (value, &*self.argument) {
            ("", "x-queue-type") => "classic".to_owned(),
            ("", _) => "not set".to_owned(),
            (value, _) => value.to_owned(),
        };
        write!(f, "its {} is {}, expected {}", self.argument, named(&self.has), named(&self.wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_tells_what_there_is_and_what_is_wanted() {
        for (text, told) in [
            (
                "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received the value 'quorum' \
                 of type 'longstr' but current is none",
                "its x-queue-type is classic, expected quorum",
            ),
            (
                "PRECONDITION_FAILED - inequivalent arg 'x-message-ttl' for queue 'q' in vhost '/': received none but current \
                 is the value '1000' of type 'long'",
                "its x-message-ttl is 1000, expected not set",
            ),
            (
                "PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'e' in vhost '/': received 'direct' but current is \
                 'topic'",
                "its type is topic, expected direct",
            ),
            (
                "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q' in vhost '/': received 'true' but current is \
                 'false'",
                "its durable is false, expected true",
            ),
            ("something else", "its something is something else, expected not set"),
        ] {
            assert_eq!(Difference::parse(text).to_string(), told);
        }
    }
}
