//! Tables `feed_entry`, the materialised home feeds, and `feed_garbage`, what the sweep is to remove from them.
//!
//! A reader's feed is: for every present subscription, the author's undeleted tweets with `id >= since_tweet_id`.
//! Reading joins the live subscription and tweet, so unfollowing and deleting show at once.

use crate::{
    Result,
    schema::{feed_entry, subscription, tweet, user},
    tweets::{self, Shown},
};
use diesel::{
    PgConnection,
    prelude::*,
    result::{DatabaseErrorKind, Error as Diesel},
    sql_query,
    sql_types::{Array, BigInt, Nullable},
};
use domain::{TweetId, UserId, message::FollowerRange};

/// Puts tweets into the feeds of ranges of their authors' followers, and answers how many rows are new. Deleted
/// tweets and followers who may not see the tweet are passed over. To be run in a transaction.
///
/// # Errors
/// [`crate::Error::NotFound`] when a tweet was never posted.
pub fn write(conn: &mut PgConnection, chunks: &[(TweetId, FollowerRange)]) -> Result<usize> {
    tweets::require_known(conn, &chunks.iter().map(|(tweet, _)| *tweet).collect::<Vec<_>>())?;
    insert_new(conn, |conn, on_conflict| {
        // `OFFSET 0` keeps the planner to one range of the index for each chunk, whatever it thinks of their sizes.
        // Sorted by key: two batches that overlap and lock in different order would deadlock.
        sql_query(format!(
            "INSERT INTO feed_entry (reader_id, tweet_id)
             SELECT s.follower_id, t.id
             FROM unnest($1, $2, $3) AS chunk (tweet_id, after, upto)
             JOIN tweet t ON t.id = chunk.tweet_id AND t.deleted_at IS NULL
             CROSS JOIN LATERAL (
                 SELECT follower_id FROM subscription
                 WHERE author_id = t.author_id AND follower_id > chunk.after AND follower_id <= chunk.upto
                   AND since_tweet_id <= t.id OFFSET 0) s
             ORDER BY 1, 2 {on_conflict}"
        ))
        .bind::<Array<BigInt>, _>(chunks.iter().map(|(tweet, _)| tweet.0).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(chunks.iter().map(|(_, range)| range.after.0).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(chunks.iter().map(|(_, range)| range.upto.0).collect::<Vec<_>>())
        .execute(conn)
    })
}

/// Runs an INSERT as it stands, in a savepoint, and only if a row is there already once more with
/// `ON CONFLICT DO NOTHING`: that costs every row a second descent of the index and a record more of the log, and only
/// what comes a second time needs it.
pub(crate) fn insert_new(
    conn: &mut PgConnection,
    insert: impl Fn(&mut PgConnection, &str) -> QueryResult<usize>,
) -> Result<usize> {
    match conn.transaction(|conn| insert(conn, "")) {
        Err(Diesel::DatabaseError(DatabaseErrorKind::UniqueViolation, _)) => {
            Ok(insert(conn, "ON CONFLICT DO NOTHING")?)
        }
        result => Ok(result?),
    }
}

/// The newest `limit` tweets of the reader's feed with ids below `before`, the newest first.
///
/// # Errors
/// [`crate::Error::NotFound`] when there's no such reader.
pub fn page(conn: &mut PgConnection, reader: UserId, before: TweetId, limit: i64) -> Result<Vec<Shown>> {
    let shown: Vec<Shown> = page_query(reader, before, limit).load(conn)?;
    if shown.is_empty() {
        crate::users::require(conn, reader)?;
    }
    Ok(shown)
}

diesel::alias!(pub(crate) const READER: Alias<ReaderRow> = user as reader_row);

/// One statement of the query builder, so that it's prepared once on each connection: planning these joins costs more
/// than running them.
#[diesel::dsl::auto_type(no_type_alias)]
pub(crate) fn page_query(reader: UserId, before: TweetId, limit: i64) -> _ {
    let reader: i64 = reader.0;
    let before: i64 = before.0;
    let reads = subscription::author_id.eq(tweet::author_id).and(subscription::follower_id.eq(feed_entry::reader_id));
    feed_entry::table
        .inner_join(tweet::table.on(tweet::id.eq(feed_entry::tweet_id)))
        .inner_join(subscription::table.on(reads))
        .inner_join(user::table.on(user::id.eq(tweet::author_id)))
        .inner_join(READER.on(READER.field(user::id).eq(feed_entry::reader_id)))
        .filter(feed_entry::reader_id.eq(reader).and(feed_entry::tweet_id.lt(before)))
        .filter(tweet::deleted_at.is_null().and(subscription::since_tweet_id.le(tweet::id)))
        .filter(user::deleted_at.is_null().and(READER.field(user::deleted_at).is_null()))
        .order(feed_entry::tweet_id.desc())
        .limit(limit)
        .select((tweet::id, user::login, tweet::text, tweet::created_at))
}

/// Removes the author's tweets from the reader's feed.
pub(crate) fn remove_author(conn: &mut PgConnection, author: UserId, reader: UserId) -> Result<usize> {
    Ok(sql_query(
        "DELETE FROM feed_entry f USING tweet t
         WHERE f.reader_id = $2 AND t.id = f.tweet_id AND t.author_id = $1
           AND NOT EXISTS (SELECT FROM subscription s
                           WHERE s.author_id = $1 AND s.follower_id = $2 AND s.since_tweet_id <= t.id)",
    )
    .bind::<BigInt, _>(author.0)
    .bind::<BigInt, _>(reader.0)
    .execute(conn)?)
}

/// How long after it became garbage a feed row is looked for: chunks that were under way have been written by then.
const SWEEP_DELAY: &str = "1 minute";

pub(crate) fn sweep_author_later(conn: &mut PgConnection, author: UserId, reader: UserId) -> Result<()> {
    sweep_later(conn, author, None, Some(reader))
}

pub(crate) fn sweep_tweet_later(conn: &mut PgConnection, author: UserId, tweet: TweetId) -> Result<()> {
    sweep_later(conn, author, Some(tweet), None)
}

fn sweep_later(conn: &mut PgConnection, author: UserId, tweet: Option<TweetId>, reader: Option<UserId>) -> Result<()> {
    sql_query(format!(
        "INSERT INTO feed_garbage (author_id, tweet_id, follower_id, due_at)
         VALUES ($1, $2, $3, clock_timestamp() + interval '{SWEEP_DELAY}')"
    ))
    .bind::<BigInt, _>(author.0)
    .bind::<Nullable<BigInt>, _>(tweet.map(|id| id.0))
    .bind::<Nullable<BigInt>, _>(reader.map(|id| id.0))
    .execute(conn)?;
    Ok(())
}

#[derive(QueryableByName)]
struct Garbage {
    #[diesel(sql_type = BigInt)]
    author_id: i64,
    #[diesel(sql_type = Nullable<BigInt>)]
    tweet_id: Option<i64>,
    #[diesel(sql_type = Nullable<BigInt>)]
    follower_id: Option<i64>,
}

/// Removes the rows of one piece of garbage that is due, and answers how many; `None` when nothing is due. Any number
/// of sweeps run side by side. To be run in a transaction.
///
/// # Errors
/// The database's.
pub fn sweep_one(conn: &mut PgConnection) -> Result<Option<usize>> {
    let due: Option<Garbage> = sql_query(
        "DELETE FROM feed_garbage WHERE id = (SELECT id FROM feed_garbage WHERE due_at <= clock_timestamp()
                                              ORDER BY due_at LIMIT 1 FOR UPDATE SKIP LOCKED)
         RETURNING author_id, tweet_id, follower_id",
    )
    .get_result(conn)
    .optional()?;
    let Some(garbage) = due else { return Ok(None) };
    let removed = match garbage {
        Garbage { author_id, follower_id: Some(reader), .. } => remove_author(conn, UserId(author_id), UserId(reader))?,
        // Whoever has the row follows the author, or did: no index on the tweet is needed.
        Garbage { author_id, tweet_id, .. } => sql_query(
            "DELETE FROM feed_entry f
             USING (SELECT follower_id FROM subscription WHERE author_id = $1
                    UNION SELECT follower_id FROM former_subscription WHERE author_id = $1) s
             WHERE f.reader_id = s.follower_id AND f.tweet_id = $2",
        )
        .bind::<BigInt, _>(author_id)
        .bind::<Nullable<BigInt>, _>(tweet_id)
        .execute(conn)?,
    };
    Ok(Some(removed))
}
