//! `user export` and `user erase`: what those may ask for of whom something is kept.

use crate::{complaint, fleetctl, run, settled_fleet};
use domain::{UserId, values::Channel};
use serde_json::{Value, json};
use std::{fs, os::unix::fs::PermissionsExt as _};
use storage::{avatars, sweep, users};
use test_support::TestDatabase;

/// More than a page.
const TOLD: usize = 2500;

/// Someone of whom there's something everywhere, and a friend.
fn someone(db: &TestDatabase) -> (UserId, UserId) {
    let (zoe, friend) = (db.user("zoe", Channel::Email), db.user("friend", Channel::Email));
    db.execute(&format!("UPDATE \"user\" SET password_hash = 'zoe-hash', age = 44 WHERE id = {zoe}"));
    db.database().transaction(|conn| avatars::put(conn, zoe, "image/png", &[0xff; 100], "/zoe")).unwrap();
    db.follow(friend, &[zoe]);
    db.follow(zoe, &[friend]);
    db.post(zoe, "zoe says \u{202e}this");
    db.post(friend, "the friend says that");
    db.execute(&format!(
        "INSERT INTO email_notification (user_id, source, source_id, email, text)
         SELECT {zoe}, 'message', lpad(n::text, 9, '0'), 'zoe@example.com', 'hello' FROM generate_series(1, {TOLD}) n"
    ));
    db.execute(&format!(
        "INSERT INTO follower_import (request_key, author_id, prefix, requested) VALUES ('key', {zoe}, 'zoes_fan', 9)"
    ));
    db.execute(&format!(
        "INSERT INTO dead_letter (dedup_key, queue, exchange, routing_key, error, attempts, body, failed_at)
         VALUES ('a', 'q', 'x', '', 'why', 5, convert_to('{{\"userId\": {zoe}, \"text\": \"hello\"}}', 'UTF8'), now()),
                ('b', 'q', 'x', '', 'why', 5, convert_to('{{\"userId\": {friend}}}', 'UTF8'), now())"
    ));
    (zoe, friend)
}

#[test]
fn an_export_holds_everything_of_a_user_and_never_the_hash_of_the_password() {
    let db = TestDatabase::new();
    let (zoe, friend) = someone(&db);
    let text = run(fleetctl(&db, &["user", "export", &zoe.to_string()]), 0);
    assert!(!text.contains("zoe-hash") && !text.contains('\u{202e}'), "what a terminal mustn't get is escaped");
    let export: Value = serde_json::from_str(&text).unwrap();
    let user = &export["user"];
    assert_eq!((&user["login"], &user["email"], &user["age"]), (&json!("zoe"), &json!("zoe@example.com"), &json!(44)));
    assert_eq!((&user["has_password"], user.get("password_hash")), (&json!(true), None));
    let lengths: Vec<_> =
        export.as_object().unwrap().iter().filter_map(|(name, rows)| Some((&**name, rows.as_array()?.len()))).collect();
    let mut expected = [
        ("avatar", 1),
        ("tweets", 1),
        ("follows", 1),
        ("followed", 0),
        ("followers", 1),
        ("former_followers", 0),
        ("email_notifications", TOLD),
        ("sms_notifications", 0),
        ("follower_imports", 1),
        ("dead_letters", 1),
    ];
    expected.sort_unstable();
    assert_eq!(lengths, expected, "in the order of names");
    assert_eq!(export["tweets"][0]["text"], "zoe says \u{202e}this");
    assert_eq!(export["follows"][0]["author_id"], friend.0);
    let avatar = export["avatar"][0]["image"].as_str().unwrap();
    assert_eq!(avatar, "/".repeat(133) + "w==", "in Base64, without line breaks");
    let told = export["email_notifications"].as_array().unwrap();
    let numbers: Vec<usize> = told.iter().map(|row| row["source_id"].as_str().unwrap().parse().unwrap()).collect();
    assert_eq!(numbers, (1..=TOLD).collect::<Vec<_>>(), "each once");
    assert!(text.lines().count() > TOLD, "a line for each row");
}

