//! The load, produced by hand.

use crate::{balances, context::Settings, experiment::Experiment, load, names};
use anyhow::{bail, ensure};
use broker::{PublishError, Publisher, Reason, Session};
use clap::{Args, ValueEnum};
use domain::{Envelope, topology::ExchangeKind};
use std::{
    io::Write,
    ops::Range,
    time::{Duration, Instant},
};
use storage::Database;

/// How long messages may take to be confirmed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where messages are produced to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// One queue for all consumers
    Competing,
    /// An x-consistent-hash exchange, with a queue for each consumer
    ConsistentHash,
}

/// The messages of some users, user by user.
#[derive(Args)]
pub(crate) struct Produce {
    /// Where to
    #[arg(value_enum)]
    target: Target,
    /// The first user
    #[arg(value_parser = clap::value_parser!(i64).range(0..=MAX_OFFSET))]
    offset: i64,
    /// How many users
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    users: u32,
    /// How many messages for each
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    messages: u32,
    /// The version that the messages say
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..))]
    message_version: i32,
    /// Makes the changes repeatable
    #[arg(long)]
    seed: Option<u64>,
    /// Forget the users' balances first
    #[arg(long)]
    fresh: bool,
}

/// The largest number of a user, well below what a table's key holds.
pub(crate) const MAX_OFFSET: i64 = 1 << 48;

/// Sees to it that the users have no balances yet: what is expected of them would be wrong.
pub(crate) fn prepare_users(database: &Database, users: &Range<i64>, fresh: bool) -> anyhow::Result<()> {
    if fresh {
        return Ok(database.transaction(|conn| balances::forget(conn, users))?);
    }
    let known = balances::known(&mut *database.connection()?, users)?;
    ensure!(
        known == 0,
        "of the users {} to {}, {known} have balances already: add --fresh to forget them, or take another offset",
        users.start,
        users.end - 1
    );
    Ok(())
}

/// Publishes, and awaits the confirms.
pub(crate) fn publish(publisher: &mut Publisher, envelopes: &[Envelope]) -> anyhow::Result<()> {
    match publisher.publish_all(envelopes, Instant::now() + PATIENCE) {
        Err(PublishError::Refused { refused }) if matches!(refused[0].1, Reason::Returned { .. }) => {
            bail!("no queue is bound to the exchange {}: start a consumer first", envelopes[0].exchange)
        }
        result => Ok(result?),
    }
}

impl Produce {
    pub(crate) fn run(&self, settings: &Settings, out: &mut dyn Write) -> anyhow::Result<()> {
        let users = self.offset..self.offset + i64::from(self.users);
        prepare_users(&settings.database()?, &users, self.fresh)?;
        let mut session = Session::open(&settings.broker, crate::SERVICE)?;
        let experiment = match self.target {
            Target::Competing => {
                let queues = [names::queue(Experiment::Competing, 1)];
                let topology = names::unbound(Experiment::Competing, ExchangeKind::Fanout, &queues)
                    .and(names::bindings(Experiment::Competing, &queues, "1"));
                broker::declare(&mut session, &topology)?;
                Experiment::Competing
            }
            Target::ConsistentHash => {
                let topology = names::unbound(Experiment::ConsistentHash, ExchangeKind::ConsistentHash, &[]);
                broker::declare(&mut session, &topology)?;
                Experiment::ConsistentHash
            }
        };
        let seed = self.seed.unwrap_or_else(rand::random);
        let messages = load::messages(seed, users.clone(), self.messages, self.message_version);
        let exchange = names::exchange(experiment);
        let envelopes: Vec<_> = messages.iter().map(|message| load::envelope(&exchange, message, None)).collect();
        publish(&mut Publisher::new(&settings.broker, crate::SERVICE), &envelopes)?;
        writeln!(
            out,
            "{} messages of the users {} to {} are in the exchange {exchange} (seed {seed})",
            messages.len(),
            users.start,
            users.end - 1
        )?;
        Ok(())
    }
}
