#![doc = include_str!("../README.md")]

use domain::{topology::queue, values::Channel};
use notifier::Notifier;
use process::Program;
use serde::Deserialize;
use service::Service;
use storage::Database;
use worker::Consuming;

/// The service's name.
pub const SERVICE: &str = "email-notifier";

/// The service as a program.
pub const PROGRAM: Program =
    Program::new(SERVICE, "Records notifications by e-mail: queue send_notification.email.", run);

/// The sections of the settings that are this service's own.
#[derive(Deserialize)]
struct Settings {
    email_notifier: Consuming,
}

/// Runs the service until it's told to stop.
///
/// # Errors
/// When the settings can't be used.
pub fn run() -> anyhow::Result<()> {
    let (service, Settings { email_notifier }) = Service::begin(SERVICE)?;
    let queues = vec![queue::SEND_NOTIFICATION_EMAIL.into()];
    service.consume(queues, email_notifier, handler)
}

/// The handler.
pub fn handler(database: Database) -> Notifier {
    Notifier::new(database, Channel::Email)
}
