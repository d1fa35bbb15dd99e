use super::{
    chosen, ensure_known, running,
    stream::{self, Stream},
    told, told_contents,
};
use crate::{Outcome, consent::Consent, context::Context, duration};
use anyhow::{bail, ensure};
use chrono::{DateTime, Utc};
use domain::log::{Group, partition_queue};
use std::io::Write;
use storage::{
    PgConnection,
    consumer_offsets::{self, Contents},
    log_audit,
};

/// Move a group to another place in a partition, or in all of them
///
/// What the group had recorded or skipped from there on is removed, and recorded again when it's read again. Going ahead
/// leaves out what is in between, which `log verify` reports as missing. The group's members are to be stopped first. Says how
/// much is removed, and asks before it is.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl log reset-offset --group recorder --first --dry-run
  fleetctl log reset-offset --group recorder --partition 0 --offset 1200
  fleetctl log reset-offset --group recorder --time 2h
  fleetctl log reset-offset --group recorder --time 2024-05-01T12:00:00Z --force --yes")]
pub(crate) struct Args {
    /// The group
    #[arg(long)]
    group: Group,
    /// Only this one; otherwise all
    #[arg(long, value_name = "P")]
    partition: Option<i32>,
    #[command(flatten)]
    to: To,
    /// Even while members of the group run; they continue from the new place
    #[arg(long)]
    force: bool,
    /// Change nothing, and say what would be changed
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    consent: Consent,
    /// With --next: also where the group has read further than the stream goes, since the broker has lost messages
    #[arg(long, conflicts_with_all = ["offset", "time", "first"])]
    back: bool,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct To {
    /// To this offset of the one partition
    #[arg(long, value_name = "N", requires = "partition", value_parser = clap::value_parser!(i64).range(0..))]
    offset: Option<i64>,
    /// To the first message that was stored then or later, RFC 3339, or how long ago (90s, 15m, 2h). The broker knows it to the
    /// second, and to the messages that were stored together
    #[arg(long, value_name = "TIME", value_parser = time)]
    time: Option<DateTime<Utc>>,
    /// To the first message that is left
    #[arg(long)]
    first: bool,
    /// To the message that comes next
    #[arg(long)]
    next: bool,
}

fn time(text: &str) -> Result<DateTime<Utc>, String> {
    if let Ok(ago) = duration::parse(text) {
        let ago = chrono::TimeDelta::from_std(ago).ok();
        return ago.and_then(|ago| Utc::now().checked_sub_signed(ago)).ok_or_else(|| "is too long ago".into());
    }
    let time = DateTime::parse_from_rfc3339(text).map(|time| time.to_utc());
    time.map_err(|_| "must be a time such as 2024-05-01T12:00:00Z, or how long ago, such as 90s, 15m or 2h".into())
}

/// Where a partition goes.
struct Target {
    partition: i32,
    offset: i64,
}

/// What became, or would become, of a partition.
struct Moved {
    partition: i32,
    from: Option<i64>,
    to: i64,
    removed: Contents,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let database = context.patient_database()?;
    let partitions = {
        let mut conn = database.connection()?;
        ensure_known(&mut conn, &args.group)?;
        chosen(&mut conn, args.partition)?
    };
    let seen_within_ms = context.recorder_seen_within_ms()?;
    let targets = targets(&args.to, &partitions, &context.broker()?)?;
    let all = |dry_run: bool| {
        let reset = database.transaction(|conn| {
            let members = running(conn, &args.group, seen_within_ms)?;
            if !members.is_empty() && !args.force {
                return Ok(Err(members));
            }
            let moved = targets.iter().map(|target| args.reset(conn, target, dry_run));
            Ok(Ok(moved.collect::<storage::Result<Vec<_>>>()?))
        })?;
        reset.or_else(|members| bail!("{}; stop them first, or use --force", told(&args.group, &members)))
    };
    let mut moved = all(true)?;
    args.ensure_not_back(&moved)?;
    if !args.dry_run {
        let sum = |count: fn(&Contents) -> i64| moved.iter().map(|moved| count(&moved.removed)).sum();
        let removed =
            Contents { messages: sum(|contents| contents.messages), skipped: sum(|contents| contents.skipped) };
        if removed != (Contents { messages: 0, skipped: 0 }) {
            let what = format!("of group `{}`, {} are to be removed", args.group, told_contents(removed));
            args.consent.obtain(&what)?;
        }
        moved = all(false)?;
    }
    let removed = if args.dry_run { "would be removed" } else { "removed" };
    for Moved { partition, from, to, removed: Contents { messages, .. } } in moved {
        let from = from.map_or_else(|| "-".into(), |from| from.to_string());
        let plural = if messages == 1 { "message" } else { "messages" };
        writeln!(out, "partition {partition}: {from} -> {to}, {messages} recorded {plural} {removed}")?;
    }
    Ok(Outcome::Done)
}

impl Args {
    fn reset(&self, conn: &mut PgConnection, target: &Target, dry_run: bool) -> storage::Result<Moved> {
        let Target { partition, offset } = *target;
        let from = consumer_offsets::position(conn, &self.group, partition)?.map(|position| position.next_offset);
        let removed = log_audit::contents_from(conn, &self.group, partition, offset)?;
        if !dry_run {
            consumer_offsets::reset(conn, &self.group, partition, offset)?;
        }
        Ok(Moved { partition, from, to: offset, removed })
    }

