//! How fast a tweet reaches its author's followers.

use crate::{
    Fanout, PROGRAM, baseline,
    context::Context,
    report::{Figure, Machine, Report, median, spread},
    stage::Stage,
};
use anyhow::{Context as _, ensure};
use command_line::progress::Progress;
use domain::{
    TweetId, UserId,
    message::{Message as _, Tweet, UpdateFeed},
    values::{Channel, TweetText},
};
use hdrhistogram::Histogram;
use serde_json::json;
use std::{
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};
use storage::tweets;

/// Readers have ids from here on: first the followers of the timed author, then those of the authors of all sizes.
const FIRST_READER: i64 = 1000;
/// Followers in a chunk, all of whose rows are committed at once: `feed_fanout.chunk` as it stands in the defaults.
const CHUNK: i64 = 1000;
const TEXT: &str = "A tweet as long as most of them are: some eighty characters, which is more than fit an SMS.";

/// Authors, whose ids precede the readers'.
const TIMED: UserId = UserId(1);
const EARLIER: UserId = UserId(2);
const EARLIER_OF_SIZES: UserId = UserId(3);
const SIZES: [(UserId, i64); 3] = [(UserId(11), 1000), (UserId(12), 10_000), (UserId(13), 100_000)];
const LARGEST: UserId = UserId(14);
const SINGLES: UserId = UserId(15);
const CROWD: std::ops::Range<i64> = 100..300;
const CROWD_FOLLOWERS: i64 = 100;
const SINGLE_FOLLOWERS: i64 = 3000;

pub(crate) fn measure(args: &Fanout, context: &Context) -> anyhow::Result<Report> {
    let progress = Progress::waiting("bench fanout");
    let begin = |what: &str| {
        progress.say(what);
        log::info!("{what}");
    };
    begin("filling the database");
    let mut stage = Stage::new(&args.place, context)?;
    fill(args, &stage)?;

    let mut figures = Vec::new();
    stage.start(&[])?;
    begin("a tweet to many followers, and plain INSERTs of the same rows, in turn");
    let many = many(args, &stage, &mut figures)?;
    begin("authors of different sizes");
    sizes(args, &stage, &mut figures)?;
    begin("200 authors at once");
    crowd(args, &stage, &mut figures)?;
    memory(&stage, &mut figures)?;
    stage.stop()?;
    begin("one message for each follower, in batches of one");
    let single = singles(&mut stage)?;
    figures.insert(
        1,
        Figure {
            what: format!("{} followers: rate ÷ rate of one message for each follower, batches of one", args.followers),
            value: many / single,
            unit: "",
            asked: None,
            reached: None,
            detail: format!("{many:.0} followers/s and {single:.0} followers/s"),
        },
    );
    drop(progress);

    let postgres = baseline::server_version(&mut *stage.connection()?)?;
    let at = chrono::Utc::now().format("%Y-%m-%d %H:%M UTC").to_string();
    Ok(Report { benchmark: "fanout", at, machine: Machine::this(postgres), figures })
}

/// The authors whose cost is compared, with their numbers of followers.
fn sizes_up_to(largest: i64) -> impl Iterator<Item = (UserId, i64)> {
    SIZES.into_iter().chain([(LARGEST, largest)]).filter(move |(_, count)| *count <= largest)
}

/// Users, who follows whom, and feeds with a past.
fn fill(args: &Fanout, stage: &Stage) -> anyhow::Result<()> {
    let mut conn = stage.connection()?;
    let (followers, largest) = (i64::from(args.followers), i64::from(args.largest));
    baseline::seed_users(&mut conn, "author", 1, CROWD.end)?;
    for first in (0..followers + largest).step_by(100_000) {
        baseline::seed_users(&mut conn, "reader", FIRST_READER + first, (followers + largest - first).min(100_000))?;
    }
    baseline::seed_followers(&mut conn, TIMED, FIRST_READER, followers)?;
    baseline::seed_followers(&mut conn, SINGLES, FIRST_READER, SINGLE_FOLLOWERS)?;
    for author in CROWD {
        baseline::seed_followers(&mut conn, UserId(author), first_of_crowd(args, author), CROWD_FOLLOWERS)?;
    }
    let sized = FIRST_READER + followers;
    for (author, count) in sizes_up_to(largest) {
        baseline::seed_followers(&mut conn, author, sized, count)?;
    }
    let entries = i64::from(args.entries);
    for (author, first, count, entries) in
        [(EARLIER, FIRST_READER, followers, entries), (EARLIER_OF_SIZES, sized, largest, i64::from(args.size_entries))]
    {
        baseline::seed_followers(&mut conn, author, first, count)?;
        baseline::seed_feeds(&mut conn, author, entries, first, count)?;
    }
    baseline::settle(&mut conn)?;
    Ok(())
}

