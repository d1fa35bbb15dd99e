#![doc = include_str!("../README.md")]

mod broker;
mod database;
mod drain;
mod events;
mod microblog;
mod servers;
pub mod sql;
mod vhost;

pub use broker::{broker_settings, log_retention};
pub use database::TestDatabase;
pub use drain::drain;
pub use harness::{
    Action, Direction, Frozen, Held, PrivatePostgres, PrivateRabbitmq, Proxy, Trap, after, eventually,
    eventually_within, free_ports,
};
pub use vhost::TestVhost;