    /// The next message is where the group is, or ahead. Else something is wrong with the stream.
    fn ensure_not_back(&self, moved: &[Moved]) -> anyhow::Result<()> {
        for Moved { partition, from, to, .. } in moved {
            let is_back = self.to.next && from.is_some_and(|from| *to < from);
            ensure!(
                !is_back || self.back,
                "partition {partition}: the next message would be at offset {to}, and the group has read up to {}: the stream \
                 has lost messages; to have the group go back all the same, say --back as well",
                from.unwrap_or_default()
            );
        }
        Ok(())
    }
}

/// The offsets that are meant.
fn targets(to: &To, partitions: &[i32], broker: &broker::Settings) -> anyhow::Result<Vec<Target>> {
    let looked = stream::survey(broker, partitions, |survey, partition| {
        let stream = Stream::look(survey, partition)?;
        let since = match to.time {
            Some(time) if stream.newest().is_some() => survey.since(&partition_queue(partition), time)?,
            _ => None,
        };
        Ok((stream, since))
    })?;
    let target = |(partition, (stream, since)): (&i32, (Stream, Option<i64>))| {
        let partition = *partition;
        stream.ensure_declared(partition)?;
        let offset = match to {
            To { offset: Some(offset), .. } => {
                // The next one may be waited for.
                if *offset != stream.next() {
                    stream.ensure_holds(partition, *offset)?;
                }
                *offset
            }
            To { first: true, .. } => stream.first().unwrap_or(0),
            // Nothing has been stored since.
            To { time: Some(_), .. } => since.unwrap_or(stream.next()),
            To { .. } => stream.next(),
        };
        Ok(Target { partition, offset })
    };
    partitions.iter().zip(looked).map(target).collect()
}

#[cfg(test)]
mod tests {
    use super::time;
    use chrono::{DateTime, TimeDelta, Utc};

    #[test]
    fn a_time_is_a_date_or_how_long_ago() {
        let date = time("2024-05-01T14:00:00+02:00").unwrap();
        assert_eq!(date, "2024-05-01T12:00:00Z".parse::<DateTime<Utc>>().unwrap());
        let time_ago = time("2h").unwrap();
        let ago = Utc::now() - time_ago;
        assert!(ago >= TimeDelta::hours(2) && ago < TimeDelta::hours(2) + TimeDelta::minutes(1), "{ago}");
        for bad in ["", "yesterday", "2024-05-01", "2024-05-01T12:00:00", "-2h", "9999999999999h"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }
}
