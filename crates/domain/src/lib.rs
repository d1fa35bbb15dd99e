#![doc = include_str!("../README.md")]

pub mod access;
pub mod delivery;
pub mod envelope;
pub mod ids;
pub mod log;
pub mod message;
pub mod stream;
pub mod topology;
pub mod values;
pub mod wire_time;

pub use delivery::{AttemptLedger, Failure, Suspect};
pub use envelope::Envelope;
pub use ids::{ImportId, TweetId, UserId};
