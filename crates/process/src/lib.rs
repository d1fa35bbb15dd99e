#![doc = include_str!("../README.md")]

mod backoff;
pub mod health;
mod panics;
mod program;
mod pulse;
mod stop;

pub use backoff::Backoff;
pub use health::Settings as HealthSettings;
pub use panics::catch;
pub use program::Program;
pub use pulse::{InHand, Pulse, guard};
pub use stop::Stop;

use serde::{Deserialize, de::DeserializeOwned};

/// Loads the sections of the settings that a service names, and begins its log and metrics, which end with the guard.
///
/// # Errors
/// When the settings can't be used.
pub fn begin<T: DeserializeOwned>(service: &'static str) -> anyhow::Result<(T, telemetry::Guard)> {
    #[derive(Deserialize)]
    struct Sections {
        telemetry: telemetry::Settings,
    }
    // One struct with the other flattened into it would lose the names of the keys that are refused.
    let Sections { telemetry } = settings::load(service)?;
    let own = settings::load(service)?;
    Ok((own, telemetry::init(service, &telemetry)?))
}
