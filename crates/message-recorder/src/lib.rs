#![doc = include_str!("../README.md")]

mod group;
mod intake;
mod members;
mod place;
mod reader;
mod streams;

use anyhow::{Context as _, ensure};
use clap::Parser as _;
use domain::{log::Group, topology::Retention};
use process::Program;
use serde::Deserialize;
use service::Service;
use std::time::Duration;
use storage::Database;

pub use group::Start;
pub use members::Recorder;

/// The service's name.
pub const SERVICE: &str = "message-recorder";

/// The service as a program.
pub const PROGRAM: Program = Program {
    reads_arguments: true,
    ..Program::new(SERVICE, "Records what a consumer group reads of the message log.", || run(&Options::parse()))
};

/// Records what a consumer group reads of the message log in the table message.
///
/// Runs until SIGTERM or SIGINT, then finishes the work in hand and exits with 0. Settings come from ./config/local.toml
/// and from variables such as MURMURATION__DATABASE__URL and MURMURATION__BROKER__URL, which have no default.
/// config/default.toml lists them all.
#[derive(clap::Parser)]
#[command(name = SERVICE, version)]
pub struct Options {
    /// The consumer group: its members share the partitions; without it the setting message_recorder.group
    #[arg(long)]
    group: Option<Group>,
    /// Where a new group begins; without it the setting message_recorder.from
    #[arg(long)]
    from: Option<Start>,
}

/// The sections of the settings that are this service's own.
#[derive(Deserialize)]
struct Settings {
    message_log: Retention,
    message_recorder: Section,
}

/// The section `[message_recorder]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    group: Group,
    from: Start,
    #[serde(flatten)]
    reading: Reading,
}

/// How a group is read, and its partitions are shared.
#[derive(Clone, Debug, Deserialize)]
pub struct Reading {
    /// What to do where retention has removed messages that weren't read.
    pub trimmed: Trimmed,
    /// The most messages recorded in one transaction.
    pub batch: usize,
    /// How long a batch that has its first message waits for more.
    pub linger_ms: u64,
    /// How many messages of each partition the broker sends ahead.
    pub prefetch: u16,
    /// How long a member may be silent before others take its partitions over.
    pub lease_ttl_ms: u64,
    /// How often a member says that it's there.
    pub lease_renew_ms: u64,
}

/// What to do where retention has removed messages that a group hasn't read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trimmed {
    /// Read nothing there until an operator resets the group's offset.
    Stop,
    /// Go on with the first message that is left.
    First,
}

impl Reading {
    fn check(&self) -> anyhow::Result<()> {
        ensure!(self.batch > 0, "message_recorder.batch must be above 0");
        ensure!(
            usize::from(self.prefetch) >= 2 * self.batch,
            "message_recorder.prefetch must be at least twice message_recorder.batch"
        );
        ensure!(self.lease_renew_ms > 0, "message_recorder.lease_renew_ms must be above 0");
        ensure!(
            self.lease_ttl_ms >= 2 * self.lease_renew_ms,
            "message_recorder.lease_ttl_ms must be at least twice message_recorder.lease_renew_ms"
        );
        Ok(())
    }

    fn ttl(&self) -> Duration {
        Duration::from_millis(self.lease_ttl_ms)
    }

    fn renew(&self) -> Duration {
        Duration::from_millis(self.lease_renew_ms)
    }

    fn linger(&self) -> Duration {
        Duration::from_millis(self.linger_ms)
    }
}

/// Runs the service until it's told to stop.
///
/// # Errors
/// When the settings can't be used, or a reader has died.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let (service, Settings { message_log, message_recorder }) = Service::begin(SERVICE)?;
    let Section { group, from, reading } = message_recorder;
    Recorder {
        group: options.group.clone().unwrap_or(group),
        from: options.from.unwrap_or(from),
        reading,
        retention: message_log,
        worker: service.worker,
        health: service.health,
        broker: service.broker,
        database: service.database,
        leases: Database::open_alone(&service.storage, SERVICE)?,
    }
    .run_until(&service.stop)
    .context("the recorder has stopped")
}
