use crate::{
    Outcome,
    context::Context,
    output::{self, short, visible},
    stream::Stream,
};
use anyhow::Context as _;
use broker::{QueueDepth, Session};
use chrono::{DateTime, Utc};
use domain::stream::shard_queue;
use serde::Serialize;
use std::{
    collections::{BTreeMap, HashMap},
    io::Write,
};
use storage::{
    leases::{self, Lease, Member},
    stream_audit::{self, Lag},
    streams::{self, Layout},
};

/// The shards of a stream
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    Show(Show),
}

/// Show for each shard who works on it, and what waits there; and the processes that share the shards
///
/// A shard that is marked as drain-only has no keys any more: its queue is being emptied, to be taken away.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl shards show
  fleetctl shards show --stream account_event --json | jq '[.shards[].waiting] | add'")]
pub(crate) struct Show {
    #[command(flatten)]
    of: Stream,
    /// As a JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shard {
    shard: i32,
    queue: String,
    /// No key belongs to it any more.
    drain_only: bool,
    holder: Option<String>,
    /// The holder hasn't renewed its lease in time.
    run_out: bool,
    /// Events that will take effect.
    waiting: i64,
    /// When the oldest of them was accepted.
    oldest_at: Option<DateTime<Utc>>,
    oldest_ms: Option<i64>,
    /// Events of parked keys.
    parked: i64,
    /// Messages in its queue that no worker has; absent if the broker can't tell.
    messages: Option<u32>,
    consumers: Option<u32>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Process {
    holder: String,
    seen_ms_ago: i64,
    shards: usize,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    stream: String,
    shard_count: i32,
    queue_count: i32,
    shards: Vec<Shard>,
    members: Vec<Process>,
    /// Why nothing is known of the queues.
    queues_out_of_sight: Option<String>,
}

pub(crate) fn run(command: &Command, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let Command::Show(args) = command;
    let report = look(&args.of.stream, context)?;
    match args.json {
        true => {
            output::json(out, &report)?;
        }
        false => report.write_text(out)?,
    }
    Ok(Outcome::Done)
}

fn look(stream: &str, context: &Context) -> anyhow::Result<Report> {
    let (layout, leases, members, lags) = context.patient_database()?.transaction(|conn| {
        let layout = streams::layout(conn, stream)?;
        let resources: Vec<_> = numbers(layout).map(|shard| domain::stream::shard_resource(stream, shard)).collect();
        let resources: Vec<_> = resources.iter().map(String::as_str).collect();
        let leases = leases::list(conn, &resources)?;
        let service = leases::service(conn, &resources)?;
        let members = service.map_or(Ok(Vec::new()), |service| leases::members(conn, &service))?;
        Ok((layout, leases, members, stream_audit::lag(conn, stream, layout.shards)?))
    })?;
    let names: Vec<_> = numbers(layout).map(|shard| shard_queue(stream, shard)).collect();
    let (depths, blind) = match depths(&names, context) {
        Ok(depths) => (depths, None),
        Err(error) => (HashMap::new(), Some(format!("{error:#}"))),
    };
    let processes = processes(members, &leases);
    let leases: HashMap<_, _> = leases.into_iter().map(|lease| (lease.resource.clone(), lease)).collect();
    let lags: HashMap<_, _> = lags.into_iter().map(|lag| (lag.shard, lag)).collect();
    let shards = numbers(layout).zip(names).map(|(shard, queue)| {
        let lease = leases.get(&domain::stream::shard_resource(stream, shard));
        let holder = lease.and_then(|lease| lease.holder.clone());
        let nothing = Lag { shard, waiting: 0, parked: 0, oldest: None, oldest_ms: None };
        let lag = lags.get(&shard).copied().unwrap_or(nothing);
        let depth = depths.get(&queue);
        Shard {
            shard,
            drain_only: shard >= layout.shards,
            run_out: holder.is_some() && lease.is_some_and(|lease| lease.expired),
            holder,
            waiting: lag.waiting,
            oldest_at: lag.oldest,
            oldest_ms: lag.oldest_ms,
            parked: lag.parked,
            messages: depth.map(|depth| depth.messages),
            consumers: depth.map(|depth| depth.consumers),
            queue,
        }
    });
    Ok(Report {
        stream: stream.into(),
        shard_count: layout.shards,
        queue_count: layout.queues,
        shards: shards.collect(),
        members: processes,
        queues_out_of_sight: blind,
    })
}

/// The shards that there are, and those that are only drained.
fn numbers(layout: Layout) -> std::ops::Range<i32> {
    0..layout.shards.max(layout.queues)
}

fn depths(names: &[String], context: &Context) -> anyhow::Result<HashMap<String, QueueDepth>> {
    let settings = context.broker_if_set()?.context("no broker address is given (--amqp-url)")?;
    let depths = broker::existing(&mut Session::open(&settings, "fleetctl")?, names)?;
    Ok(depths.into_iter().map(|depth| (depth.name.clone(), depth)).collect())
}

fn processes(members: Vec<Member>, leases: &[Lease]) -> Vec<Process> {
    let mut held = BTreeMap::<&str, usize>::new();
    for holder in leases.iter().filter(|lease| !lease.expired).filter_map(|lease| lease.holder.as_deref()) {
        *held.entry(holder).or_default() += 1;
    }
    let process = |Member { holder, seen_ms_ago }: Member| {
        let shards = held.get(holder.as_str()).copied().unwrap_or_default();
        Process { holder, seen_ms_ago, shards }
    };
    members.into_iter().map(process).collect()
}

impl Report {
    fn write_text(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        if let Some(reason) = &self.queues_out_of_sight {
            eprintln!("fleetctl: can't tell how full the queues are: {reason}");
        }
        let seconds = |ms: i64| format!("{:.1} s", ms as f64 / 1000.0);
        let number = |number: Option<u32>| match number {
            Some(number) => number.to_string(),
            None if self.queues_out_of_sight.is_some() => "?".into(),
            None => "no queue".into(),
        };
        let rows: Vec<_> = self
            .shards
            .iter()
            .map(|shard| {
                let lease = match (&shard.holder, shard.run_out) {
                    (None, _) => "free",
                    (Some(_), true) => "run out",
                    (Some(_), false) => "held",
                };
                vec![
                    format!("{}{}", shard.shard, if shard.drain_only { " (drain only)" } else { "" }),
                    shard.queue.clone(),
                    short(shard.holder.as_deref().unwrap_or("-"), 32),
                    lease.into(),
                    shard.waiting.to_string(),
                    shard.oldest_ms.map_or_else(|| "-".into(), seconds),
                    shard.parked.to_string(),
                    number(shard.messages),
                ]
            })
            .collect();
        let header = ["SHARD", "QUEUE", "HOLDER", "LEASE", "WAITING", "OLDEST", "PARKED", "MESSAGES"];
        output::table(out, &header, &rows)?;
        writeln!(out)?;
        let rows: Vec<_> = self
            .members
            .iter()
            .map(|member| vec![visible(&member.holder), member.shards.to_string(), seconds(member.seen_ms_ago)])
            .collect();
        output::table(out, &["PROCESS", "SHARDS", "LAST SEEN"], &rows)?;
        Ok(())
    }
}
