use crate::{Outcome, context::Context, duration, progress::Progress, rights::Prefix};
use std::{
    io::Write,
    thread,
    time::{Duration, Instant},
};
use storage::{Connection, Database, Error, collations, migrations, rights};

/// Bring the database's schema up to date
///
/// Running it again changes nothing, and any number of these may run at once. It also says when a library that sorts texts has
/// changed since the database's indexes were made. Where the services have roles of their own (`rights apply`), they have what the new
/// schema needs afterwards.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl migrate
  fleetctl migrate --wait 5m
  fleetctl migrate --revert-all --yes")]
pub(crate) struct Args {
    /// How long to wait for a database that is away
    #[arg(long, default_value = "60s", value_parser = duration::parse, value_name = "DURATION")]
    wait: Duration,
    #[command(flatten)]
    prefix: Prefix,
    /// Undo every migration instead: all data is gone
    #[arg(long, requires = "yes")]
    revert_all: bool,
    /// Yes, do undo them
    #[arg(long, requires = "revert_all")]
    yes: bool,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let database = context.patient_database()?;
    let mut conn = await_database(&database, args.wait)?;
    let (verb, versions) = match args.revert_all {
        true => ("reverted", migrations::revert_all(&mut conn)?),
        false => ("applied", migrations::run(&mut conn)?),
    };
    for version in &versions {
        writeln!(out, "{verb} {version}")?;
    }
    if versions.is_empty() {
        writeln!(out, "nothing to do")?;
    }
    if !args.revert_all {
        drop(conn);
        database.transaction(|conn| rights::apply(conn, &args.prefix.prefix, None))?;
        conn = database.connection()?;
    }
    for outdated in collations::outdated(&mut conn)? {
        writeln!(out, "note: {outdated}")?;
    }
    Ok(Outcome::Done)
}

/// A connection, as soon as the database gives one.
fn await_database(database: &Database, wait: Duration) -> Result<Connection, Error> {
    let deadline = Instant::now() + wait;
    let mut progress = None;
    loop {
        match database.connection() {
            Err(error @ Error::Unavailable(_)) if Instant::now() < deadline => {
                progress
                    .get_or_insert_with(|| {
                        eprintln!("the database isn't available; waiting up to {wait:?}");
                        Progress::waiting("the database")
                    })
                    .say(&cause(&error));
                thread::sleep(Duration::from_millis(250));
            }
            result => return result,
        }
    }
}

/// What lies at the bottom of the error.
fn cause(error: &Error) -> String {
    let source = std::error::Error::source(error);
    source.map_or_else(|| error.to_string(), ToString::to_string).trim().to_owned()
}
