//! Table `account_effect`: a row each time that an account event takes effect.

use crate::{Result, stream_audit::Check};
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

/// What has to hold of the effects of a stream whose handler records them here.
pub const CHECKS: &[Check] = &[
    (
        "effects missing",
        "SELECT e.key, e.seq, ', event ' || e.seq AS what FROM stream_event e
         WHERE e.stream = $1 AND e.key >= $2 AND e.key < $2 || '~' AND e.outcome = 'applied'
           AND NOT EXISTS (SELECT FROM account_effect a
                           WHERE a.account_id >= $2 AND a.account_id < $2 || '~'
                             AND a.account_id = e.key AND a.seq = e.seq)",
    ),
    (
        "effects without an applied event",
        "SELECT a.account_id AS key, a.seq, ', event ' || a.seq
                    || CASE WHEN e.key IS NULL THEN ' isn''t there' ELSE coalesce(' is ' || e.outcome, ' waits') END AS what
         FROM account_effect a LEFT JOIN stream_event e ON e.stream = $1 AND e.key = a.account_id AND e.seq = a.seq
         WHERE a.account_id >= $2 AND a.account_id < $2 || '~' AND e.outcome IS DISTINCT FROM 'applied'",
    ),
    (
        "effects doubled",
        "SELECT account_id AS key, seq, ', event ' || seq || ', ' || count(*) || ' times' AS what FROM account_effect
         WHERE account_id >= $2 AND account_id < $2 || '~' GROUP BY account_id, seq HAVING count(*) > 1",
    ),
    (
        // By the first time of each: one that is doubled isn't out of order for that alone.
        "effects out of order",
        "SELECT key, seq, ', event ' || seq || ' after ' || before AS what
         FROM (SELECT account_id AS key, seq, lag(seq) OVER (PARTITION BY account_id ORDER BY min(id)) AS before
               FROM account_effect WHERE account_id >= $2 AND account_id < $2 || '~' GROUP BY account_id, seq) effect
         WHERE seq < before",
    ),
];
