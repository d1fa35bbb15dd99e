#![doc = include_str!("../README.md")]

use process::Program;
use std::{env, path::Path, process::exit};

const PROGRAMS: [Program; 10] = [
    api_gateway::PROGRAM,
    outbox_relay::PROGRAM,
    dead_letter_recorder::PROGRAM,
    follower_importer::PROGRAM,
    feed_fanout::PROGRAM,
    feed_updater::PROGRAM,
    email_notifier::PROGRAM,
    sms_notifier::PROGRAM,
    event_processor::PROGRAM,
    message_recorder::PROGRAM,
];

const TOOL: &str = "fleetctl";

fn main() {
    let called = env::args_os().next().unwrap_or_default();
    let name = Path::new(&called).file_name().unwrap_or_default();
    if name == TOOL {
        fleetctl::main();
    }
    if let Some(program) = PROGRAMS.iter().find(|program| name == program.name) {
        program.main();
    }
    let names: Vec<_> = PROGRAMS.iter().map(|program| program.name).collect();
    eprintln!("call this program by a link with one of these names: {TOOL}, {}", names.join(", "));
    exit(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_is_in_it() {
        let listed = include_str!("../../../deploy/services").lines().filter(|line| !line.starts_with('#'));
        assert!(listed.eq(PROGRAMS.map(|program| program.name)));
    }
}
