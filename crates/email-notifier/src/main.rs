//! The service's process; see the library.

fn main() {
    email_notifier::PROGRAM.main()
}
