//! The service's process; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    worker::main(outbox_relay::SERVICE, "Publishes what is committed in the table outbox.", outbox_relay::run)
}
