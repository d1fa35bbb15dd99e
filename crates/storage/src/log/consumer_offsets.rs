//! Table `consumer_offset`: how far each consumer group of the message log has come.

use crate::{
    Result,
    schema::{consumer_offset, message, skipped_message},
};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Bool, Integer, Nullable, Text},
};
use domain::log::Group;

/// Where a group goes on with a partition.
#[derive(Clone, Debug, PartialEq, Eq, Queryable, Selectable)]
#[diesel(table_name = consumer_offset)]
pub struct Position {
    /// The offset of the next message.
    pub next_offset: i64,
    /// Whether the group was put here and hasn't read on from here yet.
    pub placed: bool,
    /// The newest sequence recorded.
    pub seq: Option<i64>,
    /// The id of the message before [`Self::next_offset`], where that was read and has one.
    pub last_message_id: Option<String>,
}

impl Position {
    /// Where a group is put that has recorded sequences up to `seq`.
    pub fn placed(next_offset: i64, seq: Option<i64>) -> Self {
        Self { next_offset, placed: true, seq, last_message_id: None }
    }
}

/// Messages that were read and not recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// No messages of the log.
    pub skipped: i64,
    /// Recorded before, or yet to come once more.
    pub repeated: i64,
    /// Confirmed by the broker and lost since.
    pub missing: i64,
}

/// The group's position; `None` if it has none there yet.
pub fn position(conn: &mut PgConnection, group: &Group, partition: i32) -> Result<Option<Position>> {
    let row = consumer_offset::table.find((group.as_str(), partition));
    Ok(row.select(Position::as_select()).first(conn).optional()?)
}

/// Whether there is such a group.
pub fn exists(conn: &mut PgConnection, group: &Group) -> Result<bool> {
    let rows = consumer_offset::table.filter(consumer_offset::group.eq(group.as_str()));
    Ok(diesel::select(diesel::dsl::exists(rows)).get_result(conn)?)
}

/// Gives the group these positions, by partition and offset, where it has none yet.
pub fn create(conn: &mut PgConnection, group: &Group, positions: &[(i32, i64)]) -> Result<()> {
    let (partitions, offsets): (Vec<i32>, Vec<i64>) = positions.iter().copied().unzip();
    sql_query(
        r#"INSERT INTO consumer_offset ("group", partition, next_offset)
           SELECT $1, partition, next_offset FROM unnest($2, $3) AS new (partition, next_offset) ORDER BY partition
           ON CONFLICT DO NOTHING"#,
    )
    .bind::<Text, _>(group.as_str())
    .bind::<Array<Integer>, _>(partitions)
    .bind::<Array<BigInt>, _>(offsets)
    .execute(conn)?;
    Ok(())
}

/// Moves the group on, in the transaction that records what it has read, unless it isn't at `from` any more: returns whether it
/// was.
pub fn advance(
    conn: &mut PgConnection,
    group: &Group,
    partition: i32,
    from: i64,
    to: &Position,
    passed: Passed,
) -> Result<bool> {
    let moved = sql_query(
        r#"UPDATE consumer_offset
           SET next_offset = $4, seq = $5, last_message_id = $6, skipped = skipped + $7, repeated = repeated + $8,
               missing = missing + $9, placed = $10, moved_at = clock_timestamp()
           WHERE "group" = $1 AND partition = $2 AND next_offset = $3"#,
    )
    .bind::<Text, _>(group.as_str())
    .bind::<Integer, _>(partition)
    .bind::<BigInt, _>(from)
    .bind::<BigInt, _>(to.next_offset)
    .bind::<Nullable<BigInt>, _>(to.seq)
    .bind::<Nullable<Text>, _>(to.last_message_id.as_deref())
    .bind::<BigInt, _>(passed.skipped)
    .bind::<BigInt, _>(passed.repeated)
    .bind::<BigInt, _>(passed.missing)
    .bind::<Bool, _>(to.placed)
    .execute(conn)?;
    Ok(moved == 1)
}

