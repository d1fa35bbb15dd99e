//! The schema's versions, built into the binary.

use crate::{
    Count, Error, Result, admin,
    error::{DEADLOCK, LOCK_TIMEOUT},
    locks,
};
use diesel::{
    PgConnection, RunQueryDsl as _,
    migration::{Migration, MigrationSource},
    pg::Pg,
    result::Error as Diesel,
    sql_query,
    sql_types::Text,
};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};
use std::{thread, time::Duration};

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../../migrations");

/// What a migration needs of a table that may be large: the migration takes over what is there already, and makes it
/// itself where it isn't.
const BEFOREHAND: [(&str, &str, &str); 2] = [
    (
        "00000000000010",
        "email_notification_c",
        r#"email_notification (user_id, source COLLATE "C", source_id COLLATE "C")"#,
    ),
    (
        "00000000000010",
        "sms_notification_c",
        r#"sms_notification (user_id, source COLLATE "C", source_id COLLATE "C")"#,
    ),
];

/// Runs what is pending and names it, in order. Two at once is safe: they wait for each other.
///
/// # Errors
/// The database's, with the migration that failed; the earlier ones stay. [`Error::Conflict`] when the tables are in another
/// schema.
pub fn run(conn: &mut PgConnection) -> Result<Vec<String>> {
    admin::alone(conn, locks::MIGRATIONS, |conn| {
        require_schema(conn)?;
        let pending = conn.pending_migrations(MIGRATIONS).map_err(migration_error)?;
        let pending: Vec<_> =
            pending.into_iter().map(|migration| (migration.name().version().to_string(), migration)).collect();
        // On an empty database there is nothing that takes long.
        if pending.len() < all().map_err(migration_error)? {
            for (_, index, on) in BEFOREHAND.iter().filter(|(version, ..)| pending.iter().any(|(p, _)| p == version)) {
                build(conn, index, on)?;
            }
        }
        for (_, migration) in &pending {
            without_queueing(conn, |conn| conn.run_migration(&**migration).map(drop).map_err(migration_error))?;
        }
        Ok(pending.into_iter().map(|(version, _)| version).collect())
    })
}

fn all() -> diesel::migration::Result<usize> {
    let all: Vec<Box<dyn Migration<Pg>>> = MIGRATIONS.migrations()?;
    Ok(all.len())
}

/// Nothing would work, and the rows would seem lost, if the tables were made a second time.
fn require_schema(conn: &mut PgConnection) -> Result<()> {
    let elsewhere: Count = sql_query(
        "SELECT count(*) AS n FROM pg_tables
         WHERE tablename = 'feed_entry' AND schemaname IS DISTINCT FROM current_schema()
           AND NOT EXISTS (SELECT FROM pg_tables WHERE tablename = 'feed_entry' AND schemaname = current_schema())",
    )
    .get_result(conn)?;
    if elsewhere.n > 0 {
        return Err(Error::Conflict("the tables are in another schema of this database: set database.schema to it"));
    }
    Ok(())
}

/// Makes a unique index while others go on writing.
fn build(conn: &mut PgConnection, name: &str, on: &str) -> Result<()> {
    // One whose making was interrupted stays, and is of no use.
    let torn: Count =
        sql_query("SELECT count(*) AS n FROM pg_index WHERE indexrelid = to_regclass($1) AND NOT indisvalid")
            .bind::<Text, _>(name)
            .get_result(conn)?;
    if torn.n > 0 {
        sql_query(format!("DROP INDEX CONCURRENTLY {name}")).execute(conn)?;
    }
    sql_query(format!("CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {on}")).execute(conn)?;
    Ok(())
}

/// Whoever waits for a whole table keeps everybody else waiting behind, so it's for moments, again and again.
fn without_queueing(conn: &mut PgConnection, mut work: impl FnMut(&mut PgConnection) -> Result<()>) -> Result<()> {
    const WAIT: Duration = Duration::from_secs(2);
    const PAUSE: Duration = Duration::from_secs(1);
    const ATTEMPTS: u32 = 30;
    let before: Timeout = sql_query("SELECT current_setting('lock_timeout') AS value").get_result(conn)?;
    let limit = |conn: &mut _, value: &str| sql_query(format!("SET lock_timeout = '{value}'")).execute(conn);
    limit(conn, &format!("{}ms", WAIT.as_millis()))?;
    let mut attempts = 1..=ATTEMPTS;
    let result = loop {
        attempts.next();
        match work(conn) {
            Err(Error::Locked(_) | Error::Contention(_)) if !attempts.is_empty() => thread::sleep(PAUSE),
            result => break result,
        }
    };
    limit(conn, &before.value)?;
    result
}

#[derive(diesel::QueryableByName)]
struct Timeout {
    #[diesel(sql_type = diesel::sql_types::Text)]
    value: String,
}

/// Undoes every migration, the newest first, and names them: all data is gone.
pub fn revert_all(conn: &mut PgConnection) -> Result<Vec<String>> {
    admin::alone(conn, locks::MIGRATIONS, |conn| {
        conn.revert_all_migrations(MIGRATIONS).map(|versions| names(&versions)).map_err(migration_error)
    })
}

/// Whether the database lacks migrations that this binary knows. (diesel's own function would make its table where that's
/// missing, which a service may not.)
pub fn are_pending(conn: &mut PgConnection) -> Result<bool> {
    #[derive(diesel::QueryableByName)]
    struct Applied {
        #[diesel(sql_type = Text)]
        version: String,
    }
    let recorded: Count = sql_query(
        "SELECT count(*) AS n FROM pg_tables
                   WHERE tablename = '__diesel_schema_migrations' AND schemaname = current_schema()",
    )
    .get_result(conn)?;
    if recorded.n == 0 {
        return Ok(true);
    }
    let applied: Vec<Applied> =
        sql_query("SELECT version::text AS version FROM __diesel_schema_migrations").load(conn)?;
    let all: Vec<Box<dyn Migration<Pg>>> = MIGRATIONS.migrations().map_err(migration_error)?;
    let is_applied = |version: &str| applied.iter().any(|applied| applied.version == version);
    Ok(all.iter().any(|migration| !is_applied(&migration.name().version().to_string())))
}

fn names(versions: &[diesel::migration::MigrationVersion<'_>]) -> Vec<String> {
    versions.iter().map(ToString::to_string).collect()
}

fn migration_error(error: Box<dyn std::error::Error + Send + Sync>) -> Error {
    // diesel keeps this error's type to itself.
    let text = error.to_string();
    let error = Diesel::QueryBuilderError(error);
    if text.ends_with(LOCK_TIMEOUT) {
        Error::Locked(error)
    } else if text.ends_with(DEADLOCK) {
        Error::Contention(error)
    } else {
        Error::Query(error)
    }
}
