//! The service's process; see the library.

fn main() {
    settings::main(
        event_processor::SERVICE,
        "Handles account events, in order per account: queues account_event.s000 and following.",
        event_processor::run,
    )
}
