use crate::{Outcome, context::Context, interrupt::Interrupt, output::pace, progress::Progress};
use anyhow::{Context as _, bail, ensure};
use domain::stream::{AccountId, PAYLOAD_MAX};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::Write,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use storage::{Database, results, stream_audit};
use ureq::Agent;

/// Post events of many accounts through the gateway, in bulk
///
/// Each event's account is drawn by the seed: the same command with the same --prefix posts the same events to the same
/// accounts once more. Which of an account's events in two requests comes first is up to the connections.
///
/// What the gateway can't answer for (503, or a lost connection) is posted again, unless the database says that it was
/// accepted. One case stays: a request whose answer was given up, and which the gateway comes round to only after it has
/// been looked for. Its events are accepted twice; that is told in the end, and exits with 1.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl load events --accounts 1000 --events 10000 --seed 7 --wait
  fleetctl load events --accounts 100 --events 100000 --rate 2000 --hot 0.5
  fleetctl load events --accounts 10 --events 100 --prefix trial-")]
pub(crate) struct Args {
    /// How many accounts: <PREFIX>0, <PREFIX>1, …
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    accounts: u64,
    /// How many events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    events: u64,
    /// What the accounts are drawn by
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// What the accounts' ids start with; without it a label that no run has had before
    #[arg(long)]
    prefix: Option<String>,
    /// How many events a request holds
    #[arg(long, default_value_t = 500, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    batch: u64,
    /// How many connections post at once
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    connections: u32,
    /// The share of the events, 0 to 1, that goes to account <PREFIX>0 besides what is drawn for it
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = share)]
    hot: f64,
    /// Events per second, over all connections; without it as fast as they go
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// How long each payload is at least
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(..=PAYLOAD_MAX as i64))]
    payload_bytes: u32,
    /// Wait until all events of these accounts are through that aren't held up by a parked one, and tell how long it
    /// took
    #[arg(long)]
    wait: bool,
    /// How long to go on trying while the gateway or the database is away
    #[arg(long, default_value = "60s", value_parser = crate::duration::parse, value_name = "DURATION")]
    patience: Duration,
    /// Where the gateway is; without it the checkout's own, or http://127.0.0.1:7777
    #[arg(long, env = "GATEWAY_URL", value_name = "URL")]
    gateway: Option<String>,
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or_else(|| "must be a number from 0 to 1".into())
}

pub(crate) fn run(
    args: &Args,
    context: &Context,
    interrupt: &Interrupt,
    out: &mut dyn Write,
) -> anyhow::Result<Outcome> {
    let label = label();
    let prefix = args.prefix.clone().unwrap_or_else(|| format!("{label}-"));
    // The last one is the longest.
    AccountId::parse(&format!("{prefix}{}", args.accounts - 1))
        .map_err(|invalid| anyhow::anyhow!("--prefix: an account's id {}", invalid.0))?;
    let gateway = context.gateway(args.gateway.as_deref());
    // A bulk a second would be no steady rate.
    let batch = args.rate.map_or(args.batch, |rate| args.batch.min((u64::from(rate) / 10).max(1)));
    let run = Run {
        url: format!("{gateway}/api/v1/event"),
        // One for each connection may look at once what has become of its request.
        database: context.database_with(|settings| settings.pool_size = args.connections)?,
        events: Events {
            label,
            prefix: prefix.clone(),
            accounts: args.accounts,
            seed: args.seed,
            hot: args.hot,
            payload_bytes: args.payload_bytes as usize,
        },
        count: args.events,
        batch,
        interval: args.rate.map(|rate| Duration::from_secs_f64(batch as f64 / f64::from(rate))),
        patience: args.patience,
        next: AtomicU64::new(0),
        failures: Mutex::default(),
        uncertain: Mutex::default(),
        progress: Progress::new("events", args.events),
        started: Instant::now(),
        interrupt,
    };
    writeln!(out, "accounts {prefix}*: {gateway}/results?prefix={prefix}")?;
    // While it runs is when one likes to look at it.
    out.flush()?;
    thread::scope(|scope| {
        for _ in 0..args.connections {
            scope.spawn(|| run.post());
        }
    });
    let (accepted, elapsed) = run.progress.finish();
    let failures = run.failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    let left = args.events - accepted;
    writeln!(out, "events: {accepted} accepted, {left} not known to be; {}", pace(accepted, elapsed))?;
    for (failure, count) in &failures {
        writeln!(out, "  {count} × {failure}")?;
    }
    let mut doubled = 0;
    for first in run.uncertain.into_inner().unwrap_or_else(PoisonError::into_inner) {
        let (account, payload) = run.events.event(first);
        let look = || stream_audit::times_accepted(&mut *run.database.connection()?, &account, &payload);
        let times = look().context("looking for events that were accepted twice")?;
        let size = run.batch.min(args.events - first);
        doubled += u64::try_from(times - 1).unwrap_or(0) * size;
    }
    if doubled > 0 {
        writeln!(out, "  {doubled} were accepted twice: their first request came through after it had been given up")?;
    }
    let all_applied = !args.wait || await_all(&context.patient_database()?, &prefix, interrupt, out)?;
    Ok(match left + doubled {
        _ if interrupt.is_set() => Outcome::Interrupted,
        0 if all_applied => Outcome::Done,
        _ => Outcome::Incomplete,
    })
}

