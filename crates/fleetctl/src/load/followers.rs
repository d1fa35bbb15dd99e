use super::{STEP, users::plan};
use crate::{Outcome, context::Context, interrupt::Interrupt, output::pace, progress::Progress};
use anyhow::Context as _;
use domain::UserId;
use std::io::Write;
use storage::imports;

/// Make followers of one author, <prefix>_0, <prefix>_1, …, directly in the database
///
/// They come to be as an import over HTTP makes them, with the author's newest tweets in their feeds. A login that is
/// taken is passed over, so running it again changes nothing.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl load followers --author 1 --count 100000
  fleetctl load followers --author 1 --count 1000 --prefix fan")]
pub(crate) struct Args {
    /// The author's id
    #[arg(long, value_name = "ID")]
    author: UserId,
    /// How many
    #[arg(long, value_name = "N")]
    count: i64,
    /// What the followers' logins start with; without it `follower<author>`
    #[arg(long)]
    prefix: Option<String>,
}

pub(crate) fn run(
    args: &Args,
    context: &Context,
    interrupt: &Interrupt,
    out: &mut dyn Write,
) -> anyhow::Result<Outcome> {
    let author = args.author;
    let prefix = args.prefix.clone().unwrap_or_else(|| format!("follower{author}"));
    let plan = plan(&prefix, args.count)?;
    let database = context.database()?;
    // The same command goes on where an interrupted one stopped.
    let key = format!("fleetctl:{author}:{}:{}", plan.prefix(), plan.count());
    let before = database.transaction(|conn| imports::open(conn, &key, author, &plan))?;
    let progress = Progress::new("followers", plan.count().into());
    progress.advance(u64::from(before.next_index.unsigned_abs()));
    let mut import = before.clone();
    while !import.is_over() && !interrupt.is_set() {
        let next = database
            .transaction(|conn| imports::step(conn, import.id, STEP))
            .with_context(|| format!("after {} followers", import.next_index))?;
        progress.advance(u64::from(next.next_index.abs_diff(import.next_index)));
        import = next;
    }
    database.transaction(|conn| imports::release(conn, import.id))?;
    let (_, elapsed) = progress.finish();
    if let Some(error) = &import.error {
        eprintln!("fleetctl: the import has failed: {error}");
    }
    let left = import.requested.abs_diff(import.next_index).into();
    writeln!(
        out,
        "followers of {author}: {} made, {} logins taken already, {left} not reached; {}",
        import.created - before.created,
        import.skipped - before.skipped,
        pace(import.next_index.abs_diff(before.next_index).into(), elapsed)
    )?;
    Ok(super::outcome(left))
}
