use super::{ensure_known, stream::look_at_all};
use crate::{
    Outcome,
    context::Context,
    duration, output,
    progress::Progress,
    verify::{findings_json, write_findings},
};
use anyhow::Context as _;
use domain::log::Group;
use serde_json::json;
use std::{
    io::Write,
    thread,
    time::{Duration, Instant},
};
use storage::{
    Database,
    audit::Finding,
    log_audit::{self, Progress as Read, Totals},
};

/// Check that a group has recorded each message once and in order, and name what it hasn't
///
/// Each message that comes in over HTTP has a sequence in its partition, from 1 and without gaps. What the group has recorded
/// has to have all of them, between the first and the last that it has, once each, and rising with the offset. Other
/// programs' messages have none: they are only counted. Reads one snapshot of the database, and exits with 1 if anything is
/// wrong.
///
/// It can't see what is missing before the group's first message or behind its last: what retention had removed before the
/// group read it, what `log reset-offset` left out there, and, without --wait, what is still to be read. In between, both
/// are missing; how many of the missing were confirmed by the broker and lost, `log groups` tells.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl log verify --group recorder
  fleetctl log verify --group recorder --wait 60s
  fleetctl log verify --group recorder --json | jq '.checks[] | select(.count > 0)'")]
pub(crate) struct Args {
    /// The group
    #[arg(long)]
    group: Group,
    /// First wait until the group has recorded all that was accepted, up to this long; something still under way then
    /// counts as wrong
    #[arg(long, value_parser = duration::parse, value_name = "DURATION")]
    wait: Option<Duration>,
    /// As a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let database = context.patient_database()?;
    ensure_known(&mut *database.connection()?, &args.group)?;
    let under_way = match args.wait {
        Some(wait) => await_all(&args.group, &database, context, Instant::now() + wait)?,
        None => Vec::new(),
    };
    let progress = Progress::waiting("verifying");
    let (totals, findings) = database.transaction(|conn| log_audit::run(conn, &args.group)).context("verifying")?;
    drop(progress);
    let report = Report { group: &args.group, under_way, totals, findings };
    match args.json {
        true => report.write_json(out)?,
        false => report.write_text(out)?,
    }
    Ok(if report.is_wrong() { Outcome::Incomplete } else { Outcome::Done })
}

/// Waits until the group has all that was accepted; answers what is under way when the time is over.
fn await_all(group: &Group, database: &Database, context: &Context, deadline: Instant) -> anyhow::Result<Vec<String>> {
    const POLL_INTERVAL: Duration = Duration::from_millis(250);
    let progress = Progress::waiting("waiting for the group to record all that was accepted");
    loop {
        let read = log_audit::progress(&mut *database.connection()?, group)?;
        let under_way = under_way(&read, context);
        if under_way.is_empty() || Instant::now() >= deadline {
            return Ok(under_way);
        }
        progress.say(&under_way.join("; "));
        thread::sleep(POLL_INTERVAL);
    }
}

fn under_way(read: &[Read], context: &Context) -> Vec<String> {
    let mut under_way = Vec::new();
    let mut unsure = Vec::new();
    for Read { partition, waiting, given, recorded, next_offset } in read {
        if *waiting > 0 {
            under_way.push(format!("partition {partition}: {waiting} to be published"));
        } else if let (None, Some(next), 1..) = (recorded, next_offset, given) {
            unsure.push((*partition, *next));
        } else if recorded.unwrap_or(0) < *given {
            let recorded = recorded.map_or_else(|| "none".into(), |seq| seq.to_string());
            under_way.push(format!("partition {partition}: recorded up to {recorded} of {given}"));
        }
    }
    // A group that begins there has no sequence yet, and maybe nothing to read.
    let partitions: Vec<_> = unsure.iter().map(|(partition, _)| *partition).collect();
    let (streams, _) = look_at_all(context, &partitions);
    for ((partition, next), stream) in unsure.into_iter().zip(streams) {
        if stream.is_none_or(|stream| stream.messages(Some(next)) > 0) {
            under_way.push(format!("partition {partition}: nothing recorded from offset {next} onwards"));
        }
    }
    under_way
}

/// What was found.
struct Report<'a> {
    group: &'a Group,
    under_way: Vec<String>,
    totals: Vec<Totals>,
    findings: Vec<Finding>,
}

impl Report<'_> {
    fn is_wrong(&self) -> bool {
        !self.under_way.is_empty() || self.findings.iter().any(|finding| finding.count > 0)
    }

    fn write_text(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        let row = |totals: &Totals| {
            let sequences = totals.sequences.map_or_else(|| "-".into(), |(first, last)| format!("{first} to {last}"));
            let counts = [totals.missing, totals.repeated, totals.disordered, totals.disordered_by_key];
            [totals.partition.to_string(), totals.recorded.to_string(), totals.foreign.to_string(), sequences]
                .into_iter()
                .chain(counts.map(|count| count.to_string()))
                .collect()
        };
        let header = ["PARTITION", "RECORDED", "FOREIGN", "SEQUENCES", "MISSING", "REPEATED", "OUT OF ORDER", "BY KEY"];
        output::table(out, &header, &self.totals.iter().map(row).collect::<Vec<_>>())?;
        writeln!(out)?;
        for under_way in &self.under_way {
            writeln!(out, "WRONG   still in progress: {under_way}")?;
        }
        write_findings(&self.findings, out)?;
        Ok(())
    }

    fn write_json(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        let partition = |totals: &Totals| {
            json!({
                "partition": totals.partition,
                "recorded": totals.recorded,
                "foreign": totals.foreign,
                "firstSequence": totals.sequences.map(|(first, _)| first),
                "lastSequence": totals.sequences.map(|(_, last)| last),
                "missing": totals.missing,
                "repeated": totals.repeated,
                "outOfOrder": totals.disordered,
                "outOfOrderByKey": totals.disordered_by_key,
            })
        };
        let report = json!({
            "ok": !self.is_wrong(),
            "group": self.group.as_str(),
            "underWay": self.under_way,
            "partitions": self.totals.iter().map(partition).collect::<Vec<_>>(),
            "checks": findings_json(&self.findings),
        });
        output::json(out, &report)?;
        Ok(())
    }
}
