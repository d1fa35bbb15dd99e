//! Tables `message` and `skipped_message`: what consumer groups have recorded of the message log, and what they found in
//! it that was no message.

use crate::{
    Error, Result,
    schema::{message, skipped_message},
};
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    prelude::*,
    result::Error as Diesel,
    sql_query,
    sql_types::{Array, BigInt, Integer, Nullable, Text, Timestamptz},
};
use domain::log::Group;
use std::collections::BTreeSet;

/// A message to be recorded. When, the table says.
#[derive(Clone, Debug)]
pub struct NewMessage<'a> {
    /// The group.
    pub group: &'a str,
    /// The partition.
    pub partition: i32,
    /// Its place in the stream.
    pub offset: i64,
    /// Its place among the partition's messages that came in over HTTP; `None` for another program's.
    pub seq: Option<i64>,
    /// The AMQP message id.
    pub message_id: Option<&'a str>,
    /// What it's about.
    pub key: Option<&'a str>,
    /// What it says.
    pub text: &'a str,
    /// When the gateway accepted it.
    pub accepted_at: Option<DateTime<Utc>>,
    /// The process that records it.
    pub recorded_by: &'a str,
}

/// Records messages, in the transaction that moves the group on.
pub fn record(conn: &mut PgConnection, messages: &[NewMessage<'_>]) -> Result<()> {
    insert_into(conn, "message", messages)
}

/// Inserts messages, those of one process, group and partition by one statement, into a table like `message`.
///
/// Not by COPY: while the server waits for a copy's data it minds no time limit, so a process that freezes amid one would keep
/// others from reading on.
pub fn insert_into(conn: &mut PgConnection, table: &str, messages: &[NewMessage<'_>]) -> Result<()> {
    fn column<'a, T>(messages: &[NewMessage<'a>], of: impl Fn(&NewMessage<'a>) -> T) -> Vec<T> {
        messages.iter().map(of).collect()
    }
    fn source<'a>(new: &NewMessage<'a>) -> (&'a str, i32, &'a str) {
        (new.group, new.partition, new.recorded_by)
    }
    for messages in messages.chunk_by(|a, b| source(a) == source(b)) {
        let (group, partition, recorded_by) = source(&messages[0]);
        sql_query(format!(
            r#"INSERT INTO {table}
                   ("group", partition, "offset", seq, message_id, key, text, accepted_at, recorded_by)
               SELECT $1, $2, "offset", seq, message_id, key, text, accepted_at, $3
               FROM unnest($4, $5, $6, $7, $8, $9) AS new ("offset", seq, message_id, key, text, accepted_at)"#
        ))
        .bind::<Text, _>(group)
        .bind::<Integer, _>(partition)
        .bind::<Text, _>(recorded_by)
        .bind::<Array<BigInt>, _>(column(messages, |new| new.offset))
        .bind::<Array<Nullable<BigInt>>, _>(column(messages, |new| new.seq))
        .bind::<Array<Nullable<Text>>, _>(column(messages, |new| new.message_id))
        .bind::<Array<Nullable<Text>>, _>(column(messages, |new| new.key))
        .bind::<Array<Text>, _>(column(messages, |new| new.text))
        .bind::<Array<Nullable<Timestamptz>>, _>(column(messages, |new| new.accepted_at))
        .execute(conn)?;
    }
    Ok(())
}

/// Whether the database takes a message at this offset whose text is nobody's: tried out within the transaction, and undone.
///
/// # Errors
/// Those of recording it.
pub fn try_out(conn: &mut PgConnection, group: &Group, partition: i32, offset: i64, recorded_by: &str) -> Result<()> {
    let group = group.as_str();
    let (seq, message_id, key, accepted_at) = (None, None, None, None);
    let plain = NewMessage { group, partition, offset, seq, message_id, key, text: "x", accepted_at, recorded_by };
    let tried = conn.transaction(|conn| {
        record(conn, &[plain])?;
        Err::<(), _>(Error::Query(Diesel::RollbackTransaction))
    });
    match tried {
        Err(Error::Query(Diesel::RollbackTransaction)) => Ok(()),
        refused => refused,
    }
}

/// Which of these ids belong to messages of other programs that the group has recorded of the partition.
pub fn recorded_ids(conn: &mut PgConnection, group: &Group, partition: i32, ids: &[&str]) -> Result<BTreeSet<String>> {
    if ids.is_empty() {
        return Ok(BTreeSet::new());
    }
    let ids: Vec<Option<String>> = message::table
        .filter(message::group.eq(group.as_str()).and(message::partition.eq(partition)))
        .filter(message::seq.is_null().and(message::message_id.eq_any(ids)))
        .select(message::message_id)
        .load(conn)?;
    Ok(ids.into_iter().flatten().collect())
}

