//! Checks that every event of a stream took effect once and in order, and tells what waits.
//!
//! The proof is in tables that don't know of each other: `stream_head` and `stream_event` say what was accepted,
//! `stream_cursor` how far each key has come, and a table of the stream's own what took effect: see
//! [`account_effects::CHECKS`](crate::account_effects::CHECKS).

use crate::{Count, Result, audit::Finding, locks};
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{BigInt, Integer, Nullable, Text, Timestamptz},
};

/// How many rows of each kind of error are named.
const EXAMPLES: usize = 20;

/// What is on its way, as a check: it may come right by itself.
pub const UNDER_WAY: &str = "events not through yet";

/// A check's name, and its query, whose rows are the errors themselves: key, sequence, and a description by these. `$1` is the
/// stream, `$2` what the keys start with: `~` sorts behind every character that a key may hold.
pub type Check = (&'static str, &'static str);

/// What has to hold of every stream. None compares times with each other: they go back when the clock is set back, and
/// nothing is wrong then.
pub const CHECKS: &[Check] = &[
    (
        "accepted events missing",
        "SELECT key, gap.seq, ', events ' || gap.seq || ' to ' || upto AS what
         FROM (SELECT key, lag(seq, 1, 0::bigint) OVER (PARTITION BY key ORDER BY seq) + 1 AS seq, seq - 1 AS upto
               FROM stream_event WHERE stream = $1 AND key >= $2 AND key < $2 || '~'
               UNION ALL
               SELECT key, coalesce(e.seq, 0) + 1, h.seq
               FROM stream_head h LEFT JOIN LATERAL (
                   SELECT e.seq FROM stream_event e WHERE e.stream = $1 AND e.key = h.key ORDER BY e.seq DESC LIMIT 1
               ) e ON true
               WHERE h.stream = $1 AND h.key >= $2 AND h.key < $2 || '~') gap
         WHERE gap.seq <= upto",
    ),
    (
        "events beyond their key's head",
        "SELECT e.key, e.seq, ', event ' || e.seq || ', head ' || coalesce(h.seq::text, 'missing') AS what
         FROM stream_event e LEFT JOIN stream_head h ON h.stream = $1 AND h.key = e.key
         WHERE e.stream = $1 AND e.key >= $2 AND e.key < $2 || '~' AND (h.seq IS NULL OR e.seq > h.seq OR e.seq < 1)",
    ),
    (
        "cursors that aren't where as many events are settled",
        "SELECT key, 0::bigint AS seq,
                ', cursor ' || coalesce(c.seq::text, 'missing') || ', ' || coalesce(e.settled, 0) || ' settled' AS what
         FROM (SELECT key, count(*) FILTER (WHERE processed_at IS NOT NULL) AS settled FROM stream_event
               WHERE stream = $1 AND key >= $2 AND key < $2 || '~' GROUP BY key) e
         FULL JOIN (SELECT key, seq FROM stream_cursor WHERE stream = $1 AND key >= $2 AND key < $2 || '~') c USING (key)
         WHERE coalesce(e.settled, 0) IS DISTINCT FROM c.seq",
    ),
    (
        "events settled out of turn",
        "SELECT e.key, e.seq, ', event ' || e.seq || CASE WHEN e.processed_at IS NULL THEN ' waits' ELSE ' is settled' END
                    || ', cursor ' || c.seq AS what
         FROM stream_event e JOIN stream_cursor c ON c.stream = $1 AND c.key = e.key
         WHERE e.stream = $1 AND e.key >= $2 AND e.key < $2 || '~' AND (e.processed_at IS NULL) = (e.seq <= c.seq)",
    ),
    (
        // The sweep would pass them over.
        "events that rest though their key doesn't",
        "SELECT e.key, e.seq, ', event ' || e.seq AS what
         FROM stream_event e JOIN stream_cursor c ON c.stream = $1 AND c.key = e.key
         WHERE e.stream = $1 AND e.rests AND e.key >= $2 AND e.key < $2 || '~' AND e.processed_at IS NULL
           AND c.parked_at IS NULL AND c.retry_at IS NULL",
    ),
    (
        UNDER_WAY,
        "SELECT e.key, e.seq, ', event ' || e.seq AS what
         FROM stream_event e LEFT JOIN stream_cursor c ON c.stream = $1 AND c.key = e.key
         WHERE e.stream = $1 AND e.key >= $2 AND e.key < $2 || '~' AND e.processed_at IS NULL AND c.parked_at IS NULL
           AND e.seq > coalesce(c.seq, 0)",
    ),
];

/// What was looked at.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Totals {
    /// Keys with at least one event.
    #[diesel(sql_type = BigInt)]
    pub keys: i64,
    /// Events accepted.
    #[diesel(sql_type = BigInt)]
    pub accepted: i64,
    /// Events that took effect.
    #[diesel(sql_type = BigInt)]
    pub applied: i64,
    /// Events skipped by an operator.
    #[diesel(sql_type = BigInt)]
    pub skipped: i64,
    /// Events that wait because their key is parked.
    #[diesel(sql_type = BigInt)]
    pub parked: i64,
}

#[derive(QueryableByName)]
struct Row {
    #[diesel(sql_type = Text)]
    key: String,
    #[diesel(sql_type = Text)]
    what: String,
    #[diesel(sql_type = BigInt)]
    count: i64,
}

