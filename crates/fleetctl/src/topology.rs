use crate::{Outcome, context::Context, output};
use anyhow::Context as _;
use broker::{QueueDepth, Session};
use domain::topology::{ExchangeKind, Expiry, Retention, Topology};
use std::{collections::HashMap, io::Write};
use storage::{Database, partitions, resharding};

/// The broker's exchanges, queues and bindings
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Declare what the fleet needs; what is there already stays as it is
    Declare,
    /// Show what the fleet needs, and how full each queue is; a stream's messages are counted with some delay
    Show,
}

pub(crate) fn run(command: &Command, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    match command {
        Command::Declare => declare(context, out),
        Command::Show => show(context, out),
    }
}

fn declare(context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let mut session = Session::open(&context.broker()?, "fleetctl")?;
    let topology = context.topology()?.and(divided(context)?);
    broker::declare(&mut session, &topology)?;
    let Topology { exchanges, queues, bindings } = topology;
    writeln!(out, "declared {} exchanges, {} queues, {} bindings", exchanges.len(), queues.len(), bindings.len())?;
    Ok(Outcome::Done)
}

/// The part of what is divided among as many queues as operators want: shards, and partitions of the message log.
fn divided(context: &Context) -> anyhow::Result<Topology> {
    let retention = context.retention()?;
    let read = |database: Database| {
        let mut conn = database.connection()?;
        Ok(resharding::topology(&mut conn)?.and(partitions::topology(&mut conn, retention)?))
    };
    context.database().and_then(read).context("how many shards and partitions there are is in the database")
}

fn show(context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let divided = divided(context).unwrap_or_else(|error| {
        eprintln!("fleetctl: the queues of shards and partitions are left out: {error:#}");
        Topology::default()
    });
    let topology = context.topology()?.and(divided);
    let depths = depths(context, &topology).unwrap_or_else(|error| {
        eprintln!("fleetctl: how full the queues are can't be told: {error:#}");
        None
    });
    let exchanges: HashMap<_, _> = topology.exchanges.iter().map(|exchange| (&exchange.name, exchange.kind)).collect();
    let queues: HashMap<_, _> = topology.queues.iter().map(|queue| (&queue.name, &queue.expiry)).collect();
    let rows: Vec<_> = topology
        .bindings
        .iter()
        .map(|binding| {
            let kind = exchanges[&binding.exchange];
            let key = match kind {
                ExchangeKind::Fanout => "(any)".into(),
                ExchangeKind::ConsistentHash => format!("(hashed, weight {})", binding.routing_key),
                ExchangeKind::Direct | ExchangeKind::Topic => binding.routing_key.clone(),
            };
            let end = match queues[&binding.queue] {
                Expiry::DeadLetter => "acknowledged, or dead_letter".into(),
                Expiry::ReturnAfter(delay) => format!("back to the queue of the key after {delay:?}"),
                Expiry::Never => "acknowledged".into(),
                Expiry::LoseAfter(deliveries) => format!("acknowledged, or lost after {deliveries} further deliveries"),
                Expiry::Retain(Retention { max_bytes, max_age_s, .. }) => {
                    format!("a stream: after {max_age_s} s, or beyond {max_bytes} bytes")
                }
            };
            let (messages, consumers) = match depths.as_ref().map(|depths| depths.get(&binding.queue)) {
                None => ("?".into(), "?".into()),
                Some(None) => ("not declared".into(), "-".into()),
                Some(Some(depth)) => (depth.messages.to_string(), depth.consumers.to_string()),
            };
            vec![binding.exchange.clone(), kind.as_str().into(), key, binding.queue.clone(), messages, consumers, end]
        })
        .collect();
    let header = ["EXCHANGE", "TYPE", "ROUTING KEY", "QUEUE", "READY", "CONSUMERS", "ITS MESSAGES END"];
    output::table(out, &header, &rows)?;
    Ok(Outcome::Done)
}

type Depths = HashMap<String, QueueDepth>;

/// How full each queue is that is declared; `None` if no broker is named.
fn depths(context: &Context, topology: &Topology) -> anyhow::Result<Option<Depths>> {
    let Some(settings) = context.broker_if_set()? else { return Ok(None) };
    let names: Vec<_> = topology.queues.iter().map(|queue| queue.name.clone()).collect();
    let mut session = Session::open(&settings, "fleetctl")?;
    let depths = broker::existing(&mut session, &names).context("looking at the queues")?;
    Ok(Some(depths.into_iter().map(|depth| (depth.name.clone(), depth)).collect()))
}
