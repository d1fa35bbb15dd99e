mod migrate;
mod prune;

use crate::{Outcome, context::Context, output};
use anyhow::Context as _;
use broker::{Error, QueueDepth, Session, Settings};
use clap::Args;
use domain::topology::{ExchangeKind, Expiry, Retention, Topology, earlier_retry_name, queue};
use management::Management;
use std::{
    collections::{HashMap, HashSet},
    io::Write,
};
use storage::{Database, partitions, resharding};

/// The broker's exchanges, queues and bindings
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Declare what the fleet needs; what is there already stays as it is
    Declare,
    /// Show what the fleet needs, and how full each queue is; a stream's messages are counted with some delay
    ///
    /// READY are messages that nobody has taken yet; "no answer" if the queue gives none, which is what one without a leader does.
    /// OVERDUE are messages whose wait is over, or that were given up, and that don't arrive where they go. Both are known from the
    /// management API alone.
    Show(Api),
    /// Give a queue or an exchange the arguments that it must have
    ///
    /// Messages that are in the queue, and those that come meanwhile, are moved to another one and back; each is acknowledged when
    /// its copy is confirmed. Its consumers have to be stopped; those of the present version wait by themselves. Interrupted, the
    /// same command goes on from where it was.
    Migrate {
        /// The queue, or the exchange
        name: String,
        /// Delete a queue that gives no answer, with whatever is in it, and declare it anew
        ///
        /// For one that was declared in the second before RabbitMQ was killed: it has lost its leader for good, and its
        /// messages, if it had any. One whose nodes are away still has them: bring those back instead.
        #[arg(long)]
        discard: bool,
        #[command(flatten)]
        api: Api,
    },
    /// Take away the queues that an earlier version let failed messages wait in, when they are empty
    ///
    /// For the time when no process of the earlier version runs any more. Their messages return by themselves.
    Prune(Api),
}

/// Where the management API is.
#[derive(Args)]
pub(crate) struct Api {
    /// RabbitMQ's management API
    #[arg(long, env = "RABBITMQ_MANAGEMENT_URL", hide_env_values = true, value_name = "URL")]
    management_url: Option<String>,
}

impl Api {
    pub(crate) fn management_url(&self) -> Option<&str> {
        self.management_url.as_deref()
    }
}

/// What the management API counts, with some seconds' delay.
pub(crate) struct Counts {
    management: Management,
    vhost: String,
}

struct Count {
    /// All messages; none if they haven't been counted yet.
    messages: Option<u64>,
    /// Of those, the ones that are to go elsewhere.
    overdue: Option<u64>,
    is_classic: bool,
}

impl Counts {
    /// `None` if nobody says where the API is.
    fn open(context: &Context, api: &Api) -> anyhow::Result<Option<Self>> {
        let Some(url) = context.management(api.management_url.as_deref()) else { return Ok(None) };
        Ok(Some(Self { management: Management::new(url)?, vhost: context.broker()?.vhost()? }))
    }

    fn require(context: &Context, api: &Api) -> anyhow::Result<Self> {
        Self::open(context, api)?.context(
            "where is RabbitMQ's management API? Set RABBITMQ_MANAGEMENT_URL: only it counts all messages of a queue",
        )
    }

    fn of(&self, queue: &str) -> anyhow::Result<Option<Count>> {
        let Some(told) = self.management.queue(&self.vhost, queue)? else { return Ok(None) };
        Ok(Some(Count {
            messages: told["messages"].as_u64(),
            overdue: told["messages_dlx"].as_u64(),
            is_classic: told["type"] == "classic",
        }))
    }
}

pub(crate) fn run(command: &Command, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    match command {
        Command::Declare => declare(context, out),
        Command::Show(api) => show(context, api, out),
        Command::Migrate { name, discard, api } => {
            migrate::Migration::new(context, Counts::require(context, api)?, out)?.run(name, *discard)
        }
        Command::Prune(api) => prune::run(context, &Counts::require(context, api)?, out),
    }
}

fn declare(context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let mut session = Session::open(&context.broker()?, "fleetctl")?;
    let topology = context.topology()?.and(divided(context)?);
    let refused = broker::declare_each(&mut session, &topology)?;
    if refused.is_empty() {
        let Topology { exchanges, queues, bindings } = topology;
        writeln!(out, "declared {} exchanges, {} queues, {} bindings", exchanges.len(), queues.len(), bindings.len())?;
        return Ok(Outcome::Done);
    }
    writeln!(out, "declared all but these:")?;
    for refused in refused {
        writeln!(out, "{}", refused.error)?;
    }
    Ok(Outcome::Incomplete)
}

