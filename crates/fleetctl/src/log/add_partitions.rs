use crate::{Outcome, context::Context};
use anyhow::{bail, ensure};
use broker::Session;
use domain::{
    log::{MESSAGE, PARTITIONS_MAX},
    topology::Topology,
};
use std::io::Write;
use storage::{PgConnection, partitions, resharding};

/// Add partitions to the log, while it runs; there's no way back
///
/// Messages without a key go to the new ones as well, and so does every key whose hash says so by the new number: a key's
/// later messages may be in another partition than its earlier ones, and a group may come to them before it has read those.
/// Order within each partition stays as it is. Groups read the new partitions from their first message on.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl log add-partitions 2
  fleetctl log partitions")]
pub(crate) struct Args {
    /// How many more
    #[arg(value_name = "N", value_parser = clap::value_parser!(i32).range(1..=i64::from(PARTITIONS_MAX - 1)))]
    more: i32,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let mut session = Session::open(&context.broker()?, "fleetctl")?;
    let retention = context.retention()?;
    let add = |conn: &mut PgConnection| -> anyhow::Result<_> {
        let before = partitions::count(conn)?;
        let after = before + args.more;
        ensure!(after <= PARTITIONS_MAX, "there are {before} partitions; the maximum is {PARTITIONS_MAX}");
        // The streams are there before anything goes by the new number.
        broker::declare(&mut session, &Topology::log(after, retention))?;
        partitions::extend_to(conn, after)?;
        Ok((before, after))
    };
    // No stream of events has this name: its exchange is the log's.
    let Some(added) = resharding::alone(&mut *context.database()?.connection()?, MESSAGE, add)? else {
        bail!("another process is adding partitions just now");
    };
    let (before, after) = added?;
    writeln!(out, "{before} -> {after}")?;
    Ok(Outcome::Done)
}
