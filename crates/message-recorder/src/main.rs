//! The service's process; see the library.

fn main() {
    message_recorder::PROGRAM.main()
}
