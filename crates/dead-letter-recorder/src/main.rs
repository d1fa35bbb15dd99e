//! The service's process; see the library.

fn main() {
    dead_letter_recorder::PROGRAM.main()
}