/// Waits until nothing waits any more but what is parked, tells how it went, and answers whether every event is through.
fn await_all(database: &Database, prefix: &str, interrupt: &Interrupt, out: &mut dyn Write) -> anyhow::Result<bool> {
    const POLL_INTERVAL: Duration = Duration::from_millis(250);
    let backlog = || -> anyhow::Result<_> { Ok(stream_audit::backlog(&mut *database.connection()?, prefix)?) };
    let mut waiting = backlog()?.waiting;
    let progress = Progress::new("applied", waiting.unsigned_abs());
    while waiting > 0 && !interrupt.is_set() {
        interrupt.sleep_until(Instant::now() + POLL_INTERVAL);
        let now = backlog()?.waiting;
        progress.advance(u64::try_from(waiting - now).unwrap_or(0));
        waiting = now;
    }
    drop(progress);
    let totals = database.transaction(|conn| results::totals(conn, prefix))?;
    let took = totals.first_generated_at.zip(totals.last_processed_at).map(|(first, last)| last - first);
    let took = took.and_then(|took| took.to_std().ok()).unwrap_or_default();
    writeln!(
        out,
        "applied: {} of {}, {} skipped, {} parked; since the first was accepted {}",
        totals.applied,
        totals.accepted,
        totals.skipped,
        totals.parked,
        pace(totals.applied.unsigned_abs(), took)
    )?;
    if let Some(longest) = &totals.longest {
        let work = Duration::from_millis(longest.work_ms.unsigned_abs());
        let mut line =
            format!("longest account: {}, {} events, {:.1} s of work", longest.key, longest.events, work.as_secs_f64());
        if !work.is_zero() {
            write!(line, "; all took {:.3} times as long", took.as_secs_f64() / work.as_secs_f64())?;
        }
        writeln!(out, "{line}")?;
    }
    if totals.order_errors > 0 {
        writeln!(out, "ORDER ERRORS: {} (fleetctl events verify)", totals.order_errors)?;
    }
    Ok(totals.waiting() == 0 && totals.order_errors == 0)
}

/// `r` and six letters or digits.
fn label() -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let digit = |_| char::from(DIGITS[rand::random_range(0..DIGITS.len())]);
    "r".chars().chain((0..6).map(digit)).collect()
}

/// What is posted.
struct Events {
    /// Of this run alone: so its events can be told from all others.
    label: String,
    prefix: String,
    accounts: u64,
    seed: u64,
    hot: f64,
    payload_bytes: usize,
}

