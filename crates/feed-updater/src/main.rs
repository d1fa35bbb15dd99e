//! The service's process; see the library.

fn main() {
    settings::main(
        "feed-updater",
        "Writes tweets into feeds and asks for notifications: queues update_feed.00 and following.",
        feed_updater::run,
    )
}