/// Runs every check on the stream's keys that start with `prefix`, and those of its `effects`; what it returns has a count of 0
/// where all is well. To be run in a transaction of its own: all checks see the same state.
pub fn run(
    conn: &mut PgConnection,
    stream: &str,
    prefix: &str,
    effects: &[Check],
    mut progress: impl FnMut(&'static str),
) -> Result<(Totals, Vec<Finding>)> {
    sql_query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY").execute(conn)?;
    sql_query("SET LOCAL statement_timeout = 0").execute(conn)?;
    // Keys that are newer than the statistics are a handful to the planner, which would read a whole table for each.
    sql_query("SET LOCAL enable_nestloop = off").execute(conn)?;
    let totals = sql_query(
        "SELECT count(DISTINCT e.key) AS keys, count(*) AS accepted,
                count(*) FILTER (WHERE e.outcome = 'applied') AS applied,
                count(*) FILTER (WHERE e.outcome = 'skipped') AS skipped,
                count(*) FILTER (WHERE e.outcome IS NULL AND c.parked_at IS NOT NULL) AS parked
         FROM stream_event e LEFT JOIN stream_cursor c ON c.stream = $1 AND c.key = e.key
         WHERE e.stream = $1 AND e.key >= $2 AND e.key < $2 || '~'",
    )
    .bind::<Text, _>(stream)
    .bind::<Text, _>(prefix)
    .get_result(conn)?;
    let mut findings = Vec::new();
    for (check, query) in CHECKS.iter().chain(effects) {
        progress(check);
        let rows: Vec<Row> = sql_query(format!(
            "SELECT key, what, count(*) OVER () AS count FROM ({query}) found ORDER BY key, seq LIMIT {EXAMPLES}"
        ))
        .bind::<Text, _>(stream)
        .bind::<Text, _>(prefix)
        .load(conn)?;
        findings.push(Finding {
            check,
            count: rows.first().map_or(0, |row| row.count.unsigned_abs()),
            examples: rows.into_iter().map(|row| format!("key {}{}", row.key, row.what)).collect(),
        });
    }
    Ok((totals, findings))
}

/// Events that haven't taken effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, QueryableByName)]
pub struct Backlog {
    /// Those that will.
    #[diesel(sql_type = BigInt)]
    pub waiting: i64,
    /// Those that wait because their key is parked.
    #[diesel(sql_type = BigInt)]
    pub parked: i64,
}

/// What waits, of the stream's keys that start with `prefix`. Costs no more than there is.
pub fn backlog(conn: &mut PgConnection, stream: &str, prefix: &str) -> Result<Backlog> {
    Ok(sql_query(
        "SELECT count(*) FILTER (WHERE c.parked_at IS NULL) AS waiting,
                count(*) FILTER (WHERE c.parked_at IS NOT NULL) AS parked
         FROM stream_event e LEFT JOIN stream_cursor c ON c.stream = $1 AND c.key = e.key
         WHERE e.stream = $1 AND e.rests = ANY ('{f,t}') AND e.key >= $2 AND e.key < $2 || '~' AND e.processed_at IS NULL",
    )
    .bind::<Text, _>(stream)
    .bind::<Text, _>(prefix)
    .get_result(conn)?)
}

/// How many of a key's events have exactly this payload: for a client that doesn't know whether its request took
/// place, and has marked what it sent. Waits for everybody who is accepting events just now, since one of them may be at
/// that request.
pub fn times_accepted(conn: &mut PgConnection, stream: &str, key: &str, payload: &str) -> Result<i64> {
    conn.transaction(|conn| locks::stream_for_dividing(conn, stream))?;
    let count: Count =
        sql_query("SELECT count(*) AS n FROM stream_event WHERE stream = $1 AND key = $2 AND payload::text = $3")
            .bind::<Text, _>(stream)
            .bind::<Text, _>(key)
            .bind::<Text, _>(payload)
            .get_result(conn)?;
    Ok(count.n)
}

/// What waits in one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, QueryableByName)]
pub struct Lag {
    /// The shard.
    #[diesel(sql_type = Integer)]
    pub shard: i32,
    /// Events that will take effect.
    #[diesel(sql_type = BigInt)]
    pub waiting: i64,
    /// Events of parked keys.
    #[diesel(sql_type = BigInt)]
    pub parked: i64,
    /// When the oldest of those that will take effect was accepted.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub oldest: Option<DateTime<Utc>>,
    /// How long ago that was, by the database's clock.
    #[diesel(sql_type = Nullable<BigInt>)]
    pub oldest_ms: Option<i64>,
}

/// What waits in each shard of a stream that has so many; in no order, and without those where nothing does.
pub fn lag(conn: &mut PgConnection, stream: &str, shards: i32) -> Result<Vec<Lag>> {
    Ok(sql_query(
        "SELECT shard, waiting, parked, oldest, (extract(epoch FROM clock_timestamp() - oldest) * 1000)::bigint AS oldest_ms
         FROM (SELECT e.key_hash % $2 AS shard, count(*) FILTER (WHERE c.parked_at IS NULL) AS waiting,
                      count(*) FILTER (WHERE c.parked_at IS NOT NULL) AS parked,
                      min(e.generated_at) FILTER (WHERE c.parked_at IS NULL) AS oldest
               FROM stream_event e LEFT JOIN stream_cursor c ON c.stream = $1 AND c.key = e.key
               WHERE e.stream = $1 AND e.processed_at IS NULL GROUP BY 1) by_shard",
    )
    .bind::<Text, _>(stream)
    .bind::<Integer, _>(shards)
    .load(conn)?)
}
