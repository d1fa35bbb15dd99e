#![doc = include_str!("../README.md")]

mod handler;
mod lanes;
mod leases;
mod pool;
mod processor;
mod settings;

pub use handler::{Event, Handler, apply};
pub use leases::{Leases, Round};
pub use processor::Processor;
pub use settings::Settings;

/// The name by which a stream's shard is leased.
pub fn resource(stream: &str, shard: i32) -> String {
    format!("{stream}/{shard:03}")
}
