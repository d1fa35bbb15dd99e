//! Whole databases, for tests and benchmarks: each works in one of its own.

use crate::{Error, Result, locks::pg_try_advisory_lock};
use diesel::{
    PgConnection, RunQueryDsl, sql_query,
    sql_types::{BigInt, Text},
};
use std::{thread, time::Duration};

/// A name that needs no thought about quoting.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Makes a database, empty or as a copy of `template`, to which nobody may be connected meanwhile.
///
/// # Errors
/// The database's, such as that the name is in use.
pub fn create_database(conn: &mut PgConnection, name: &str, template: Option<&str>) -> Result<()> {
    let template = template.map(|template| format!(" TEMPLATE {}", quoted(template))).unwrap_or_default();
    sql_query(format!("CREATE DATABASE {}{template}", quoted(name))).execute(conn)?;
    Ok(())
}

/// Drops a database, if it's there, and ends every session in it.
pub fn drop_database(conn: &mut PgConnection, name: &str) -> Result<()> {
    sql_query(format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", quoted(name))).execute(conn)?;
    Ok(())
}

/// Whether there is a database of this name.
pub fn has_database(conn: &mut PgConnection, name: &str) -> Result<bool> {
    let count = sql_query("SELECT count(*) AS n FROM pg_database WHERE datname = $1")
        .bind::<Text, _>(name)
        .get_result::<crate::Count>(conn)?;
    Ok(count.n > 0)
}

/// Runs `work` while no other session does so under the same key, in whichever process.
///
/// # Errors
/// Those of `work`; [`Error::Conflict`] when the other one takes longer than ten minutes.
pub fn alone<T>(conn: &mut PgConnection, key: i64, work: impl FnOnce(&mut PgConnection) -> Result<T>) -> Result<T> {
    const PAUSE: Duration = Duration::from_millis(100);
    const PATIENCE: u32 = 6000;
    // Asked again and again: a statement that waits has a snapshot, and CREATE INDEX CONCURRENTLY of the other one would wait
    // for that.
    let mut asked = 0;
    while !diesel::select(pg_try_advisory_lock(key)).get_result::<bool>(conn)? {
        asked += 1;
        if asked == PATIENCE {
            return Err(Error::Conflict("another process is doing the same, and doesn't finish"));
        }
        thread::sleep(PAUSE);
    }
    let result = work(conn);
    sql_query("SELECT pg_advisory_unlock($1)").bind::<BigInt, _>(key).execute(conn)?;
    result
}
