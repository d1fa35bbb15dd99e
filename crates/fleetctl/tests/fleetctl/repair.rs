//! `verify --repair`.

use crate::{await_line, checked, complaint, fleetctl, interrupt, run, settled_fleet, spawn, user, wrong};
use serde_json::{Value, json};
use test_support::{TestDatabase, eventually, sql};

fn rows(database: &TestDatabase) -> (i64, i64) {
    let notifications = "(SELECT count(*) FROM email_notification) + (SELECT count(*) FROM sms_notification)";
    (database.count("SELECT count(*) AS n FROM feed_entry"), database.count(&format!("SELECT {notifications} AS n")))
}

#[test]
fn a_repair_is_rehearsed_done_and_recorded() {
    let (database, author) = settled_fleet();
    user(&database, "bystander");
    let verify = |args: &[&str], status| run(fleetctl(&database, &[&["verify"], args].concat()), status);
    let all = rows(&database);
    assert!(
        verify(&["--repair", "--dry-run"], 0).starts_with("repair: 0 feed rows and 0 notifications would be written")
    );
    database.execute("DELETE FROM feed_entry WHERE tweet_id % 3 = 0");
    database.execute("DELETE FROM email_notification");
    database.execute(&format!("INSERT INTO feed_entry SELECT {author}, id FROM tweet"));
    let (lost, broken) = (rows(&database), verify(&[], 1));
    assert_eq!(wrong(&broken).len(), 3, "{broken}");
    let missing = (10, all.1 - lost.1);
    let would = verify(&["--repair", "--dry-run"], 1);
    let expected = format!(
        "repair: {} feed rows and {} notifications would be written, 3 feed rows and 0 notifications would be removed\n",
        missing.0, missing.1
    );
    assert_eq!(would, expected);
    assert_eq!((rows(&database), verify(&[], 1)), (lost, broken));

    let report = verify(&["--repair", "--by", "ann"], 0);
    assert!(report.starts_with("repair 1: 10 feed rows and 15 notifications written, 3 feed rows and 0"), "{report}");
    assert!(wrong(&report).is_empty() && report.contains("ok      feed rows missing: none"), "{report}");
    assert_eq!(rows(&database), all);
    let recorded = "SELECT feed_rows_written + notifications_written + feed_rows_removed AS n FROM feed_repair
                    WHERE started_by = 'ann' AND finished_at >= started_at";
    assert_eq!(database.ids(recorded), [10 + 15 + 3]);

    database.execute("DELETE FROM sms_notification");
    let report: Value = serde_json::from_str(&verify(&["--repair", "--json"], 0)).unwrap();
    let repair = json!({
        "id": 2, "done": true, "feedRowsWritten": 0, "notificationsWritten": 15, "feedRowsRemoved": 0, "notificationsRemoved": 0,
    });
    assert_eq!((&report["ok"], &report["repair"]), (&json!(true), &repair));
    assert_eq!(rows(&database), all);
    for lonely in ["--dry-run", "--restart"] {
        assert!(complaint(fleetctl(&database, &["verify", lonely]), 2).contains("--repair"));
    }
}

#[test]
fn an_interrupted_repair_says_so_and_goes_on_when_it_is_run_again() {
    let (database, _) = settled_fleet();
    let all = rows(&database);
    database.execute("DELETE FROM feed_entry");
    database.execute("DELETE FROM email_notification");
    // Slow enough to be met half way on any machine: a repair of its own is one page for each of its parts.
    database.execute(
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(2); RETURN NULL; END'",
    );
    database.execute("CREATE TRIGGER slow AFTER INSERT ON feed_entry EXECUTE FUNCTION dawdle()");
    let repair = |args: &[&str]| fleetctl(&database, &[&["verify", "--repair"], args].concat());
    let child = spawn(repair(&["--by", "ann"]));
    let writing = "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database()
                   AND application_name = 'fleetctl' AND query LIKE '%INSERT INTO feed_entry%'";
    eventually("the repair writes", || (database.count(writing) > 0).then_some(()));
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    let said = checked(&output, 130);
    assert!(said.starts_with("repair 1: 30 feed rows") && said.contains("run it again to continue"), "{said}");
    assert_eq!(rows(&database), all, "the page in hand is done");
    assert_eq!(database.count("SELECT count(*) AS n FROM feed_repair WHERE finished_at IS NULL"), 1);

    // What is behind it isn't looked at again, unless that is asked for.
    database.execute("DROP TRIGGER slow ON feed_entry");
    database.execute("DELETE FROM feed_entry WHERE tweet_id = (SELECT min(tweet_id) FROM feed_entry)");
    let mut again = repair(&["--by", "ben"]);
    let output = again.output().unwrap();
    let report = checked(&output, 1);
    assert!(String::from_utf8_lossy(&output.stderr).contains("continuing repair 1, which ann began"), "{output:?}");
    assert!(report.starts_with("repair 1: 30 feed rows"), "{report}");
    assert_eq!(wrong(&report), ["WRONG   feed rows missing: 10"]);
    let report = run(repair(&["--restart"]), 0);
    assert!(report.starts_with("repair 2: 10 feed rows and 0 notifications written"), "{report}");
    assert_eq!(rows(&database), all);
}

#[test]
fn a_repair_waits_for_a_row_that_somebody_holds() {
    let (database, author) = settled_fleet();
    let all = rows(&database);
    database.execute(&format!("INSERT INTO feed_entry SELECT {author}, id FROM tweet"));
    let mut other = database.database().connection().unwrap();
    sql::execute(&mut other, "BEGIN").unwrap();
    sql::execute(&mut other, &format!("SELECT FROM feed_entry WHERE reader_id = {author} FOR UPDATE")).unwrap();
    let mut child = spawn(fleetctl(&database, &["verify", "--repair"]));
    await_line(&mut child, "trying again: another transaction held");
    sql::execute(&mut other, "ROLLBACK").unwrap();
    checked(&child.wait_with_output().unwrap(), 0);
    assert_eq!(rows(&database), all);
}
