//! Processors on a real database and a real broker. Whatever a test does: every event takes effect once and in order.

mod busy;
mod failures;
mod messages;
mod order;
mod resharding;
mod servers;
mod sharing;
mod streams;
mod support;