impl Events {
    /// Account and payload of event number `index`.
    fn event(&self, index: u64) -> (String, String) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        // A stream of its own for each event, so that it doesn't matter which connection posts it.
        let mut rng = StdRng::seed_from_u64(rng.random::<u64>() ^ index);
        let account = if rng.random_bool(self.hot) { 0 } else { rng.random_range(0..self.accounts) };
        let start = format!(r#"{{"run":"{}","event":{index}"#, self.label);
        let payload = if start.len() + 1 >= self.payload_bytes {
            format!("{start}}}")
        } else {
            let around = start.len() + r#","padding":""}"#.len();
            format!(r#"{start},"padding":"{}"}}"#, "x".repeat(self.payload_bytes.saturating_sub(around)))
        };
        (format!("{}{account}", self.prefix), payload)
    }

    /// A request's body.
    fn body(&self, range: std::ops::Range<u64>) -> String {
        let event = |index| {
            let (account, payload) = self.event(index);
            format!(r#"{{"accountId":"{account}","payload":{payload}}}"#)
        };
        format!(r#"{{"events":[{}]}}"#, range.map(event).collect::<Vec<_>>().join(","))
    }
}

/// What the connections share.
struct Run<'a> {
    url: String,
    database: Database,
    events: Events,
    count: u64,
    batch: u64,
    interval: Option<Duration>,
    patience: Duration,
    /// The index of the next request.
    next: AtomicU64,
    /// Why events weren't accepted, and how many that concerns. One is the end.
    failures: Mutex<BTreeMap<String, u64>>,
    /// The first events of requests that were posted more than once.
    uncertain: Mutex<Vec<u64>>,
    progress: Progress,
    started: Instant,
    interrupt: &'a Interrupt,
}

/// How a request ended.
enum Answer {
    Accepted,
    /// It didn't reach the gateway.
    Unsent(String),
    /// It may have been accepted.
    Unknown(String),
    /// It never will be.
    Refused(String),
}

impl Run<'_> {
    /// One connection's share.
    fn post(&self) {
        let agent = Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(60)))
            .http_status_as_error(false)
            .build()
            .into();
        while !self.interrupt.is_set() && self.failures().is_empty() {
            let request = self.next.fetch_add(1, Ordering::Relaxed);
            let first = request * self.batch;
            if first >= self.count {
                return;
            }
            if let Some(interval) = self.interval {
                self.interrupt.sleep_until(self.started + interval.mul_f64(request as f64));
                if self.interrupt.is_set() {
                    return;
                }
            }
            let range = first..(first + self.batch).min(self.count);
            let size = range.end - range.start;
            match self.post_until_accepted(&agent, range) {
                Ok(()) => self.progress.advance(size),
                Err(error) => *self.failures().entry(format!("{error:#}")).or_default() += size,
            }
        }
    }

    fn failures(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, u64>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post_until_accepted(&self, agent: &Agent, range: std::ops::Range<u64>) -> anyhow::Result<()> {
        const FIRST_WAIT: Duration = Duration::from_millis(100);
        const LONGEST_WAIT: Duration = Duration::from_secs(2);
        let first = range.start;
        let body = self.events.body(range);
        let deadline = Instant::now() + self.patience;
        let mut wait = FIRST_WAIT;
        let mut is_uncertain = false;
        loop {
            let reason = match post(agent, &self.url, &body) {
                Answer::Accepted => return Ok(()),
                Answer::Refused(reason) => bail!(reason),
                Answer::Unsent(reason) => reason,
                Answer::Unknown(reason) => {
                    if !is_uncertain {
                        is_uncertain = true;
                        self.uncertain.lock().unwrap_or_else(PoisonError::into_inner).push(first);
                    }
                    reason
                }
            };
            log::info!("a request is tried again if need be: {reason}");
            loop {
                self.interrupt.sleep_until(Instant::now() + wait);
                wait = (wait * 2).min(LONGEST_WAIT);
                ensure!(!self.interrupt.is_set(), "interrupted after: {reason}");
                ensure!(Instant::now() < deadline, "{reason}");
                if !is_uncertain {
                    break;
                }
                // All of a request is accepted, or nothing. As long as the database can't tell, nobody can.
                match self.is_there(first) {
                    Ok(true) => return Ok(()),
                    Ok(false) => break,
                    Err(error) => log::info!("can't look for the events of a request: {error:#}"),
                }
            }
        }
    }

    fn is_there(&self, index: u64) -> anyhow::Result<bool> {
        let (account, payload) = self.events.event(index);
        let times = stream_audit::times_accepted(&mut *self.database.connection()?, &account, &payload);
        Ok(times.context("looking for an event")? > 0)
    }
}