/// The first of the followers of one of the authors who post at once. They lie among those of the timed author.
fn first_of_crowd(args: &Fanout, author: i64) -> i64 {
    let room = (i64::from(args.followers) - CROWD_FOLLOWERS).max(1);
    FIRST_READER + (author - CROWD.start) * CROWD_FOLLOWERS % room
}

/// The readers by whose rows the arrival of every chunk is told: the last one of each, and for each channel the last
/// one who has it. A chunk's rows are committed together, so the last one stands for all.
struct Arrival {
    tweet: TweetId,
    feeds: Vec<i64>,
    email: Vec<i64>,
    phone: Vec<i64>,
}

impl Arrival {
    fn of(tweet: TweetId, first_follower: i64, followers: i64) -> Self {
        let mut arrival = Self { tweet, feeds: Vec::new(), email: Vec::new(), phone: Vec::new() };
        for first in (0..followers).step_by(usize::try_from(CHUNK).unwrap_or(1)) {
            let last = first_follower + (first + CHUNK).min(followers) - 1;
            arrival.feeds.push(last);
            // Users with even ids have an e-mail address.
            let (even, odd) = if last % 2 == 0 { (last, last - 1) } else { (last - 1, last) };
            arrival.email.push(even);
            arrival.phone.push(odd);
        }
        arrival
    }

    /// Looks at what is still missing; answers whether nothing is.
    fn is_complete(&mut self, conn: &mut storage::PgConnection) -> storage::Result<bool> {
        if !self.feeds.is_empty() {
            self.feeds = baseline::readers_without(conn, self.tweet, &self.feeds)?;
        }
        for (channel, users) in [(Channel::Email, &mut self.email), (Channel::Phone, &mut self.phone)] {
            if !users.is_empty() {
                *users = baseline::users_without(conn, channel, self.tweet, users)?;
            }
        }
        Ok(self.feeds.is_empty() && self.email.is_empty() && self.phone.is_empty())
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(60))).build().into()
}

/// Posts by way of the gateway, `async=true`; answers the tweet and the moment of the answer.
fn post(agent: &ureq::Agent, gateway: &str, author: UserId) -> anyhow::Result<(TweetId, Instant)> {
    let mut answer = agent
        .post(format!("{gateway}/api/v1/post-tweet"))
        .send_json(json!({"userId": author.0, "text": TEXT, "async": true}))
        .context("the gateway didn't take a tweet")?;
    let body: serde_json::Value = answer.body_mut().read_json().context("the gateway's answer can't be read")?;
    let moment = Instant::now();
    Ok((TweetId(body["id"].as_i64().context("the gateway's answer has no id")?), moment))
}

/// From the answer until the last row of the tweet is committed.
fn time_tweet(
    stage: &Stage,
    agent: &ureq::Agent,
    author: UserId,
    first_follower: i64,
    followers: i64,
) -> anyhow::Result<Duration> {
    const LIMIT: Duration = Duration::from_secs(300);
    let mut conn = stage.connection()?;
    baseline::checkpoint(&mut conn)?;
    let (tweet, start) = post(agent, &stage.fleet.gateway_url(), author)?;
    let mut arrival = Arrival::of(tweet, first_follower, followers);
    while !arrival.is_complete(&mut conn)? {
        ensure!(start.elapsed() < LIMIT, "a tweet to {followers} followers hasn't arrived after {LIMIT:?}");
        thread::sleep(Duration::from_millis(4));
    }
    let elapsed = start.elapsed();
    let rows = baseline::rows_of(&mut conn, tweet)?;
    ensure!(rows == (followers, followers), "{rows:?} rows of a tweet to {followers} followers");
    Ok(elapsed)
}

