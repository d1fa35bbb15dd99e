//! Processes that are killed at any moment.

use crate::{
    load::Load,
    stage::{PATIENCE, Stage},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use std::{thread, time::Duration};

#[test]
fn killing_any_process_at_any_time_loses_and_doubles_nothing() {
    const ROUNDS: u32 = 4;
    let seed = rand::random();
    eprintln!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (_vhost, mut stage) = Stage::shared();
    stage.fleet.start_all().expect("the services' binaries");
    for service in ["outbox-relay", "feed-updater"] {
        stage.fleet.start(service, &[]).expect("its binary");
    }
    stage.fleet.wait_ready(PATIENCE).expect("all services are ready");
    let load = Load::start(&stage, 1);
    for _ in 0..ROUNDS {
        load.await_more(10);
        let mut names = stage.fleet.names();
        names.shuffle(&mut random);
        for name in names {
            stage.fleet.kill_and_restart(&name).expect("it runs");
            thread::sleep(Duration::from_millis(random.random_range(50..700)));
        }
    }
    stage.fleet.wait_ready(PATIENCE).expect("all services are ready");
    load.await_more(10);
    let accepted = load.stop();
    stage.await_rest();
    accepted.is_all_there(&stage);
    stage.ends_well(0);
}
