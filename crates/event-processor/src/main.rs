//! The service's process; see the library.

fn main() {
    event_processor::PROGRAM.main()
}
