//! The schema's versions, built into the binary.

use crate::{Error, Result, admin, locks};
use diesel::PgConnection;
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../../migrations");

/// Runs what is pending and names it, in order. Two at once is safe: they wait for each other.
///
/// # Errors
/// The database's, with the migration that failed; the earlier ones stay.
pub fn run(conn: &mut PgConnection) -> Result<Vec<String>> {
    admin::alone(conn, locks::MIGRATIONS, |conn| {
        conn.run_pending_migrations(MIGRATIONS).map(|versions| names(&versions)).map_err(migration_error)
    })
}

/// Undoes every migration, the newest first, and names them: all data is gone.
///
/// # Errors
/// The database's.
pub fn revert_all(conn: &mut PgConnection) -> Result<Vec<String>> {
    admin::alone(conn, locks::MIGRATIONS, |conn| {
        conn.revert_all_migrations(MIGRATIONS).map(|versions| names(&versions)).map_err(migration_error)
    })
}

/// Whether the database lacks migrations that this binary knows.
///
/// # Errors
/// The database's.
pub fn are_pending(conn: &mut PgConnection) -> Result<bool> {
    conn.has_pending_migration(MIGRATIONS).map_err(migration_error)
}

fn names(versions: &[diesel::migration::MigrationVersion<'_>]) -> Vec<String> {
    versions.iter().map(ToString::to_string).collect()
}

fn migration_error(error: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::Query(diesel::result::Error::QueryBuilderError(error))
}
