#![doc = include_str!("../README.md")]

use domain::{
    Failure,
    message::{SendNotification, SendNotificationChunk},
    values::Channel,
};
use storage::{
    Database,
    notifications::{self, Single},
};
use worker::{BatchHandler, Item, Outgoing, Received, Step};

/// A notification as it comes.
pub enum Notification {
    /// To the followers in a range, of a tweet.
    Chunk(SendNotificationChunk),
    /// To one user, by another program.
    Single(SendNotification),
}

/// The handler.
pub struct Notifier {
    database: Database,
    channel: Channel,
}

impl Notifier {
    /// For this channel.
    pub fn new(database: Database, channel: Channel) -> Self {
        Self { database, channel }
    }
}

impl BatchHandler for Notifier {
    type Message = Notification;

    fn decode(&self, received: &Received) -> anyhow::Result<Notification> {
        let notification = match worker::kind(received, &[SendNotification::TYPE, SendNotificationChunk::TYPE])? {
            SendNotificationChunk::TYPE => Notification::Chunk(worker::json(received)?),
            _ => Notification::Single(worker::json(received)?),
        };
        let text = match &notification {
            Notification::Chunk(chunk) => &chunk.text,
            Notification::Single(single) => &single.text,
        };
        self.channel.check_text(text).map_err(|invalid| anyhow::anyhow!("text {invalid}"))?;
        Ok(notification)
    }

    fn handle(&mut self, batch: &[Item<Notification>], _: &mut Outgoing, _: &Step) -> Result<(), Failure> {
        let mut chunks = Vec::new();
        let mut singles = Vec::new();
        // Without an id there is nothing to tell a second delivery by, so such a message is recorded at least once.
        let anonymous = uuid::Uuid::new_v4();
        let stand_ins: Vec<String> = (0..batch.len()).map(|n| format!("anonymous {anonymous} {n}")).collect();
        for (item, stand_in) in batch.iter().zip(&stand_ins) {
            match &item.message {
                Notification::Chunk(chunk) => chunks.push(chunk),
                Notification::Single(single) => singles.push(Single {
                    user_id: single.user_id,
                    message_id: item.received.message_id.as_deref().unwrap_or(stand_in),
                    text: &single.text,
                }),
            }
        }
        self.database.transaction(|conn| {
            if !chunks.is_empty() {
                notifications::record_chunks(conn, self.channel, &chunks)?;
            }
            if !singles.is_empty() {
                notifications::record_singles(conn, self.channel, &singles)?;
            }
            Ok(())
        })?;
        Ok(())
    }
}
