//! Table `message_outbox`: messages of the log that were accepted, on their way to the partitions' streams.
//!
//! Accepting takes no lock: a message gets its [sequence](domain::log::MessageId::seq) only when a relay takes it, which
//! one relay at a time may do for a partition. What it has taken is committed before it's published, so that
//! whoever publishes it again, after whatever has happened, gives each message the sequence that it had.

use crate::{
    Floors, Result,
    floors::Given,
    schema::{message_outbox, message_partition},
};
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_query,
    sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Timestamptz},
};
use domain::{log::LogMessage, stream::key_hash};
use std::{collections::HashMap, time::Instant};

/// Messages to be accepted.
#[derive(Clone, Copy, Debug)]
pub struct New<'a> {
    /// The text.
    pub text: &'a str,
    /// What they're about.
    pub key: Option<&'a str>,
    /// The partition, where it's chosen. Else that of the key, or each of them in turn.
    pub partition: Option<i32>,
    /// How many, their texts numbered from 0: `text #0` … . One, with the text as it is, if that isn't said.
    pub count: Option<i64>,
}

/// Accepts messages, and returns how many: none if there's no such partition.
pub fn append(conn: &mut PgConnection, new: &New<'_>, correlation_id: Option<&str>) -> Result<usize> {
    Ok(sql_query(
        "INSERT INTO message_outbox (partition, id, text, key, correlation_id)
         SELECT CASE WHEN $1 IS NOT NULL THEN $1 WHEN $2 IS NOT NULL THEN $2 % n ELSE id % n END,
                id, CASE WHEN $3 THEN $4 || ' #' || i ELSE $4 END, $5, $6
         FROM (SELECT count(*)::integer AS n FROM message_partition) partitions,
              (SELECT i, nextval('message_outbox_id') AS id FROM generate_series(0, $7 - 1) i) new
         WHERE $1 IS NULL OR $1 BETWEEN 0 AND n - 1",
    )
    .bind::<Nullable<Integer>, _>(new.partition)
    .bind::<Nullable<Integer>, _>(new.key.map(key_hash))
    .bind::<Bool, _>(new.count.is_some())
    .bind::<Text, _>(new.text)
    .bind::<Nullable<Text>, _>(new.key)
    .bind::<Nullable<Text>, _>(correlation_id)
    .bind::<BigInt, _>(new.count.unwrap_or(1))
    .execute(conn)?)
}

/// A partition's messages that are to be published next, in this order.
#[derive(Debug)]
pub struct Taken {
    /// The partition.
    pub partition: i32,
    /// The sequence of the first of them; the others' follow.
    pub first_seq: i64,
    /// The messages, each with the id of its row. A row that somebody has removed by hand is `None`: its sequence stays
    /// unused.
    pub messages: Vec<(i64, Option<Message>)>,
}

/// A message that was accepted.
#[derive(Debug)]
pub struct Message {
    /// What it says.
    pub body: LogMessage,
    /// The request that brought it.
    pub correlation_id: Option<String>,
}

#[derive(QueryableByName)]
struct PartitionRow {
    #[diesel(sql_type = Integer)]
    partition: i32,
    #[diesel(sql_type = BigInt)]
    seq: i64,
    #[diesel(sql_type = Array<BigInt>)]
    taken: Vec<i64>,
}

#[derive(QueryableByName)]
struct MessageRow {
    #[diesel(sql_type = Integer)]
    partition: i32,
    #[diesel(sql_type = BigInt)]
    id: i64,
    #[diesel(sql_type = Text)]
    text: String,
    #[diesel(sql_type = Nullable<Text>)]
    key: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    correlation_id: Option<String>,
    #[diesel(sql_type = Timestamptz)]
    accepted_at: DateTime<Utc>,
}

/// Prepared once for each connection, which a query as text isn't.
#[derive(QueryId)]
struct Look {
    partitions: Vec<i32>,
    floors: Vec<i64>,
}

impl QueryFragment<Pg> for Look {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        // In the order of the ids, or the planner would take a small table for one that is read through.
        out.push_sql(
            "SELECT partition, taken <> '{}', (
                 SELECT id FROM message_outbox o WHERE o.partition = p.partition AND o.id > coalesce(f.floor, 0)
                 ORDER BY id LIMIT 1)
             FROM message_partition p LEFT JOIN unnest(",
        );
        out.push_bind_param::<Array<Integer>, _>(&self.partitions)?;
        out.push_sql(", ");
        out.push_bind_param::<Array<BigInt>, _>(&self.floors)?;
        out.push_sql(") AS f (partition, floor) USING (partition)");
        Ok(())
    }
}

impl Query for Look {
    type SqlType = (Integer, Bool, Nullable<BigInt>);
}

impl RunQueryDsl<PgConnection> for Look {}

/// Whether any partition has something to publish. Notes in `floors` from where on to look next time.
pub fn look(conn: &mut PgConnection, floors: &mut Floors, now: Instant) -> Result<bool> {
    if floors.is_due(now) {
        floors.note(now, Given::by("message_outbox_id", conn)?);
    }
    let (partitions, begin) = floors.all();
    let open: Vec<(i32, bool, Option<i64>)> = Look { partitions, floors: begin }.load(conn)?;
    let mut any = false;
    for (partition, taken, first) in open {
        floors.found(partition, first);
        any |= taken || first.is_some();
    }
    Ok(any)
}

