//! `fleetctl bench`: the figures that the fleet is judged by, measured in one run beside what they're compared with.
//!
//! A benchmark works in a database and a vhost of its own and with processes of its own, all gone afterwards. What it
//! prints are ratios of figures taken in turn on one machine, because machines differ and their speed drifts.

mod fanout;
mod report;
mod stage;

use clap::{Args, Subcommand};
use std::path::PathBuf;

pub use fanout::run as fanout;

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Benchmark {
    /// A tweet's way to its author's followers: how fast, beside plain INSERTs of the same rows
    Fanout(Fanout),
}

/// How to measure it.
#[derive(Clone, Debug, Args)]
pub struct Fanout {
    /// Followers of the author whose tweets are timed
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1000..=1_000_000))]
    pub followers: u32,
    /// Entries that each of their feeds holds beforehand
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub entries: u32,
    /// Followers of the largest author of the comparison of sizes
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1000..=10_000_000))]
    pub largest: u32,
    /// How often each figure is taken; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: u32,
    /// How long the gateway, and pgbench beside it, are loaded, in seconds
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub seconds: u32,
    /// Folder for the table and the JSON
    #[arg(long, default_value = "target/bench", value_name = "DIR")]
    pub out: PathBuf,
    /// RabbitMQ's management API, for a vhost of its own
    #[arg(long, env = "RABBITMQ_MANAGEMENT_URL", hide_env_values = true, value_name = "URL")]
    pub management_url: String,
    /// Keep the database, the vhost and the logs
    #[arg(long)]
    pub keep: bool,
}
