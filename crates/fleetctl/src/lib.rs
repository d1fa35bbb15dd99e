#![doc = include_str!("../README.md")]

mod consent;
mod context;
mod dead_letters;
mod duration;
mod events;
mod keys;
mod load;
mod log;
mod migrate;
mod output;
mod reshard;
mod rights;
mod shards;
mod stream;
mod topology;
mod user;
mod verify;

use crate::context::Context;
use anyhow::{Context as _, anyhow};
use clap::{Parser, Subcommand};
use command_line::{Outcome, Verbosity, interrupt, progress, servers::Connections};
use std::io::{self, Write};

/// The operator's tool of the murmuration fleet.
#[derive(Parser)]
#[command(name = "fleetctl", version, after_long_help = AFTER_HELP)]
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
AMQP_URL; the services' own settings (./config/local.toml, MURMURATION__DATABASE__URL, MURMURATION__BROKER__URL);
.local/env in this folder or one above it, which `make run` writes.

Exit status: 0 all is well; 1 something was found wrong, or was done in part; 2 it couldn't be done (usage, settings,
a server that is away, a refusal); 130 interrupted.

Examples:
  fleetctl migrate
  fleetctl user create --login ann --email ann@example.com
  fleetctl load followers --author 1 --count 100000
  fleetctl dead-letters list --queue update_feed.00
  fleetctl verify --wait 60s";

#[derive(Subcommand)]
enum Command {
    Migrate(migrate::Args),
    #[command(subcommand)]
    Rights(rights::Command),
    #[command(subcommand)]
    Topology(topology::Command),
    #[command(subcommand)]
    User(user::Command),
    #[command(subcommand)]
    Load(load::Command),
    #[command(subcommand)]
    DeadLetters(dead_letters::Command),
    Verify(verify::Args),
    #[command(subcommand)]
    Events(events::Command),
    #[command(subcommand)]
    Keys(keys::Command),
    #[command(subcommand)]
    Shards(shards::Command),
    Reshard(reshard::Args),
    #[command(subcommand)]
    Log(log::Command),
}

/// The whole of the program: reads the arguments, does what they say, and exits.
pub fn main() -> ! {
    let cli = Cli::parse();
    let mut out = output::Forgiving(io::stdout().lock());
    let result = run(cli, &mut out).and_then(|outcome| {
        out.flush().context("can't write the output")?;
        Ok(outcome)
    });
    // What was written before it went wrong; that it did is being told.
    let _ = out.flush();
    command_line::exit("fleetctl", result.map_err(|error| anyhow!(output::visible_lines(&format!("{error:#}")))))
}

fn run(cli: Cli, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let _telemetry = cli.verbosity.log("fleetctl")?;
    let context = Context::new(&cli.connections)?;
    match cli.command {
        Command::Migrate(args) => migrate::run(&args, &context, out),
        Command::Rights(command) => rights::run(&command, &context, out),
        Command::Topology(command) => topology::run(&command, &context, out),
        Command::User(command) => user::run(command, &context, out),
        Command::Load(command) => load::run(command, &context, out),
        Command::DeadLetters(command) => dead_letters::run(command, &context, out),
        Command::Verify(args) => verify::run(&args, &context, out),
        Command::Events(command) => events::run(&command, &context, out),
        Command::Keys(command) => keys::run(&command, &context, out),
        Command::Shards(command) => shards::run(&command, &context, out),
        Command::Reshard(args) => reshard::run(&args, &context, out),
        Command::Log(command) => log::run(&command, &context, out),
    }
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
