use super::{
    label,
    posting::{Found, Options, Request},
};
use crate::{Outcome, context::Context, duration, interrupt::Interrupt, output::pace, progress::Progress};
use domain::stream::{ACCOUNT_EVENT, AccountId, PAYLOAD_MAX};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    fmt::Write as _,
    io::Write,
    ops::Range,
    time::{Duration, Instant},
};
use storage::{Database, results, stream_audit};

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
  fleetctl load events --accounts 1000 --events 10000 --seed 7 --wait 5m
  fleetctl load events --accounts 100 --events 100000 --rate 2000 --hot 0.5
  fleetctl load events --accounts 10 --events 100 --prefix trial-")]
pub(crate) struct Args {
    /// How many accounts: <PREFIX>0, <PREFIX>1, …
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    accounts: u64,
    /// How many events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    events: u64,
    /// The seed that accounts are drawn with
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// What the accounts' ids start with; without it a label that no run has had before
    #[arg(long)]
    prefix: Option<String>,
    /// How many events a request holds
    #[arg(long, default_value_t = 500, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    batch: u64,
    /// The share of the events, 0 to 1, that goes to account <PREFIX>0 besides what is drawn for it
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = share)]
    hot: f64,
    /// How long each payload is at least
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(..=PAYLOAD_MAX as i64))]
    payload_bytes: u32,
    /// Then wait, up to this long, until all events of these accounts are processed or held up by a parked one, and tell how
    /// long it took; exit with 1 if any are still pending
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    wait: Option<Duration>,
    #[command(flatten)]
    options: Options,
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
    let options = &args.options;
    let gateway = context.gateway(options.gateway.as_deref());
    // One for each connection may look at once what has become of its request.
    let database = context.database_with(|settings| settings.pool_size = options.connections)?;
    let events = Events {
        label,
        prefix: prefix.clone(),
        accounts: args.accounts,
        seed: args.seed,
        hot: args.hot,
        payload_bytes: args.payload_bytes as usize,
    };
    let look = |request: &Request| {
        let (account, payload) = events.event(request.range.start);
        let times = stream_audit::times_accepted(&mut *database.connection()?, ACCOUNT_EVENT, &account, &payload)?;
        Ok(Found { times: times.unsigned_abs(), is_all: true })
    };
    let delivery = options.delivery(format!("{gateway}/api/v1/event"), interrupt, look);
    writeln!(out, "accounts {prefix}*: {gateway}/results?prefix={prefix}")?;
    // While it runs is when one likes to look at it.
    out.flush()?;
    let posting = options.posting(args.events, args.batch, interrupt);
    let posted =
        posting.run("events", |agent, request| delivery.post(agent, request, &events.body(request.range.clone())));
    let left = posted.tell("events", args.events, out)?;
    let none_doubled = delivery.doubles()?.tell(out)?;
    let all_applied = match args.wait {
        Some(wait) => await_all(&context.patient_database()?, &prefix, wait, interrupt, out)?,
        None => true,
    };
    Ok(match left {
        _ if interrupt.is_set() => Outcome::Interrupted,
        0 if none_doubled && all_applied => Outcome::Done,
        _ => Outcome::Incomplete,
    })
}

/// Waits up to `limit` until nothing is pending but what is parked, tells how it went, and returns whether every event is
/// processed.
fn await_all(
    database: &Database,
    prefix: &str,
    limit: Duration,
    interrupt: &Interrupt,
    out: &mut dyn Write,
) -> anyhow::Result<bool> {
    const POLL_INTERVAL: Duration = Duration::from_millis(250);
    let deadline = Instant::now() + limit;
    let backlog =
        || -> anyhow::Result<_> { Ok(stream_audit::backlog(&mut *database.connection()?, ACCOUNT_EVENT, prefix)?) };
    let mut waiting = backlog()?.waiting;
    let progress = Progress::new("applied", waiting.unsigned_abs());
    while waiting > 0 && !interrupt.is_set() && Instant::now() < deadline {
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
    if waiting > 0 {
        writeln!(out, "{waiting} events still pending")?;
    }
    if let Some(longest) = &totals.longest {
        let work = Duration::from_millis(longest.work_ms.unsigned_abs());
        let mut line =
            format!("longest account: {}, {} events, {:.1} s of work", longest.key, longest.events, work.as_secs_f64());
        if !work.is_zero() {
            write!(line, "; all of it took {:.3} times as long", took.as_secs_f64() / work.as_secs_f64())?;
        }
        writeln!(out, "{line}")?;
    }
    if totals.order_errors > 0 {
        writeln!(out, "ORDER ERRORS: {} (fleetctl events verify)", totals.order_errors)?;
    }
    Ok(totals.waiting() == 0 && totals.order_errors == 0)
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
    fn body(&self, range: Range<u64>) -> String {
        let event = |index| {
            let (account, payload) = self.event(index);
            format!(r#"{{"accountId":"{account}","payload":{payload}}}"#)
        };
        format!(r#"{{"events":[{}]}}"#, range.map(event).collect::<Vec<_>>().join(","))
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
