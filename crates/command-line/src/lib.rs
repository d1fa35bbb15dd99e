#![doc = include_str!("../README.md")]

pub mod interrupt;
pub mod progress;
pub mod servers;

use clap::{ArgAction, Args};
use interrupt::Interrupted;

/// How much a tool logs.
#[derive(Args)]
pub struct Verbosity {
    /// Log more to the standard error stream: -v what happens, -vv everything. RUST_LOG goes before it
    #[arg(short, long, action = ArgAction::Count, global = true)]
    verbose: u8,
}

impl Verbosity {
    /// The filter of log lines.
    pub fn filter(&self) -> &'static str {
        match self.verbose {
            // What the AMQP client warns of comes back as an error, or is none: a queue that isn't there.
            0 => "warn,amiquip=error",
            1 => "info",
            _ => "debug",
        }
    }

    /// Logs from now on, and keeps no metrics.
    ///
    /// # Errors
    /// When `RUST_LOG` can't be read.
    pub fn log(&self, program: &'static str) -> anyhow::Result<telemetry::Guard> {
        let settings =
            telemetry::Settings { log: self.filter().into(), statsd: String::new(), metrics_prefix: String::new() };
        Ok(telemetry::init(program, &settings)?)
    }
}

/// How a command ended that could do its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All is well.
    Done,
    /// Something was found wrong, or not all was done.
    Incomplete,
    /// Stopped by a signal.
    Interrupted,
}

impl Outcome {
    fn status(self) -> i32 {
        match self {
            Self::Done => 0,
            Self::Incomplete => 1,
            // 128 and the number of SIGINT, as shells have it.
            Self::Interrupted => 130,
        }
    }
}

/// Ends the process at once, rather than by returning: on the way out of a process the TLS library below libpq tears itself
/// down, and a thread of the connection pool that is just connecting crashes over that.
pub fn end(status: i32) -> ! {
    signal_hook::low_level::exit(status)
}

/// [Ends](end) the process with the exit status of what a command came to; says first why it couldn't do its work.
pub fn exit(program: &str, result: anyhow::Result<Outcome>) -> ! {
    let status = match result {
        Ok(outcome) => outcome.status(),
        Err(error) => {
            eprintln!("{program}: {error:#}");
            if error.is::<Interrupted>() { Outcome::Interrupted.status() } else { 2 }
        }
    };
    end(status)
}
