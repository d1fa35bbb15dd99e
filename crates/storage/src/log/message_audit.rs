//! Looking from outside at what has become of messages of the log.

use crate::Result;
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Timestamptz},
};
use domain::log::Group;

/// How often a message was accepted, as far as that can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, QueryableByName)]
pub struct Found {
    /// At least so often.
    #[diesel(sql_type = BigInt)]
    pub times: i64,
    /// Not more often either: whatever isn't in the outbox any more was recorded by some group.
    #[diesel(sql_type = Bool)]
    pub is_complete: bool,
}

/// How many messages have exactly this text, of those that were accepted since the partitions had these newest sequences:
/// for a client that doesn't know whether its request took place, and has marked what it sent. Waits for everybody who is
/// accepting messages just now, since one of them may be at that request.
pub fn times_accepted(conn: &mut PgConnection, text: &str, since: &[(i32, i64)]) -> Result<Found> {
    // Accepting takes no lock of its own, but that of the table which an INSERT holds to the commit.
    conn.transaction(|conn| sql_query("LOCK TABLE message_outbox IN SHARE MODE").execute(conn))?;
    let (partitions, seqs): (Vec<i32>, Vec<i64>) = since.iter().copied().unzip();
    // One statement, one view: a message is in the outbox, or its sequence is one that has left it.
    Ok(sql_query(
        r#"WITH gone AS (
               SELECT p.partition, coalesce(since.seq, 0) AS after, p.seq - cardinality(p.taken) AS upto
               FROM message_partition p LEFT JOIN unnest($2, $3) AS since (partition, seq) USING (partition)
           ), recorded AS (
               SELECT m.partition, count(*) AS messages, count(*) FILTER (WHERE m.text = $1) AS times
               FROM message m JOIN gone ON gone.partition = m.partition AND m.seq > gone.after AND m.seq <= gone.upto
               GROUP BY m."group", m.partition
           ), known AS (
               SELECT partition, max(messages) AS messages, max(times) AS times FROM recorded GROUP BY partition
           )
           SELECT (SELECT count(*) FROM message_outbox WHERE text = $1) + coalesce(sum(times), 0)::bigint AS times,
                  coalesce(bool_and(coalesce(messages, 0) >= upto - after - message_unused_among(gone.partition, after + 1, upto)),
                           true) AS is_complete
           FROM gone LEFT JOIN known USING (partition)"#,
    )
    .bind::<Text, _>(text)
    .bind::<Array<Integer>, _>(partitions)
    .bind::<Array<BigInt>, _>(seqs)
    .get_result(conn)?)
}

/// What a group has recorded of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, QueryableByName)]
pub struct Recorded {
    /// How many.
    #[diesel(sql_type = BigInt)]
    pub messages: i64,
    /// When the first of them was accepted.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub first_accepted_at: Option<DateTime<Utc>>,
    /// When the last one of them was accepted.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub last_accepted_at: Option<DateTime<Utc>>,
    /// When the first of them was recorded.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub first_recorded_at: Option<DateTime<Utc>>,
    /// When the last one of them was recorded.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub last_recorded_at: Option<DateTime<Utc>>,
}

/// What the group has recorded of messages whose texts start with `prefix`. Goes over all that it has recorded.
pub fn recorded(conn: &mut PgConnection, group: &Group, prefix: &str) -> Result<Recorded> {
    Ok(sql_query(
        r#"SELECT count(*) AS messages, min(accepted_at) AS first_accepted_at, max(accepted_at) AS last_accepted_at,
                  min(recorded_at) AS first_recorded_at, max(recorded_at) AS last_recorded_at
           FROM message WHERE "group" = $1 AND starts_with(text, $2)"#,
    )
    .bind::<Text, _>(group.as_str())
    .bind::<Text, _>(prefix)
    .get_result(conn)?)
}
