//! The service's process; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    worker::main(
        "email-notifier",
        "Records notifications by e-mail: queue send_notification.email.",
        email_notifier::run,
    )
}
