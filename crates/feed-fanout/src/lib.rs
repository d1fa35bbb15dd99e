#![doc = include_str!("../README.md")]

use domain::{
    Failure, UserId,
    message::{FollowerRange, Message as _, PublishTweet, UpdateFeedChunk},
    topology::queue,
};
use serde::Deserialize;
use std::sync::Arc;
use storage::{Database, attempts::Ledger, subscriptions, tweets};
use worker::{BatchHandler, Consuming, HealthSettings, Item, Outgoing, Received, Step, Worker};

/// The service's name.
pub const SERVICE: &str = "feed-fanout";

/// The sections of the settings that this service needs.
#[derive(Debug, Deserialize)]
pub struct Settings {
    database: storage::Settings,
    broker: broker::Settings,
    worker: worker::Settings,
    health: HealthSettings,
    telemetry: telemetry::Settings,
    feed_fanout: Own,
}

#[derive(Debug, Deserialize)]
struct Own {
    #[serde(flatten)]
    consuming: Consuming,
    chunk: u32,
}

/// Runs the service until it's told to stop.
///
/// # Errors
/// When the settings can't be used.
pub fn run() -> anyhow::Result<()> {
    let settings: Settings = settings::load(SERVICE)?;
    let _telemetry = telemetry::init(SERVICE, &settings.telemetry)?;
    let database = Database::open(&settings.database, SERVICE)?;
    let chunk = settings.feed_fanout.chunk.max(1);
    Worker {
        service: SERVICE,
        queues: vec![queue::PUBLISH_TWEET.into()].into(),
        settings: settings.worker,
        consuming: settings.feed_fanout.consuming,
        health: settings.health,
        broker: settings.broker,
        ledger: Arc::new(Ledger::new(database.clone())),
        database: database.probe(),
        handler: || Fanout::new(database.clone(), chunk),
    }
    .run()
}

/// The handler.
pub struct Fanout {
    database: Database,
    chunk: u32,
}

impl Fanout {
    /// With this many followers in a chunk.
    pub fn new(database: Database, chunk: u32) -> Self {
        Self { database, chunk }
    }
}

impl BatchHandler for Fanout {
    type Message = PublishTweet;

    fn decode(&self, received: &Received) -> anyhow::Result<PublishTweet> {
        worker::kind(received, &[PublishTweet::TYPE])?;
        worker::json(received)
    }

    fn handle(&mut self, batch: &[Item<PublishTweet>], out: &mut Outgoing, step: &Step) -> Result<(), Failure> {
        let mut conn = self.database.connection()?;
        // Else a wrong author's followers would be walked, and the tweet's own never hear of it.
        let posted: Vec<_> = batch.iter().map(|item| (item.message.0.id, item.message.0.author_id)).collect();
        tweets::require_posted(&mut conn, &posted)?;
        for Item { message: PublishTweet(tweet), received } in batch {
            let mut after = UserId(0);
            while let Some(upto) = subscriptions::next_chunk(&mut conn, tweet.author_id, after, self.chunk)? {
                let chunk = UpdateFeedChunk { tweet: tweet.clone(), followers: FollowerRange { after, upto } };
                out.publish(received, chunk.envelope());
                after = upto;
                step.renew();
            }
        }
        Ok(())
    }
}
