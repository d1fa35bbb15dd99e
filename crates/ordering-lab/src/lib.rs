#![doc = include_str!("../README.md")]

mod balances;
mod chart;
mod consume;
mod context;
mod experiment;
mod experiments;
mod lab;
mod load;
mod names;
mod produce;
mod report;
mod run;
mod tables;
mod work;

use crate::{context::Settings, experiment::Experiment};
use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum as _};
use command_line::{Outcome, Verbosity, interrupt, progress, servers::Connections};
use std::io::{self, Write};

/// The program's name, and that of its consumers of a sequenced stream.
pub(crate) const SERVICE: &str = "ordering-lab";

/// See how parallel consumers break the order of messages, what helps, and what doesn't
#[derive(Parser)]
#[command(name = "ordering-lab", version, after_long_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    verbosity: Verbosity,
    #[command(flatten)]
    connections: Connections,
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Where the servers are is taken from the first of these that is set: --database-url and --amqp-url; DATABASE_URL and
AMQP_URL; the services' own settings; .local/env in this folder or one above it, which `make servers` writes. The database
needs the schema: fleetctl migrate.

Exit status: 0 all is as expected; 1 an experiment isn't; 2 it couldn't be done; 130 interrupted.

Examples:
  ordering-lab run competing --work-ms 5..20
  ordering-lab run all --work-ms 5..20 --seed 7
  ordering-lab consume consistent-hash --consumer-id 1   # and others, each in a terminal of its own; then
  ordering-lab produce consistent-hash 1000
  ordering-lab clean";

#[derive(Subcommand)]
enum Command {
    Run(run::Run),
    Produce(produce::Produce),
    Consume(consume::Consume),
    /// Take away what the lab's commands have left in the broker
    Clean,
}

/// The whole of the program: reads the arguments, does what they say, and exits.
pub fn main() -> ! {
    let cli = Cli::parse();
    let mut out = io::stdout().lock();
    let result = run(cli, &mut out).and_then(|outcome| {
        out.flush().context("can't write the output")?;
        Ok(outcome)
    });
    let _ = out.flush();
    command_line::exit(SERVICE, result)
}

fn run(cli: Cli, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let settings = Settings::load(&cli.connections)?;
    let telemetry = telemetry::Settings { log: cli.verbosity.filter().into(), ..settings.telemetry.clone() };
    let _telemetry = telemetry::init(SERVICE, &telemetry)?;
    match cli.command {
        Command::Run(run) => return run.run(&settings, out),
        Command::Produce(produce) => produce.run(&settings, out)?,
        Command::Consume(consume) => writeln!(out, "{}", consume.run(&settings)?)?,
        Command::Clean => {
            let mut session = broker::Session::open(&settings.broker, SERVICE)?;
            let database = settings.database()?;
            run::alone(&database, || lab::clean(&settings, &mut session, &database, Experiment::value_variants()))?;
        }
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::CommandFactory as _;

    #[test]
    fn the_arguments_are_defined_without_contradiction() {
        Cli::command().debug_assert();
    }
}
