use crate::{
    Outcome,
    context::Context,
    duration,
    output::{self, visible},
    progress::Progress,
};
use anyhow::Context as _;
use broker::Session;
use serde_json::json;
use std::{
    fmt,
    io::{self, Write},
    thread,
    time::{Duration, Instant},
};
use storage::{
    Database,
    audit::{self, Finding},
    dead_letters, outbox,
};

/// Recompute every feed and who had to be notified, and tell what is missing, extra or doubled
///
/// Reads users, subscriptions and tweets in one snapshot of the database. Meaningful when the fleet is at rest: what is
/// under way is missing for now. Exits with 1 if anything is wrong.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl verify
  fleetctl verify --wait 60s
  fleetctl verify --json | jq .checks")]
pub(crate) struct Args {
    /// First wait until nothing is under way, and look again as long as something is wrong, up to this long; something
    /// still under way then counts as wrong
    #[arg(long, value_parser = duration::parse, value_name = "DURATION")]
    wait: Option<Duration>,
    /// As a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let database = context.patient_database()?;
    let mut flow = Flow::new(context, database.clone())?;
    let deadline = args.wait.map(|wait| Instant::now() + wait);
    let report = loop {
        let rest = match deadline {
            Some(deadline) => flow.await_rest(deadline)?,
            None => flow.look()?,
        };
        let report = audit(&database, rest, deadline.is_some())?;
        // A message that a worker has in hand is in no queue's depth: what is missing may just be on its way.
        match deadline {
            Some(deadline) if report.is_wrong() && Instant::now() < deadline => thread::sleep(POLL_INTERVAL),
            _ => break report,
        }
    };
    match args.json {
        true => report.write_json(out)?,
        false => report.write_text(out)?,
    }
    Ok(if report.is_wrong() { Outcome::Incomplete } else { Outcome::Done })
}

const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// So many polls in a row must find nothing.
const QUIET_POLLS: u32 = 5;

/// What messages are where.
#[derive(Default)]
struct Rest {
    /// Outbox and queues that aren't empty.
    under_way: Vec<(String, u64)>,
    /// Why nothing is known of the queues.
    blind: Option<String>,
}

impl fmt::Display for Rest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let under_way: Vec<_> = self.under_way.iter().map(|(place, count)| format!("{count} in {place}")).collect();
        f.write_str(&under_way.join(", "))?;
        if let Some(reason) = &self.blind {
            let separator = if under_way.is_empty() { "" } else { "; " };
            write!(f, "{separator}the queues are out of sight: {reason}")?;
        }
        Ok(())
    }
}

/// Watches what is under way.
struct Flow {
    database: Database,
    /// `None` where nothing says where it is.
    broker: Option<broker::Settings>,
    session: Option<Session>,
    queues: Vec<String>,
}

impl Flow {
    fn new(context: &Context, database: Database) -> anyhow::Result<Self> {
        let queues = context.topology()?.queues.into_iter().map(|queue| queue.name).collect();
        Ok(Self { database, broker: context.broker_if_set()?, session: None, queues })
    }

    fn look(&mut self) -> anyhow::Result<Rest> {
        let mut rest = Rest::default();
        // The outbox first: what leaves it is in a queue by then.
        let waiting = outbox::count(&mut *self.database.connection()?)?;
        if waiting > 0 {
            rest.under_way.push(("the outbox".into(), waiting.unsigned_abs()));
        }
        match self.depths() {
            Ok(depths) => rest.under_way.extend(depths.into_iter().filter(|(_, depth)| *depth > 0)),
            Err(reason) => rest.blind = Some(reason),
        }
        Ok(rest)
    }

