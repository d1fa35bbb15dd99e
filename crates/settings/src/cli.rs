//! What every service's `main` does.

use std::{
    env,
    io::{self, Write as _},
};

/// The whole of a service's `main`: answers `--help` and `--version`, else runs until the service has stopped.
///
/// Exits with 0 after a clean stop, with 1 after an error, with 2 when it's called with anything else. At once, rather
/// than by returning: on the way out of a process the TLS library below libpq tears itself down, and a thread of the
/// connection pool that is just connecting crashes over that.
pub fn main(service: &str, about: &str, run: impl FnOnce() -> anyhow::Result<()>) -> ! {
    signal_hook::low_level::exit(status(service, about, run))
}

fn status(service: &str, about: &str, run: impl FnOnce() -> anyhow::Result<()>) -> i32 {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let text = match arguments.iter().map(|argument| argument.to_str()).collect::<Vec<_>>()[..] {
        [] => {
            return match run() {
                Ok(()) => 0,
                Err(error) => {
                    eprintln!("{service}: {error:#}");
                    1
                }
            };
        }
        [Some("-h" | "--help")] => format!(
            "{about}\n\n\
             Usage: {service} [--help | --version]\n\n\
             Runs until SIGTERM or SIGINT, then finishes the work in hand and exits with 0.\n\
             Settings come from ./config/local.toml and from variables such as MURMURATION__DATABASE__URL and\n\
             MURMURATION__BROKER__URL, which have no default. config/default.toml lists them all.\n"
        ),
        [Some("-V" | "--version")] => format!("{service} {}\n", env!("CARGO_PKG_VERSION")),
        _ => {
            eprintln!("{service}: takes no arguments but --help and --version");
            return 2;
        }
    };
    // A reader that has gone away needs no answer.
    let _ = io::stdout().write_all(text.as_bytes());
    0
}
