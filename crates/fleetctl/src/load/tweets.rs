use crate::{Outcome, context::Context, interrupt::Interrupt, output::pace, progress::Progress};
use anyhow::{Context as _, ensure};
use domain::{
    UserId,
    message::{Message as _, PublishTweet},
    values::{TWEET_MAX, TweetText},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use std::{
    collections::BTreeMap,
    io::Write,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use storage::{Database, outbox, tweets, users};
use ureq::Agent;
use uuid::Uuid;

/// Post tweets, through the gateway or straight in the database
///
/// The same seed makes the same tweets; which one of an author comes first is up to the connections.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl load tweets --author 1 --count 100 --async
  fleetctl load tweets --authors 200 --count 10000 --rate 500 --async
  fleetctl load tweets --authors 20 --count 1000 --direct --seed 7")]
pub(crate) struct Args {
    /// How many tweets
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// By how many authors: the first by id who have followers, in turn
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    authors: Option<u32>,
    /// By this author alone
    #[arg(long, value_name = "ID", conflicts_with = "authors", required_unless_present = "authors")]
    author: Option<UserId>,
    /// Tweets per second, over all connections; without it as fast as they go
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Let the workers bring the tweets to their readers, rather than the gateway within the request
    #[arg(long = "async")]
    asynchronous: bool,
    /// Commit each tweet and its message straight to the database, as the gateway does for --async
    #[arg(long)]
    direct: bool,
    /// Where the gateway is; without it the checkout's own, or http://127.0.0.1:7777
    #[arg(long, env = "GATEWAY_URL", value_name = "URL")]
    gateway: Option<String>,
    /// How many connections post at once
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    connections: u32,
    /// What the texts are drawn by
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// How many errors end it
    #[arg(long, default_value_t = 100, value_name = "N")]
    max_errors: u64,
}

pub(crate) fn run(
    args: &Args,
    context: &Context,
    interrupt: &Interrupt,
    out: &mut dyn Write,
) -> anyhow::Result<Outcome> {
    let authors = authors(args, context)?;
    let way = match args.direct {
        true => Way::Direct(context.database_with(|settings| settings.pool_size = args.connections)?),
        false => Way::Gateway {
            url: format!("{}/api/v1/post-tweet", context.gateway(args.gateway.as_deref())),
            asynchronous: args.asynchronous,
        },
    };
    let run = Run {
        way,
        authors,
        count: args.count,
        seed: args.seed,
        interval: args.rate.map(|rate| Duration::from_secs(1) / rate),
        max_errors: args.max_errors,
        next: AtomicU64::new(0),
        errors: Mutex::default(),
        progress: Progress::new("tweets", args.count),
        started: Instant::now(),
        interrupt,
    };
    thread::scope(|scope| {
        for _ in 0..args.connections {
            scope.spawn(|| run.post());
        }
    });
    let (posted, elapsed) = run.progress.finish();
    let errors = run.errors.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failed = errors.values().sum::<u64>();
    writeln!(
        out,
        "tweets: {posted} posted, {failed} failed, {} not tried; {}",
        args.count - posted - failed,
        pace(posted, elapsed)
    )?;
    for (error, count) in &errors {
        writeln!(out, "  {count} × {error}")?;
    }
    Ok(match failed {
        _ if interrupt.is_set() => Outcome::Interrupted,
        0 => Outcome::Done,
        _ => Outcome::Incomplete,
    })
}

fn authors(args: &Args, context: &Context) -> anyhow::Result<Vec<UserId>> {
    let Some(count) = args.authors else { return Ok(args.author.into_iter().collect()) };
    let mut conn = context.patient_database()?.connection()?;
    let authors = users::followed(&mut conn, count.into())?;
    ensure!(
        authors.len() == count as usize,
        "--authors {count}, but {} users have followers; `fleetctl load followers` makes some",
        authors.len()
    );
    Ok(authors)
}

enum Way {
    Gateway { url: String, asynchronous: bool },
    Direct(Database),
}

/// What the connections share.
struct Run<'a> {
    way: Way,
    authors: Vec<UserId>,
    count: u64,
    seed: u64,
    interval: Option<Duration>,
    max_errors: u64,
    /// The index of the next tweet.
    next: AtomicU64,
    /// How often each has happened.
    errors: Mutex<BTreeMap<String, u64>>,
    progress: Progress,
    started: Instant,
    interrupt: &'a Interrupt,
}

impl Run<'_> {
    /// One connection's share.
    fn post(&self) {
        let agent = Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(60)))
            .http_status_as_error(false)
            .build()
            .into();
        while !self.interrupt.is_set() && self.error_count() < self.max_errors {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count {
                return;
            }
            if let Some(interval) = self.interval {
                let due =
                    Duration::from_nanos(u64::try_from(interval.as_nanos() * u128::from(index)).unwrap_or(u64::MAX));
                self.interrupt.sleep_until(self.started + due);
                if self.interrupt.is_set() {
                    return;
                }
            }
            let author = self.authors[(index % self.authors.len() as u64) as usize];
            let text = text(self.seed, index);
            let result = match &self.way {
                Way::Gateway { url, asynchronous } => post_over_http(&agent, url, author, &text, *asynchronous),
                Way::Direct(database) => post_directly(database, author, &text),
            };
            match result {
                Ok(()) => self.progress.advance(1),
                Err(error) => {
                    let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
                    *errors.entry(format!("{error:#}")).or_default() += 1;
                }
            }
        }
    }

    fn error_count(&self) -> u64 {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }
}