    fn depths(&mut self) -> Result<Vec<(String, u64)>, String> {
        let settings = self.broker.as_ref().ok_or("nothing says where the broker is (--amqp-url)")?;
        let chain = |error: broker::Error| format!("{:#}", anyhow::Error::from(error));
        let session = match &mut self.session {
            Some(session) => session,
            none => none.insert(Session::open(settings, "fleetctl").map_err(chain)?),
        };
        match broker::depths(session, &self.queues) {
            Ok(depths) => Ok(depths.into_iter().map(|queue| (queue.name, queue.messages.into())).collect()),
            Err(error) => {
                // Whatever it was, the next look starts afresh.
                self.session = None;
                Err(chain(error))
            }
        }
    }

    /// Waits until nothing has been under way for some polls in a row; answers what is, where the time is over first.
    fn await_rest(&mut self, deadline: Instant) -> anyhow::Result<Rest> {
        let progress = Progress::waiting("waiting until nothing is under way");
        let mut quiet = 0;
        loop {
            let rest = self.look()?;
            let known = rest.blind.is_none() || self.broker.is_none();
            quiet = if rest.under_way.is_empty() && known { quiet + 1 } else { 0 };
            if quiet >= QUIET_POLLS || Instant::now() >= deadline {
                return Ok(rest);
            }
            progress.say(&rest.to_string());
            thread::sleep(POLL_INTERVAL);
        }
    }
}

fn audit(database: &Database, rest: Rest, rest_required: bool) -> anyhow::Result<Report> {
    let progress = Progress::new("verifying", audit::CHECK_COUNT as u64);
    let (findings, waiting) = database
        .transaction(|conn| {
            let findings = audit::run(conn, |check| {
                progress.say(check);
                progress.advance(1);
            })?;
            Ok((findings, dead_letters::count_waiting(conn)?))
        })
        .context("verifying")?;
    Ok(Report { rest, rest_required, findings, waiting_dead_letters: waiting.unsigned_abs() })
}

/// What was found.
struct Report {
    rest: Rest,
    /// Whether anything under way counts as wrong: whoever doesn't wait is only told.
    rest_required: bool,
    findings: Vec<Finding>,
    waiting_dead_letters: u64,
}

impl Report {
    fn is_wrong(&self) -> bool {
        (self.rest_required && !self.rest.under_way.is_empty()) || self.findings.iter().any(|finding| finding.count > 0)
    }

    fn write_text(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        if let Some(reason) = &self.rest.blind {
            writeln!(out, "note    the queues are out of sight: {reason}")?;
        }
        let level = if self.rest_required { "WRONG " } else { "note  " };
        for (place, count) in &self.rest.under_way {
            writeln!(out, "{level}  still under way: {count} in {place}")?;
        }
        write_findings(&self.findings, out)?;
        if self.waiting_dead_letters > 0 {
            let count = self.waiting_dead_letters;
            writeln!(out, "note    dead letters waiting for an operator: {count} (fleetctl dead-letters list)")?;
        }
        Ok(())
    }

    fn write_json(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        let under_way = self.rest.under_way.iter().map(|(place, count)| json!({"place": place, "count": count}));
        let report = json!({
            "ok": !self.is_wrong(),
            "underWay": under_way.collect::<Vec<_>>(),
            "queuesOutOfSight": self.rest.blind,
            "checks": findings_json(&self.findings),
            "waitingDeadLetters": self.waiting_dead_letters,
        });
        output::json(out, &report)?;
        Ok(())
    }
}

/// A line for each check, and one for each example.
pub(crate) fn write_findings(findings: &[Finding], out: &mut dyn Write) -> io::Result<()> {
    for Finding { check, count, examples } in findings {
        match count {
            0 => writeln!(out, "ok      {check}: none")?,
            _ => writeln!(out, "WRONG   {check}: {count}")?,
        }
        for example in examples {
            writeln!(out, "          {}", visible(example))?;
        }
        if *count > examples.len() as u64 {
            writeln!(out, "          and {} more", count - examples.len() as u64)?;
        }
    }
    Ok(())
}

pub(crate) fn findings_json(findings: &[Finding]) -> serde_json::Value {
    let check =
        |Finding { check, count, examples }: &Finding| json!({"check": check, "count": count, "examples": examples});
    findings.iter().map(check).collect()
}
