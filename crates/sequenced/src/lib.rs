#![doc = include_str!("../README.md")]

mod engine;
mod handler;
mod intake;
mod lanes;
mod pool;
mod processor;
mod recorder;
mod settings;
mod shares;
mod sweep;
mod time_limit;

pub use handler::{Event, Handler, apply};
pub use processor::Processor;
pub use settings::Settings;
