//! The service's process; see the library.

fn main() {
    settings::main(
        "feed-fanout",
        "Cuts an author's followers into chunks for each new tweet: queue publish_tweet.",
        feed_fanout::run,
    )
}
