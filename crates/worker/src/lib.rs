#![doc = include_str!("../README.md")]

mod consume;
mod death;
mod decode;
mod handler;
pub mod header;
mod needs;
mod policy;
mod queues;
mod returning;
mod settings;
pub mod testing;
mod worker;

pub use death::Death;
pub use decode::{json, kind};
pub use handler::{BatchHandler, Item, Outgoing, Received, Step};
pub use policy::reason;
pub use queues::Queues;
pub use settings::{Consuming, Settings};
pub use worker::Worker;
