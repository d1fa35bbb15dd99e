//! Moving all messages of a queue elsewhere, without losing any.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use amiquip::{AmqpProperties, AmqpValue, Confirm, Delivery, Publish, QueueDeleteOptions, Return};
use crossbeam_channel::Receiver;
use domain::envelope::header::{ORIGINAL_EXCHANGE, ORIGINAL_ROUTING_KEY};

use crate::{Error, Session, consumer::Source, session::Channel, topology::explain_missing};

const MOVING: &str = "moving messages";

/// How many messages are on their way at a time.
const WINDOW: u16 = 500;

/// How long to look for the next message.
const LOOK: Duration = Duration::from_millis(10);

/// Moves all messages of a queue to an exchange, under their routing keys and with all their properties: each is acknowledged when
/// its copy is confirmed, so that one that this is interrupted with is there twice, and none is lost. Ends when there has been none
/// for as long as `quiet`, and returns how many there were. What other consumers hold isn't moved.
///
/// # Errors
/// [`Error::MissingQueue`]; [`Error::Refused`] if the exchange leads to no queue, or to one that is full; or one that
/// [is lost](Error::is_lost).
pub fn move_messages(session: &mut Session, queue: &str, exchange: &str, quiet: Duration) -> Result<u64, Error> {
    let mut moving = Moving::begin(session, queue, exchange)?;
    moving.until_quiet(quiet)?;
    Ok(moving.end())
}

/// The same, and then deletes the queue and moves what has come to it until it was gone.
///
/// # Errors
/// The same.
pub fn move_and_delete(session: &mut Session, queue: &str, exchange: &str, quiet: Duration) -> Result<u64, Error> {
    let mut moving = Moving::begin(session, queue, exchange)?;
    moving.until_quiet(quiet)?;
    moving.delete(queue)?;
    Ok(moving.end())
}

struct Moving {
    source: Source,
    consuming: Channel,
    publishing: Channel,
    confirms: Receiver<Confirm>,
    returns: Receiver<Return>,
    exchange: String,
    last_tag: u64,
    limit: Duration,
    moved: u64,
}

impl Moving {
    fn begin(session: &mut Session, queue: &str, exchange: &str) -> Result<Self, Error> {
        let publishing = session.channel()?;
        let (confirms, returns) = publishing.call("asking for confirms", |raw| {
            raw.enable_publisher_confirms()?;
            Ok((raw.listen_for_publisher_confirms()?, raw.listen_for_returns()?))
        })?;
        let consuming = session.channel()?;
        consuming.call("limiting what the broker sends ahead", |raw| raw.qos(0, WINDOW, false))?;
        let source = Source::open(&consuming, &Arc::from(queue), None)?;
        let limit = session.limit();
        let exchange = exchange.into();
        Ok(Self { source, consuming, publishing, confirms, returns, exchange, last_tag: 0, limit, moved: 0 })
    }

    /// Moves what comes until nothing has for so long.
    fn until_quiet(&mut self, quiet: Duration) -> Result<(), Error> {
        let mut until = Instant::now() + quiet;
        while Instant::now() < until {
            let deliveries = self.next()?;
            if deliveries.is_empty() {
                std::thread::sleep(LOOK);
                continue;
            }
            self.copy(&deliveries)?;
            self.consuming.call(MOVING, |raw| deliveries.into_iter().try_for_each(|delivery| delivery.ack(raw)))?;
            until = Instant::now() + quiet;
        }
        Ok(())
    }

    /// Deletes the queue. What it still hands out before it's gone arrives here before that is told.
    fn delete(&mut self, queue: &str) -> Result<(), Error> {
        self.publishing
            .call("deleting a queue", |raw| raw.queue_delete(queue, QueueDeleteOptions::default()).map(drop))
            .map_err(|error| explain_missing(error, queue))?;
        let until = Instant::now() + self.limit;
        loop {
            match self.next() {
                // It's gone.
                Err(error) if error.is_lost() => return Ok(()),
                Err(error) => return Err(error),
                Ok(deliveries) => self.copy(&deliveries)?,
            }
            if Instant::now() >= until {
                return Err(Error::TimedOut { doing: "deleting a queue", after: self.limit });
            }
            std::thread::sleep(LOOK);
        }
    }

