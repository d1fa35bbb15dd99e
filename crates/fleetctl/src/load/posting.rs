//! Posting in bulk: over several connections, at a rate, and once more where the gateway couldn't answer.

use crate::{
    interrupt::Interrupt,
    output::{pace, visible},
    progress::Progress,
};
use anyhow::{Context as _, bail, ensure};
use std::{
    collections::BTreeMap,
    io::Write,
    ops::Range,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use ureq::Agent;

/// Options of what is posted until it's accepted.
#[derive(clap::Args)]
pub(super) struct Options {
    /// How many connections post at once
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(super) connections: u32,
    /// How many of them per second, over all connections; without it as fast as they go
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) rate: Option<u32>,
    /// How long to go on trying while the gateway or the database is away
    #[arg(long, default_value = "60s", value_parser = crate::duration::parse, value_name = "DURATION")]
    pub(super) patience: Duration,
    /// Where the gateway is; without it the checkout's own, or http://127.0.0.1:7777
    #[arg(long, env = "GATEWAY_URL", value_name = "URL")]
    pub(super) gateway: Option<String>,
}

impl Options {
    /// Posting so many, with `batch` in a request: fewer at a slow rate, where a bulk a second would be no steady one.
    pub(super) fn posting<'a>(&self, count: u64, batch: u64, interrupt: &'a Interrupt) -> Posting<'a> {
        let batch = self.rate.map_or(batch, |rate| batch.min((u64::from(rate) / 10).max(1)));
        Posting { count, batch, connections: self.connections, rate: self.rate, max_failures: 1, interrupt }
    }

    /// Posting until it's accepted; `look` looks for a request's content in the database.
    pub(super) fn delivery<'a, L: Fn(&Request) -> anyhow::Result<Found>>(
        &self,
        url: String,
        interrupt: &'a Interrupt,
        look: L,
    ) -> Delivery<'a, L> {
        Delivery { url, patience: self.patience, interrupt, look, repeated: Mutex::default() }
    }
}

/// What is to be posted, and how fast.
pub(super) struct Posting<'a> {
    pub(super) count: u64,
    /// How many a request holds.
    pub(super) batch: u64,
    pub(super) connections: u32,
    /// How many per second, over all connections.
    pub(super) rate: Option<u32>,
    /// How many that weren't accepted are the end.
    pub(super) max_failures: u64,
    pub(super) interrupt: &'a Interrupt,
}

/// One request of many.
#[derive(Clone)]
pub(super) struct Request {
    /// Its place among the requests, from 0.
    pub(super) index: u64,
    /// What it holds, each by its place among all, from 0.
    pub(super) range: Range<u64>,
}

