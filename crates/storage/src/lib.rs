#![doc = include_str!("../README.md")]

pub mod admin;
pub mod collations;
mod error;
mod locks;
pub mod migrations;
mod pool;
pub mod rights;
mod schema;
mod session;
mod socket;

/// Users, whom they follow, what they post, and what follows from that.
mod microblog {
    pub mod audit;
    pub mod avatars;
    pub mod erasure;
    pub mod export;
    pub mod feeds;
    pub(crate) mod garbage;
    pub mod imports;
    pub mod notifications;
    pub mod repair;
    pub mod subscriptions;
    pub mod sweep;
    pub mod tweets;
    pub mod users;
}

/// What stands between a transaction and a queue.
mod messaging {
    pub mod attempts;
    pub mod dead_letters;
    pub(crate) mod floors;
    pub mod outbox;
    pub mod sleeper;
}

/// Events in order per key.
pub mod streams {
    pub mod account_effects;
    mod events;
    pub mod leases;
    pub mod parked;
    pub mod resharding;
    pub mod results;
    pub mod stream_audit;

    pub use self::events::*;
}

/// The message log.
mod log {
    pub mod consumer_offsets;
    pub mod log_audit;
    pub mod message_audit;
    pub mod message_epochs;
    pub mod message_outbox;
    pub mod messages;
    pub mod partitions;
}

// The folders are for readers of the source; callers name only a table's module.
pub use self::{
    log::*,
    messaging::*,
    microblog::*,
    streams::{account_effects, leases, parked, resharding, results, stream_audit},
};
pub use diesel::PgConnection;
pub use error::Error;
pub use floors::Floors;
pub use pool::{Connection, Database, Settings};

/// What queries return. Every one may fail as [`Error`] says; where a function has a section of errors, it's about those
/// that have a meaning of their own there.
pub type Result<T> = std::result::Result<T, Error>;

/// The result of a `SELECT count(*) AS n`.
#[derive(diesel::QueryableByName)]
struct Count {
    #[diesel(sql_type = diesel::sql_types::BigInt)]
    n: i64,
}
