#![doc = include_str!("../README.md")]

use domain::{topology::queue, values::Channel};
use serde::Deserialize;
use worker::Consuming;

/// The service's name.
pub const SERVICE: &str = "sms-notifier";

#[derive(Deserialize)]
struct Settings {
    #[serde(flatten)]
    common: notifier::Settings,
    sms_notifier: Consuming,
}

/// Runs the service until it's told to stop.
///
/// # Errors
/// When the settings can't be used.
pub fn run() -> anyhow::Result<()> {
    let settings: Settings = settings::load(SERVICE)?;
    notifier::run(SERVICE, Channel::Phone, queue::SEND_NOTIFICATION_SMS, settings.common, settings.sms_notifier)
}
