#![doc = include_str!("../README.md")]

mod backoff;
mod consume;
mod death;
mod decode;
mod handler;
pub mod header;
pub mod health;
mod panics;
mod policy;
mod pulse;
mod queues;
mod settings;
mod stop;
pub mod testing;
mod worker;

pub use backoff::Backoff;
pub use death::Death;
pub use decode::{json, kind};
pub use handler::{BatchHandler, Item, Outgoing, Received, Step};
pub use panics::catch;
pub use policy::reason;
pub use pulse::Pulse;
pub use queues::Queues;
pub use settings::{Consuming, HealthSettings, Settings};
pub use stop::Stop;
pub use worker::Worker;
