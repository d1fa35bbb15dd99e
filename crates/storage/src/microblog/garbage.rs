//! Table `feed_garbage`: what nobody sees any more in feeds, to be removed by the [sweep](crate::sweep).

use crate::Result;
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{BigInt, Nullable},
};
use domain::{TweetId, UserId};

/// How long after it became garbage a feed row is looked for: chunks that were under way have been written by then.
pub(crate) const SWEEP_DELAY: &str = "interval '1 minute'";

pub(crate) fn author_left(conn: &mut PgConnection, author: UserId, reader: UserId) -> Result<()> {
    add(conn, author, None, Some(reader))
}

pub(crate) fn tweet_deleted(conn: &mut PgConnection, author: UserId, tweet: TweetId) -> Result<()> {
    add(conn, author, Some(tweet), None)
}

fn add(conn: &mut PgConnection, author: UserId, tweet: Option<TweetId>, reader: Option<UserId>) -> Result<()> {
    sql_query(format!(
        "INSERT INTO feed_garbage (author_id, tweet_id, follower_id, due_at)
         VALUES ($1, $2, $3, clock_timestamp() + {SWEEP_DELAY})"
    ))
    .bind::<BigInt, _>(author.0)
    .bind::<Nullable<BigInt>, _>(tweet.map(|id| id.0))
    .bind::<Nullable<BigInt>, _>(reader.map(|id| id.0))
    .execute(conn)?;
    Ok(())
}
