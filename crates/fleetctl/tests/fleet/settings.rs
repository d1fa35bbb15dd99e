//! A service that can't begin says which setting is to blame.

use harness::{binaries, services};
use std::process::{Command, Output};

fn run(service: &str, (variable, value): (&str, &str)) -> Output {
    // Else one that likes its settings would run until it's told to stop.
    Command::new("timeout")
        .arg("60")
        .arg(binaries().expect("where they are").join(service))
        // Nobody listens there.
        .env("MURMURATION__DATABASE__URL", "postgres://nobody@127.0.0.1:1/nowhere")
        .env("MURMURATION__BROKER__URL", "amqp://nobody:nothing@127.0.0.1:1/nowhere")
        .env(variable, value)
        .output()
        .expect("the binary runs")
}

#[test]
fn every_service_names_the_setting_that_it_can_not_use() {
    for service in services() {
        for (variable, value, why) in [
            ("MURMURATION__DATABASE__URL", "", "`database.url` in the environment variable MURMURATION__DATABASE__URL"),
            ("MURMURATION__DATABASE__POOL_SIZE", "-1", "MURMURATION__DATABASE__POOL_SIZE"),
            ("MURMURATION__DATABASE__POOL_SIZE", "many", "`database.pool_size`"),
            ("MURMURATION__DATABASE__POOL_SIZES", "1", "did you mean `database.pool_size`?"),
        ] {
            let output = run(service, (variable, value));
            let said = String::from_utf8(output.stderr).expect("it prints UTF-8");
            assert_eq!(output.status.code(), Some(1), "{service} with {variable}={value}: {said}");
            assert!(said.contains(why), "{service} with {variable}={value}: {said}");
        }
    }
}
