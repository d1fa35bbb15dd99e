//! SQL as it stands, for tests that plant or look for what no function of `storage` would.

use diesel::{PgConnection, QueryableByName, RunQueryDsl, sql_query, sql_types::BigInt};
use storage::Result;

#[derive(QueryableByName)]
struct Row {
    #[diesel(sql_type = BigInt)]
    n: i64,
}

/// Runs a statement and returns how many rows it touched.
pub fn execute(conn: &mut PgConnection, sql: &str) -> Result<usize> {
    Ok(sql_query(sql).execute(conn)?)
}

/// The numbers that a query returns under the name `n`.
pub fn numbers(conn: &mut PgConnection, sql: &str) -> Result<Vec<i64>> {
    Ok(sql_query(sql).load::<Row>(conn)?.into_iter().map(|row| row.n).collect())
}

/// The one number that a query returns under the name `n`.
pub fn count(conn: &mut PgConnection, sql: &str) -> Result<i64> {
    Ok(sql_query(sql).get_result::<Row>(conn)?.n)
}
