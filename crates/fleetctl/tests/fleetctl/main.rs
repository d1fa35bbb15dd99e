//! The program as an operator runs it, on the real servers.

mod events;
mod gateway;
mod keys;
mod log;
mod messages;
mod people;
mod repair;
mod reshard;
mod rights;
mod streams;
mod topology;

use crate::gateway::Gateway;
use domain::{
    UserId,
    message::{FollowerRange, SendNotificationChunk},
    values::{Channel, Contact, Email, Login, TweetText},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::Instant,
};
use storage::{
    admin,
    dead_letters::{self, NewDeadLetter},
    feeds, notifications, outbox, tweets,
    users::{self, NewUser},
};
use test_support::{TestDatabase, TestVhost, eventually};

/// Nobody listens there.
const NOWHERE: &str = "amqp://nobody:nothing@127.0.0.1:1/%2f";

/// The program, knowing nothing of any server.
fn bare() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleetctl"));
    for (name, _) in env::vars() {
        if name.starts_with("MURMURATION") || name.ends_with("_URL") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

fn fleetctl(database: &TestDatabase, args: &[&str]) -> Command {
    let mut command = bare();
    command.env("DATABASE_URL", database.url()).env("AMQP_URL", NOWHERE).envs(PATIENT).args(args);
    command
}

/// So long may servers that are there take to answer.
const PATIENT: [(&str, &str); 3] = [
    ("MURMURATION__DATABASE__CONNECT_TIMEOUT_MS", "30000"),
    ("MURMURATION__BROKER__CONNECT_TIMEOUT_MS", "30000"),
    ("MURMURATION__BROKER__HEARTBEAT_S", "30"),
];

/// Runs it, and returns its standard output; it must have exited with `status`.
fn run(mut command: Command, status: i32) -> String {
    let output = command.output().expect("the program runs");
    checked(&output, status)
}

fn checked(output: &Output, status: i32) -> String {
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "stdout:\n{stdout}\nstderr:\n{stderr}");
    stdout.into_owned()
}

/// Runs it, and returns its standard error stream; it must have exited with `status`.
fn complaint(mut command: Command, status: i32) -> String {
    let output = command.output().expect("the program runs");
    checked(&output, status);
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Awaits a line of the standard error stream that holds `text`.
fn await_line(child: &mut Child, text: &str) {
    let stderr = child.stderr.take().expect("the stream is piped");
    let (sender, lines) = mpsc::channel();
    // Reads on to the end: the program mustn't block on a full pipe, and a test that fails shows what it said.
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            eprintln!("{line}");
            drop(sender.send(line));
        }
    });
    eventually(text, || lines.try_iter().find(|line| line.contains(text)));
}

fn interrupt(child: &Child) {
    kill_process(Pid::from_child(child), Signal::INT).expect("the process is there");
}

/// Awaits that the program asks the database for something like this.
fn await_activity(database: &TestDatabase, query: &str) {
    let seen = format!(
        "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database()
         AND application_name = 'fleetctl' AND query LIKE '{query}'"
    );
    eventually(query, || (database.count(&seen) > 0).then_some(()));
}

fn spawn(mut command: Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program runs")
}

/// The number in front of `what` in a summary.
fn figure(summary: &str, what: &str) -> i64 {
    let before = summary.split(what).next().unwrap_or_default().trim_end();
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().unwrap_or_else(|_| panic!("no number before `{what}` in `{summary}`"))
}

fn user(database: &TestDatabase, login: &str) -> UserId {
    let new = NewUser {
        login: &Login::parse(login).unwrap(),
        contact: &Contact::Email(Email::parse(&format!("{login}@example.com")).unwrap()),
        password_hash: None,
        age: None,
        is_active: true,
        roles: &[],
    };
    users::create(&mut database.database().connection().unwrap(), &new).unwrap().id
}

/// Posts a tweet and does everything that follows from it.
fn post(database: &TestDatabase, author: UserId) {
    let everybody = FollowerRange { after: UserId(0), upto: UserId(i64::MAX) };
    database
        .database()
        .transaction(|conn| {
            let tweet = tweets::post(conn, author, &TweetText::parse("hello").unwrap())?;
            feeds::write(conn, &[(tweet.id, everybody)])?;
            for channel in Channel::ALL {
                notifications::record_chunks(conn, channel, &[&SendNotificationChunk::of(&tweet, everybody, channel)])?;
            }
            Ok(())
        })
        .unwrap();
}

