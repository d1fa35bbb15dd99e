//! The service's process; see the library.

fn main() {
    settings::main(
        outbox_relay::SERVICE,
        "Publishes what is committed in the tables outbox and message_outbox.",
        outbox_relay::run,
    )
}
