#![doc = include_str!("../README.md")]

pub mod account_effects;
pub mod admin;
pub mod attempts;
pub mod audit;
pub mod avatars;
pub mod collations;
pub mod consumer_offsets;
pub mod dead_letters;
mod error;
pub mod feeds;
mod floors;
pub mod garbage;
pub mod imports;
pub mod leases;
mod locks;
pub mod log_audit;
pub mod message_audit;
pub mod message_epochs;
pub mod message_outbox;
pub mod messages;
pub mod migrations;
pub mod notifications;
pub mod outbox;
pub mod parked;
pub mod partitions;
mod pool;
pub mod repair;
pub mod resharding;
pub mod results;
mod schema;
mod session;
pub mod sleeper;
mod socket;
pub mod stream_audit;
pub mod streams;
pub mod subscriptions;
pub mod tweets;
pub mod users;

pub use diesel::PgConnection;
pub use error::Error;
pub use floors::Floors;
pub use pool::{Connection, Database, Settings};

/// What queries answer.
pub type Result<T> = std::result::Result<T, Error>;

/// The answer of a `SELECT count(*) AS n`.
#[derive(diesel::QueryableByName)]
struct Count {
    #[diesel(sql_type = diesel::sql_types::BigInt)]
    n: i64,
}
