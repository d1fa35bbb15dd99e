//! What every service's `main` does.

use std::{
    env,
    io::{self, Write as _},
};

/// The whole of a service's `main`: answers `--help` and `--version`, else runs until the service has stopped.
///
/// Exits with 0 after a clean stop, with 1 after an error, with 2 when it's called with anything else.
pub fn main(service: &str, about: &str, run: impl FnOnce() -> anyhow::Result<()>) -> ! {
    if let Some(status) = answer(service, about) {
        exit(status)
    }
    end(service, run())
}

/// The end of a service's `main` that reads its arguments itself: says what went wrong, and exits with 0 or 1.
pub fn end(service: &str, result: anyhow::Result<()>) -> ! {
    exit(match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{service}: {error:#}");
            1
        }
    })
}

/// At once, rather than by returning: on the way out of a process the TLS library below libpq tears itself down, and a
/// thread of the connection pool that is just connecting crashes over that.
fn exit(status: i32) -> ! {
    signal_hook::low_level::exit(status)
}

/// Answers the arguments, if there are any, with the status to exit with.
fn answer(service: &str, about: &str) -> Option<i32> {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let text = match arguments.iter().map(|argument| argument.to_str()).collect::<Vec<_>>()[..] {
        [] => return None,
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
            return Some(2);
        }
    };
    // A reader that has gone away needs no answer.
    let _ = io::stdout().write_all(text.as_bytes());
    Some(0)
}
