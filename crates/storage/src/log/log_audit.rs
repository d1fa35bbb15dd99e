//! Checks that a consumer group has recorded each message of the log once and in order, and tells what is on its way.
//!
//! The proof is in the sequences, which are given when a message is published, and the offsets, which the broker gives: a
//! partition's recorded sequences have to be without gaps, and to rise with the offsets.

use crate::{
    Result,
    audit::Finding,
    consumer_offsets::Contents,
    schema::{message, skipped_message},
};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{BigInt, Integer, Nullable, Text},
};
use domain::log::Group;

/// How many rows of each kind of error are named.
const EXAMPLES: usize = 20;

/// The kinds of errors, in the order in which [`run`] returns them.
const CHECKS: [&str; 4] = [
    "gaps in the sequences",
    "sequences recorded more than once",
    "messages out of order",
    "messages of one key out of order",
];

/// The group's messages (`$1`), each beside those that its sequence is compared with. Of a sequence that is there more than
/// once only the later offsets count as repeated, and only the first one may be out of order.
const MARKED: &str = r#"
    WITH compared AS (
        SELECT partition, "offset", seq, key,
               lag(seq) OVER (PARTITION BY partition ORDER BY seq, "offset") AS previous,
               max(seq) OVER (PARTITION BY partition ORDER BY "offset" ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
                   AS highest,
               max(seq) OVER (PARTITION BY partition, key COLLATE "C" ORDER BY "offset"
                              ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS highest_of_key
        FROM message WHERE "group" = $1),
    marked AS (
        SELECT partition, "offset", seq, previous, highest, highest_of_key,
               -- Where the database has become another one, sequences are left out.
               CASE WHEN seq - previous > 1
                    THEN seq - previous - 1 - message_unused_among(partition, previous + 1, seq - 1) ELSE 0 END
                   AS missing,
               coalesce(seq = previous, false) AS repeated,
               coalesce(seq < highest AND seq IS DISTINCT FROM previous, false) AS disordered,
               coalesce(key IS NOT NULL AND seq < highest_of_key AND seq IS DISTINCT FROM previous, false)
                   AS disordered_by_key
        FROM compared)"#;

/// What a group has recorded of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals {
    /// The partition.
    pub partition: i32,
    /// Messages.
    pub recorded: i64,
    /// Those of other programs, which have no sequence.
    pub foreign: i64,
    /// The lowest sequence, and the highest.
    pub sequences: Option<(i64, i64)>,
    /// Sequences between those that aren't there.
    pub missing: i64,
    /// Places where one or several of them are missing.
    pub gaps: i64,
    /// Messages whose sequence is at a lower offset as well.
    pub repeated: i64,
    /// Messages at a higher offset than one with a higher sequence.
    pub disordered: i64,
    /// The same among those of one key.
    pub disordered_by_key: i64,
}

#[derive(QueryableByName)]
struct Row {
    #[diesel(sql_type = Integer)]
    partition: i32,
    #[diesel(sql_type = BigInt)]
    recorded: i64,
    #[diesel(sql_type = BigInt)]
    foreign_count: i64,
    #[diesel(sql_type = Nullable<BigInt>)]
    first_seq: Option<i64>,
    #[diesel(sql_type = Nullable<BigInt>)]
    last_seq: Option<i64>,
    #[diesel(sql_type = BigInt)]
    missing: i64,
    #[diesel(sql_type = BigInt)]
    gaps: i64,
    #[diesel(sql_type = BigInt)]
    repeated: i64,
    #[diesel(sql_type = BigInt)]
    disordered: i64,
    #[diesel(sql_type = BigInt)]
    disordered_by_key: i64,
}

#[derive(QueryableByName)]
struct Example {
    #[diesel(sql_type = Integer)]
    check_number: i32,
    #[diesel(sql_type = Text)]
    example: String,
}

/// Looks through all that the group has recorded: by partition, and by kind of error, with a count of 0 where all is well. To
/// be run in a transaction of its own: all of it sees the same state.
pub fn run(conn: &mut PgConnection, group: &Group) -> Result<(Vec<Totals>, Vec<Finding>)> {
    sql_query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY").execute(conn)?;
    sql_query("SET LOCAL statement_timeout = 0").execute(conn)?;
    let rows: Vec<Row> = sql_query(format!(
        "{MARKED}
         SELECT partition, count(*) AS recorded, count(*) - count(seq) AS foreign_count,
                min(seq) AS first_seq, max(seq) AS last_seq, coalesce(sum(missing), 0)::bigint AS missing,
                count(*) FILTER (WHERE missing > 0) AS gaps, count(*) FILTER (WHERE repeated) AS repeated,
                count(*) FILTER (WHERE disordered) AS disordered,
                count(*) FILTER (WHERE disordered_by_key) AS disordered_by_key
         FROM marked GROUP BY partition ORDER BY partition"
    ))
    .bind::<Text, _>(group.as_str())
    .load(conn)?;
    let totals: Vec<_> = rows.into_iter().map(Totals::from).collect();
    let count = |count: fn(&Totals) -> i64| totals.iter().map(count).sum::<i64>().unsigned_abs();
    let counts = [
        count(|totals| totals.gaps),
        count(|totals| totals.repeated),
        count(|totals| totals.disordered),
        count(|totals| totals.disordered_by_key),
    ];
    let examples = if counts == [0; CHECKS.len()] { Vec::new() } else { examples(conn, group)? };
    let finding = |(number, (check, count)): (i32, (&'static str, u64))| Finding {
        check,
        count,
        examples: examples.iter().filter(|row| row.check_number == number).map(|row| row.example.clone()).collect(),
    };
    let findings = (0..).zip(CHECKS.into_iter().zip(counts)).map(finding).collect();
    Ok((totals, findings))
}

fn examples(conn: &mut PgConnection, group: &Group) -> Result<Vec<Example>> {
    Ok(sql_query(format!(
        r#"{MARKED}
           SELECT check_number, example FROM (
               SELECT check_number, 'partition ' || partition || ', ' || what AS example,
                      row_number() OVER (PARTITION BY check_number ORDER BY partition, "offset") AS place
               FROM marked, LATERAL (VALUES
                   (0, missing > 0, 'sequences ' || previous + 1 || ' to ' || seq - 1),
                   (1, repeated, 'sequence ' || seq || ' again at offset ' || "offset"),
                   (2, disordered, 'sequence ' || seq || ' at offset ' || "offset" || ' after ' || highest),
                   (3, disordered_by_key, 'sequence ' || seq || ' at offset ' || "offset" || ' after ' || highest_of_key)
               ) AS found (check_number, is_so, what)
               WHERE is_so) numbered
           WHERE place <= {EXAMPLES} ORDER BY check_number, place"#
    ))
    .bind::<Text, _>(group.as_str())
    .load(conn)?)
}

impl From<Row> for Totals {
    fn from(row: Row) -> Self {
        Self {
            partition: row.partition,
            recorded: row.recorded,
            foreign: row.foreign_count,
            sequences: row.first_seq.zip(row.last_seq),
            missing: row.missing,
            gaps: row.gaps,
            repeated: row.repeated,
            disordered: row.disordered,
            disordered_by_key: row.disordered_by_key,
        }
    }
}

/// How far a group is behind what was accepted for a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, QueryableByName)]
pub struct Progress {
    /// The partition.
    #[diesel(sql_type = Integer)]
    pub partition: i32,
    /// Messages that aren't known to be in the stream.
    #[diesel(sql_type = BigInt)]
    pub waiting: i64,
    /// The newest sequence that was given to a message.
    #[diesel(sql_type = BigInt)]
    pub given: i64,
    /// The newest sequence that the group has recorded; `None` where it is to begin.
    #[diesel(sql_type = Nullable<BigInt>)]
    pub recorded: Option<i64>,
    /// The offset of its next message; `None` if it has none there yet.
    #[diesel(sql_type = Nullable<BigInt>)]
    pub next_offset: Option<i64>,
}

/// How far the group is, by partition.
pub fn progress(conn: &mut PgConnection, group: &Group) -> Result<Vec<Progress>> {
    Ok(sql_query(
        r#"SELECT p.partition, (SELECT count(*) FROM message_outbox w WHERE w.partition = p.partition) AS waiting,
                  p.seq AS given, o.seq AS recorded, o.next_offset
           FROM message_partition p LEFT JOIN consumer_offset o ON o."group" = $1 AND o.partition = p.partition
           ORDER BY p.partition"#,
    )
    .bind::<Text, _>(group.as_str())
    .load(conn)?)
}

/// What the group has recorded and skipped of the partition from this offset on.
pub fn contents_from(conn: &mut PgConnection, group: &Group, partition: i32, offset: i64) -> Result<Contents> {
    let messages = message::table
        .filter(message::group.eq(group.as_str()))
        .filter(message::partition.eq(partition).and(message::offset.ge(offset)));
    let skipped = skipped_message::table
        .filter(skipped_message::group.eq(group.as_str()))
        .filter(skipped_message::partition.eq(partition).and(skipped_message::offset.ge(offset)));
    Ok(Contents { messages: messages.count().get_result(conn)?, skipped: skipped.count().get_result(conn)? })
}
