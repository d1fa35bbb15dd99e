//! Members, relays and the broker, killed at random moments.

use crate::stage::{LEASE_TTL_MS, Load, PATIENCE, Stage};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};
use std::{
    thread,
    time::{Duration, Instant},
};
use storage::Database;
use test_support::{PrivateRabbitmq, TestDatabase, eventually_within, sql};

const SEED: u64 = 5;
const GROUPS: [&str; 2] = ["one", "two"];
const KILLS_OF_PROCESSES: usize = 45;
const KILLS_OF_BROKER: usize = 5;

/// How many messages a group has passed.
fn progress(database: &Database, group: &str) -> i64 {
    let sql =
        format!(r#"SELECT coalesce(sum(next_offset), 0)::bigint AS n FROM consumer_offset WHERE "group" = '{group}'"#);
    sql::count(&mut database.connection().expect("a connection"), &sql).expect("the query runs")
}

fn sleep(random: &mut SmallRng, at_most_ms: u64) {
    thread::sleep(Duration::from_millis(random.random_range(0..at_most_ms)));
}

#[test]
fn what_a_relay_has_published_before_it_died_is_recorded_once() {
    const MESSAGES: usize = 40;
    let mut stage = Stage::new();
    stage.member("recorder");
    stage.producer("before").spread(MESSAGES as i64);
    // What is published can't be removed, so it's published again by whoever comes next.
    let mut gate = stage.database.database().connection().expect("a connection");
    let mut gate = |sql| sql::execute(&mut gate, sql).expect("the statement runs");
    gate("BEGIN");
    gate("SELECT FROM message_outbox FOR UPDATE");
    let relay = stage.relay();
    stage.await_count("recorder", MESSAGES);
    stage.kill(relay);
    gate("COMMIT");
    stage.restart(relay);
    let repeated = || stage.database.count("SELECT sum(repeated)::bigint AS n FROM consumer_offset");
    eventually_within(PATIENCE, "they come again", || (repeated() >= MESSAGES as i64).then_some(()));
    stage.producer("afterwards").spread(MESSAGES as i64);
    stage.ends_well(&["recorder"]);
}

#[test]
fn fifty_kills_at_random_moments_lose_and_double_nothing_and_leave_order_alone() {
    let mut rabbitmq = PrivateRabbitmq::new();
    rabbitmq.start();
    let mut stage = Stage::at(TestDatabase::new(), &rabbitmq.url());
    // So that a group of one member reads again soon after each kill. Who loses a lease by being slow, gets another one.
    stage.set(&[(LEASE_TTL_MS, "800")]);
    let [one, two] = GROUPS;
    let processes = [stage.relay(), stage.relay(), stage.member(one), stage.member(one), stage.member(two)];
    let producers = ["odd", "even"].map(|name| stage.producer(name));
    let load = producers.map(|producer| Load::begin(producer, 3, Duration::from_millis(30)));
    let mut victims: Vec<_> = processes.into_iter().cycle().take(KILLS_OF_PROCESSES).collect();
    let mut random = SmallRng::seed_from_u64(SEED);
    victims.shuffle(&mut random);
    let began = Instant::now();
    let _rabbitmq = thread::scope(|scope| {
        let database = stage.database.database().clone();
        let broker = scope.spawn(move || {
            let mut random = SmallRng::seed_from_u64(SEED + 1);
            for _ in 0..KILLS_OF_BROKER {
                // Else it would find nobody at work.
                for group in GROUPS {
                    let before = progress(&database, group);
                    eventually_within(PATIENCE, "the group records", || {
                        (progress(&database, group) > before + 100).then_some(())
                    });
                }
                sleep(&mut random, 1000);
                rabbitmq.kill();
                eprintln!("{:?}: killed the broker", began.elapsed());
                sleep(&mut random, 500);
                rabbitmq.start();
                eprintln!("{:?}: it's back", began.elapsed());
            }
            rabbitmq
        });
        for victim in victims {
            sleep(&mut random, 2500);
            stage.kill(victim);
            stage.restart(victim);
            eprintln!("{:?}: killed process {victim}", began.elapsed());
        }
        broker.join().expect("the broker starts again each time")
    });
    drop(load);
    eprintln!("{:?}: {} messages were accepted", began.elapsed(), stage.accepted());
    stage.ends_well(&GROUPS);
}
