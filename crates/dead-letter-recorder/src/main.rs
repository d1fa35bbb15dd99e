//! The service's process; see the library.

fn main() {
    settings::main(
        dead_letter_recorder::SERVICE,
        "Records dead letters in the table dead_letter, for an operator to replay or drop.",
        dead_letter_recorder::run,
    )
}