/// The same rows by three sessions of plain statements at once.
fn time_plain(stage: &Stage, author: UserId, followers: i64) -> anyhow::Result<Duration> {
    let mut conn = stage.connection()?;
    let text = TweetText::parse(TEXT)?;
    let tweet = stage.database.transaction(|conn| tweets::post(conn, author, &text))?;
    let sms = text.for_sms();
    baseline::checkpoint(&mut conn)?;
    let start = Instant::now();
    let notify = |channel, text| {
        stage.database.transaction(|conn| baseline::plain_notifications(conn, channel, author, tweet.id, text))
    };
    let written: Vec<storage::Result<usize>> = thread::scope(|scope| {
        let sessions = [
            scope.spawn(|| stage.database.transaction(|conn| baseline::plain_feed_rows(conn, author, tweet.id))),
            scope.spawn(|| notify(Channel::Email, text.as_str())),
            scope.spawn(|| notify(Channel::Phone, &sms)),
        ];
        sessions.into_iter().map(|session| session.join().unwrap_or_else(|_| Ok(0))).collect()
    });
    let elapsed = start.elapsed();
    let rows: usize = written.into_iter().sum::<storage::Result<usize>>()?;
    ensure!(i64::try_from(rows) == Ok(2 * followers), "{rows} rows written plainly for {followers} followers");
    Ok(elapsed)
}