/// A message as it was recorded.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Message {
    /// The partition.
    #[diesel(sql_type = Integer)]
    pub partition: i32,
    /// Its place in the stream.
    #[diesel(sql_type = BigInt)]
    pub offset: i64,
    /// The AMQP message id.
    #[diesel(sql_type = Nullable<Text>)]
    pub message_id: Option<String>,
    /// What it's about.
    #[diesel(sql_type = Nullable<Text>)]
    pub key: Option<String>,
    /// What it says.
    #[diesel(sql_type = Text)]
    pub text: String,
    /// When the gateway accepted it.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub accepted_at: Option<DateTime<Utc>>,
    /// The process that recorded it.
    #[diesel(sql_type = Text)]
    pub recorded_by: String,
    /// When that was.
    #[diesel(sql_type = Timestamptz)]
    pub recorded_at: DateTime<Utc>,
}

/// Which of a group's messages are wanted. An offset alone is no place: each partition has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// Those of all partitions, from the first on.
    All,
    /// Those of this partition: after that offset, or from the first on.
    Partition(i32, Option<i64>),
}

/// Messages that the group has recorded, in the order of partition and offset. At most `limit` of them, and no further ones
/// once their texts have `bytes` together.
pub fn page(conn: &mut PgConnection, group: &Group, pick: Pick, limit: i64, bytes: i64) -> Result<Vec<Message>> {
    // No condition that may not be meant: whichever plan it's run by begins at the place.
    let (place, partition, after) = match pick {
        Pick::All => ("", None, None),
        Pick::Partition(partition, None) => ("AND partition = $2", Some(partition), None),
        Pick::Partition(partition, after) => (r#"AND partition = $2 AND "offset" > $3"#, Some(partition), after),
    };
    Ok(sql_query(format!(
        r#"SELECT * FROM (
             SELECT *, sum(octet_length(text)) OVER (ORDER BY partition, "offset") - octet_length(text) AS before FROM (
                 SELECT partition, "offset", message_id, key, text, accepted_at, recorded_by, recorded_at FROM message
                 WHERE "group" = $1 {place} ORDER BY partition, "offset" LIMIT $4) page) sized
           WHERE before < $5 ORDER BY partition, "offset""#,
    ))
    .bind::<Text, _>(group.as_str())
    .bind::<Nullable<Integer>, _>(partition)
    .bind::<Nullable<BigInt>, _>(after)
    .bind::<BigInt, _>(limit)
    .bind::<BigInt, _>(bytes)
    .load(conn)?)
}

/// What stood in a stream and was no message.
#[derive(Clone, Debug, Insertable)]
#[diesel(table_name = skipped_message)]
pub struct NewSkipped<'a> {
    /// The group.
    pub group: &'a str,
    /// The partition.
    pub partition: i32,
    /// Its place in the stream.
    pub offset: i64,
    /// The AMQP message id.
    pub message_id: Option<&'a str>,
    /// What was wrong with it.
    pub reason: &'a str,
    /// Its body.
    pub body: &'a [u8],
}

/// Keeps what was no message, the first 64 KiB of each, in the transaction that moves the group on.
pub fn skip(conn: &mut PgConnection, skipped: &[NewSkipped<'_>]) -> Result<()> {
    const BODY_MAX: usize = 65536;
    for one in skipped {
        let kept = NewSkipped { body: &one.body[..one.body.len().min(BODY_MAX)], ..one.clone() };
        diesel::insert_into(skipped_message::table).values(kept).execute(conn)?;
    }
    Ok(())
}

/// What a group has skipped.
#[derive(Clone, Debug, PartialEq, Eq, Queryable, Selectable)]
#[diesel(table_name = skipped_message)]
pub struct Skipped {
    /// The partition.
    pub partition: i32,
    /// Its place in the stream.
    pub offset: i64,
    /// The AMQP message id.
    pub message_id: Option<String>,
    /// What was wrong with it.
    pub reason: String,
    /// Its body, the first 64 KiB.
    pub body: Vec<u8>,
    /// When it was met.
    pub skipped_at: DateTime<Utc>,
}

/// Up to `limit` of what the group has skipped, the newest first.
pub fn skipped(conn: &mut PgConnection, group: &Group, limit: i64) -> Result<Vec<Skipped>> {
    Ok(skipped_message::table
        .filter(skipped_message::group.eq(group.as_str()))
        .order((skipped_message::skipped_at.desc(), skipped_message::partition, skipped_message::offset.desc()))
        .limit(limit)
        .select(Skipped::as_select())
        .load(conn)?)
}
