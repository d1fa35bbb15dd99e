#![doc = include_str!("../README.md")]

mod events;
mod line;
pub mod metrics;
mod statsd;

use std::io::{self, Write as _};

use log::LevelFilter;
use serde::Deserialize;

pub use events::*;
pub use statsd::flush;

/// The section `[telemetry]` of the settings.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// What to log: a level, or several by crate (`info,broker=debug`). `RUST_LOG` goes before it.
    pub log: String,
    /// `host:port` of a statsd server; empty for no metrics.
    pub statsd: String,
    /// What every metric's name starts with.
    pub metrics_prefix: String,
}

/// Something that happened: its log line and its metrics together.
pub trait Event {
    /// Writes the line and counts. Never fails, and never waits for the metrics' server.
    fn emit(self);
}

/// Emits an event.
pub fn emit(event: impl Event) {
    event.emit();
}

/// Keeps the metrics going to the server each second; dropping it sends the last ones. For `main` to hold.
#[must_use = "dropping it ends the sending of metrics"]
#[derive(Debug)]
pub struct Guard {
    _sender: Option<statsd::Sender>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        flush();
    }
}

/// Why telemetry can't start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `telemetry.log` has something else than levels in it.
    #[error(
        "`telemetry.log`: \"{0}\" isn't a level (error, warn, info, debug, trace, off) or a list like info,broker=debug"
    )]
    Log(String),
    /// `telemetry.statsd` isn't an address. A host that can't be resolved is no error.
    #[error("`telemetry.statsd`: \"{0}\" isn't host:port")]
    Statsd(String),
    /// There is a logger already.
    #[error("telemetry can be initialised only once in a process")]
    Twice(#[source] log::SetLoggerError),
    /// The thread that sends metrics couldn't be started.
    #[error("can't start the thread that sends metrics")]
    Thread(#[source] io::Error),
}

/// Starts logging to the standard error stream, and metrics if the settings name a server. Once in a process.
///
/// # Errors
/// See [`Error`]. A server that is away or can't be resolved is none: it is warned of once and tried again.
pub fn init(service: &str, settings: &Settings) -> Result<Guard, Error> {
    let filters = match std::env::var("RUST_LOG") {
        Ok(filters) if !filters.is_empty() => filters,
        _ => checked_filters(&settings.log)?.to_owned(),
    };
    let service = service.to_owned();
    env_logger::Builder::new()
        .parse_filters(&filters)
        .format(move |out, record| {
            let time = out.timestamp_millis();
            out.write_all(line::format(&time, &service, record).as_bytes())
        })
        .try_init()
        .map_err(Error::Twice)?;
    Ok(Guard { _sender: statsd::start(&settings.statsd, &settings.metrics_prefix)? })
}

/// Refuses a misspelt level, which the logger would take for the name of a crate, and then log nothing else.
fn checked_filters(filters: &str) -> Result<&str, Error> {
    let level = |directive: &str| directive.rsplit('=').next().unwrap_or_default().trim().parse::<LevelFilter>();
    match filters.split(',').find(|directive| level(directive).is_err()) {
        Some(directive) => Err(Error::Log(directive.to_owned())),
        None => Ok(filters),
    }
}

#[cfg(test)]
mod tests {
    use super::checked_filters;

    #[test]
    fn only_levels_pass_as_what_to_log() {
        for good in ["info", "off", "WARN", "info,broker=debug", "warn, storage::pool=trace"] {
            assert!(checked_filters(good).is_ok(), "{good}");
        }
        for bad in ["", "inof", "broker", "info,", "info,broker=", "broker=loud"] {
            assert!(checked_filters(bad).is_err(), "{bad}");
        }
    }
}
