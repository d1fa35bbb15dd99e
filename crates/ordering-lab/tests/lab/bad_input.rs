//! What the program says to input that it can't use.

use crate::stage::{Ended, Stage};
use test_support::{PrivateRabbitmq, TestDatabase};

#[test]
fn what_there_isnt_is_refused_and_what_there_is_named() {
    let stage = Stage::new();
    for (arguments, expected) in [
        ("run competition", "possible values: competing, consistent-hash, add-consumers"),
        ("run competing --consumers 0", "0 is not in 1..=16"),
        ("run competing --consumers 17", "17 is not in 1..=16"),
        ("run competing --users 1", "1 is not in 2..=1000"),
        ("run competing --messages 1", "1 is not in 2..=1000"),
        ("run competing --work-ms 20..5", "a range such as 200..1500"),
        ("run competing --seed x", "invalid digit"),
        ("run competing --offset=-1", "-1 is not in 0..="),
        ("consume competing --consumer-id 0", "0 is not in 1..=32"),
        ("consume random --consumer-id 1", "possible values: competing, consistent-hash"),
        ("produce competing", "<OFFSET>"),
        ("produce competing x", "invalid digit"),
    ] {
        let Ended { status, out, err } = stage.run(arguments);
        assert_eq!((status, out.as_str()), (2, ""), "{arguments}: {err}");
        assert!(err.contains(expected), "{arguments}: {err}");
    }
}

#[test]
fn users_who_have_balances_are_refused_unless_they_are_to_be_forgotten() {
    let stage = Stage::new();
    stage.database.execute(
        "INSERT INTO user_balance (user_id, value, consumer_id, processed_at, effects) VALUES (19, 7, 1, now(), 1)",
    );
    for arguments in ["run competing --out .", "produce competing 0", "run balance --offset 19 --out ."] {
        let Ended { status, err, .. } = stage.run(arguments);
        assert_eq!(status, 2, "{arguments}: {err}");
        assert!(err.contains("1 have balances already: add --fresh"), "{arguments}: {err}");
    }
    assert_eq!(stage.database.count("SELECT value AS n FROM user_balance"), 7, "nothing is lost by a refusal");
    stage.experiment("competing --offset 20 --users 2 --messages 2 --consumers 1");
    assert_eq!(stage.database.count("SELECT value AS n FROM user_balance"), 7, "others' balances stay");
    stage.experiment("competing --fresh --users 20 --messages 2 --consumers 1");
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM user_balance"), 0);
}

#[test]
fn a_broker_without_consistent_hashing_is_told_with_the_way_to_enable_it() {
    let mut node = PrivateRabbitmq::new();
    node.start();
    node.eval("rabbit_registry:unregister(exchange, <<\"x-consistent-hash\">>)");
    let stage = Stage::new();
    for arguments in ["run consistent-hash --out .", "produce consistent-hash 0"] {
        let output = stage.command(arguments).env("AMQP_URL", node.url()).output().expect("the program runs");
        let Ended { status, err, .. } = Ended::from(output);
        assert_eq!(status, 2, "{arguments}: {err}");
        assert!(err.contains("rabbitmq-plugins enable rabbitmq_consistent_hash_exchange"), "{arguments}: {err}");
    }
}

#[test]
fn servers_that_cant_be_used_are_told_without_their_passwords() {
    let stage = Stage::new();
    let empty = TestDatabase::new();
    empty.execute(
        "DELETE FROM __diesel_schema_migrations WHERE version = (SELECT max(version) FROM __diesel_schema_migrations)",
    );
    for (variable, url, expected) in [
        ("DATABASE_URL", empty.url(), "run `fleetctl migrate`"),
        ("DATABASE_URL", "postgres://me:pa55@127.0.0.1:1/none", "the database is not available"),
        ("AMQP_URL", "amqp://me:pa55@127.0.0.1:1/none", "lost the broker while connecting"),
        ("AMQP_URL", "http://me:pa55@127.0.0.1:1/none", "must start with amqp://"),
    ] {
        let mut command = stage.command("run competing --out .");
        // There's nothing to wait for.
        command.env(variable, url).env("MURMURATION__DATABASE__CONNECT_TIMEOUT_MS", "3000");
        let output = command.output().expect("the program runs");
        let Ended { status, err, .. } = Ended::from(output);
        assert_eq!(status, 2, "{variable}: {err}");
        assert!(err.contains(expected) && !err.contains("pa55"), "{variable}: {err}");
    }
}
