//! The gateway over HTTP, on a real database.

mod app;
mod attacks;
mod bad_input;
mod events;
mod feeds;
mod hostile;
mod imports;
mod messages;
mod operation;
mod process;
mod raw;
mod results;
mod tweets;
mod users;
mod values;
