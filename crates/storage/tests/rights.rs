//! What each service's role may do, and what it's refused.

use std::{collections::BTreeSet, fs, path::Path};
use storage::{
    Database, Settings, migrations,
    rights::{self, OF_THE_OPERATOR, SERVICES},
};
use test_support::{TestDatabase, sql};

/// A database whose roles are its own, gone with it: roles are the server's.
struct Stage {
    db: TestDatabase,
    prefix: String,
}

impl Stage {
    fn new() -> Self {
        let db = TestDatabase::new();
        let prefix = db.url().rsplit_once('/').unwrap().1.to_owned();
        let passwords = SERVICES.iter().map(|rights| (rights.service.to_owned(), "it's secret".to_owned())).collect();
        let stage = Self { db, prefix };
        // Again changes nothing.
        for _ in 0..2 {
            stage.db.database().transaction(|conn| rights::apply(conn, &stage.prefix, Some(&passwords))).unwrap();
        }
        stage
    }

    fn role(&self, service: &str) -> String {
        rights::role(&self.prefix, service)
    }

    /// What the role of a service says to a statement.
    fn try_as(&self, service: &str, statement: &str) -> Result<(), String> {
        let server = self.db.url().rsplit_once('@').unwrap().1;
        let url = format!("postgres://{}:it%27s%20secret@{server}", self.role(service));
        let database = Database::open(&Settings { url: url.into(), ..self.db.settings() }, "test").unwrap();
        let mut conn = database.connection().unwrap();
        sql::execute(&mut conn, statement).map(drop).map_err(|error| format!("{error:?}"))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for rights in &SERVICES {
            let role = self.role(rights.service);
            self.db.execute(&format!("DROP OWNED BY {role}"));
            self.db.execute(&format!("DROP ROLE {role}"));
        }
    }
}

#[test]
fn every_service_and_every_table_has_its_line() {
    let listed = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/services")).unwrap();
    let listed: BTreeSet<_> = listed.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(SERVICES.iter().map(|rights| rights.service).collect::<BTreeSet<_>>(), listed);

    let db = TestDatabase::new();
    let lines = SERVICES.iter().flat_map(|rights| rights.grants).map(|(_, objects)| *objects);
    let named: BTreeSet<_> = lines
        .filter(|objects| !objects.starts_with("SEQUENCE") && !objects.starts_with("FUNCTION"))
        .flat_map(|objects| objects.split(", "))
        .map(|table| table.trim_matches('"'))
        .chain(OF_THE_OPERATOR)
        .collect();
    let quoted: Vec<_> = named.iter().map(|table| format!("'{table}'")).collect();
    let tables = "SELECT count(*) AS n FROM pg_tables WHERE schemaname = 'public'";
    let known = db.count(&format!("{tables} AND tablename IN ({})", quoted.join(", ")));
    assert_eq!(known, i64::try_from(named.len()).unwrap(), "a line is about a table that isn't there");
    assert_eq!(db.count(tables), known, "a table has no line: say in rights.rs who needs it");
}

