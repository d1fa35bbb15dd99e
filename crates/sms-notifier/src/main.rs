//! The service's process; see the library.

fn main() {
    sms_notifier::PROGRAM.main()
}
