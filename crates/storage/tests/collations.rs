//! Keys of text don't depend on a library that sorts, and a library that has changed is told.

use std::{sync::mpsc, thread};
use storage::{Database, Settings, collations, migrations, users};
use test_support::{TestDatabase, eventually, sql};

/// Indexes that have texts in an order which isn't that of their bytes.
const SORTED_BY_A_LIBRARY: &str = "
    SELECT count(*) AS n FROM pg_index i, unnest(i.indcollation) AS used (oid)
    WHERE i.indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = current_schema()::regnamespace)
      AND used.oid NOT IN (0, 'pg_catalog.\"C\"'::regcollation)
      AND i.indrelid <> '__diesel_schema_migrations'::regclass";

const VERSION: &str = "00000000000010";

/// Takes the migration back, as if it had never been.
fn revert(db: &TestDatabase) {
    let down = include_str!("../../../migrations/00000000000010_collations/down.sql");
    for statement in down.split(';').filter(|sql| !sql.trim().is_empty()) {
        db.execute(statement);
    }
    db.execute(&format!("DELETE FROM __diesel_schema_migrations WHERE version = '{VERSION}'"));
}

#[test]
fn no_key_of_text_depends_on_a_library_that_sorts() {
    let db = TestDatabase::new();
    assert_eq!(db.count(SORTED_BY_A_LIBRARY), 0);
}

#[test]
fn a_database_with_rows_is_migrated_while_others_write_and_its_keys_stay_unique() {
    let db = TestDatabase::new();
    revert(&db);
    assert!(db.count(SORTED_BY_A_LIBRARY) > 0, "the tables are as they were before");
    db.execute(
        r#"INSERT INTO "user" (login, channel, email)
           SELECT 'fan-' || i, 'email', 'a@example.com' FROM generate_series(1, 1000) i"#,
    );
    let notify = "INSERT INTO email_notification (user_id, source, source_id, email, text)
                  SELECT id, 'message', 'm-' || id, email, 'hello' FROM \"user\" WHERE id ";
    db.execute(&format!("{notify} <= 900"));
    // Left over by one that was interrupted.
    db.execute("CREATE TABLE torn AS SELECT 1 AS id UNION ALL SELECT 1");
    let mut conn = db.database().connection().unwrap();
    sql::execute(&mut conn, "CREATE UNIQUE INDEX CONCURRENTLY email_notification_c ON torn (id)").unwrap_err();

    // The index waits for a transaction that doesn't end for now; nobody waits for the index.
    let (wrote, may_migrate) = mpsc::channel();
    let waits = "SELECT count(*) AS n FROM pg_stat_activity
                 WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%email_notification_c%'";
    thread::scope(|scope| {
        let db = &db;
        let writer = scope.spawn(move || {
            db.database().transaction(|conn| {
                sql::execute(conn, &format!("{notify} BETWEEN 901 AND 950"))?;
                wrote.send(()).unwrap();
                eventually("the migration waits for this", || (db.count(waits) > 0).then_some(()));
                db.execute(&format!("{notify} > 950"));
                Ok(())
            })
        });
        may_migrate.recv().unwrap();
        // Two at once.
        let others = scope.spawn(|| migrations::run(&mut db.database().connection().unwrap()).unwrap());
        let mut ran = migrations::run(&mut conn).unwrap();
        ran.extend(others.join().unwrap());
        assert_eq!(ran, [VERSION]);
        writer.join().unwrap().unwrap();
    });

    assert_eq!(db.count(SORTED_BY_A_LIBRARY), 0);
    assert_eq!(db.count("SELECT count(*) AS n FROM pg_index WHERE NOT indisvalid"), 0);
    let again = format!("{notify} > 0 ON CONFLICT DO NOTHING");
    assert_eq!(db.execute(&again), 0, "each has one");
    let twice = r#"INSERT INTO "user" (login, channel, email) VALUES ('fan-7', 'email', 'b@example.com')"#;
    sql::execute(&mut conn, twice).unwrap_err();
    assert_eq!(users::by_login(&mut conn, "fan-7").unwrap().id.0, 7);
    revert(&db);
    assert!(db.count(SORTED_BY_A_LIBRARY) > 0);
}

#[test]
fn a_migration_that_cannot_have_its_tables_leaves_others_room_and_tries_again() {
    let db = TestDatabase::new();
    revert(&db);
    let (holds, held) = mpsc::channel();
    let (done, may_end) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let db = &db;
        let holder = scope.spawn(move || {
            db.database().transaction(|conn| {
                sql::execute(conn, r#"LOCK TABLE "user" IN ACCESS SHARE MODE"#)?;
                holds.send(()).unwrap();
                let _ = may_end.recv();
                Ok(())
            })
        });
        held.recv().unwrap();
        let migration = scope.spawn(|| migrations::run(&mut db.database().connection().unwrap()));
        let waits = "SELECT count(*) AS n FROM pg_locks WHERE relation = '\"user\"'::regclass AND NOT granted";
        eventually("the migration waits", || (db.count(waits) > 0).then_some(()));
        // Meanwhile, since it lets go again and again:
        let impatient = Settings { lock_timeout_ms: 10_000, ..db.settings() };
        let impatient = Database::open(&impatient, "test").unwrap();
        users::require(&mut impatient.connection().unwrap(), domain::UserId(1)).unwrap_err();
        assert!(!migration.is_finished(), "it tries again");
        drop(done);
        assert_eq!(migration.join().unwrap().unwrap(), [VERSION]);
        holder.join().unwrap().unwrap();
    });
}

#[test]
fn a_library_that_sorts_otherwise_than_before_is_told_with_what_to_type() {
    let db = TestDatabase::new();
    let mut conn = db.database().connection().unwrap();
    assert_eq!(collations::outdated(&mut conn).unwrap(), []);
    db.execute("CREATE COLLATION german (provider = icu, locale = 'de')");
    db.execute("CREATE TABLE sorted (name text COLLATE german PRIMARY KEY)");
    assert_eq!(collations::outdated(&mut conn).unwrap(), []);
    db.execute("UPDATE pg_collation SET collversion = '1' WHERE collname = 'german'");
    let [outdated] = &collations::outdated(&mut conn).unwrap()[..] else { panic!("one") };
    assert_eq!((&*outdated.name, &*outdated.recorded), ("COLLATION public.german", "1"));
    let told = outdated.to_string();
    for statement in ["REINDEX DATABASE test_", "ALTER COLLATION public.german REFRESH VERSION;"] {
        assert!(told.contains(statement), "{told}");
    }
    db.execute("ALTER COLLATION german REFRESH VERSION");
    assert_eq!(collations::outdated(&mut conn).unwrap(), []);
}
