use crate::{Outcome, consent::Consent, context::Context, progress::Progress};
use domain::UserId;
use std::{
    io::Write,
    time::{Duration, Instant},
};
use storage::{
    Database, Error,
    erasure::{self, Erased},
};

/// How long to go on trying where somebody holds a row.
const PATIENCE: Duration = Duration::from_secs(30);

/// Erase what is kept of a user, now and for good
///
/// Deletes the user, where that wasn't done, and takes everything personal away that the sweep would take away after
/// users.keep_deleted_days. The row stays under its id, and so do those of tweets, without their texts. Says what that is, and asks
/// before. Where it's interrupted, the sweep of feed-updater goes on; that also takes one more look an hour after the deletion, for
/// what was under way. Backups and the mailboxes of those who were notified aren't reached.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl user export 17 --out user-17.json
  fleetctl user erase 17 --dry-run
  fleetctl user erase 17 --yes")]
pub(crate) struct Args {
    /// The user's id
    #[arg(value_name = "ID")]
    id: UserId,
    /// Change nothing, and say what would be changed
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    consent: Consent,
}

pub(super) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let Args { id, dry_run, consent } = args;
    let database = context.patient_database()?;
    let left = erasure::left(&mut *database.connection()?, *id)?;
    if *dry_run {
        writeln!(out, "user {id}: {} would be erased", told(left))?;
        return Ok(Outcome::Done);
    }
    consent.obtain(&format!("user {id} is to be erased for good: {}", told(left)))?;
    let deleted = database.transaction(|conn| erasure::begin(conn, *id))?;
    let erased = erase(&database, *id, left)?;
    let deleted = if deleted { "deleted; " } else { "" };
    writeln!(out, "user {id}: {deleted}{} erased", told(erased))?;
    Ok(Outcome::Done)
}

fn erase(database: &Database, id: UserId, left: Erased) -> Result<Erased, Error> {
    let progress = Progress::new("rows", left.rows() as u64);
    let mut all = Erased::default();
    let mut deadline = Instant::now() + PATIENCE;
    loop {
        match database.transaction(|conn| erasure::step(conn, id)) {
            Ok((erased, more)) => {
                all += erased;
                progress.advance(erased.rows() as u64);
                if !more {
                    return Ok(all);
                }
                deadline = Instant::now() + PATIENCE;
            }
            // Each try has waited for a second.
            Err(Error::Locked(_)) if Instant::now() < deadline => {}
            Err(error) => return Err(error),
        }
    }
}

fn told(erased: Erased) -> String {
    let Erased { user, avatar, imports, dead_letters, notifications, tweets } = erased;
    let parts = [(user, "login, address, password, age and roles"), (avatar, "the avatar")];
    let parts = parts.iter().filter(|(rows, _)| *rows > 0).map(|(_, what)| (*what).to_owned());
    let counted = [
        (notifications, "notifications"),
        (tweets, "texts of tweets"),
        (imports, "prefixes of imports"),
        (dead_letters, "bodies of dead letters"),
    ];
    let counted = counted.iter().filter(|(rows, _)| *rows > 0).map(|(rows, what)| format!("{rows} {what}"));
    let all: Vec<_> = parts.chain(counted).collect();
    if all.is_empty() { "nothing".into() } else { all.join(", ") }
}
