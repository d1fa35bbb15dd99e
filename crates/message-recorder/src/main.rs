//! The service's process; see the library.

use clap::Parser as _;
use message_recorder::{Options, SERVICE};

fn main() {
    let options = Options::parse();
    settings::end(SERVICE, message_recorder::run(&options))
}
