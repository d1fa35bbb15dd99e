//! A consumer as a tutorial has it, and what else the crate `broker` keeps out of its users' hands: giving a message back to
//! its queue, and a limit of deliveries of one's own choice.

use crate::load::Fault;
use amiquip::{AmqpValue, Channel, Connection, ConsumerMessage, ConsumerOptions, FieldTable, QueueDeclareOptions};
use anyhow::{Context as _, anyhow, bail};
use std::{mem, time::Duration};

type Messages = crossbeam_channel::Receiver<ConsumerMessage>;

/// The client's errors may hold the URL, and that a password.
fn open(url: &str) -> anyhow::Result<(Connection, Channel)> {
    let mut connection = Connection::insecure_open(url).map_err(|_| anyhow!("can't connect to the broker"))?;
    let channel = connection.open_channel(None).context("can't open a channel")?;
    Ok((connection, channel))
}

/// Takes messages from one queue.
pub(crate) struct Consumer {
    messages: Messages,
    channel: Channel,
    _connection: Connection,
}

/// A message in hand.
pub(crate) struct Delivery {
    inner: amiquip::Delivery,
    /// What is to go wrong with it.
    pub(crate) fault: Option<Fault>,
}

impl Delivery {
    pub(crate) fn body(&self) -> &[u8] {
        &self.inner.body
    }

    /// Whether it was in somebody's hand before.
    pub(crate) fn redelivered(&self) -> bool {
        self.inner.redelivered
    }
}

impl Consumer {
    /// Consumes a queue, with up to `prefetch` messages in hand.
    pub(crate) fn open(url: &str, queue: &str, prefetch: u16) -> anyhow::Result<Self> {
        let (connection, channel) = open(url)?;
        channel.qos(0, prefetch, false)?;
        let consumer = channel
            .basic_consume(queue, ConsumerOptions::default())
            .with_context(|| format!("can't consume the queue {queue}"))?;
        let messages = consumer.receiver().clone();
        // Its drop would cancel it, in a race with the client's thread.
        mem::forget(consumer);
        Ok(Self { messages, channel, _connection: connection })
    }

    /// The next message, if one comes within `limit`.
    pub(crate) fn next(&self, limit: Duration) -> anyhow::Result<Option<Delivery>> {
        match self.messages.recv_timeout(limit) {
            Ok(ConsumerMessage::Delivery(inner)) => {
                let headers = inner.properties.headers().as_ref();
                let fault = match headers.and_then(|headers| headers.get(Fault::HEADER)) {
                    Some(AmqpValue::LongString(text)) => Fault::parse(text),
                    _ => None,
                };
                Ok(Some(Delivery { inner, fault }))
            }
            Ok(ended) => bail!("the broker delivers no more: {ended:?}"),
            Err(error) if error.is_timeout() => Ok(None),
            Err(_) => bail!("the connection to the broker is lost"),
        }
    }

    /// Settles a message.
    pub(crate) fn ack(&self, delivery: Delivery) -> anyhow::Result<()> {
        delivery.inner.ack(&self.channel).context("can't acknowledge a message")
    }

    /// Gives a message back to its queue, to be delivered again.
    pub(crate) fn turn_away(&self, delivery: Delivery) -> anyhow::Result<()> {
        delivery.inner.nack(&self.channel, true).context("can't give a message back")
    }
}

/// Declares quorum queues that drop a message after so many further deliveries.
pub(crate) fn declare_limited(url: &str, queues: &[String], limit: i32) -> anyhow::Result<()> {
    let (connection, channel) = open(url)?;
    for queue in queues {
        let mut arguments = FieldTable::new();
        arguments.insert("x-queue-type".into(), AmqpValue::LongString("quorum".into()));
        arguments.insert("x-delivery-limit".into(), AmqpValue::LongInt(limit));
        channel
            .queue_declare(queue.as_str(), QueueDeclareOptions { durable: true, arguments, ..Default::default() })
            .with_context(|| format!("can't declare the queue {queue}"))?;
    }
    channel.close()?;
    Ok(connection.close()?)
}

/// Deletes exchanges. One that isn't there is no error.
pub(crate) fn delete_exchanges(url: &str, exchanges: &[String]) -> anyhow::Result<()> {
    let (connection, channel) = open(url)?;
    for exchange in exchanges {
        channel.exchange_delete(exchange.as_str(), false).context("can't delete an exchange")?;
    }
    channel.close()?;
    Ok(connection.close()?)
}
