//! `fleetctl log`: the message log.

mod add_partitions;
mod browse;
mod groups;
mod message;
mod partitions;
mod remove_group;
mod reset_offset;
mod skipped;
mod stream;
mod tail;
mod verify;

use crate::{Outcome, context::Context, output::visible};
use anyhow::{bail, ensure};
use domain::log::Group;
use std::io::Write;
use storage::{
    PgConnection,
    consumer_offsets::{self, Contents},
    leases::{self, Member},
};

/// The message log: its partitions, the consumer groups, and the messages themselves
///
/// The broker uses some of a stream's offsets for itself, so counts that are made from offsets may be a little too high.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    #[command(visible_alias = "topics")]
    Partitions(partitions::Args),
    Groups(groups::Args),
    Browse(browse::Args),
    Tail(tail::Args),
    ResetOffset(reset_offset::Args),
    RemoveGroup(remove_group::Args),
    AddPartitions(add_partitions::Args),
    Skipped(skipped::Args),
    Verify(verify::Args),
}

pub(crate) fn run(command: &Command, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    match command {
        Command::Partitions(args) => partitions::run(args, context, out),
        Command::Groups(args) => groups::run(args, context, out),
        Command::Browse(args) => browse::run(args, context, out),
        Command::Tail(args) => tail::run(args, context),
        Command::ResetOffset(args) => reset_offset::run(args, context, out),
        Command::RemoveGroup(args) => remove_group::run(args, context, out),
        Command::AddPartitions(args) => add_partitions::run(args, context, out),
        Command::Skipped(args) => skipped::run(args, context, out),
        Command::Verify(args) => verify::run(args, context, out),
    }
}

/// The partitions that are meant: that one, which must be there, or all of them.
fn chosen(conn: &mut PgConnection, partition: Option<i32>) -> anyhow::Result<Vec<i32>> {
    let count = storage::partitions::count(conn)?;
    let Some(partition) = partition else { return Ok((0..count).collect()) };
    ensure!((0..count).contains(&partition), "there is no partition {partition}; there are 0 to {}", count - 1);
    Ok(vec![partition])
}

/// Whoever mistypes a group's name isn't to be told that there's nothing.
fn ensure_known(conn: &mut PgConnection, group: &Group) -> anyhow::Result<()> {
    if consumer_offsets::exists(conn, group)? {
        return Ok(());
    }
    let mut known: Vec<_> = consumer_offsets::list(conn, None)?.into_iter().map(|standing| standing.group).collect();
    known.dedup();
    match known.is_empty() {
        true => bail!("there is no group `{group}`; there are none yet"),
        false => bail!("there is no group `{group}`; there are: {}", known.join(", ")),
    }
}

/// How much is to be removed.
fn told_contents(Contents { messages, skipped }: Contents) -> String {
    let plural = if messages == 1 { "" } else { "s" };
    match skipped {
        0 => format!("{messages} recorded message{plural}"),
        _ => format!("{messages} recorded message{plural} and {skipped} skipped"),
    }
}

/// The group's members that run. A dead one hasn't been seen for so long.
fn running(conn: &mut PgConnection, group: &Group, seen_within_ms: i64) -> storage::Result<Vec<Member>> {
    let mut members = leases::members(conn, &group.service())?;
    members.retain(|member| member.seen_ms_ago <= seen_within_ms);
    Ok(members)
}

/// That these run.
fn told(group: &Group, members: &[Member]) -> String {
    let seen =
        |member: &Member| format!("{} (seen {:.1} s ago)", visible(&member.holder), member.seen_ms_ago as f64 / 1000.0);
    let members: Vec<_> = members.iter().map(seen).collect();
    format!("members of `{group}` are running: {}", members.join(", "))
}
