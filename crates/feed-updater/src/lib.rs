#![doc = include_str!("../README.md")]

use anyhow::Context as _;
use domain::{
    Failure, UserId,
    message::{FollowerRange, Message as _, SendNotificationChunk, Tweet, UpdateFeed, UpdateFeedChunk},
    topology::{exchange, queue},
    values::Channel,
};
use process::{Program, Stop};
use serde::Deserialize;
use service::Service;
use std::{
    thread,
    time::{Duration, Instant},
};
use storage::{Database, PgConnection, erasure, feeds, sweep, users};
use telemetry::{SweepDone, TweetsErased, UserErased};
use worker::{BatchHandler, Consuming, Item, Outgoing, Received, Step};

/// The service's name.
pub const SERVICE: &str = "feed-updater";

/// The service as a program.
pub const PROGRAM: Program = Program::new(
    SERVICE,
    "Writes tweets into feeds and asks for notifications: queues update_feed.00 and following.",
    run,
);

/// The sections of the settings that are this service's own.
#[derive(Deserialize)]
struct Settings {
    feed_updater: Section,
    users: Users,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Users {
    keep_deleted_days: u32,
}

#[derive(Deserialize)]
struct Section {
    #[serde(flatten)]
    consuming: Consuming,
    sweep_interval_ms: u64,
}

/// Runs the service until it's told to stop.
///
/// # Errors
/// When the settings can't be used.
pub fn run() -> anyhow::Result<()> {
    let (service, Settings { feed_updater: Section { consuming, sweep_interval_ms }, users }) =
        Service::begin(SERVICE)?;
    if sweep_interval_ms > 0 {
        let interval = Duration::from_millis(sweep_interval_ms);
        let (database, stop) = (service.database.clone(), service.stop.clone());
        thread::Builder::new()
            .name("sweep".into())
            .spawn(move || sweep(&database, interval, users.keep_deleted_days, &stop))
            .context("can't start a thread")?;
    }
    service.consume(queue::update_feed(), consuming, Updater::new)
}

/// Removes what is due, every `interval`. What fails is due again later, and keeps nothing else waiting.
fn sweep(database: &Database, interval: Duration, keep_deleted_days: u32, stop: &Stop) {
    while !stop.wait(interval) {
        let start = Instant::now();
        let mut removed = 0;
        let remove_page = |conn: &mut _, piece: &_| sweep::remove_page(conn, piece);
        each_due(database, stop, sweep::take, remove_page, |rows| removed += rows as u64);
        if removed > 0 {
            telemetry::emit(SweepDone { removed, duration: start.elapsed() });
        }
        let take = |conn: &mut _| erasure::take(conn, keep_deleted_days);
        each_due(
            database,
            stop,
            take,
            |conn, user| erasure::step(conn, *user),
            |(erased, more)| {
                telemetry::emit(UserErased { rows: erased.rows() as u64, done: !more });
            },
        );
        erase_texts(database, keep_deleted_days, stop);
    }
}

/// Takes away the texts of tweets that were deleted so long ago.
fn erase_texts(database: &Database, keep_deleted_days: u32, stop: &Stop) {
    let mut texts = 0;
    while !stop.is_requested() {
        match database.transaction(|conn| erasure::deleted_tweets(conn, keep_deleted_days)) {
            Ok(0) => break,
            Ok(page) => texts += page as u64,
            Err(error) => {
                log::warn!("the sweep pauses: {:#}", anyhow::Error::new(error));
                break;
            }
        }
    }
    if texts > 0 {
        telemetry::emit(TweetsErased { texts });
    }
}

/// Takes one after the other of what is due, and does a step of it.
fn each_due<T, R>(
    database: &Database,
    stop: &Stop,
    mut take: impl FnMut(&mut PgConnection) -> storage::Result<Option<T>>,
    mut step: impl FnMut(&mut PgConnection, &T) -> storage::Result<R>,
    mut done: impl FnMut(R),
) {
    while !stop.is_requested() {
        let due = match database.transaction(&mut take) {
            Ok(Some(due)) => due,
            Ok(None) => break,
            Err(error) => {
                log::warn!("the sweep pauses: {:#}", anyhow::Error::new(error));
                break;
            }
        };
        match database.transaction(|conn| step(conn, &due)) {
            Ok(result) => done(result),
            Err(error) => log::warn!("swept later: {:#}", anyhow::Error::new(error)),
        }
    }
}

/// A tweet for a range of followers, or for a single one that another program named.
pub struct Update {
    tweet: Tweet,
    followers: FollowerRange,
    named: Option<UserId>,
}

/// The handler.
pub struct Updater {
    database: Database,
}

impl Updater {
    /// With this database.
    pub fn new(database: Database) -> Self {
        Self { database }
    }
}

impl BatchHandler for Updater {
    type Message = Update;

    const PUBLISHES_TO: &'static [&'static str] = &[exchange::SEND_NOTIFICATION];

    fn decode(&self, received: &Received) -> anyhow::Result<Update> {
        Ok(match worker::kind(received, &[UpdateFeed::TYPE, UpdateFeedChunk::TYPE])? {
            UpdateFeedChunk::TYPE => {
                let UpdateFeedChunk { tweet, followers } = worker::json(received)?;
                Update { tweet, followers, named: None }
            }
            _ => {
                let UpdateFeed { tweet, follower_id } = worker::json(received)?;
                Update { tweet, followers: FollowerRange::only(follower_id), named: Some(follower_id) }
            }
        })
    }

    fn handle(&mut self, batch: &[Item<Update>], out: &mut Outgoing, _: &Step) -> Result<(), Failure> {
        let named: Vec<UserId> = batch.iter().filter_map(|item| item.message.named).collect();
        let chunks: Vec<_> = batch.iter().map(|item| (item.message.tweet.id, item.message.followers)).collect();
        self.database.transaction(|conn| {
            if !named.is_empty() {
                users::require_known(conn, &named)?;
            }
            feeds::write(conn, &chunks)
        })?;
        for Item { message: Update { tweet, followers, .. }, received } in batch {
            for channel in Channel::ALL {
                out.publish(received, SendNotificationChunk::of(tweet, *followers, channel).envelope(channel));
            }
        }
        Ok(())
    }
}
