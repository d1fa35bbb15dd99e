use crate::{
    Outcome,
    context::Context,
    duration,
    interrupt::Interrupt,
    output::{self, visible},
    progress::Progress,
};
use anyhow::{Context as _, bail};
use broker::Session;
use domain::Failure;
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
    repair::{self, Repair, Totals},
};

/// Recompute every feed and who had to be notified, and tell what is missing, extra or doubled
///
/// Reads users, subscriptions and tweets in one snapshot of the database. Meaningful when the fleet is at rest: what is
/// under way is missing for now. Exits with 1 if anything is wrong.
///
/// With --repair it first writes what is missing and removes what is extra, page by page, while the fleet may run. An
/// interrupted repair goes on where it stopped when it's run again. A table keeps who began it and what it did.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl verify
  fleetctl verify --wait 60s
  fleetctl verify --json | jq .checks
  fleetctl verify --repair --dry-run
  fleetctl verify --repair --wait 60s")]
pub(crate) struct Args {
    /// First wait until nothing is under way, and look again as long as something is wrong, up to this long; something
    /// still under way then counts as wrong
    #[arg(long, value_parser = duration::parse, value_name = "DURATION")]
    wait: Option<Duration>,
    /// First write the feed rows and notifications that are missing, and remove those that are extra
    #[arg(long)]
    repair: bool,
    /// With --repair: change nothing, and say what would be written and removed; exit with 1 if that is anything
    #[arg(long, requires = "repair")]
    dry_run: bool,
    /// With --repair: begin anew, rather than where an earlier one was interrupted
    #[arg(long, requires = "repair", conflicts_with = "dry_run")]
    restart: bool,
    /// With --repair: who does it, for the record
    #[arg(long, env = "USER", default_value = "unknown", hide_env_values = true, value_name = "NAME")]
    by: String,
    /// As a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let database = context.patient_database()?;
    let mut flow = Flow::new(context, database.clone())?;
    let deadline = args.wait.map(|wait| Instant::now() + wait);
    let mut repaired = None;
    if args.repair {
        if let Some(deadline) = deadline {
            flow.await_rest(deadline)?;
        }
        let repair = repair(args, context)?;
        if !args.json || args.dry_run || !repair.is_over() {
            write_repair(&repair, args, out)?;
        }
        match () {
            () if !repair.is_over() => return Ok(Outcome::Interrupted),
            () if !args.dry_run => repaired = Some(repair),
            () if repair.totals.sum() > 0 => return Ok(Outcome::Incomplete),
            () => return Ok(Outcome::Done),
        }
    }
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
        true => report.write_json(repaired.as_ref(), out)?,
        false => report.write_text(out)?,
    }
    Ok(if report.is_wrong() { Outcome::Incomplete } else { Outcome::Done })
}

/// Repairs, or counts what a repair would do, until it's over or a signal comes.
fn repair(args: &Args, context: &Context) -> anyhow::Result<Repair> {
    /// So many failures in a row, a second apart, of what may pass.
    const PATIENCE: u32 = 30;
    let interrupt = Interrupt::catch()?;
    let database = context.database()?;
    let mut repair = if args.dry_run {
        Repair::rehearsal()
    } else {
        database.transaction(|conn| {
            if args.restart {
                repair::abandon(conn)?;
            }
            repair::open(conn, &args.by)
        })?
    };
    if repair.totals.sum() > 0 {
        eprintln!("continuing repair {}, which {} began", repair.id, visible(&repair.started_by));
    }
    let progress = Progress::waiting("repairing");
    let mut failures = 0;
    while !repair.is_over() && !interrupt.is_set() {
        let next = match args.dry_run {
            true => database.transaction(|conn| repair::rehearse(conn, &repair)),
            false => database.transaction(|conn| repair::step(conn, repair.id)),
        };
        match next.map_err(Failure::from) {
            Ok(next) => (repair, failures) = (next, 0),
            Err(failure) if !matches!(failure, Failure::Permanent(_)) && failures < PATIENCE => {
                failures += 1;
                progress.say(&format!("trying again: {:#}", failure.error()));
                interrupt.sleep_until(Instant::now() + Duration::from_secs(1));
                continue;
            }
            Err(failure) => {
                bail!("{:#}; what is repaired stays repaired; run it again to continue", failure.error())
            }
        }
        progress.say(&format!("{}; {}", repair.place(), summary(&repair.totals, args.dry_run)));
    }
    Ok(repair)
}

fn summary(totals: &Totals, dry_run: bool) -> String {
    let Totals { feed_rows_written, notifications_written, feed_rows_removed, notifications_removed } = totals;
    let would = if dry_run { " would be" } else { "" };
    format!(
        "{feed_rows_written} feed rows and {notifications_written} notifications{would} written, \
         {feed_rows_removed} feed rows and {notifications_removed} notifications{would} removed"
    )
}

fn write_repair(repair: &Repair, args: &Args, out: &mut dyn Write) -> anyhow::Result<()> {
    if args.json {
        output::json(out, &json!({"repair": repair_json(repair)}))?;
        return Ok(());
    }
    let id = if args.dry_run { String::new() } else { format!(" {}", repair.id) };
    let stopped = if repair.is_over() { "" } else { "; interrupted, run it again to continue" };
    writeln!(out, "repair{id}: {}{stopped}", summary(&repair.totals, args.dry_run))?;
    Ok(())
}

fn repair_json(repair: &Repair) -> serde_json::Value {
    let Totals { feed_rows_written, notifications_written, feed_rows_removed, notifications_removed } = repair.totals;
    json!({
        "id": (repair.id > 0).then_some(repair.id),
        "done": repair.is_over(),
        "feedRowsWritten": feed_rows_written,
        "notificationsWritten": notifications_written,
        "feedRowsRemoved": feed_rows_removed,
        "notificationsRemoved": notifications_removed,
    })
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
            write!(f, "{separator}can't see the queues: {reason}")?;
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
        let settings = self.broker.as_ref().ok_or("no broker address is given (--amqp-url)")?;
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
        let progress = Progress::waiting("waiting for work in progress to finish");
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
            writeln!(out, "note    can't see the queues: {reason}")?;
        }
        let level = if self.rest_required { "WRONG " } else { "note  " };
        for (place, count) in &self.rest.under_way {
            writeln!(out, "{level}  still in progress: {count} in {place}")?;
        }
        write_findings(&self.findings, out)?;
        if self.waiting_dead_letters > 0 {
            let count = self.waiting_dead_letters;
            writeln!(out, "note    dead letters waiting for an operator: {count} (fleetctl dead-letters list)")?;
        }
        Ok(())
    }

    fn write_json(&self, repaired: Option<&Repair>, out: &mut dyn Write) -> anyhow::Result<()> {
        let under_way = self.rest.under_way.iter().map(|(place, count)| json!({"place": place, "count": count}));
        let report = json!({
            "ok": !self.is_wrong(),
            "underWay": under_way.collect::<Vec<_>>(),
            "queuesOutOfSight": self.rest.blind,
            "checks": findings_json(&self.findings),
            "waitingDeadLetters": self.waiting_dead_letters,
            "repair": repaired.map(repair_json),
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