fn post_over_http(
    agent: &Agent,
    url: &str,
    author: UserId,
    text: &TweetText,
    asynchronous: bool,
) -> anyhow::Result<()> {
    let body = serde_json::json!({"userId": author, "text": text, "async": asynchronous});
    let mut response = agent.post(url).send_json(body).context("the gateway didn't answer")?;
    // To the end, or else the connection can't be used again.
    let answer: serde_json::Value =
        response.body_mut().read_json().with_context(|| format!("{} without JSON", response.status()))?;
    // RFC 9457: the title doesn't change from occurrence to occurrence.
    let title = answer["title"].as_str().unwrap_or_default();
    ensure!(response.status().is_success(), "{} {title}", response.status());
    Ok(())
}

fn post_directly(database: &Database, author: UserId, text: &TweetText) -> anyhow::Result<()> {
    let correlation_id = Uuid::new_v4().to_string();
    Ok(database.transaction(|conn| {
        let tweet = tweets::post(conn, author, text)?;
        outbox::push(conn, &[PublishTweet(tweet).envelope().correlated(Some(&correlation_id))])
    })?)
}

/// The text of tweet number `index`: of any length up to the longest, some of it beyond ASCII.
fn text(seed: u64, index: u64) -> TweetText {
    const WORDS: [&str; 24] = [
        "starlings",
        "gather",
        "above",
        "the",
        "marsh",
        "at",
        "dusk",
        "and",
        "turn",
        "as",
        "one",
        "žluna",
        "цапля",
        "écho",
        "雁",
        "🐦",
        "ten",
        "thousand",
        "wings",
        "fold",
        "into",
        "reeds",
        "before",
        "night",
    ];
    let mut rng = StdRng::seed_from_u64(seed);
    // A stream of its own for each tweet, so that it doesn't matter which connection posts it.
    let mut rng = StdRng::seed_from_u64(rng.random::<u64>() ^ index);
    let length = rng.random_range(10..=TWEET_MAX);
    let mut text = format!("#{index}");
    while text.chars().count() < length {
        text.push(' ');
        text.push_str(WORDS.choose(&mut rng).expect("there are words"));
    }
    let text: String = text.chars().take(length).collect();
    TweetText::parse(&text).expect("it's neither empty nor too long")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_texts() {
        let texts = |seed| (0..200).map(|index| text(seed, index)).collect::<Vec<_>>();
        assert_eq!(texts(7), texts(7));
        assert_ne!(texts(7), texts(8));
        let texts = texts(7);
        assert!(texts.iter().any(|text| text.as_str().chars().count() > 130));
        assert!(texts.iter().any(|text| !text.as_str().is_ascii()));
    }
}
