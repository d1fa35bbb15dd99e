//! The service's process; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    worker::main(
        "follower-importer",
        "Makes users in bulk and lets them follow an author: queue add_followers.",
        follower_importer::run,
    )
}
