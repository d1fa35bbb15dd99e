use super::{ensure_known, running, told};
use crate::{Outcome, context::Context};
use anyhow::bail;
use domain::log::Group;
use std::io::Write;
use storage::{
    PgConnection,
    consumer_offsets::{self, Contents},
    leases, partitions,
};

/// Remove a group, with everything that it has recorded and skipped
///
/// The streams keep their messages: a group of the same name is a new one. The group's members are to be stopped first.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl log remove-group --group audit --dry-run
  fleetctl log remove-group --group audit")]
pub(crate) struct Args {
    /// The group
    #[arg(long)]
    group: Group,
    /// Change nothing, and say what would be changed
    #[arg(long)]
    dry_run: bool,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let Args { group, dry_run } = args;
    let database = context.patient_database()?;
    ensure_known(&mut *database.connection()?, group)?;
    let seen_within_ms = context.recorder_seen_within_ms()?;
    let removed = database.transaction(|conn| {
        let members = running(conn, group, seen_within_ms)?;
        Ok(match (members.is_empty(), dry_run) {
            (false, _) => Err(members),
            (true, true) => Ok(consumer_offsets::contents(conn, group)?),
            (true, false) => Ok(remove(conn, group)?),
        })
    })?;
    // There's no --force: they would make it anew at once, and record everything from the first message on.
    let Contents { messages, skipped } =
        removed.or_else(|members| bail!("{}; stop them first", told(group, &members)))?;
    let removed = if *dry_run { "would be removed" } else { "removed" };
    writeln!(out, "group `{group}`, {messages} recorded and {skipped} skipped messages: {removed}")?;
    Ok(Outcome::Done)
}

/// Removes the group, and what is left of its members that have died.
fn remove(conn: &mut PgConnection, group: &Group) -> storage::Result<Contents> {
    let service = group.service();
    for dead in leases::members(conn, &service)? {
        leases::leave(conn, &service, &dead.holder)?;
    }
    let resources: Vec<_> = (0..partitions::count(conn)?).map(|partition| group.resource(partition)).collect();
    leases::remove(conn, &resources.iter().map(String::as_str).collect::<Vec<_>>())?;
    consumer_offsets::remove(conn, group)
}
