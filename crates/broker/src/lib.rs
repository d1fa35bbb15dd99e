#![doc = include_str!("../README.md")]

mod address;
mod backoff;
mod confirms;
mod connector;
mod consumer;
mod delivery;
mod error;
mod link;
mod moving;
mod publisher;
mod session;
mod settings;
mod survey;
mod topology;
mod unsettled;
mod watchdog;
mod wire;

pub use consumer::{Acked, Batch, Consumer, LeftOut, StreamOffset};
pub use delivery::{Delivery, Ticket, header};
pub use error::Error;
pub use link::{Destination, Link};
pub use moving::{move_and_delete, move_messages};
pub use publisher::{PublishError, Publisher, Reason};
pub use session::Session;
pub use settings::Settings;
pub use survey::Survey;
pub use topology::{
    Difference, QueueDepth, Refused, ask, declare, declare_each, delete_exchanges, delete_queues, depths, drain,
    existing, unbind,
};
