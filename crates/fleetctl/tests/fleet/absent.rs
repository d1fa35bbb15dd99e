//! A fleet that starts before its servers do.

use crate::stage::{PATIENCE, PRIVATE, Stage};
use harness::Name;
use test_support::{PrivatePostgres, PrivateRabbitmq, TestDatabase, eventually_within};

const NO_BROKER: &str = "no connection to the broker";

#[test]
fn services_that_start_before_their_servers_wait_say_so_and_go_on_by_themselves() {
    let mut postgres = PrivatePostgres::new();
    let mut rabbitmq = PrivateRabbitmq::new();
    postgres.start();
    let database = TestDatabase::on(&postgres.url());
    postgres.stop();
    let mut stage = Stage::new(database, &rabbitmq.url());
    // So long do they try before they say so.
    stage.set("MURMURATION__DATABASE__CONNECT_TIMEOUT_MS", "2000");

    stage.fleet.start_all().expect("the services' binaries");
    let names = stage.fleet.names();
    for name in &names {
        await_readiness(&mut stage, name, 503);
        // The relay begins with the other server.
        let line = if name.0 == "outbox-relay" { NO_BROKER } else { "the database is unavailable" };
        await_line(&stage, name, line);
        let live = eventually_within(PATIENCE, "it answers", || {
            stage.fleet.health(name, "/health/live").expect("it was started")
        });
        assert_eq!(live.0, 200, "{name:?}");
    }

    // The gateway needs no broker.
    postgres.start();
    let (gateway, workers) = names.split_first().expect("there are services");
    assert_eq!(gateway.0, "api-gateway");
    await_readiness(&mut stage, gateway, 200);
    let author = stage.api.reader_by_email("author");
    let reader = stage.api.reader_by_phone("reader", 1);
    stage.api.follow(author, reader);
    let tweet = stage.api.post(author, PRIVATE, true);
    for name in workers {
        await_line(&stage, name, NO_BROKER);
        await_readiness(&mut stage, name, 503);
    }

    rabbitmq.start();
    stage.fleet.wait_ready(PATIENCE).expect("all services go on by themselves");
    eventually_within(PATIENCE, "the tweet arrives", || (stage.api.feed(reader) == [tweet]).then_some(()));
    stage.ends_well(0);
}

fn await_readiness(stage: &mut Stage, name: &Name, status: u16) {
    eventually_within(PATIENCE, &format!("{name:?} says {status}"), || {
        let answer = stage.fleet.health(name, "/health/ready").expect("it was started")?;
        (answer.0 == status).then_some(())
    });
}

fn await_line(stage: &Stage, name: &Name, line: &str) {
    eventually_within(PATIENCE, &format!("{name:?} logs {line:?}"), || {
        stage.fleet.log(name).expect("it was started").contains(line).then_some(())
    });
}