/// An author with 10 followers and 3 tweets, which have arrived everywhere.
fn settled_fleet() -> (TestDatabase, UserId) {
    let database = TestDatabase::new();
    let author = user(&database, "author");
    run(fleetctl(&database, &["load", "followers", "--author", &author.to_string(), "--count", "10"]), 0);
    for _ in 0..3 {
        post(&database, author);
    }
    (database, author)
}

#[test]
fn migrating_twice_applies_each_migration_once() {
    let database = TestDatabase::new();
    assert_eq!(run(fleetctl(&database, &["migrate"]), 0), "nothing to do\n");
    assert!(complaint(fleetctl(&database, &["migrate", "--revert-all"]), 2).contains("--yes"));
    let reverted = run(fleetctl(&database, &["migrate", "--revert-all", "--yes"]), 0);
    let mut versions: Vec<_> = reverted.lines().map(|line| line.strip_prefix("reverted ").unwrap()).collect();
    versions.reverse();
    assert_eq!(database.count("SELECT count(*) AS n FROM pg_tables WHERE tablename = 'tweet'"), 0);
    let applied = run(fleetctl(&database, &["migrate"]), 0);
    assert_eq!(applied.lines().map(|line| line.strip_prefix("applied ").unwrap()).collect::<Vec<_>>(), versions);
    assert!(versions.len() >= 2, "{versions:?}");
    assert_eq!(run(fleetctl(&database, &["migrate"]), 0), "nothing to do\n");
}

#[test]
fn migrating_tells_of_a_library_that_sorts_otherwise_than_before() {
    let database = TestDatabase::new();
    database.execute("CREATE COLLATION german (provider = icu, locale = 'de')");
    database.execute("CREATE TABLE sorted (name text COLLATE german PRIMARY KEY)");
    database.execute("UPDATE pg_collation SET collversion = '1' WHERE collname = 'german'");
    let told = run(fleetctl(&database, &["migrate"]), 0);
    assert!(told.contains("note: COLLATION public.german"), "{told}");
    assert!(told.contains("ALTER COLLATION public.german REFRESH VERSION;"), "{told}");
}

#[test]
fn migrating_waits_for_a_database_that_isnt_there_yet() {
    let beside = TestDatabase::new();
    let (server, name) = beside.url().rsplit_once('/').unwrap();
    let name = format!("{name}_late");
    let mut command = bare();
    command.args(["--database-url", &format!("{server}/{name}"), "migrate"]);
    let mut child = spawn(command);
    await_line(&mut child, "waiting up to 60s");
    let mut conn = beside.database().connection().unwrap();
    admin::create_database(&mut conn, &name, None).unwrap();
    let output = child.wait_with_output().unwrap();
    admin::drop_database(&mut conn, &name).unwrap();
    assert!(checked(&output, 0).starts_with("applied "));
}

#[test]
fn a_server_that_is_away_or_unnamed_is_told_with_status_2() {
    let mut away = bare();
    away.args(["--database-url", "postgres://me:secret@127.0.0.1:1/x", "migrate", "--wait", "0s"]);
    let away = complaint(away, 2);
    assert!(away.contains("the database is not available") && !away.contains("secret"), "{away}");
    let nowhere = tempfile::tempdir().unwrap();
    let mut unnamed = bare();
    unnamed.current_dir(nowhere.path()).args(["dead-letters", "list"]);
    assert!(complaint(unnamed, 2).contains("MURMURATION__DATABASE__URL"));
    let mut broker = bare();
    broker.args(["--amqp-url", NOWHERE, "topology", "declare"]);
    assert!(complaint(broker, 2).contains("broker"));
}

