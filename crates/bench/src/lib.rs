#![doc = include_str!("../README.md")]

mod attack;
mod baseline;
mod context;
mod cpu;
mod events;
mod fanout;
mod gateway;
mod load;
mod messages;
mod report;
mod stage;

use crate::context::Context;
use anyhow::ensure;
use clap::{Args, Parser, Subcommand};
use command_line::{Outcome, Verbosity, interrupt::Interrupt, servers::Connections};
use std::{
    io::{self, Write as _},
    path::PathBuf,
};

/// The program's name, for the servers' lists of connections.
const PROGRAM: &str = "bench";

/// Measure what the fleet is judged by, beside what it's compared with
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Cli {
    #[command(flatten)]
    verbosity: Verbosity,
    #[command(flatten)]
    connections: Connections,
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Debug, Subcommand)]
enum Benchmark {
    /// A tweet's way to its author's followers: how fast, beside plain INSERTs of the same rows
    ///
    /// Works in a database and a vhost of its own, with processes of its own, all gone afterwards.
    Fanout(Fanout),
    /// Account events, in order per account: how fast, through kills, beside one long backlog, and while they're resharded
    ///
    /// Works in a database and a vhost of its own, with processes of its own, all gone afterwards.
    Events(Events),
    /// The message log: how fast it's replayed, beside plain INSERTs of the same rows, how soon a message is recorded, and
    /// how soon somebody else reads on after a kill
    ///
    /// Works in a database and a vhost of its own, with processes of its own, all gone afterwards.
    Messages(Messages),
    /// The gateway: how much it serves beside pgbench, how soon, and what it bears: overload, idle and slow clients, and what
    /// takes memory
    ///
    /// Works in a database and a vhost of its own, with processes of its own, all gone afterwards.
    Gateway(Gateway),
}

/// The whole of the program: reads the arguments, measures, and exits.
pub fn main() -> ! {
    command_line::exit(PROGRAM, run(&Cli::parse()).map(|()| Outcome::Done))
}

/// Measures, prints the table, and writes it with the JSON.
fn run(cli: &Cli) -> anyhow::Result<()> {
    let _telemetry = cli.verbosity.log(PROGRAM)?;
    ensure!(!cfg!(debug_assertions), "this is a debug build, whose figures mean nothing: use `make bench`");
    let context = Context::new(&cli.connections)?;
    let (report, place) = match &cli.benchmark {
        Benchmark::Fanout(args) => (fanout::measure(args, &context)?, &args.place),
        Benchmark::Events(args) => (events::measure(args, &context)?, &args.place),
        Benchmark::Messages(args) => {
            let interrupt = Interrupt::catch()?;
            let report = messages::measure(args, &context, &interrupt);
            interrupt.check()?;
            (report?, &args.place)
        }
        Benchmark::Gateway(args) => (gateway::measure(args, &context)?, &args.place),
    };
    report.write(&place.out)?;
    writeln!(io::stdout(), "{}", report.to_markdown())?;
    Ok(())
}

/// How to measure it.
#[derive(Clone, Debug, Args)]
pub(crate) struct Fanout {
    /// Followers of the author whose tweets are timed
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(10_000..=1_000_000))]
    followers: u32,
    /// Entries that each of their feeds holds beforehand
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=1000))]
    entries: u32,
    /// Followers of the largest author of the comparison of sizes
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1000..=10_000_000))]
    largest: u32,
    /// Entries that each of their followers' feeds hold beforehand
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=1000))]
    size_entries: u32,
    /// How often each figure is taken; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    #[command(flatten)]
    place: Place,
}

/// How to measure them.
#[derive(Clone, Debug, Args)]
pub(crate) struct Events {
    /// Accounts of the runs whose events take their time
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    accounts: u32,
    /// Their events
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    events: u32,
    /// How long handling each of them takes
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    work_ms: u32,
    /// Events of the runs whose handling takes no time, of ten thousand accounts
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(10_000..=10_000_000))]
    fast_events: u32,
    /// How often figures are taken that are compared with others; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    #[command(flatten)]
    place: Place,
}

/// How to measure it.
#[derive(Clone, Debug, Args)]
pub(crate) struct Messages {
    /// How many messages are replayed
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(10_000..=5_000_000))]
    messages: u32,
    /// How long messages come in whose way to the record is timed, 1000 a second, in seconds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=300))]
    seconds: u32,
    /// How often each figure is taken; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    #[command(flatten)]
    place: Place,
}

/// How to measure it.
#[derive(Clone, Debug, Args)]
pub(crate) struct Gateway {
    /// How long each load takes, and pgbench beside it, in seconds
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// How often each figure is taken; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    #[command(flatten)]
    place: Place,
}

/// Where a benchmark works.
#[derive(Clone, Debug, Args)]
pub(crate) struct Place {
    /// Folder for the table and the JSON
    #[arg(long, default_value = "target/bench", value_name = "DIR")]
    out: PathBuf,
    /// RabbitMQ's management API, for a vhost of its own
    #[arg(long, env = "RABBITMQ_MANAGEMENT_URL", hide_env_values = true, value_name = "URL")]
    management_url: Option<String>,
    /// Keep the database, the vhost and the logs
    #[arg(long)]
    keep: bool,
}
