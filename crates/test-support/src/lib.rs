#![doc = include_str!("../README.md")]

mod database;
mod servers;
mod vhost;
mod wait;

pub use database::TestDatabase;
pub use vhost::TestVhost;
pub use wait::{eventually, eventually_within};
