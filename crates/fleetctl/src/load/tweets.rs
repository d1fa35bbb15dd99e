use super::posting::{self, Answer, Posting};
use crate::{Outcome, context::Context, interrupt::Interrupt, output::pace};
use anyhow::{bail, ensure};
use domain::{
    UserId,
    message::{Message as _, PublishTweet},
    values::{TWEET_MAX, TweetText},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use std::io::Write;
use storage::{Database, outbox, tweets, users};
use ureq::Agent;
use uuid::Uuid;

/// Post tweets, through the gateway or directly in the database
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
    let posting = Posting {
        count: args.count,
        batch: 1,
        connections: args.connections,
        rate: args.rate,
        max_failures: args.max_errors,
        interrupt,
    };
    let posted = posting.run("tweets", |agent, request| {
        let author = authors[(request.index % authors.len() as u64) as usize];
        let text = text(args.seed, request.index);
        match &way {
            Way::Gateway { url, asynchronous } => post_over_http(agent, url, author, &text, *asynchronous),
            Way::Direct(database) => post_directly(database, author, &text),
        }
    });
    let failed = posted.failures.values().sum::<u64>();
    writeln!(
        out,
        "tweets: {} posted, {failed} failed, {} not tried; {}",
        posted.accepted,
        args.count - posted.accepted - failed,
        pace(posted.accepted, posted.elapsed)
    )?;
    posted.tell_failures(out)?;
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

fn post_over_http(
    agent: &Agent,
    url: &str,
    author: UserId,
    text: &TweetText,
    asynchronous: bool,
) -> anyhow::Result<()> {
    let body = serde_json::json!({"userId": author, "text": text, "async": asynchronous});
    match posting::post(agent, url, &body.to_string()) {
        Answer::Accepted => Ok(()),
        Answer::Unsent(reason) | Answer::Unknown(reason) | Answer::Refused(reason) => bail!(reason),
    }
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
