#![doc = include_str!("../README.md")]

mod database;
mod events;
mod postgres;
mod private;
mod rabbitmq;
mod servers;
mod vhost;
mod wait;

pub use database::TestDatabase;
pub use postgres::PrivatePostgres;
pub use private::Frozen;
pub use rabbitmq::PrivateRabbitmq;
pub use vhost::TestVhost;
pub use wait::{eventually, eventually_within};
