//! Members, relays and the broker, killed at random moments.

use crate::stage::{Load, PATIENCE, Stage};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};
use std::{thread, time::Duration};
use test_support::{PrivateRabbitmq, TestDatabase, eventually_within};

const SEED: u64 = 5;

#[derive(Clone, Copy)]
enum Victim {
    Process(usize),
    Broker,
}

#[test]
fn fifty_kills_at_random_moments_lose_and_double_nothing_and_leave_order_alone() {
    let mut rabbitmq = PrivateRabbitmq::new();
    rabbitmq.start();
    let mut stage = Stage::at(TestDatabase::new(), &rabbitmq.url());
    let processes = [stage.relay(), stage.relay(), stage.member("one"), stage.member("one"), stage.member("two")]
        .map(Victim::Process);
    let producers = ["odd", "even"].map(|name| stage.producer(name));
    let load = producers.map(|producer| Load::begin(producer, 3, Duration::from_millis(15)));
    for group in ["one", "two"] {
        stage.await_more(group, 100);
    }

    let mut random = SmallRng::seed_from_u64(SEED);
    let mut victims: Vec<_> = processes.into_iter().cycle().take(42).chain([Victim::Broker; 8]).collect();
    victims.shuffle(&mut random);
    for victim in victims {
        // At work, or still beginning.
        thread::sleep(Duration::from_millis(random.random_range(50..900)));
        match victim {
            Victim::Process(number) => {
                stage.kill(number);
                stage.restart(number);
            }
            Victim::Broker => {
                let before = ["one", "two"].map(|group| stage.recorded(group));
                rabbitmq.kill();
                thread::sleep(Duration::from_millis(random.random_range(0..500)));
                rabbitmq.start();
                // Else the next kill would find nobody at work.
                for (group, before) in ["one", "two"].into_iter().zip(before) {
                    eventually_within(PATIENCE, "the group records again", || {
                        (stage.recorded(group) > before).then_some(())
                    });
                }
            }
        }
    }
    drop(load);
    stage.ends_well(&["one", "two"]);
}
