//! The service's process; see the library.

fn main() {
    outbox_relay::PROGRAM.main()
}