impl Request {
    /// How many it holds.
    pub(super) fn size(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// What became of them.
pub(super) struct Posted {
    pub(super) accepted: u64,
    pub(super) elapsed: Duration,
    /// Why some weren't accepted, and how many that concerns.
    pub(super) failures: BTreeMap<String, u64>,
}

impl Posting<'_> {
    /// Hands the requests to `post`, over several connections; those that it couldn't post have failed.
    pub(super) fn run(&self, what: &str, post: impl Fn(&Agent, &Request) -> anyhow::Result<()> + Sync) -> Posted {
        let (next, failures) = (AtomicU64::new(0), Mutex::<BTreeMap<String, u64>>::default());
        let (progress, started) = (Progress::new(what, self.count), Instant::now());
        let connection = || {
            let agent = agent();
            while !self.interrupt.is_set() && lock(&failures).values().sum::<u64>() < self.max_failures {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let first = index * self.batch;
                if first >= self.count {
                    return;
                }
                let request = Request { index, range: first..(first + self.batch).min(self.count) };
                if let Some(rate) = self.rate {
                    self.interrupt.sleep_until(started + Duration::from_secs_f64(first as f64 / f64::from(rate)));
                    if self.interrupt.is_set() {
                        return;
                    }
                }
                match post(&agent, &request) {
                    Ok(()) => progress.advance(request.size()),
                    Err(error) => *lock(&failures).entry(format!("{error:#}")).or_default() += request.size(),
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..self.connections {
                scope.spawn(connection);
            }
        });
        let (accepted, elapsed) = progress.finish();
        Posted { accepted, elapsed, failures: failures.into_inner().unwrap_or_else(PoisonError::into_inner) }
    }
}

impl Posted {
    /// Tells how it went that each was to be accepted, and returns how many aren't known to be.
    pub(super) fn tell(&self, what: &str, count: u64, out: &mut dyn Write) -> anyhow::Result<u64> {
        let left = count - self.accepted;
        let pace = pace(self.accepted, self.elapsed);
        writeln!(out, "{what}: {} accepted, {left} unconfirmed; {pace}", self.accepted)?;
        self.tell_failures(out)?;
        Ok(left)
    }

    /// A line for each kind of failure.
    pub(super) fn tell_failures(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        for (failure, count) in &self.failures {
            writeln!(out, "  {count} × {failure}")?;
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn agent() -> Agent {
    const TIMEOUT: Duration = Duration::from_secs(60);
    Agent::config_builder().timeout_global(Some(TIMEOUT)).http_status_as_error(false).build().into()
}

/// How a request ended.
pub(super) enum Answer {
    Accepted,
    /// It didn't reach the gateway.
    Unsent(String),
    /// It may have been accepted.
    Unknown(String),
    /// It never will be.
    Refused(String),
}

/// Posts a JSON body.
pub(super) fn post(agent: &Agent, url: &str, body: &str) -> Answer {
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
    let reason = || match answer.as_ref().and_then(|answer| answer["detail"].as_str()) {
        // RFC 9457. The gateway's own don't change from occurrence to occurrence.
        Some(detail) => format!("{status}: {}", visible(detail)),
        None => status.to_string(),
    };
    match status.as_u16() {
        200..=299 if answer.is_some() => Answer::Accepted,
        // It arrived too slowly.
        408 => Answer::Unknown(reason()),
        400..=499 => Answer::Refused(reason()),
        _ => Answer::Unknown(reason()),
    }
}

/// How often what a request holds is in the database.
pub(super) struct Found {
    /// At least so often.
    pub(super) times: u64,
    /// Not more often either.
    pub(super) is_all: bool,
}

/// Posts requests until they're accepted: again what the gateway can't answer for, unless the database has it. All of a
/// request is accepted, or nothing.
pub(super) struct Delivery<'a, L> {
    url: String,
    patience: Duration,
    interrupt: &'a Interrupt,
    look: L,
    /// Those that were posted again although the first one may have reached the gateway.
    repeated: Mutex<Vec<Request>>,
}

/// How many may have come to be there by a request that was given up, and came through all the same.
#[derive(Default)]
pub(super) struct Doubles {
    /// Accepted twice.
    certain: u64,
    /// Maybe so.
    possible: u64,
}

impl<L: Fn(&Request) -> anyhow::Result<Found>> Delivery<'_, L> {
    /// Posts a request with this body.
    ///
    /// # Errors
    /// When it isn't accepted, or not known to be, and why.
    pub(super) fn post(&self, agent: &Agent, request: &Request, body: &str) -> anyhow::Result<()> {
        const FIRST_WAIT: Duration = Duration::from_millis(100);
        const LONGEST_WAIT: Duration = Duration::from_secs(2);
        let deadline = Instant::now() + self.patience;
        let (mut wait, mut is_uncertain, mut is_repeated) = (FIRST_WAIT, false, false);
        loop {
            let reason = match post(agent, &self.url, body) {
                Answer::Accepted => return Ok(()),
                Answer::Refused(reason) => bail!(reason),
                Answer::Unsent(reason) => reason,
                Answer::Unknown(reason) => {
                    is_uncertain = true;
                    reason
                }
            };
            log::info!("retrying a request: {reason}");
            let mut doubt = "";
            loop {
                self.interrupt.sleep_until(Instant::now() + wait);
                wait = (wait * 2).min(LONGEST_WAIT);
                ensure!(!self.interrupt.is_set(), "interrupted after: {reason}");
                // Once at least, however late the answer was given up. As long as the database can't tell, nobody can.
                let mut is_told = !is_uncertain;
                if is_uncertain {
                    match (self.look)(request) {
                        Ok(Found { times: 1.., .. }) => return Ok(()),
                        Ok(Found { is_all: true, .. }) => (is_told, doubt) = (true, ""),
                        Ok(_) => doubt = "; it may have been accepted all the same",
                        Err(error) => log::info!("can't check whether a request was accepted: {error:#}"),
                    }
                }
                ensure!(Instant::now() < deadline, "{reason}{doubt}");
                if is_told {
                    break;
                }
            }
            if is_uncertain && !is_repeated {
                is_repeated = true;
                lock(&self.repeated).push(request.clone());
            }
        }
    }

    /// Looks for what was accepted twice, until that can be told or patience is over.
    pub(super) fn doubles(&self) -> anyhow::Result<Doubles> {
        const INTERVAL: Duration = Duration::from_millis(250);
        let deadline = Instant::now() + self.patience;
        let mut doubles = Doubles::default();
        for request in &*lock(&self.repeated) {
            let found = loop {
                let found = (self.look)(request).context("looking for what was accepted twice")?;
                if found.is_all || self.interrupt.is_set() || Instant::now() >= deadline {
                    break found;
                }
                self.interrupt.sleep_until(Instant::now() + INTERVAL);
            };
            match found.times {
                2.. => doubles.certain += (found.times - 1) * request.size(),
                _ if !found.is_all => doubles.possible += request.size(),
                _ => {}
            }
        }
        Ok(doubles)
    }
}

impl Doubles {
    /// Tells of them, if there are any, and returns whether there are none.
    pub(super) fn tell(&self, out: &mut dyn Write) -> anyhow::Result<bool> {
        let &Self { certain, possible } = self;
        if certain > 0 {
            writeln!(
                out,
                "  {certain} were accepted twice: the first request came through after it had been given up"
            )?;
        }
        if possible > 0 {
            writeln!(out, "  {possible} may have been accepted twice")?;
        }
        Ok(certain + possible == 0)
    }
}
