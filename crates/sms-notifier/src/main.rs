//! The service's process; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    worker::main("sms-notifier", "Records notifications by SMS: queue send_notification.sms.", sms_notifier::run)
}
