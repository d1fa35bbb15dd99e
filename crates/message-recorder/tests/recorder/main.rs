//! The real binary, as processes on real servers that are killed, frozen and stopped. Whatever a test does: every group
//! records each message that was accepted once, and those of a key in their order.

mod absent;
mod failover;
mod foreign;
mod groups;
mod kills;
mod places;
mod settings;
mod sharing;
mod stage;
