//! The service's process; see the library.

fn main() {
    settings::main("sms-notifier", "Records notifications by SMS: queue send_notification.sms.", sms_notifier::run)
}
