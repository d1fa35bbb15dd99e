//! The real binary, as processes on real servers that are killed, frozen and stopped. Whatever a test does: every event
//! takes effect once and in order.

mod broker;
mod deaths;
mod settings;
mod stage;
mod takeover;
