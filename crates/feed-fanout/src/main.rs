//! The service's process; see the library.

fn main() {
    feed_fanout::PROGRAM.main()
}
