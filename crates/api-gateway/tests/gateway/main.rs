//! The gateway over HTTP, on a real database.

mod app;
mod bad_input;
mod feeds;
mod imports;
mod operation;
mod process;
mod tweets;
mod users;
