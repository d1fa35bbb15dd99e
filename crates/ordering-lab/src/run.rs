//! One experiment, or all of them.

use crate::{
    Outcome, chart,
    context::Settings,
    experiment::Experiment,
    experiments,
    interrupt::Interrupt,
    lab::{self, Lab, Options},
    names::CONSUMERS_MAX,
    produce::MAX_OFFSET,
    report::{self, Report, Verdict},
    work::WorkTime,
};
use anyhow::{Context as _, bail};
use broker::Session;
use clap::{
    Args, ValueEnum as _,
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser as _},
};
use serde::Serialize;
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};
use storage::{Database, resharding};

const ALL: &str = "all";

/// Does some work while no other lab is at work in this database.
pub(crate) fn alone<T>(database: &Database, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    // The name of no stream.
    const LOCK: &str = "lab";
    resharding::alone(&mut *database.connection()?, LOCK, |_| work())?
        .unwrap_or_else(|| bail!("another ordering-lab is at work in this database"))
}

/// Does a whole experiment and says what was seen.
#[derive(Args)]
pub(crate) struct Run {
    /// Which one
    #[arg(value_parser = PossibleValuesParser::new(names()).map(|name| Selection::parse(&name)))]
    experiment: Selection,
    /// How many users
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(2..=1_000))]
    users: u32,
    /// How many messages for each
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(2..=1_000))]
    messages: u32,
    /// The first user
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..=MAX_OFFSET))]
    offset: i64,
    /// How many consumers, before others join them
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=i64::from(CONSUMERS_MAX)))]
    consumers: u32,
    /// How long a message's work takes, in ms
    #[arg(long, value_name = "MS", default_value = "200..1500")]
    work_ms: WorkTime,
    /// Makes the load, the times of work and the faults repeatable
    #[arg(long)]
    seed: Option<u64>,
    /// Count consumer errors for the first consumers only
    #[arg(long)]
    tolerate_new: bool,
    /// Forget the users' balances first
    #[arg(long)]
    fresh: bool,
    /// The folder for results and logs
    #[arg(long, value_name = "FOLDER", default_value = "target/lab")]
    out: PathBuf,
}

/// The experiments asked for.
#[derive(Clone)]
struct Selection(Vec<Experiment>);

impl Selection {
    /// One of [`names`].
    fn parse(name: &str) -> Self {
        let chosen = |experiment: &&Experiment| name == ALL || experiment.name() == name;
        Self(Experiment::value_variants().iter().filter(chosen).copied().collect())
    }
}

fn names() -> Vec<PossibleValue> {
    let names = Experiment::value_variants().iter().filter_map(clap::ValueEnum::to_possible_value);
    names.chain([PossibleValue::new(ALL)]).collect()
}

/// The file that has everything.
#[derive(Serialize)]
struct Results<'a> {
    seed: u64,
    users: u32,
    messages: u32,
    consumers: u32,
    work_ms: String,
    took_ms: u128,
    experiments: &'a [Report],
}

impl Run {
    pub(crate) fn run(self, settings: &Settings, out: &mut dyn Write) -> anyhow::Result<Outcome> {
        let interrupt = Interrupt::catch()?;
        alone(&settings.database()?, || self.alone(settings, &interrupt, out))
    }

    fn alone(self, settings: &Settings, interrupt: &Interrupt, out: &mut dyn Write) -> anyhow::Result<Outcome> {
        let began = Instant::now();
        let database = settings.database()?;
        let options = Options {
            users: self.users,
            messages: self.messages,
            offset: self.offset,
            consumers: self.consumers,
            work: self.work_ms,
            seed: self.seed.unwrap_or_else(|| rand::random_range(1..1_000_000)),
            tolerate_new: self.tolerate_new,
            fresh: self.fresh,
            out: self.out,
        };
        // What a run that crashed has left behind.
        let mut session = Session::open(&settings.broker, crate::SERVICE)?;
        lab::clean(settings, &mut session, &database, Experiment::value_variants())?;

        let mut reports = Vec::new();
        for experiment in &self.experiment.0 {
            let lab = Lab::new(settings, &options, *experiment, interrupt, &database)?;
            let report = lab.run(|lab| experiments::run(*experiment, lab))?;
            report.write(out)?;
            out.flush()?;
            reports.push(report);
        }
        if reports.len() > 1 {
            writeln!(out)?;
            report::table(out, &reports)?;
        }
        let results = Results {
            seed: options.seed,
            users: options.users,
            messages: options.messages,
            consumers: options.consumers,
            work_ms: options.work.to_string(),
            took_ms: began.elapsed().as_millis(),
            experiments: &reports,
        };
        let json = serde_json::to_string_pretty(&results).context("can't write the results as JSON")?;
        write(&options.out, "results.json", &json, out)?;
        write(&options.out, "errors.svg", &chart::svg(&reports), out)?;
        let wrong = reports.iter().any(|report| matches!(report.verdict, Verdict::NotAsExpected(_)));
        Ok(if wrong { Outcome::Incomplete } else { Outcome::Done })
    }
}

fn write(folder: &Path, name: &str, text: &str, out: &mut dyn Write) -> anyhow::Result<()> {
    let path = folder.join(name);
    fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))?;
    writeln!(out, "written: {}", path.display())?;
    Ok(())
}
