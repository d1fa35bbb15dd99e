//! The service's process; see the library.

fn main() {
    settings::main(
        "follower-importer",
        "Makes users in bulk and lets them follow an author: queue add_followers.",
        follower_importer::run,
    )
}