#[test]
fn a_checkouts_own_servers_are_found_from_any_folder_in_it() {
    let database = TestDatabase::new();
    let checkout = tempfile::tempdir().unwrap();
    let folder = checkout.path().join("crates/deep");
    fs::create_dir_all(&folder).unwrap();
    fs::create_dir(checkout.path().join(".local")).unwrap();
    let env = format!("MURMURATION__DATABASE__URL={}\nMURMURATION__BROKER__URL={NOWHERE}\n", database.url());
    fs::write(checkout.path().join(".local/env"), env).unwrap();
    let create = |login: &str| {
        let mut command = bare();
        command.current_dir(&folder).envs(PATIENT).args([
            "user",
            "create",
            "--login",
            login,
            "--phone",
            "+14155550123",
        ]);
        command
    };
    let id = run(create("ann"), 0);
    assert_eq!(database.count(r#"SELECT id AS n FROM "user" WHERE login = 'ann'"#), id.trim().parse::<i64>().unwrap());
    // Whoever names one server never gets the checkout's other one.
    let mut elsewhere = create("ben");
    elsewhere.env("AMQP_URL", NOWHERE);
    assert!(complaint(elsewhere, 2).contains("MURMURATION__DATABASE__URL"));
    // The command line goes before the environment.
    let other = TestDatabase::new();
    let mut flag = create("ben");
    flag.env("DATABASE_URL", database.url()).args(["--database-url", other.url()]);
    run(flag, 0);
    assert_eq!(other.count(r#"SELECT count(*) AS n FROM "user""#), 1);
}

#[test]
fn the_topology_is_declared_as_often_as_one_likes_and_shown_with_depths() {
    let (database, vhost) = (TestDatabase::new(), TestVhost::new());
    let fleetctl = |args: &[&str]| {
        let mut command = fleetctl(&database, args);
        command.env("AMQP_URL", vhost.url());
        command
    };
    let row = |shown: &str, queue: &str| -> Vec<String> {
        let row = shown.lines().find(|line| line.split("  ").any(|cell| cell.trim() == queue));
        let row = row.unwrap_or_else(|| panic!("no row of {queue} in\n{shown}"));
        row.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).map(Into::into).collect()
    };
    let before = run(fleetctl(&["topology", "show"]), 0);
    assert_eq!(row(&before, "update_feed.07")[4], "not declared");
    assert_eq!(
        row(&before, "message.p03")[4..],
        ["not declared", "-", "a stream: after 604800 s, or beyond 10737418240 bytes"]
    );
    let first = run(fleetctl(&["topology", "declare"]), 0);
    assert_eq!(run(fleetctl(&["topology", "declare"]), 0), first);
    assert!(first.starts_with("declared 12 exchanges, 40 queues, 42 bindings"), "{first}");
    assert!(vhost.publish("publish_tweet", "publish_tweet", &json!({}), b"{}"));
    // The management API's answer may come before the queue has the message.
    eventually("the queue shows its message", || {
        let shown = run(fleetctl(&["topology", "show"]), 0);
        assert_eq!(row(&shown, "update_feed.07")[4..6], ["0", "0"]);
        (row(&shown, "publish_tweet")[..6] == ["publish_tweet", "direct", "publish_tweet", "publish_tweet", "1", "0"])
            .then_some(())
    });
    // Without a broker, the table alone.
    let mut blind = fleetctl(&["topology", "show"]);
    let output = blind.env("AMQP_URL", NOWHERE).output().unwrap();
    assert_eq!(row(&checked(&output, 0), "publish_tweet")[4], "?");
    assert!(String::from_utf8_lossy(&output.stderr).contains("can't tell"));
}

#[test]
fn a_users_password_is_read_from_the_standard_input_and_kept_as_a_hash() {
    let database = TestDatabase::new();
    let create = |args: &[&str], input: &str| {
        let mut command = fleetctl(&database, &["user", "create"]);
        let mut child = command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let child = child.as_mut().unwrap();
        // It may have ended without reading.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let mut output = Output { status: child.wait().unwrap(), stdout: Vec::new(), stderr: Vec::new() };
        child.stdout.take().unwrap().read_to_end(&mut output.stdout).unwrap();
        child.stderr.take().unwrap().read_to_end(&mut output.stderr).unwrap();
        output
    };
    let ann = ["--login", "ann", "--email", "ann@example.com", "--password", "--role", "admin", "--role", "ops"];
    assert!(String::from_utf8_lossy(&create(&ann, "short\n").stderr).contains("6 to 128"));
    assert!(String::from_utf8_lossy(&create(&ann, "passw0rd\n").stderr).contains("too easy to guess"));
    let id = checked(&create(&ann, "correct horse\n"), 0);
    let count = |condition: &str| database.count(&format!(r#"SELECT count(*) AS n FROM "user" WHERE {condition}"#));
    assert_eq!(count(&format!("id = {} AND password_hash LIKE '$argon2id$%'", id.trim())), 1);
    assert_eq!(count(r#"login = 'ann' AND channel = 'email' AND roles = '["admin", "ops"]'"#), 1);
    checked(&create(&["--login", "ben", "--phone", "+14155550123"], ""), 0);
    assert_eq!(count("login = 'ben' AND channel = 'phone' AND password_hash IS NULL"), 1);

    let refused = |args: &[&str], why: &str| {
        let output = create(args, "");
        checked(&output, 2);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains(why), "{stderr}");
    };
    refused(&["--login", "ben", "--phone", "+14155550123"], "the login is taken");
    refused(&["--login", "cat", "--phone", "+14155550123", "--email", "a@b.cd"], "cannot be used with");
    refused(&["--login", "cat"], "required");
    refused(&["--login", "cat", "--phone", "123"], "E.164");
    refused(&["--login", "c t", "--email", "a@b.cd"], "whitespace");
    assert_eq!(count("true"), 2);
}

#[test]
fn users_are_loaded_once_however_often_it_is_asked_for() {
    let database = TestDatabase::new();
    user(&database, "fan_7");
    let load = || run(fleetctl(&database, &["load", "users", "--count", "4500", "--prefix", "fan"]), 0);
    let summary = load();
    assert_eq!((figure(&summary, "made"), figure(&summary, "there already")), (4499, 1));
    let summary = load();
    assert_eq!((figure(&summary, "made"), figure(&summary, "there already")), (0, 4500));
    assert_eq!(database.count(r#"SELECT count(*) AS n FROM "user" WHERE login ~ '^fan_[0-9]+$'"#), 4500);
    assert_eq!(database.count(r#"SELECT count(*) AS n FROM "user" WHERE channel = 'phone'"#), 2249);
    let long = "p".repeat(30);
    let too_long = fleetctl(&database, &["load", "users", "--count", "100", "--prefix", &long]);
    assert!(complaint(too_long, 2).contains("--prefix is too long"));
    assert!(complaint(fleetctl(&database, &["load", "users", "--count", "0"]), 2).contains("--count must be"));
}

#[test]
fn followers_are_loaded_exactly_and_an_interrupted_load_goes_on_where_it_stopped() {
    let database = TestDatabase::new();
    let author = user(&database, "author");
    post(&database, author);
    let load = || fleetctl(&database, &["load", "followers", "--author", &author.to_string(), "--count", "40000"]);
    let followers = || database.count(&format!("SELECT count(*) AS n FROM subscription WHERE author_id = {author}"));

    // Slow enough to be met half way on any machine.
    database.execute(
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(1); RETURN NULL; END'",
    );
    database.execute("CREATE TRIGGER slow AFTER INSERT ON subscription EXECUTE FUNCTION dawdle()");
    let child = spawn(load());
    eventually("some followers are there", || (followers() > 0).then_some(()));
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    database.execute("DROP TRIGGER slow ON subscription");
    let summary = checked(&output, 130);
    let made = followers();
    assert_eq!(figure(&summary, "made"), made);
    assert_eq!(figure(&summary, "not reached"), 40_000 - made);

    let summary = run(load(), 0);
    assert_eq!(figure(&summary, "made"), 40_000 - made);
    assert_eq!(followers(), 40_000);
    assert_eq!(database.count("SELECT count(*) AS n FROM feed_entry"), 40_000, "each has the author's tweet");
    let summary = run(load(), 0);
    assert_eq!((figure(&summary, "made"), figure(&summary, "logins taken already")), (0, 40_000));
    assert_eq!(followers(), 40_000);

    let unknown = fleetctl(&database, &["load", "followers", "--author", "999999999", "--count", "1"]);
    assert!(complaint(unknown, 2).contains("unknown user"));
}

#[test]
fn tweets_go_straight_to_the_outbox_at_the_asked_rate() {
    let (database, author) = settled_fleet();
    let lonely = user(&database, "lonely");
    let before = database.count("SELECT count(*) AS n FROM tweet");
    let started = Instant::now();
    let load = |args: &[&str]| {
        let mut command = fleetctl(&database, &["load", "tweets", "--direct"]);
        command.args(args);
        command
    };
    let summary = run(load(&["--authors", "1", "--count", "50", "--rate", "100", "--seed", "5"]), 0);
    // The last of 50 is due 490 ms after the first.
    assert!(started.elapsed().as_millis() >= 490, "{:?}", started.elapsed());
    assert_eq!((figure(&summary, "posted"), figure(&summary, "failed")), (50, 0));
    let count = |what: &str| database.count(&format!("SELECT count(*) AS n FROM {what}"));
    assert_eq!(count("tweet") - before, 50);
    assert_eq!(count(&format!("tweet WHERE author_id = {author}")) - before, 50, "of those who have followers");
    assert_eq!(count("outbox WHERE exchange = 'publish_tweet' AND kind = 'publish_tweet'"), 50);
    let of_tweets = "outbox o JOIN tweet t ON t.id = (convert_from(o.body, 'UTF8')::jsonb->>'id')::bigint";
    assert_eq!(count(&format!("{of_tweets} AND t.text = convert_from(o.body, 'UTF8')::jsonb->>'text'")), 50);

    run(load(&["--author", &lonely.to_string(), "--count", "50", "--seed", "5"]), 0);
    let texts = |author: UserId| format!("(SELECT text FROM tweet WHERE author_id = {author} AND text LIKE '#%')");
    assert_eq!(count(&format!("({} EXCEPT ALL {}) x", texts(author), texts(lonely))), 0, "the seed makes the texts");
    assert!(complaint(load(&["--authors", "2", "--count", "1"]), 2).contains("1 users have followers"));

    let mut nobody = load(&["--author", "999999999", "--count", "500", "--max-errors", "10", "--connections", "1"]);
    let output = nobody.output().unwrap();
    let summary = checked(&output, 1);
    assert_eq!((figure(&summary, "failed"), figure(&summary, "not tried")), (10, 490));
    assert!(summary.contains("10 × unknown user"), "{summary}");
}

#[test]
fn tweets_go_through_the_gateway_and_arrive_in_the_request() {
    let (database, author) = settled_fleet();
    let gateway = Gateway::serve(&database, &[]);
    // A slash at the end is all the same.
    let url = format!("{}/", gateway.url);
    let load = |args: &[&str]| {
        let mut command = fleetctl(&database, &["load", "tweets", "--gateway", &url]);
        command.args(args);
        command
    };
    let summary = run(load(&["--author", &author.to_string(), "--count", "40"]), 0);
    assert_eq!((figure(&summary, "posted"), figure(&summary, "failed")), (40, 0));
    assert_eq!(database.count("SELECT count(*) AS n FROM feed_entry"), 10 * 43);
    run(fleetctl(&database, &["verify"]), 0);
    run(load(&["--author", &author.to_string(), "--count", "5", "--async"]), 0);
    assert_eq!(database.count("SELECT count(*) AS n FROM outbox"), 5);
    let output = load(&["--author", "999999999", "--count", "3"]).output().unwrap();
    let summary = checked(&output, 1);
    assert!(summary.contains("3 × 404"), "{summary}");
    drop(gateway);
    let output = load(&["--author", &author.to_string(), "--count", "3", "--connections", "1"]).output().unwrap();
    assert!(checked(&output, 1).contains("3 × the gateway didn't answer"));
}

fn dead_letter(queue: &str, body: &[u8]) -> NewDeadLetter {
    NewDeadLetter {
        dedup_key: format!("{queue}:{}", String::from_utf8_lossy(body)),
        queue: queue.into(),
        message_id: Some(format!("id-{}", body.len())),
        kind: Some("update_feed".into()),
        correlation_id: Some("request-1".into()),
        exchange: "update_feed".into(),
        routing_key: "42".into(),
        headers: BTreeMap::from([
            ("x-attempts".into(), "5".into()),
            ("x-error".into(), "boom".into()),
            ("x-failed-at".into(), "2024-05-06T07:08:09Z".into()),
            ("x-published-at-ms".into(), "1".into()),
        ]),
        error: "boom\u{1b}[2J".into(),
        attempts: 5,
        body: body.into(),
        failed_at: "2024-05-06T07:08:09Z".parse().unwrap(),
    }
}

/// Records them, and returns their ids.
fn dead_letters(database: &TestDatabase, letters: &[NewDeadLetter]) -> Vec<String> {
    let mut conn = database.database().connection().unwrap();
    dead_letters::record(&mut conn, letters).unwrap();
    dead_letters::waiting_ids(&mut conn, None).unwrap().iter().map(ToString::to_string).collect()
}

#[test]
fn a_dead_letter_is_listed_shown_replayed_once_and_dropped_once() {
    let database = TestDatabase::new();
    let letters = [dead_letter("update_feed.03", b"{\"id\": 7}"), dead_letter("update_feed.03", b"\xff\x00binary")];
    let ids = dead_letters(&database, &letters);
    let (text, binary) = (ids[0].as_str(), ids[1].as_str());
    let fleetctl = |args: &[&str]| fleetctl(&database, &[&["dead-letters"], args].concat());

    let listed = run(fleetctl(&["list"]), 0);
    let rows: Vec<Vec<_>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["ID", "FAILED", "(UTC)", "STATE", "QUEUE", "TYPE", "ATTEMPTS", "REASON"]);
    let row = ["2024-05-06", "07:08:09", "waiting", "update_feed.03", "update_feed", "5", r"boom\u{1b}[2J"];
    assert_eq!(rows[1][0], binary, "the newest first");
    assert_eq!(rows[2][0], text);
    assert_eq!(rows[1][1..], row);
    assert_eq!(rows.len(), 3);
    assert!(run(fleetctl(&["list", "--limit", "1"]), 0).ends_with(&format!("for more: --before {binary}\n")));
    let page: Value = serde_json::from_str(&run(fleetctl(&["list", "--json", "--before", binary]), 0)).unwrap();
    assert_eq!(page.as_array().unwrap().len(), 1);
    assert_eq!(page[0]["headers"]["x-attempts"], "5");

    let shown = run(fleetctl(&["show", text]), 0);
    for line in ["attempts:       5", "header:         x-error = boom", "body (9 bytes):", "{\"id\": 7}"] {
        assert!(shown.lines().any(|shown| shown == line), "no line `{line}` in\n{shown}");
    }
    assert!(run(fleetctl(&["show", text, "--max-body", "3"]), 0).ends_with("body (9 bytes, the first 3):\n{\"i\n"));
    assert!(run(fleetctl(&["show", binary]), 0).contains("ff 00 62 69 6e 61 72 79"));
    let shown: Value = serde_json::from_str(&run(fleetctl(&["show", binary, "--json"]), 0)).unwrap();
    assert_eq!((&shown["bodyHex"], &shown["error"]), (&json!("ff0062696e617279"), &json!("boom\u{1b}[2J")));

    assert_eq!(run(fleetctl(&["replay", text, "--by", "olga"]), 0), "1 replayed\n");
    let rows = database.database().transaction(|conn| outbox::take(conn, 10)).unwrap();
    let envelope = &rows[0].envelope;
    assert_eq!(rows.len(), 1);
    // To the one queue that it died in, by the default exchange.
    assert_eq!((envelope.exchange.as_str(), envelope.routing_key.as_str()), ("", "update_feed.03"));
    assert_eq!((envelope.message_id.as_str(), envelope.kind.as_deref()), ("id-9", Some("update_feed")));
    assert_eq!((envelope.correlation_id.as_deref(), &envelope.body[..]), (Some("request-1"), &b"{\"id\": 7}"[..]));
    let headers = [("x-published-at-ms", "1"), ("x-replay", "1")].map(|(name, value)| (name.into(), value.into()));
    assert_eq!(envelope.headers, BTreeMap::from(headers));

    // Once is enough, and one that is refused holds up no other.
    let output = fleetctl(&["replay", text, "999999999", binary]).output().unwrap();
    assert_eq!(checked(&output, 1), "1 replayed\n");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains(&format!("dead letter {text}: it was replayed or dropped before")), "{stderr}");
    assert!(stderr.contains("dead letter 999999999: unknown dead letter"), "{stderr}");
    assert_eq!(database.count("SELECT count(*) AS n FROM outbox"), 2);
    assert!(run(fleetctl(&["show", text]), 0).contains(" by olga\n"));
    assert_eq!(run(fleetctl(&["list", "--state", "replayed"]), 0).lines().count(), 3);
    assert_eq!(run(fleetctl(&["list"]), 0).lines().count(), 1);
    assert_eq!(run(fleetctl(&["drop", text]), 1), "0 dropped\n");
    assert!(complaint(fleetctl(&["show", "999999999"]), 2).contains("unknown dead letter"));
}

#[test]
fn dead_letters_are_settled_by_the_queue() {
    let database = TestDatabase::new();
    let letters: Vec<_> = (0..120).map(|n| dead_letter("a", format!("{n}").as_bytes())).collect();
    dead_letters(&database, &letters);
    dead_letters(&database, &[dead_letter("b", b"x"), dead_letter("", b"y")]);
    let fleetctl = |args: &[&str]| fleetctl(&database, &[&["dead-letters"], args].concat());
    assert_eq!(run(fleetctl(&["replay", "--all", "--queue", "a"]), 0), "120 replayed\n");
    assert_eq!(database.count("SELECT count(*) AS n FROM outbox WHERE routing_key = 'a'"), 120);
    // In the order in which they died.
    let out_of_order =
        "SELECT count(*) AS n FROM (SELECT convert_from(body, 'UTF8')::int - row_number() OVER (ORDER BY id)
                        AS ahead FROM outbox) x WHERE ahead <> -1";
    assert_eq!(database.count(out_of_order), 0);
    assert!(complaint(fleetctl(&["drop", "--all"]), 2).contains("--yes"));
    assert_eq!(run(fleetctl(&["drop", "--all", "--queue", "", "--yes"]), 0), "1 dropped\n");
    assert_eq!(run(fleetctl(&["list", "--state", "dropped"]), 0).lines().filter(|l| l.contains("(outbox)")).count(), 1);
    assert_eq!(run(fleetctl(&["drop", "--all", "--yes"]), 0), "1 dropped\n");
    assert_eq!(database.count("SELECT count(*) AS n FROM outbox"), 120);
    for nothing_said in [&["drop"][..], &["replay"], &["replay", "1", "--all"], &["replay", "1", "--queue", "a"]] {
        complaint(fleetctl(nothing_said), 2);
    }
}

/// What is wrong, by the lines that say so.
fn wrong(report: &str) -> Vec<&str> {
    report.lines().filter(|line| line.starts_with("WRONG")).collect()
}

#[test]
fn verifying_finds_nothing_where_all_is_well_and_exactly_what_was_planted() {
    let (database, author) = settled_fleet();
    user(&database, "bystander");
    let verify = |status| run(fleetctl(&database, &["verify"]), status);
    let report = verify(0);
    assert!(wrong(&report).is_empty(), "{report}");
    assert!(report.lines().filter(|line| line.starts_with("ok")).count() >= 7, "{report}");
    assert!(report.contains("can't see the queues"), "{report}");

    let bystander = r#"(SELECT id FROM "user" WHERE login = 'bystander')"#;
    let notify = |source_id: &str| {
        format!(
            "INSERT INTO email_notification (user_id, source, source_id, email, text)
             VALUES ({bystander}, 'tweet', {source_id}, 'bystander@example.com', 'planted')"
        )
    };
    // Each error, and what undoes it.
    let planted = [
        (
            "feed rows missing: 1",
            "CREATE TABLE kept AS SELECT * FROM feed_entry LIMIT 1;
             DELETE FROM feed_entry USING kept WHERE feed_entry = kept"
                .to_owned(),
            "INSERT INTO feed_entry SELECT * FROM kept; DROP TABLE kept".to_owned(),
        ),
        (
            "feed rows extra: 2",
            format!(
                "INSERT INTO feed_entry SELECT {bystander}, min(id) FROM tweet UNION ALL SELECT {author}, max(id) \
                 FROM tweet"
            ),
            format!("DELETE FROM feed_entry WHERE reader_id IN ({bystander}, {author})"),
        ),
        (
            "feed rows extra: 1",
            format!("INSERT INTO feed_entry VALUES ({bystander}, 999999999)"),
            "DELETE FROM feed_entry WHERE tweet_id = 999999999".to_owned(),
        ),
        (
            "feed rows doubled: 1",
            "ALTER TABLE feed_entry DROP CONSTRAINT feed_entry_pkey;
             INSERT INTO feed_entry SELECT * FROM feed_entry LIMIT 1"
                .to_owned(),
            "DELETE FROM feed_entry a USING feed_entry b WHERE a.ctid > b.ctid AND a = b;
             ALTER TABLE feed_entry ADD PRIMARY KEY (reader_id, tweet_id)"
                .to_owned(),
        ),
        (
            "notifications missing: 1",
            "CREATE TABLE kept AS SELECT * FROM sms_notification LIMIT 1;
             DELETE FROM sms_notification n USING kept k WHERE n.user_id = k.user_id AND n.source_id = k.source_id"
                .to_owned(),
            "INSERT INTO sms_notification SELECT * FROM kept; DROP TABLE kept".to_owned(),
        ),
        (
            "notifications extra: 1",
            notify("(SELECT max(id)::text FROM tweet)"),
            "DELETE FROM email_notification WHERE text = 'planted'".to_owned(),
        ),
        (
            "imports that don't add up: 1",
            "UPDATE follower_import SET created = created - 1, skipped = skipped + 1".to_owned(),
            "UPDATE follower_import SET created = created + 1, skipped = skipped - 1".to_owned(),
        ),
    ];
    for (finding, plant, undo) in planted {
        for statement in plant.split(';') {
            database.execute(statement);
        }
        let report = verify(1);
        assert_eq!(wrong(&report), [format!("WRONG   {finding}")], "{report}");
        for statement in undo.split(';') {
            database.execute(statement);
        }
        verify(0);
    }

    // Another program's notification of a user isn't the fleet's to judge.
    database.execute(&notify("'999'").replace("'tweet'", "'message'"));
    verify(0);
    database.execute(&notify("'999'"));
    let report: Value = serde_json::from_str(&run(fleetctl(&database, &["verify", "--json"]), 1)).unwrap();
    assert_eq!(report["ok"], false);
    let extra = report["checks"].as_array().unwrap().iter().find(|check| check["check"] == "notifications extra");
    assert_eq!(extra.unwrap()["count"], 1);
    assert!(extra.unwrap()["examples"][0].as_str().unwrap().ends_with("tweet 999"));
}

#[test]
fn verifying_tells_what_is_under_way_and_counts_it_as_wrong_after_waiting_in_vain() {
    let (database, vhost) = (TestDatabase::new(), TestVhost::new());
    let command = |args: &[&str]| {
        let mut command = fleetctl(&database, args);
        command.env("AMQP_URL", vhost.url());
        command
    };
    let fleetctl = |args: &[&str], status| run(command(args), status);
    assert!(fleetctl(&["verify"], 0).contains("declare the topology first"));
    fleetctl(&["topology", "declare"], 0);
    assert_eq!(fleetctl(&["verify", "--wait", "30s"], 0).lines().filter(|line| !line.starts_with("ok")).count(), 0);
    assert!(vhost.publish("send_notification", "phone", &json!({}), b"{}"));
    dead_letters(&database, &[dead_letter("a", b"x"), dead_letter("a", b"y")]);
    eventually("the queue has the message", || {
        fleetctl(&["verify"], 0).contains("note    still in progress: 1 in send_notification.sms").then_some(())
    });
    // The broker says of a queue that can't answer at once that it's empty.
    let report = eventually("the message is counted in the end", || {
        let output = command(&["verify", "--wait", "1s"]).output().unwrap();
        (output.status.code() != Some(0)).then(|| checked(&output, 1))
    });
    assert_eq!(wrong(&report), ["WRONG   still in progress: 1 in send_notification.sms"]);
    assert!(report.contains("note    dead letters waiting for an operator: 2"), "{report}");
    eventually("the message is counted", || {
        let report: Value = serde_json::from_str(&fleetctl(&["verify", "--json"], 0)).unwrap();
        (report["underWay"] == json!([{"place": "send_notification.sms", "count": 1}])).then_some(())
    });
}

#[test]
fn verifying_waits_until_the_fleet_is_at_rest_and_looks_again_while_something_is_missing() {
    let ((database, author), vhost) = (settled_fleet(), TestVhost::new());
    let command = |args: &[&str]| {
        let mut command = fleetctl(&database, args);
        command.env("AMQP_URL", vhost.url());
        command
    };
    run(command(&["topology", "declare"]), 0);
    run(command(&["load", "tweets", "--direct", "--author", &author.to_string(), "--count", "1"]), 0);
    assert_eq!(wrong(&run(command(&["verify"]), 1)).len(), 2, "its feed rows and notifications are missing");
    let mut child = spawn(command(&["verify", "--wait", "60s"]));
    await_line(&mut child, "1 in the outbox");
    // As if the message had been in somebody's hand: it has left the outbox, and its rows come later.
    database.execute("DELETE FROM outbox");
    await_activity(&database, "%FROM subscription s%");
    database.execute(&format!(
        "WITH new AS (SELECT t.id AS tweet_id, f.follower_id, u.channel FROM tweet t
             JOIN subscription f ON f.author_id = {author} JOIN \"user\" u ON u.id = f.follower_id
             WHERE t.id = (SELECT max(id) FROM tweet)),
         feeds AS (INSERT INTO feed_entry SELECT follower_id, tweet_id FROM new),
         mails AS (INSERT INTO email_notification (user_id, source, source_id, email, text)
             SELECT follower_id, 'tweet', tweet_id::text, 'x', 'x' FROM new WHERE channel = 'email')
         INSERT INTO sms_notification (user_id, source, source_id, phone, text)
             SELECT follower_id, 'tweet', tweet_id::text, 'x', 'x' FROM new WHERE channel = 'phone'"
    ));
    let output = child.wait_with_output().unwrap();
    checked(&output, 0);
}

#[test]
fn a_reader_who_has_seen_enough_changes_nothing_of_the_outcome() {
    let (database, _) = settled_fleet();
    for status in [0, 1] {
        let mut child = spawn(fleetctl(&database, &["verify"]));
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        checked(&output, status);
        let stderr = String::from_utf8_lossy(&output.stderr);
        // How far it is, which it tells of every few seconds.
        assert!(stderr.lines().all(|line| line.starts_with("verifying: ")), "{stderr}");
        database.execute("DELETE FROM feed_entry");
    }
}