/// Where a group stands in a partition.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Standing {
    /// The group.
    #[diesel(sql_type = Text)]
    pub group: String,
    /// The partition.
    #[diesel(sql_type = Integer)]
    pub partition: i32,
    /// The offset of its next message.
    #[diesel(sql_type = BigInt)]
    pub next_offset: i64,
    /// Messages that were none of the log's.
    #[diesel(sql_type = BigInt)]
    pub skipped: i64,
    /// Messages that had been recorded before.
    #[diesel(sql_type = BigInt)]
    pub repeated: i64,
    /// Messages that the broker had confirmed and lost.
    #[diesel(sql_type = BigInt)]
    pub missing: i64,
}

/// Where the groups stand, or the one of them, sorted by group and partition.
pub fn list(conn: &mut PgConnection, group: Option<&Group>) -> Result<Vec<Standing>> {
    Ok(sql_query(
        r#"SELECT "group", partition, next_offset, skipped, repeated, missing FROM consumer_offset
           WHERE "group" = coalesce($1, "group") ORDER BY "group", partition"#,
    )
    .bind::<Nullable<Text>, _>(group.map(Group::as_str))
    .load(conn)?)
}

/// Puts the group at an offset, as if it had never read on from there: what it has recorded or skipped from there on is
/// removed, and how much was recorded is returned.
pub fn reset(conn: &mut PgConnection, group: &Group, partition: i32, offset: i64) -> Result<usize> {
    // First, so that a member that is recording just now is through, and the next one finds the group elsewhere.
    sql_query(
        r#"INSERT INTO consumer_offset ("group", partition, next_offset) VALUES ($1, $2, $3)
           ON CONFLICT ("group", partition) DO UPDATE
           SET next_offset = $3, placed = true, last_message_id = NULL, moved_at = clock_timestamp()"#,
    )
    .bind::<Text, _>(group.as_str())
    .bind::<Integer, _>(partition)
    .bind::<BigInt, _>(offset)
    .execute(conn)?;
    diesel::delete(skipped_message::table)
        .filter(skipped_message::group.eq(group.as_str()))
        .filter(skipped_message::partition.eq(partition).and(skipped_message::offset.ge(offset)))
        .execute(conn)?;
    let removed = diesel::delete(message::table)
        .filter(message::group.eq(group.as_str()))
        .filter(message::partition.eq(partition).and(message::offset.ge(offset)))
        .execute(conn)?;
    // What is left isn't to be recorded again, should it stand in the stream once more.
    sql_query(
        r#"UPDATE consumer_offset SET seq = (
               SELECT seq FROM message WHERE "group" = $1 AND partition = $2 AND seq IS NOT NULL
               ORDER BY "offset" DESC LIMIT 1)
           WHERE "group" = $1 AND partition = $2"#,
    )
    .bind::<Text, _>(group.as_str())
    .bind::<Integer, _>(partition)
    .execute(conn)?;
    Ok(removed)
}

/// What a group has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Messages that it has recorded.
    pub messages: i64,
    /// Messages that it has skipped.
    pub skipped: i64,
}

/// What the group has recorded and skipped.
pub fn contents(conn: &mut PgConnection, group: &Group) -> Result<Contents> {
    let messages = message::table.filter(message::group.eq(group.as_str())).count().get_result(conn)?;
    let skipped = skipped_message::table.filter(skipped_message::group.eq(group.as_str())).count().get_result(conn)?;
    Ok(Contents { messages, skipped })
}

/// Removes the group with all that it has recorded and skipped, and returns what that was. Members that run would make it
/// anew.
pub fn remove(conn: &mut PgConnection, group: &Group) -> Result<Contents> {
    // First, so that a member that is recording just now is through, and the next one finds no group.
    diesel::delete(consumer_offset::table.filter(consumer_offset::group.eq(group.as_str()))).execute(conn)?;
    let messages = diesel::delete(message::table.filter(message::group.eq(group.as_str()))).execute(conn)?;
    let skipped =
        diesel::delete(skipped_message::table.filter(skipped_message::group.eq(group.as_str()))).execute(conn)?;
    Ok(Contents { messages: messages as i64, skipped: skipped as i64 })
}