#[test]
fn each_role_is_refused_what_it_has_no_business_with() {
    let stage = Stage::new();
    for (service, statement) in [
        ("email-notifier", "SELECT password_hash FROM \"user\""),
        ("email-notifier", "SELECT phone FROM \"user\""),
        ("email-notifier", "SELECT * FROM email_notification"),
        ("sms-notifier", "SELECT email FROM \"user\""),
        ("feed-updater", "SELECT email FROM \"user\""),
        ("feed-updater", "SELECT password_hash FROM \"user\""),
        ("feed-updater", "UPDATE \"user\" SET password_hash = 'mine'"),
        ("feed-updater", "UPDATE \"user\" SET login = 'mine'"),
        ("api-gateway", "SELECT erase_user(1)"),
        ("feed-updater", "SELECT image FROM avatar"),
        ("feed-fanout", "SELECT text FROM tweet"),
        ("feed-fanout", "INSERT INTO feed_entry VALUES (1, 1)"),
        ("follower-importer", "SELECT email FROM \"user\""),
        ("follower-importer", "DELETE FROM subscription"),
        ("api-gateway", "SELECT password_hash FROM \"user\""),
        ("api-gateway", "UPDATE \"user\" SET roles = '[\"admin\"]'"),
        ("api-gateway", "DELETE FROM \"user\""),
        ("api-gateway", "DROP TABLE tweet"),
        ("api-gateway", "SELECT * FROM outbox"),
        ("api-gateway", "SELECT * FROM dead_letter"),
        ("api-gateway", "SELECT * FROM message_epoch"),
        ("outbox-relay", "SELECT login FROM \"user\""),
        ("outbox-relay", "SELECT body FROM dead_letter"),
        ("dead-letter-recorder", "SELECT body FROM dead_letter"),
        ("event-processor", "SELECT login FROM \"user\""),
        ("event-processor", "DELETE FROM account_effect"),
        ("message-recorder", "SELECT login FROM \"user\""),
        ("message-recorder", "DELETE FROM message"),
    ] {
        let refused = stage.try_as(service, statement).expect_err(statement);
        assert!(refused.contains("permission denied") || refused.contains("must be owner"), "{service}: {refused}");
    }
    for rights in &SERVICES {
        for statement in [
            "CREATE TABLE mine (id bigint)",
            "SELECT * FROM feed_repair",
            "CREATE ROLE mine",
            "COPY tweet TO PROGRAM 'true'",
        ] {
            let refused = stage.try_as(rights.service, statement).expect_err(statement);
            let refused = refused.contains("denied") || refused.contains("must be superuser");
            assert!(refused, "{}: {statement}", rights.service);
        }
    }
}

#[test]
fn what_a_role_had_besides_is_taken_away() {
    let stage = Stage::new();
    let role = stage.role("feed-fanout");
    stage.db.execute(&format!("GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}"));
    stage.db.execute(&format!("GRANT SELECT (text) ON tweet TO {role}"));
    stage.try_as("feed-fanout", "SELECT text FROM tweet").unwrap();
    stage.db.database().transaction(|conn| rights::apply(conn, &stage.prefix, None)).unwrap();
    assert!(stage.try_as("feed-fanout", "SELECT text FROM tweet").is_err());
    stage.try_as("feed-fanout", "SELECT id FROM tweet").unwrap();
}

#[test]
fn the_owner_needs_to_be_no_superuser() {
    let stage = Stage::new();
    let (owner, database) = (format!("{}_owner", stage.prefix), format!("{}_owned", stage.prefix));
    stage.db.execute(&format!("CREATE ROLE {owner} LOGIN CREATEROLE PASSWORD 'it''s secret'"));
    stage.db.execute(&format!("CREATE DATABASE {database} OWNER {owner}"));
    let server = stage.db.url().rsplit_once('@').unwrap().1.rsplit_once('/').unwrap().0;
    let url = format!("postgres://{owner}:it%27s%20secret@{server}/{database}");
    let owned = Database::open(&Settings { url: url.into(), ..stage.db.settings() }, "test").unwrap();
    let prefix = format!("{}_2", stage.prefix);
    let passwords = SERVICES.iter().map(|rights| (rights.service.to_owned(), "secret".to_owned())).collect();
    let migrated = migrations::run(&mut owned.connection().unwrap());
    let lineage = owned
        .connection()
        .map(|mut conn| sql::count(&mut conn, "SELECT (message_lineage() IS NOT NULL)::integer::bigint AS n").unwrap());
    let roles = owned.transaction(|conn| rights::apply(conn, &prefix, Some(&passwords)));
    drop(owned);
    // First away with what is the server's, then look.
    stage.db.execute(&format!("DROP DATABASE {database} WITH (FORCE)"));
    for rights in &SERVICES {
        stage.db.execute(&format!("DROP ROLE IF EXISTS {}", rights::role(&prefix, rights.service)));
    }
    stage.db.execute(&format!("DROP ROLE {owner}"));
    assert!(migrated.is_ok_and(|versions| versions.len() > 10));
    assert_eq!((lineage.unwrap(), roles.unwrap().len()), (1, SERVICES.len()), "it knows the database's life");
}