/// The part of what is divided among as many queues as operators want: shards, and partitions of the message log.
fn divided(context: &Context) -> anyhow::Result<Topology> {
    let retention = context.retention()?;
    let read = |database: Database| {
        let mut conn = database.connection()?;
        Ok(resharding::topology(&mut conn)?.and(partitions::topology(&mut conn, retention)?))
    };
    context.database().and_then(read).context("the numbers of shards and partitions are in the database")
}

fn show(context: &Context, api: &Api, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let divided = divided(context).unwrap_or_else(|error| {
        eprintln!("fleetctl: the queues of shards and partitions are left out: {error:#}");
        Topology::default()
    });
    let topology = context.topology()?.and(divided);
    let depths = depths(context, &topology).unwrap_or_else(|error| {
        eprintln!("fleetctl: can't tell how full the queues are: {error:#}");
        None
    });
    let earlier: Vec<_> = context.retry_delays()?.into_iter().map(earlier_retry_name).collect();
    let told = told(context, api, &topology, &earlier).unwrap_or_else(|error| {
        eprintln!("fleetctl: cannot read which messages are overdue, and which queues give no answer: {error:#}");
        Told::default()
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
                Expiry::ReturnAfter(delay) => format!("after {delay:?} in {}", queue::RETURN),
                Expiry::Never if binding.queue == queue::RETURN => "back in the queue of the key".into(),
                Expiry::Never => "acknowledged".into(),
                Expiry::LoseAfter(deliveries) => format!("acknowledged, or lost after {deliveries} further deliveries"),
                Expiry::Retain(Retention { max_bytes, max_age_s, .. }) => {
                    format!("a stream: after {max_age_s} s, or beyond {max_bytes} bytes")
                }
            };
            let (messages, consumers) = match depths.as_ref().map(|depths| depths.get(&binding.queue)) {
                None => ("?".into(), "?".into()),
                Some(None) => ("not declared".into(), "-".into()),
                Some(Some(_)) if told.silent.contains(&binding.queue) => ("no answer".into(), "?".into()),
                Some(Some(depth)) => (depth.messages.to_string(), depth.consumers.to_string()),
            };
            let late = told.overdue.get(&binding.queue).filter(|count| **count > 0);
            let late = late.map(u64::to_string).unwrap_or_default();
            let (exchange, queue) = (binding.exchange.clone(), binding.queue.clone());
            vec![exchange, kind.as_str().into(), key, queue, messages, consumers, end, late]
        })
        .collect();
    let header = ["EXCHANGE", "TYPE", "ROUTING KEY", "QUEUE", "READY", "CONSUMERS", "ITS MESSAGES END", "OVERDUE"];
    output::table(out, &header, &rows)?;
    for name in earlier {
        if let Some(overdue) = told.overdue.get(&name) {
            writeln!(
                out,
                "{name} is an earlier version's ({overdue} overdue): `fleetctl topology prune` takes it away"
            )?;
        }
    }
    Ok(Outcome::Done)
}

/// What only the management API tells of queues; nothing if nobody says where it is.
#[derive(Default)]
struct Told {
    /// How many messages of each are overdue.
    overdue: HashMap<String, u64>,
    /// Those that give no answer.
    silent: HashSet<String>,
}

fn told(context: &Context, api: &Api, topology: &Topology, earlier: &[String]) -> anyhow::Result<Told> {
    let mut told = Told::default();
    let Some(settings) = context.broker_if_set()? else { return Ok(told) };
    let Some(counts) = Counts::open(context, api)? else { return Ok(told) };
    // A queue that answers does so at once.
    let settings = Settings { confirm_timeout_ms: settings.confirm_timeout_ms.min(1000), ..settings };
    for name in topology.queues.iter().map(|queue| &queue.name).chain(earlier) {
        let Some(Count { messages, overdue, .. }) = counts.of(name)? else { continue };
        told.overdue.extend(overdue.map(|overdue| (name.clone(), overdue)));
        // Its leader counts.
        if messages.is_none() && is_silent(&settings, name)? {
            told.silent.insert(name.clone());
        }
    }
    Ok(told)
}

fn is_silent(settings: &Settings, queue: &str) -> anyhow::Result<bool> {
    match broker::ask(&mut Session::open(settings, "fleetctl")?, queue) {
        Err(Error::TimedOut { .. }) => Ok(true),
        Ok(()) | Err(Error::Refused { .. } | Error::MissingQueue { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
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