/// Returns the rate in followers/s.
fn many(args: &Fanout, stage: &Stage, figures: &mut Vec<Figure>) -> anyhow::Result<f64> {
    let (agent, followers) = (agent(), i64::from(args.followers));
    let (mut fleet, mut plain, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    // The first of each warms caches and plans.
    for run in 0..=args.runs {
        let way = f64::from(args.followers) / time_tweet(stage, &agent, TIMED, FIRST_READER, followers)?.as_secs_f64();
        let statements = f64::from(args.followers) / time_plain(stage, TIMED, followers)?.as_secs_f64();
        if run > 0 {
            fleet.push(way);
            plain.push(statements);
            ratios.push(way / statements);
        }
    }
    let ratio = median(&ratios);
    figures.push(Figure {
        what: format!("{} followers: rate ÷ rate of plain INSERT … SELECT by three sessions", args.followers),
        value: ratio,
        unit: "",
        asked: Some("≥ 0.5"),
        reached: Some(ratio >= 0.5),
        detail: format!(
            "{} and {} followers/s; ratios {}; {} runs",
            spread(&fleet),
            spread(&plain),
            spread(&ratios),
            args.runs
        ),
    });
    Ok(median(&fleet))
}

fn sizes(args: &Fanout, stage: &Stage, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let agent = agent();
    let mut costs = Vec::new();
    let first = FIRST_READER + i64::from(args.followers);
    for (author, followers) in sizes_up_to(args.largest.into()) {
        let runs: Vec<f64> = (0..args.runs.min(3))
            .map(|_| Ok(time_tweet(stage, &agent, author, first, followers)?.as_secs_f64() * 1e6 / followers as f64))
            .collect::<anyhow::Result<_>>()?;
        costs.push((followers, median(&runs)));
        figures.push(Figure {
            what: format!("{followers} followers with {} entries each: time ÷ followers", args.size_entries),
            value: median(&runs),
            unit: "µs",
            asked: None,
            reached: None,
            detail: spread(&runs),
        });
    }
    let large: Vec<f64> = costs.iter().filter(|(followers, _)| *followers >= 10_000).map(|(_, cost)| *cost).collect();
    let factor = large.iter().copied().fold(0.0, f64::max) / large.iter().copied().fold(f64::INFINITY, f64::min);
    figures.push(Figure {
        what: "time ÷ followers from 10,000 up: largest ÷ smallest".into(),
        value: factor,
        unit: "",
        asked: Some("≤ 1.5"),
        reached: Some(factor <= 1.5),
        detail: String::new(),
    });
    Ok(())
}

fn crowd(args: &Fanout, stage: &Stage, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    const POSTERS: usize = 8;
    let authors = Mutex::new(CROWD);
    let waiting = Mutex::new(Vec::new());
    let mut latencies = Histogram::<u64>::new(3).context("a histogram")?;
    let gateway = stage.fleet.gateway_url();
    let start = Instant::now();
    thread::scope(|scope| -> anyhow::Result<()> {
        let posters: Vec<_> = (0..POSTERS)
            .map(|_| {
                scope.spawn(|| -> anyhow::Result<()> {
                    let agent = agent();
                    loop {
                        let Some(author) = authors.lock().expect("no poster panics").next() else { return Ok(()) };
                        let (tweet, moment) = post(&agent, &gateway, UserId(author))?;
                        waiting.lock().expect("no poster panics").push((tweet, first_of_crowd(args, author), moment));
                    }
                })
            })
            .collect();
        let mut conn = stage.connection()?;
        let mut seen = 0;
        while seen < CROWD.count() {
            ensure!(start.elapsed() < Duration::from_secs(120), "tweets of 200 authors haven't arrived");
            let candidates = waiting.lock().expect("no poster panics").clone();
            for (tweet, reader, moment) in candidates {
                if baseline::readers_without(&mut conn, tweet, &[reader])?.is_empty() {
                    let micros = u64::try_from(moment.elapsed().as_micros()).unwrap_or(u64::MAX);
                    latencies.record(micros).context("an impossible latency")?;
                    waiting.lock().expect("no poster panics").retain(|(waiting, ..)| *waiting != tweet);
                    seen += 1;
                }
            }
        }
        for poster in posters {
            poster.join().map_err(|_| anyhow::anyhow!("a poster panicked"))??;
        }
        Ok(())
    })?;
    for (name, quantile) in [("p50", 0.5), ("p99", 0.99)] {
        figures.push(Figure {
            what: format!("200 authors with 100 followers each, all at once: answer to visible, {name}"),
            value: latencies.value_at_quantile(quantile) as f64 / 1000.0,
            unit: "ms",
            asked: None,
            reached: None,
            detail: format!("{POSTERS} connections; all visible after {:.2} s", start.elapsed().as_secs_f64()),
        });
    }
    Ok(())
}

fn memory(stage: &Stage, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    for (name, bytes) in stage.fleet.resident_bytes()? {
        let worker = name.0 != "api-gateway";
        figures.push(Figure {
            what: format!("resident memory of {} after all that", name.0),
            value: bytes as f64 / 1e6,
            unit: "MB",
            asked: worker.then_some("≤ 40 MB"),
            reached: worker.then_some(bytes <= 40_000_000),
            detail: String::new(),
        });
    }
    Ok(())
}

/// Followers/s of the fleet when it's fed as other programs feed it, and takes no batches.
fn singles(stage: &mut Stage) -> anyhow::Result<f64> {
    let one: Vec<(String, &str)> = ["FEED_UPDATER", "EMAIL_NOTIFIER", "SMS_NOTIFIER"]
        .into_iter()
        .flat_map(|service| {
            [("BATCH", "1"), ("PREFETCH", "1"), ("LINGER_MS", "0")]
                .map(|(key, value)| (format!("MURMURATION__{service}__{key}"), value))
        })
        .collect();
    let one: Vec<(&str, &str)> = one.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    stage.start(&one)?;
    let text = TweetText::parse(TEXT)?;
    let tweet: Tweet = stage.database.transaction(|conn| tweets::post(conn, SINGLES, &text))?;
    let envelopes: Vec<_> = (FIRST_READER..FIRST_READER + SINGLE_FOLLOWERS)
        .map(|reader| UpdateFeed { tweet: tweet.clone(), follower_id: UserId(reader) }.envelope())
        .collect();
    let mut publisher = broker::Publisher::new(&stage.broker, PROGRAM);
    let start = Instant::now();
    let limit = start + Duration::from_secs(300);
    publisher.publish_all(&envelopes, limit).context("the broker didn't take the messages")?;
    let mut conn = stage.connection()?;
    let readers: Vec<i64> = (FIRST_READER..FIRST_READER + SINGLE_FOLLOWERS).collect();
    let (mut email, mut phone): (Vec<i64>, Vec<i64>) = readers.iter().partition(|reader| *reader % 2 == 0);
    while !email.is_empty() || !phone.is_empty() {
        ensure!(Instant::now() < limit, "single messages haven't arrived");
        email = baseline::users_without(&mut conn, Channel::Email, tweet.id, &email)?;
        phone = baseline::users_without(&mut conn, Channel::Phone, tweet.id, &phone)?;
        thread::sleep(Duration::from_millis(50));
    }
    let rate = SINGLE_FOLLOWERS as f64 / start.elapsed().as_secs_f64();
    stage.stop()?;
    Ok(rate)
}
