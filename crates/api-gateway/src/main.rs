//! The service's process; see the library.

use std::{
    env,
    io::{self, Write as _},
    process::ExitCode,
};

const HELP: &str = "\
Answers the fleet's HTTP: users, subscriptions, tweets, feeds, follower imports.

Usage: api-gateway [--help | --version]

Runs until SIGTERM or SIGINT; upon SIGTERM it answers the requests in hand first. Settings come from ./config/local.toml
and from variables such as MURMURATION__DATABASE__URL, which is required. config/default.toml lists them all.
";

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let text = match arguments.iter().map(|argument| argument.to_str()).collect::<Vec<_>>()[..] {
        [] => match api_gateway::run() {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("api-gateway: {error:#}");
                return ExitCode::FAILURE;
            }
        },
        [Some("-h" | "--help")] => HELP,
        [Some("-V" | "--version")] => concat!("api-gateway ", env!("CARGO_PKG_VERSION"), "\n"),
        _ => {
            eprintln!("api-gateway: takes no arguments but --help and --version");
            return ExitCode::from(2);
        }
    };
    // A reader that has gone away needs no answer.
    let _ = io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
