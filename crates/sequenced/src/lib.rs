#![doc = include_str!("../README.md")]

mod engine;
mod handler;
mod intake;
mod lanes;
mod outcome;
mod pool;
mod processor;
mod recorder;
mod settings;
mod shares;
mod signal;
mod sweep;
mod time_limit;
mod work;

pub use handler::{Event, Handler, apply};
pub use processor::Processor;
pub use settings::Settings;
