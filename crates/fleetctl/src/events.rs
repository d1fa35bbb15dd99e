use crate::{
    Outcome,
    context::Context,
    duration, output,
    progress::Progress,
    stream::Stream,
    verify::{findings_json, write_findings},
};
use anyhow::{Context as _, ensure};
use domain::stream::ACCOUNT_EVENT;
use serde_json::json;
use std::{
    io::Write,
    thread,
    time::{Duration, Instant},
};
use storage::{
    Database, account_effects,
    audit::Finding,
    stream_audit::{self, Totals},
    streams,
};

/// Events of sequenced streams
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    Verify(Verify),
}

/// Check that every event took effect once and in order, and name each that didn't
///
/// For each key (of account events: each account), every event that was accepted has to be applied, in order, skipped by an
/// operator, or held up by a key that is parked. Of account events the effects are looked at too: in the order in which they
/// were committed they have to be the events 1, 2, 3 … without a gap, save for those that were skipped. What is still on its
/// way counts as wrong, unless there's time for it with --wait. Reads one snapshot of the database. Exits with 1 if anything
/// is wrong.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl events verify
  fleetctl events verify --prefix r1a2b3c- --wait 60s
  fleetctl events verify --json | jq '.checks[] | select(.count > 0)'")]
pub(crate) struct Verify {
    #[command(flatten)]
    of: Stream,
    /// Only keys that start with this; it's an error if there's none
    #[arg(long)]
    prefix: Option<String>,
    /// First wait until all events are through that aren't held up by a parked key, up to this long
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
    let Stream { stream } = &args.of;
    // Whoever mistypes something isn't to be told that all is well.
    streams::layout(&mut *database.connection()?, stream)?;
    let effects = if stream == ACCOUNT_EVENT { account_effects::CHECKS } else { &[] };
    let prefix = args.prefix.as_deref().unwrap_or_default();
    if let Some(wait) = args.wait {
        await_all(&database, stream, prefix, Instant::now() + wait)?;
    }
    let progress = Progress::new("verifying", (stream_audit::CHECKS.len() + effects.len()) as u64);
    let look = |check| {
        progress.say(check);
        progress.advance(1);
    };
    let run = |conn: &mut _| stream_audit::run(conn, stream, prefix, effects, look);
    let (totals, findings) = database.transaction(run).context("verifying")?;
    drop(progress);
    ensure!(totals.accepted > 0 || prefix.is_empty(), "there is no key that starts with `{prefix}`");
    let is_wrong = findings.iter().any(|finding| finding.count > 0);
    match args.json {
        true => write_json(&totals, &findings, is_wrong, out)?,
        false => write_text(&totals, &findings, out)?,
    }
    Ok(if is_wrong { Outcome::Incomplete } else { Outcome::Done })
}

/// Waits until nothing waits any more but what is parked, or the time is over.
fn await_all(database: &Database, stream: &str, prefix: &str, deadline: Instant) -> anyhow::Result<()> {
    const POLL_INTERVAL: Duration = Duration::from_millis(250);
    let progress = Progress::waiting("waiting for all events to be processed");
    loop {
        let backlog = stream_audit::backlog(&mut *database.connection()?, stream, prefix)?;
        if backlog.waiting == 0 || Instant::now() >= deadline {
            return Ok(());
        }
        progress.say(&format!("{} events still pending", backlog.waiting));
        thread::sleep(POLL_INTERVAL);
    }
}

fn write_text(totals: &Totals, findings: &[Finding], out: &mut dyn Write) -> anyhow::Result<()> {
    write_findings(findings, out)?;
    let Totals { keys, accepted, applied, skipped, parked } = totals;
    writeln!(out, "{accepted} events of {keys} keys: {applied} applied, {skipped} skipped, {parked} parked")?;
    Ok(())
}

fn write_json(totals: &Totals, findings: &[Finding], is_wrong: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let report = json!({
        "ok": !is_wrong,
        "accounts": totals.keys,
        "accepted": totals.accepted,
        "applied": totals.applied,
        "skipped": totals.skipped,
        "parked": totals.parked,
        "checks": findings_json(findings),
    });
    output::json(out, &report)?;
    Ok(())
}
