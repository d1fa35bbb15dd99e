#![doc = include_str!("../README.md")]

pub mod interrupt;
pub mod progress;
pub mod servers;

use clap::{ArgAction, Args};

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

/// Ends the process at once, rather than by returning: on the way out of a process the TLS library below libpq tears itself
/// down, and a thread of the connection pool that is just connecting crashes over that.
pub fn exit(status: i32) -> ! {
    signal_hook::low_level::exit(status)
}
