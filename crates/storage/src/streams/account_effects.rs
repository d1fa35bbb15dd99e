//! Table `account_effect`: a row each time that an account event takes effect.

use crate::Result;
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Integer, Text},
};

/// An account event that takes effect.
#[derive(Clone, Copy, Debug)]
pub struct Effect<'a> {
    /// The account.
    pub account: &'a str,
    /// The event's place among the account's.
    pub seq: i64,
    /// How long its handling took by itself.
    pub work_ms: i32,
}

/// Records the effects, in the transaction that moves the accounts' cursors and after that: so that ids grow, within one
/// account, in the order of the commits.
///
/// # Errors
/// The database's.
pub fn record(conn: &mut PgConnection, worker: &str, effects: &[Effect<'_>]) -> Result<()> {
    sql_query(
        "INSERT INTO account_effect (account_id, seq, worker, work_ms)
         SELECT account, seq, $4, work_ms FROM unnest($1, $2, $3) AS new (account, seq, work_ms)",
    )
    .bind::<Array<Text>, _>(effects.iter().map(|effect| effect.account).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(effects.iter().map(|effect| effect.seq).collect::<Vec<_>>())
    .bind::<Array<Integer>, _>(effects.iter().map(|effect| effect.work_ms).collect::<Vec<_>>())
    .bind::<Text, _>(worker)
    .execute(conn)?;
    Ok(())
}
