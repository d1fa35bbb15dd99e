#![doc = include_str!("../README.md")]

mod dependencies;
mod suite;

use std::{env, path::Path, process::ExitCode};

const USAGE: &str = "usage: cargo xtask dependencies | test [--workspace | --package CRATE]...";

fn main() -> anyhow::Result<ExitCode> {
    // Cargo starts it in whichever folder it was called.
    env::set_current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))?;
    let arguments: Vec<String> = env::args().skip(1).collect();
    let passed = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["dependencies"] => dependencies::check()?,
        ["test", ..] => suite::run(&arguments[1..])?,
        _ => {
            eprintln!("{USAGE}");
            return Ok(ExitCode::from(2));
        }
    };
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
