use crate::{
    Outcome,
    context::Context,
    duration, output,
    progress::Progress,
    verify::{findings_json, write_findings},
};
use anyhow::{Context as _, ensure};
use serde_json::json;
use std::{
    io::Write,
    thread,
    time::{Duration, Instant},
};
use storage::{
    Database,
    audit::Finding,
    stream_audit::{self, Totals},
};

/// Account events
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    Verify(Verify),
}

/// Check that every event took effect once and in order, and name each that didn't
///
/// For each account, the effects in the order in which they were committed have to be the events 1, 2, 3 … without a gap,
/// save for those that an operator skipped; every event that was accepted has to be applied, skipped, or held up by an
/// account that is parked. What is still on its way counts as wrong, unless there's time for it with --wait. Reads one
/// snapshot of the database. Exits with 1 if anything is wrong.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl events verify
  fleetctl events verify --prefix r1a2b3c- --wait 60s
  fleetctl events verify --json | jq '.checks[] | select(.count > 0)'")]
pub(crate) struct Verify {
    /// Only accounts whose id starts with this; it's an error if there's none
    #[arg(long)]
    prefix: Option<String>,
    /// First wait until all events are through that aren't held up by a parked account, up to this long
    #[arg(long, value_parser = duration::parse, value_name = "DURATION")]
    wait: Option<Duration>,
    /// As a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: &Command, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let Command::Verify(args) = command;
    verify(args, context, out)
}

fn verify(args: &Verify, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let database = context.patient_database()?;
    let prefix = args.prefix.as_deref().unwrap_or_default();
    if let Some(wait) = args.wait {
        await_all(&database, prefix, Instant::now() + wait)?;
    }
    let progress = Progress::new("verifying", stream_audit::CHECK_COUNT as u64);
    let look = |check| {
        progress.say(check);
        progress.advance(1);
    };
    let (totals, findings) = database.transaction(|conn| stream_audit::run(conn, prefix, look)).context("verifying")?;
    drop(progress);
    // Whoever mistypes it isn't to be told that all is well.
    ensure!(totals.accepted > 0 || prefix.is_empty(), "there is no account whose id starts with `{prefix}`");
    let is_wrong = findings.iter().any(|finding| finding.count > 0);
    match args.json {
        true => write_json(&totals, &findings, is_wrong, out)?,
        false => write_text(&totals, &findings, out)?,
    }
    Ok(if is_wrong { Outcome::Incomplete } else { Outcome::Done })
}

/// Waits until nothing waits any more but what is parked, or the time is over.
fn await_all(database: &Database, prefix: &str, deadline: Instant) -> anyhow::Result<()> {
    const POLL_INTERVAL: Duration = Duration::from_millis(250);
    let progress = Progress::waiting("waiting until all events are through");
    loop {
        let backlog = stream_audit::backlog(&mut *database.connection()?, prefix)?;
        if backlog.waiting == 0 || Instant::now() >= deadline {
            return Ok(());
        }
        progress.say(&format!("{} aren't", backlog.waiting));
        thread::sleep(POLL_INTERVAL);
    }
}

fn write_text(totals: &Totals, findings: &[Finding], out: &mut dyn Write) -> anyhow::Result<()> {
    write_findings(findings, out)?;
    let Totals { accounts, accepted, applied, skipped, parked } = totals;
    writeln!(out, "{accepted} events of {accounts} accounts: {applied} applied, {skipped} skipped, {parked} parked")?;
    Ok(())
}

fn write_json(totals: &Totals, findings: &[Finding], is_wrong: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let report = json!({
        "ok": !is_wrong,
        "accounts": totals.accounts,
        "accepted": totals.accepted,
        "applied": totals.applied,
        "skipped": totals.skipped,
        "parked": totals.parked,
        "checks": findings_json(findings),
    });
    output::json(out, &report)?;
    Ok(())
}
