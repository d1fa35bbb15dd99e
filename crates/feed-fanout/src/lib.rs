#![doc = include_str!("../README.md")]

use domain::{
    Failure, UserId,
    message::{FollowerRange, Message as _, PublishTweet, UpdateFeedChunk},
    topology::{exchange, queue},
};
use process::Program;
use serde::Deserialize;
use service::Service;
use storage::{Database, subscriptions, tweets};
use worker::{BatchHandler, Consuming, Item, Outgoing, Received, Step};

/// The service's name.
pub const SERVICE: &str = "feed-fanout";

/// The service as a program.
pub const PROGRAM: Program =
    Program::new(SERVICE, "Cuts an author's followers into chunks for each new tweet: queue publish_tweet.", run);

/// The sections of the settings that are this service's own.
#[derive(Deserialize)]
struct Settings {
    feed_fanout: Section,
}

#[derive(Deserialize)]
struct Section {
    #[serde(flatten)]
    consuming: Consuming,
    chunk: u32,
}

/// Runs the service until it's told to stop.
///
/// # Errors
/// When the settings can't be used.
pub fn run() -> anyhow::Result<()> {
    let (service, Settings { feed_fanout: Section { consuming, chunk } }) = Service::begin(SERVICE)?;
    service.consume(vec![queue::PUBLISH_TWEET.into()], consuming, |database| Fanout::new(database, chunk.max(1)))
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

    const PUBLISHES_TO: &'static [&'static str] = &[exchange::UPDATE_FEED];

    fn decode(&self, received: &Received) -> anyhow::Result<PublishTweet> {
        worker::kind(received, &[PublishTweet::TYPE])?;
        worker::json(received)
    }

    fn handle(&mut self, batch: &[Item<PublishTweet>], out: &mut Outgoing, step: &Step) -> Result<(), Failure> {
        let mut conn = self.database.connection()?;
        // Else a wrong author's followers would be walked, and the tweet's own never hear of it.
        let posted: Vec<_> = batch.iter().map(|item| (item.message.0.id, item.message.0.author_id)).collect();
        let live = tweets::live(&mut conn, &posted)?;
        for Item { message: PublishTweet(tweet), received } in batch {
            if !live.contains(&tweet.id) {
                continue;
            }
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
