//! The service's process; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    worker::main(
        "feed-fanout",
        "Cuts an author's followers into chunks for each new tweet: queue publish_tweet.",
        feed_fanout::run,
    )
}