fn post(agent: &Agent, url: &str, body: &str) -> Answer {
    let response = agent.post(url).header("content-type", "application/json").send(body);
    let mut response = match response {
        Ok(response) => response,
        Err(error) => {
            let unsent = match &error {
                ureq::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
                ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => true,
                ureq::Error::Timeout(at) => matches!(at, ureq::Timeout::Resolve | ureq::Timeout::Connect),
                // It can't be used at all.
                ureq::Error::BadUri(_) => return Answer::Refused(format!("--gateway: {error}")),
                _ => false,
            };
            let reason = format!("the gateway didn't answer: {error}");
            return if unsent { Answer::Unsent(reason) } else { Answer::Unknown(reason) };
        }
    };
    let status = response.status();
    // To the end, or else the connection can't be used again.
    let answer: Option<serde_json::Value> = response.body_mut().read_json().ok();
    match status.as_u16() {
        202 => Answer::Accepted,
        400..=499 => {
            // RFC 9457: the title doesn't change from occurrence to occurrence.
            let title = answer.as_ref().and_then(|answer| answer["title"].as_str()).unwrap_or_default();
            Answer::Refused(format!("{status} {title}"))
        }
        _ => Answer::Unknown(status.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::stream::Payload;

    fn events(seed: u64, hot: f64, payload_bytes: usize) -> Events {
        Events { label: "rabc123".into(), prefix: "p-".into(), accounts: 100, seed, hot, payload_bytes }
    }

    #[test]
    fn the_same_seed_draws_the_same_accounts_evenly_and_a_hot_one_has_its_share() {
        let accounts = |events: &Events| (0..10_000).map(|index| events.event(index).0).collect::<Vec<_>>();
        let even = accounts(&events(7, 0.0, 0));
        assert_eq!(even, accounts(&events(7, 0.0, 200)));
        assert_ne!(even, accounts(&events(8, 0.0, 0)));
        let count = |accounts: &[String], id: &str| accounts.iter().filter(|account| *account == id).count();
        for n in 0..100 {
            assert!((50..200).contains(&count(&even, &format!("p-{n}"))));
        }
        let hot = accounts(&events(7, 0.5, 0));
        assert!((4800..5300).contains(&count(&hot, "p-0")), "{}", count(&hot, "p-0"));
        assert!(accounts(&events(7, 1.0, 0)).iter().all(|account| account == "p-0"));
    }

    #[test]
    fn payloads_are_json_of_the_length_asked_for_and_each_is_another() {
        for bytes in [0, 40, 48, 49, 64, 1000, PAYLOAD_MAX] {
            let (_, payload) = events(1, 0.0, bytes).event(17);
            let least = bytes.max(r#"{"run":"rabc123","event":17}"#.len());
            assert!((least..least + 14).contains(&payload.len()), "{bytes}: {}", payload.len());
            assert!(bytes < 64 || payload.len() == bytes, "{bytes}: {}", payload.len());
            Payload::parse(payload).unwrap();
        }
        let body: serde_json::Value = serde_json::from_str(&events(1, 0.0, 0).body(3..5)).unwrap();
        assert_eq!(body["events"][1]["payload"], serde_json::json!({"run": "rabc123", "event": 4}));
    }

    #[test]
    fn a_label_is_a_short_account_id() {
        let label = label();
        assert!(AccountId::parse(&label).is_ok() && label.len() == 7, "{label}");
    }
}
