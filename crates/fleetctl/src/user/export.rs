use crate::{Outcome, context::Context, output::json_line, progress::Progress};
use anyhow::{Context as _, bail};
use domain::UserId;
use serde_json::Value;
use std::{
    fs::{self, OpenOptions},
    io::{self, BufWriter, Write},
    mem,
    ops::ControlFlow,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};
use storage::{Database, export};

/// Write everything that the tables hold of a user, as JSON
///
/// The user, the avatar, tweets, who follows whom, notifications, imports that were asked for, and messages that were set aside: every
/// column but the hash of the password, which `has_password` stands for. Images and messages are in Base64. All of it is as it was
/// at one moment; lists are of any length. Also for a user who is deleted and whose days aren't over (users.keep_deleted_days).
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl user export 17 --out user-17.json
  fleetctl user export 17 | jq .user")]
pub(crate) struct Args {
    /// The user's id
    #[arg(value_name = "ID")]
    id: UserId,
    /// Write it to this file, which mustn't be there yet, and which nobody else may read
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(super) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let database = context.patient_database()?;
    match &args.out {
        None => write(&database, args.id, out)?,
        Some(path) => {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
            let mut file = BufWriter::new(file.with_context(|| told(path))?);
            let written = write(&database, args.id, &mut file)
                .and_then(|()| file.flush().and_then(|()| file.get_ref().sync_all()).with_context(|| told(path)));
            if let Err(error) = written {
                // A part of it could be taken for all.
                if let Err(left) = fs::remove_file(path) {
                    bail!("{error:#}; {} is incomplete, and can't be removed: {left}", path.display());
                }
                return Err(error);
            }
        }
    }
    Ok(Outcome::Done)
}

fn told(path: &Path) -> String {
    format!("can't write {}", path.display())
}

fn write(database: &Database, id: UserId, out: &mut dyn Write) -> anyhow::Result<()> {
    let progress = Progress::waiting("rows");
    let mut list = Sections { left: export::sections().collect(), is_open: false, has_rows: false };
    let mut written = Ok(());
    let mut rows = 0_u64;
    export::run(&mut *database.connection()?, id, |section, row| {
        written = list.row(out, section, &row);
        rows += 1;
        if rows.is_multiple_of(1000) {
            progress.say(&format!("{rows} so far"));
        }
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    written.and_then(|()| list.end(out)).context("can't write the output")
}

/// An object of lists, and of the user, a line for each row.
struct Sections {
    /// Those that haven't begun, the first first.
    left: Vec<&'static str>,
    is_open: bool,
    has_rows: bool,
}

impl Sections {
    fn row(&mut self, out: &mut dyn Write, section: &str, row: &Value) -> io::Result<()> {
        self.go_on(out, Some(section))?;
        if section != export::USER {
            out.write_all(if mem::replace(&mut self.has_rows, true) { b"," } else { b"" })?;
        }
        json_line(out, row)
    }

    fn end(&mut self, out: &mut dyn Write) -> io::Result<()> {
        self.go_on(out, None)?;
        writeln!(out, "]}}")
    }

    /// Begins sections up to this one, or all.
    fn go_on(&mut self, out: &mut dyn Write, upto: Option<&str>) -> io::Result<()> {
        while upto.is_none_or(|section| self.left.contains(&section)) && !self.left.is_empty() {
            let section = self.left.remove(0);
            match (section, mem::replace(&mut self.is_open, section != export::USER)) {
                (export::USER, _) => write!(out, "{{\"{section}\": ")?,
                (_, false) => writeln!(out, ",\"{section}\": [")?,
                (_, true) => writeln!(out, "],\"{section}\": [")?,
            }
            self.has_rows = false;
        }
        Ok(())
    }
}