    /// What has come.
    fn next(&mut self) -> Result<Vec<Delivery>, Error> {
        let mut deliveries = Vec::new();
        while deliveries.len() < WINDOW.into() {
            match self.source.refill(&self.consuming) {
                // What came before that is to be copied first.
                Err(_) if !deliveries.is_empty() => break,
                refilled => refilled?,
            }
            let Some(delivery) = self.source.head.take() else { break };
            deliveries.push(delivery);
        }
        Ok(deliveries)
    }

    /// Publishes copies, and waits until all are confirmed.
    fn copy(&mut self, deliveries: &[Delivery]) -> Result<(), Error> {
        let mut open = BTreeSet::new();
        for delivery in deliveries {
            let publish = Publish {
                body: &delivery.body,
                routing_key: delivery.routing_key.clone(),
                mandatory: true,
                immediate: false,
                properties: properties(delivery),
            };
            self.publishing.call(MOVING, |raw| raw.basic_publish(&self.exchange, publish))?;
            self.last_tag += 1;
            open.insert(self.last_tag);
        }
        let until = Instant::now() + self.limit;
        while !open.is_empty() {
            let confirm = match self.confirms.recv_deadline(until) {
                Ok(confirm) => confirm,
                Err(crossbeam_channel::RecvTimeoutError::Timeout) => {
                    return Err(Error::TimedOut { doing: MOVING, after: self.limit });
                }
                Err(crossbeam_channel::RecvTimeoutError::Disconnected) => return Err(self.publishing.failure(MOVING)),
            };
            if let Some(returned) = self.returns.try_iter().next() {
                return Err(Error::Refused { doing: MOVING, code: returned.reply_code, text: returned.reply_text });
            }
            match confirm {
                Confirm::Ack(payload) if payload.multiple => open.retain(|tag| *tag > payload.delivery_tag),
                Confirm::Ack(payload) => _ = open.remove(&payload.delivery_tag),
                Confirm::Nack(_) => {
                    let text = "the target queue doesn't take them; is it full?".into();
                    return Err(Error::Refused { doing: MOVING, code: 0, text });
                }
            }
        }
        self.moved += deliveries.len() as u64;
        Ok(())
    }

    fn end(self) -> u64 {
        let deadline = Instant::now() + self.limit;
        self.consuming.close(deadline);
        self.publishing.close(deadline);
        self.source.drain();
        self.moved
    }
}

/// A delivery's own, and where it was published to in the first place. Without the two that the broker would act upon: the
/// publisher's name, which must be the connection's, and further routing keys, whose queues have the message already.
fn properties(delivery: &Delivery) -> AmqpProperties {
    let old = &delivery.properties;
    let mut headers = old.headers().clone().unwrap_or_default();
    headers.remove("CC");
    headers.remove("BCC");
    for (name, value) in [(ORIGINAL_EXCHANGE, &delivery.exchange), (ORIGINAL_ROUTING_KEY, &delivery.routing_key)] {
        headers.entry(name.into()).or_insert_with(|| AmqpValue::LongString(value.clone()));
    }
    macro_rules! copy {
        ($($get:ident $with:ident),*) => {{
            let mut new = AmqpProperties::default().with_headers(headers);
            $(if let Some(value) = old.$get() { new = new.$with(value.clone()); })*
            new
        }};
    }
    copy!(
        content_type with_content_type, content_encoding with_content_encoding, delivery_mode with_delivery_mode,
        priority with_priority, correlation_id with_correlation_id, reply_to with_reply_to, expiration with_expiration,
        message_id with_message_id, timestamp with_timestamp, type_ with_type_, app_id with_app_id
    )
}
