use super::{
    ensure_known,
    stream::{Stream, figure, look_at_all, write_blindness},
};
use crate::{
    Outcome,
    context::Context,
    output::{self, short, visible},
};
use anyhow::Context as _;
use domain::log::{Group, partition_queue};
use serde::Serialize;
use std::{
    collections::{BTreeMap, HashMap},
    io::Write,
};
use storage::{
    PgConnection,
    consumer_offsets::{self, Standing},
    leases::{self, Lease, Member},
    partitions,
};

/// Show how far each consumer group has come, who reads for it, and what it hasn't recorded
///
/// LAG is how many messages are still to be read, estimated from the offsets, some of which the broker uses for itself. What
/// waits for the relay isn't in it (see `log partitions`). A NEXT that is marked as trimmed has been removed by
/// retention; one beyond the end is a stream that has lost messages, or was made anew. Of the messages that were read and
/// not recorded, SKIPPED were none of the log's (see `log skipped`), REPEATED had been recorded or come again later, and
/// MISSING were confirmed by the broker and lost since.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl log groups
  fleetctl log groups --group recorder
  fleetctl log groups --json | jq '.groups[] | {group, lag: [.partitions[].lag] | add}'")]
pub(crate) struct Args {
    /// Only this one
    #[arg(long)]
    group: Option<Group>,
    /// As a JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PartitionShown {
    partition: i32,
    stream: String,
    /// Whether the stream is there; null where the broker can't tell.
    declared: Option<bool>,
    newest_offset: Option<i64>,
    /// Null where the group has none yet: it's to read all that is there.
    next_offset: Option<i64>,
    lag: Option<i64>,
    /// Retention has removed messages that the group hasn't read.
    trimmed: bool,
    /// The stream ends before the group's next message.
    beyond_end: bool,
    holder: Option<String>,
    /// The holder hasn't renewed its lease in time.
    run_out: bool,
    skipped: i64,
    repeated: i64,
    missing: i64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MemberShown {
    holder: String,
    seen_ms_ago: i64,
    partitions: usize,
}

#[derive(Serialize)]
struct GroupShown {
    group: String,
    partitions: Vec<PartitionShown>,
    members: Vec<MemberShown>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    groups: Vec<GroupShown>,
    /// Why nothing is known of the streams.
    streams_out_of_sight: Option<String>,
}

/// What the database knows of a group.
struct Known {
    group: Group,
    standings: BTreeMap<i32, Standing>,
    leases: Vec<Lease>,
    members: Vec<Member>,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let mut conn = context.database()?.connection()?;
    if let Some(group) = &args.group {
        ensure_known(&mut conn, group)?;
    }
    let partitions: Vec<_> = (0..partitions::count(&mut conn)?).collect();
    // Before the streams: what has come to those meanwhile is only a little more lag.
    let known = known(&mut conn, args.group.as_ref(), &partitions)?;
    drop(conn);
    let (streams, blind) = look_at_all(context, &partitions);
    let groups = known.into_iter().map(|known| known.show(&streams)).collect();
    let report = Report { groups, streams_out_of_sight: blind };
    match args.json {
        true => output::json(out, &report)?,
        false => report.write_text(out)?,
    }
    Ok(Outcome::Done)
}

fn known(conn: &mut PgConnection, group: Option<&Group>, partitions: &[i32]) -> anyhow::Result<Vec<Known>> {
    let mut groups = BTreeMap::<String, BTreeMap<i32, Standing>>::new();
    for standing in consumer_offsets::list(conn, group)? {
        groups.entry(standing.group.clone()).or_default().insert(standing.partition, standing);
    }
    let known = |(name, standings): (String, BTreeMap<i32, Standing>)| {
        let group = Group::parse(&name).with_context(|| format!("the group `{}` in the database", visible(&name)))?;
        let resources: Vec<_> = partitions.iter().map(|partition| group.resource(*partition)).collect();
        let leases = leases::list(conn, &resources.iter().map(String::as_str).collect::<Vec<_>>())?;
        let members = leases::members(conn, &group.service())?;
        Ok(Known { group, standings, leases, members })
    };
    groups.into_iter().map(known).collect()
}

impl Known {
    fn show(self, streams: &[Option<Stream>]) -> GroupShown {
        let members = self.members.iter().map(|Member { holder, seen_ms_ago }| {
            let held = |lease: &&Lease| !lease.expired && lease.holder.as_ref() == Some(holder);
            let partitions = self.leases.iter().filter(held).count();
            MemberShown { holder: holder.clone(), seen_ms_ago: *seen_ms_ago, partitions }
        });
        let members = members.collect();
        let leases: HashMap<_, _> = self.leases.iter().map(|lease| (lease.resource.as_str(), lease)).collect();
        let partition = |(partition, stream): (i32, &Option<Stream>)| {
            let standing = self.standings.get(&partition);
            let next = standing.map(|standing| standing.next_offset);
            let lease = leases.get(self.group.resource(partition).as_str());
            let holder = lease.and_then(|lease| lease.holder.clone());
            let count = |count: fn(&Standing) -> i64| standing.map_or(0, count);
            PartitionShown {
                partition,
                stream: partition_queue(partition),
                declared: stream.map(|stream| stream != Stream::Missing),
                newest_offset: stream.and_then(Stream::newest),
                next_offset: next,
                lag: stream.filter(|stream| *stream != Stream::Missing).map(|stream| stream.messages(next)),
                trimmed: stream.and_then(Stream::first).zip(next).is_some_and(|(first, next)| next < first),
                beyond_end: stream.zip(next).is_some_and(|(stream, next)| next > stream.next()),
                run_out: holder.is_some() && lease.is_some_and(|lease| lease.expired),
                holder,
                skipped: count(|standing| standing.skipped),
                repeated: count(|standing| standing.repeated),
                missing: count(|standing| standing.missing),
            }
        };
        let partitions = (0..).zip(streams).map(partition).collect();
        GroupShown { group: self.group.to_string(), partitions, members }
    }
}

impl Report {
    fn write_text(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        write_blindness(self.streams_out_of_sight.as_deref());
        if self.groups.is_empty() {
            writeln!(out, "no group has read anything yet")?;
        }
        for (place, group) in self.groups.iter().enumerate() {
            if place > 0 {
                writeln!(out)?;
            }
            group.write_text(out)?;
        }
        Ok(())
    }
}

impl GroupShown {
    fn write_text(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        writeln!(out, "group {}", self.group)?;
        let rows: Vec<_> = self
            .partitions
            .iter()
            .map(|shown| {
                let next = match shown {
                    PartitionShown { next_offset: None, .. } => "-".into(),
                    PartitionShown { next_offset: Some(next), trimmed: true, .. } => format!("{next} (trimmed)"),
                    PartitionShown { next_offset: Some(next), beyond_end: true, .. } => {
                        format!("{next} (beyond the end)")
                    }
                    PartitionShown { next_offset: Some(next), .. } => next.to_string(),
                };
                let lease = match (&shown.holder, shown.run_out) {
                    (None, _) => "free",
                    (Some(_), true) => "run out",
                    (Some(_), false) => "held",
                };
                vec![
                    shown.partition.to_string(),
                    figure(shown.declared, shown.newest_offset),
                    next,
                    figure(shown.declared, shown.lag),
                    short(shown.holder.as_deref().unwrap_or("-"), 32),
                    lease.into(),
                    shown.skipped.to_string(),
                    shown.repeated.to_string(),
                    shown.missing.to_string(),
                ]
            })
            .collect();
        let header =
            ["PARTITION", "NEWEST", "NEXT", "LAG (ABOUT)", "HOLDER", "LEASE", "SKIPPED", "REPEATED", "MISSING"];
        output::table(out, &header, &rows)?;
        writeln!(out)?;
        let rows: Vec<_> = self
            .members
            .iter()
            .map(|member| {
                let seconds = format!("{:.1} s", member.seen_ms_ago as f64 / 1000.0);
                vec![visible(&member.holder), member.partitions.to_string(), seconds]
            })
            .collect();
        output::table(out, &["MEMBER", "PARTITIONS", "LAST SEEN"], &rows)?;
        Ok(())
    }
}
