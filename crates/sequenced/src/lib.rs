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
