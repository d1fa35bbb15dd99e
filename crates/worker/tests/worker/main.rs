//! The worker on a real broker.

mod failures;
mod health;
mod processes;
mod stopping;
mod support;
mod topology;
