//! Versions of the libraries by which texts are sorted: an index over texts is good for the one that it was made with.

use crate::{Count, Result};
use diesel::{PgConnection, RunQueryDsl, sql_query, sql_types::Text};
use std::fmt;

/// A collation whose library has changed since its indexes were made.
#[derive(Clone, Debug, PartialEq, Eq, diesel::QueryableByName)]
pub struct Outdated {
    /// As SQL names it: `DATABASE "murmuration"`, or `COLLATION "public"."german"`.
    #[diesel(sql_type = Text)]
    pub name: String,
    /// The library's version when the indexes were made.
    #[diesel(sql_type = Text)]
    pub recorded: String,
    /// The library's version now.
    #[diesel(sql_type = Text)]
    pub actual: String,
    /// The database that it's in, quoted.
    #[diesel(sql_type = Text)]
    database: String,
}

// What has happened, and what to type.
impl fmt::Display for Outdated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, recorded, actual, database } = self;
        let refresh = if name.starts_with("DATABASE") { "REFRESH COLLATION VERSION" } else { "REFRESH VERSION" };
        write!(
            f,
            "{name} sorts texts by version {actual} of a library, its indexes were made with {recorded}. The fleet's keys \
             don't depend on it; for whatever else is in this database: REINDEX DATABASE {database}; ALTER {name} {refresh};"
        )
    }
}

/// The database's own collation and those that its columns name, where the library's version isn't the recorded one.
/// PostgreSQL records the database's as of version 15.
pub fn outdated(conn: &mut PgConnection) -> Result<Vec<Outdated>> {
    let version: Count = sql_query(
        "SELECT count(*) AS n FROM pg_attribute WHERE attrelid = 'pg_database'::regclass AND attname = 'datcollversion'",
    )
    .get_result(conn)?;
    let of_database = if version.n > 0 {
        "SELECT 'DATABASE ' || quote_ident(datname) AS name, datcollversion AS recorded,
                pg_database_collation_actual_version(oid) AS actual
         FROM pg_database WHERE datname = current_database() UNION ALL "
    } else {
        ""
    };
    Ok(sql_query(format!(
        "SELECT name, recorded, actual, quote_ident(current_database()) AS database FROM (
             {of_database}
             SELECT 'COLLATION ' || quote_ident(n.nspname) || '.' || quote_ident(c.collname), c.collversion,
                    pg_collation_actual_version(c.oid)
             FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace
             WHERE c.collversion IS NOT NULL AND EXISTS (SELECT FROM pg_attribute a WHERE a.attcollation = c.oid)
         ) AS all_of_them (name, recorded, actual)
         WHERE recorded <> actual ORDER BY name"
    ))
    .load(conn)?)
}
