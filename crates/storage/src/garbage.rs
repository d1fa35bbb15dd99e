//! Table `feed_garbage`: what nobody sees any more in feeds, to be removed by the sweep.

use crate::Result;
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{BigInt, Nullable},
};
use domain::{TweetId, UserId};

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

pub(crate) fn author_left(conn: &mut PgConnection, author: UserId, reader: UserId) -> Result<()> {
    add(conn, author, None, Some(reader))
}

pub(crate) fn tweet_deleted(conn: &mut PgConnection, author: UserId, tweet: TweetId) -> Result<()> {
    add(conn, author, Some(tweet), None)
}

fn add(conn: &mut PgConnection, author: UserId, tweet: Option<TweetId>, reader: Option<UserId>) -> Result<()> {
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
