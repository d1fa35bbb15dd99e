//! The service's process; see the library.

fn main() {
    follower_importer::PROGRAM.main()
}
