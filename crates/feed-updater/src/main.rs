//! The service's process; see the library.

fn main() {
    feed_updater::PROGRAM.main()
}