/// Keeps the partitions that have anything to publish, and that no other relay has, to the end of the transaction;
/// returns what was taken of each by the transaction before: that may be nothing yet.
pub fn taken(conn: &mut PgConnection) -> Result<Vec<Taken>> {
    taken_above(conn, &Floors::default())
}

/// The same, where looking begins at the floors.
pub fn taken_above(conn: &mut PgConnection, floors: &Floors) -> Result<Vec<Taken>> {
    let (numbers, begin) = floors.all();
    let partitions: Vec<PartitionRow> = sql_query(
        "SELECT partition, seq, taken FROM message_partition p
         WHERE taken <> '{}' OR (
             SELECT id FROM message_outbox o WHERE o.partition = p.partition AND o.id > coalesce((
                 SELECT floor FROM unnest($1, $2) AS f (partition, floor) WHERE f.partition = p.partition), 0)
             ORDER BY id LIMIT 1) IS NOT NULL
         ORDER BY partition FOR UPDATE SKIP LOCKED",
    )
    .bind::<Array<Integer>, _>(numbers)
    .bind::<Array<BigInt>, _>(begin)
    .load(conn)?;
    let ids = partitions.iter().flat_map(|row| row.taken.iter().map(|id| (row.partition, *id)));
    let (numbers, ids): (Vec<i32>, Vec<i64>) = ids.unzip();
    let rows: Vec<MessageRow> = if ids.is_empty() {
        Vec::new()
    } else {
        sql_query(
            "SELECT partition, id, text, key, correlation_id, accepted_at
             FROM unnest($1, $2) AS wanted (partition, id) JOIN message_outbox USING (partition, id)",
        )
        .bind::<Array<Integer>, _>(numbers)
        .bind::<Array<BigInt>, _>(ids)
        .load(conn)?
    };
    let mut messages: HashMap<_, _> = rows
        .into_iter()
        .map(|row| {
            let body = LogMessage { text: row.text, key: row.key, accepted_at: Some(row.accepted_at), run: None };
            ((row.partition, row.id), Message { body, correlation_id: row.correlation_id })
        })
        .collect();
    Ok(partitions
        .into_iter()
        .map(|PartitionRow { partition, seq, taken }| Taken {
            partition,
            first_seq: seq - i64::try_from(taken.len()).unwrap_or(0) + 1,
            messages: taken.into_iter().map(|id| (id, messages.remove(&(partition, id)))).collect(),
        })
        .collect())
}

/// How far publishing has come.
#[derive(Clone, Copy, Debug)]
pub struct Published<'a> {
    /// The partition.
    pub partition: i32,
    /// The rows of the messages of which it's known that they are in the stream, from the first that was taken.
    pub confirmed: &'a [i64],
    /// The others that were taken.
    pub left: &'a [i64],
}

/// Removes what is published, and takes up to `limit` further messages, of up to `bytes` in all (and one at least), of each
/// partition that has nothing left.
pub fn advance(conn: &mut PgConnection, published: &[Published<'_>], limit: i64, bytes: i64) -> Result<()> {
    advance_above(conn, &Floors::default(), published, limit, bytes)
}

/// The same, where looking begins at the floors.
pub fn advance_above(
    conn: &mut PgConnection,
    floors: &Floors,
    published: &[Published<'_>],
    limit: i64,
    bytes: i64,
) -> Result<()> {
    let gone = published.iter().flat_map(|done| done.confirmed.iter().map(|id| (done.partition, *id)));
    let (numbers, ids): (Vec<i32>, Vec<i64>) = gone.unzip();
    if !ids.is_empty() {
        sql_query(
            "DELETE FROM message_outbox o USING unnest($1, $2) AS gone (partition, id)
             WHERE o.partition = gone.partition AND o.id = gone.id",
        )
        .bind::<Array<Integer>, _>(numbers)
        .bind::<Array<BigInt>, _>(ids)
        .execute(conn)?;
    }
    let (through, stuck): (Vec<&Published<'_>>, Vec<_>) = published.iter().partition(|done| done.left.is_empty());
    for done in stuck.into_iter().filter(|done| !done.confirmed.is_empty()) {
        diesel::update(message_partition::table.find(done.partition))
            .set(message_partition::taken.eq(done.left))
            .execute(conn)?;
    }
    if !through.is_empty() {
        sql_query(
            "UPDATE message_partition p SET taken = next.ids, seq = p.seq + cardinality(next.ids)
             FROM unnest($1, $4) AS through (partition, floor), LATERAL (
                 SELECT coalesce(array_agg(id ORDER BY id), '{}') AS ids FROM (
                     SELECT id, sum(size) OVER (ORDER BY id) - size AS before FROM (
                         SELECT id, octet_length(text) AS size FROM message_outbox o
                         WHERE o.partition = through.partition AND o.id > through.floor ORDER BY id LIMIT $2) first) sized
                 WHERE before < $3) next
             WHERE p.partition = through.partition",
        )
        .bind::<Array<Integer>, _>(through.iter().map(|done| done.partition).collect::<Vec<_>>())
        .bind::<BigInt, _>(limit)
        .bind::<BigInt, _>(bytes)
        .bind::<Array<BigInt>, _>(through.iter().map(|done| floors.of(done.partition)).collect::<Vec<_>>())
        .execute(conn)?;
    }
    Ok(())
}

/// How many messages wait.
pub fn count(conn: &mut PgConnection) -> Result<i64> {
    Ok(message_outbox::table.count().get_result(conn)?)
}