#[test]
fn a_file_gets_the_whole_export_or_none_and_is_for_its_owner_alone() {
    let db = TestDatabase::new();
    let (zoe, _) = someone(&db);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("zoe.json");
    let to = |id: &str| fleetctl(&db, &["user", "export", id, "--out", path.to_str().unwrap()]);
    let unknown = complaint(to("999"), 2);
    assert!(unknown.contains("unknown user") && !path.exists(), "{unknown}");
    assert_eq!(run(to(&zoe.to_string()), 0), "");
    let written = fs::read_to_string(&path).unwrap();
    assert_eq!(written, run(fleetctl(&db, &["user", "export", &zoe.to_string()]), 0));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let again = complaint(to(&zoe.to_string()), 2);
    assert!(again.contains("can't write") && again.contains("exists"), "{again}");
    assert_eq!(fs::read_to_string(&path).unwrap(), written);
}

#[test]
fn erasing_is_rehearsed_agreed_to_and_says_what_it_did() {
    let db = TestDatabase::new();
    let (zoe, friend) = someone(&db);
    let id = zoe.to_string();
    let export = || run(fleetctl(&db, &["user", "export", &id]), 0);
    let before = export();
    let what = "login, address, password, age and roles, the avatar, 2500 notifications, 1 texts of tweets, \
                1 prefixes of imports, 1 bodies of dead letters";
    let rehearsed = run(fleetctl(&db, &["user", "erase", &id, "--dry-run"]), 0);
    assert_eq!(rehearsed, format!("user {id}: {what} would be erased\n"));
    let refused = complaint(fleetctl(&db, &["user", "erase", &id]), 2);
    assert!(refused.contains(what) && refused.contains("nothing was changed"), "{refused}");
    assert_eq!(export(), before);

    let erased = run(fleetctl(&db, &["user", "erase", &id, "--yes"]), 0);
    assert_eq!(erased, format!("user {id}: deleted; {what} erased\n"));
    let after: Value = serde_json::from_str(&export()).unwrap();
    assert_eq!(after["user"]["login"], format!("erased_{id}"));
    for gone in ["email", "phone", "age", "avatar_link"] {
        assert_eq!(after["user"][gone], Value::Null, "{gone}");
    }
    assert_eq!((&after["avatar"], &after["email_notifications"]), (&json!([]), &json!([])));
    assert_eq!(after["tweets"][0]["text"], "(erased)");
    let friends: Value =
        serde_json::from_str(&run(fleetctl(&db, &["user", "export", &friend.to_string()]), 0)).unwrap();
    assert_eq!(
        (&friends["user"]["email"], &friends["tweets"][0]["text"]),
        (&json!("friend@example.com"), &json!("the friend says that"))
    );

    let again = run(fleetctl(&db, &["user", "erase", &id, "--yes"]), 0);
    assert_eq!(again, format!("user {id}: nothing erased\n"));
    for dry_run in ["--dry-run", "--yes"] {
        let unknown = complaint(fleetctl(&db, &["user", "erase", "999", dry_run]), 2);
        assert!(unknown.contains("unknown user"), "{unknown}");
    }
}

#[test]
fn who_was_deleted_by_mistake_is_brought_back_with_feeds_as_they_were() {
    let (database, author) = settled_fleet();
    let rows = || database.count("SELECT count(*) AS n FROM feed_entry");
    let before = rows();
    database.database().transaction(|conn| users::delete(conn, author)).unwrap();
    while database.execute("UPDATE feed_garbage SET due_at = clock_timestamp()") > 0 {
        let piece = database.database().transaction(sweep::take).unwrap().expect("it's due");
        database.database().transaction(|conn| sweep::remove_page(conn, &piece)).unwrap();
    }
    assert!(rows() < before);
    database.execute(&format!("UPDATE \"user\" SET deleted_at = NULL WHERE id = {author} AND erased_at IS NULL"));
    run(fleetctl(&database, &["verify", "--repair"]), 0);
    assert_eq!(rows(), before);
}
