//! The service's process; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args_os().nth(1).as_deref().map(std::ffi::OsStr::to_str) {
        None => match api_gateway::run() {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => eprintln!("api-gateway: {error:#}"),
        },
        Some(Some("-V" | "--version")) => {
            eprintln!("api-gateway {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Some(_) => eprintln!(
            "Usage: api-gateway [--version]\n\nAnswers HTTP until SIGTERM. Settings come from ./config/local.toml and \
             from variables such as\nMURMURATION__DATABASE__URL, which is required; config/default.toml lists them all."
        ),
    }
    ExitCode::FAILURE
}
