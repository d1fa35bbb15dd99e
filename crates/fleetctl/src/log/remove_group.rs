use super::{ensure_known, running, told, told_contents};
use crate::{Outcome, consent::Consent, context::Context};
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
/// The streams keep their messages: a group of the same name is a new one. The group's members are to be stopped first. Says
/// how much is removed, and asks before it is.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl log remove-group --group audit --dry-run
  fleetctl log remove-group --group audit --yes")]
pub(crate) struct Args {
    /// The group
    #[arg(long)]
    group: Group,
    /// Change nothing, and say what would be changed
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    consent: Consent,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let Args { group, dry_run, consent } = args;
    let database = context.patient_database()?;
    ensure_known(&mut *database.connection()?, group)?;
    let seen_within_ms = context.recorder_seen_within_ms()?;
    let alone = |work: fn(&mut PgConnection, &Group) -> storage::Result<Contents>| {
        let worked = database.transaction(|conn| {
            let members = running(conn, group, seen_within_ms)?;
            Ok(if members.is_empty() { Ok(work(conn, group)?) } else { Err(members) })
        })?;
        // There's no --force: they would make it anew at once, and record everything from the first message on.
        worked.or_else(|members| bail!("{}; stop them first", told(group, &members)))
    };
    let mut contents = alone(consumer_offsets::contents)?;
    if !dry_run {
        if contents != (Contents { messages: 0, skipped: 0 }) {
            consent.obtain(&format!("group `{group}` is to be removed, with {}", told_contents(contents)))?;
        }
        contents = alone(remove)?;
    }
    let Contents { messages, skipped } = contents;
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
