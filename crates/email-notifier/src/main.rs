//! The service's process; see the library.

fn main() {
    settings::main(
        "email-notifier",
        "Records notifications by e-mail: queue send_notification.email.",
        email_notifier::run,
    )
}
