//! What every service's `main` does.

use crate::health;
use std::{
    env,
    io::{self, Write as _},
    net::SocketAddr,
};

/// A service as a program of the command line.
#[derive(Clone, Copy)]
pub struct Program {
    /// The service's name.
    pub name: &'static str,
    /// What it does, in a sentence.
    pub about: &'static str,
    /// Runs it until it has stopped.
    pub run: fn() -> anyhow::Result<()>,
    /// Where its process answers health checks, by the settings.
    pub health: fn(&str) -> anyhow::Result<SocketAddr>,
    /// Whether `run` reads the arguments itself; `--probe` alone is answered before.
    pub reads_arguments: bool,
}

impl Program {
    /// A service that takes no arguments and answers health checks at `[health]`.
    pub const fn new(name: &'static str, about: &'static str, run: fn() -> anyhow::Result<()>) -> Self {
        Self { name, about, run, health: health::address, reads_arguments: false }
    }

    /// The whole of its `main`.
    ///
    /// Exits with 0 after a clean stop, with 1 after an error, with 2 when it's called with arguments that it doesn't know.
    pub fn main(&self) -> ! {
        let status = self.answer().unwrap_or_else(|| self.status((self.run)()));
        // At once, rather than by returning: on the way out of a process the TLS library below libpq tears itself down, and
        // a thread of the connection pool that is just connecting crashes over that.
        signal_hook::low_level::exit(status)
    }

    /// The status to exit with; says what went wrong.
    fn status(&self, result: anyhow::Result<()>) -> i32 {
        match result {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("{}: {error:#}", self.name);
                1
            }
        }
    }

    /// Answers the arguments, if there are any, with the status to exit with.
    fn answer(&self) -> Option<i32> {
        let Self { name, about, .. } = self;
        let arguments: Vec<_> = env::args_os().skip(1).collect();
        let text = match arguments.iter().map(|argument| argument.to_str()).collect::<Vec<_>>()[..] {
            [Some("--probe")] => return Some(self.status((self.health)(name).and_then(health::probe))),
            [] => return None,
            _ if self.reads_arguments => return None,
            [Some("-h" | "--help")] => format!(
                "{about}\n\n\
                 Usage: {name} [--help | --version | --probe]\n\n\
                 Runs until SIGTERM or SIGINT, then finishes the work in hand and exits with 0. With --probe it asks the\n\
                 process that runs with the same settings whether it's ready, and exits with 0 if so.\n\
                 Settings come from ./config/local.toml and from variables such as MURMURATION__DATABASE__URL and\n\
                 MURMURATION__BROKER__URL, which have no default. config/default.toml lists them all.\n"
            ),
            [Some("-V" | "--version")] => format!("{name} {}\n", env!("CARGO_PKG_VERSION")),
            _ => {
                eprintln!("{name}: takes no arguments but --help, --version and --probe");
                return Some(2);
            }
        };
        // A reader that has gone away needs no answer.
        let _ = io::stdout().write_all(text.as_bytes());
        Some(0)
    }
}
