use super::STEP;
use crate::{Outcome, context::Context, interrupt::Interrupt, output::pace, progress::Progress};
use anyhow::Context as _;
use domain::values::ImportPlan;
use std::io::Write;
use storage::{Database, users};

/// Make the users <prefix>_0, <prefix>_1, … directly in the database
///
/// Every other one has an e-mail address at example.com, the others a phone number that belongs to nobody. None has a
/// password. A login that is taken is passed over, so running it again changes nothing.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl load users --count 100000
  fleetctl load users --count 1000 --prefix reader")]
pub(crate) struct Args {
    /// How many
    #[arg(long, value_name = "N")]
    count: i64,
    /// What the logins start with
    #[arg(long, default_value = "user")]
    prefix: String,
}

pub(crate) fn run(
    args: &Args,
    context: &Context,
    interrupt: &Interrupt,
    out: &mut dyn Write,
) -> anyhow::Result<Outcome> {
    let plan = plan(&args.prefix, args.count)?;
    let progress = Progress::new("users", plan.count().into());
    let made = make(&context.database()?, &plan, interrupt, &progress)?;
    let (seen, elapsed) = progress.finish();
    let left = u64::from(plan.count()) - seen;
    writeln!(out, "users: {made} made, {} there already, {left} not reached; {}", seen - made, pace(seen, elapsed))?;
    Ok(super::outcome(left))
}

/// The logins to be made, known to be valid.
pub(super) fn plan(prefix: &str, count: i64) -> anyhow::Result<ImportPlan> {
    ImportPlan::new(prefix, count, i32::MAX.unsigned_abs()).map_err(|(field, why)| anyhow::anyhow!("--{field} {why}"))
}

/// Makes the users, and returns how many are new.
fn make(database: &Database, plan: &ImportPlan, interrupt: &Interrupt, progress: &Progress) -> anyhow::Result<u64> {
    let (mut made, mut next) = (0, 0);
    while next < plan.count() && !interrupt.is_set() {
        let upto = next.saturating_add(STEP).min(plan.count());
        // The plan's count was bounded so.
        let range = next.cast_signed()..upto.cast_signed();
        let new = database
            .transaction(|conn| users::create_series(conn, plan.prefix(), range.clone(), None))
            .with_context(|| format!("after {next} users"))?;
        made += new.len() as u64;
        progress.advance((upto - next).into());
        next = upto;
    }
    Ok(made)
}
