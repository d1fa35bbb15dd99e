//! Tables `subscription` and `former_subscription`: who follows whom, and since which tweet.

use crate::{
    Error, Result, feeds, garbage, locks,
    schema::{subscription, user},
    users,
};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt},
};
use domain::UserId;

/// How many of the author's newest tweets a new follower finds in the feed.
pub const FILL_IN: i64 = 100;

/// Lets `follower` follow `author`, and fills the author's newest tweets into the follower's feed. Returns whether
/// that's new. To be run in a transaction.
///
/// # Errors
/// [`Error::NotFound`] when either is unknown.
pub fn create(conn: &mut PgConnection, author: UserId, follower: UserId) -> Result<bool> {
    users::require(conn, author)?;
    users::require(conn, follower)?;
    Ok(add(conn, author, &[follower.0])? > 0)
}

/// Lets all these users, who are known to be there, follow `author`; returns how many didn't before.
pub(crate) fn add(conn: &mut PgConnection, author: UserId, followers: &[i64]) -> Result<usize> {
    locks::author_for_following(conn, author)?;
    // The lock comes first and the statement's snapshot after it, so this sees every tweet whose posting came before. It's
    // one statement, so that a deletion in between can't let an older tweet in. A row that is there already is left over
    // from an earlier subscription, and the sweep may be about to remove it: locking it has one wait for the other.
    let new = sql_query(
        "WITH newest AS MATERIALIZED (
             SELECT id FROM tweet WHERE author_id = $1 AND deleted_at IS NULL ORDER BY id DESC LIMIT $3),
         new AS (
             INSERT INTO subscription (author_id, follower_id, since_tweet_id, after_tweet_id)
             SELECT $1, f, coalesce((SELECT min(id) FROM newest), 0),
                    coalesce((SELECT max(id) FROM tweet WHERE author_id = $1), 0)
             FROM unnest($2) f ORDER BY f
             ON CONFLICT DO NOTHING RETURNING follower_id),
         filled AS (
             INSERT INTO feed_entry (reader_id, tweet_id)
             SELECT follower_id, id FROM new, newest ORDER BY 1, 2
             ON CONFLICT (reader_id, tweet_id) DO UPDATE SET tweet_id = excluded.tweet_id)
         SELECT count(*) AS n FROM new",
    )
    .bind::<BigInt, _>(author.0)
    .bind::<Array<BigInt>, _>(followers)
    .bind::<BigInt, _>(FILL_IN)
    .get_result::<crate::Count>(conn)?;
    Ok(usize::try_from(new.n).unwrap_or(0))
}

/// Ends that `follower` follows `author`; the author's tweets leave the follower's feed. To be run in a transaction.
///
/// # Errors
/// [`Error::NotFound`] when there's no such subscription.
pub fn remove(conn: &mut PgConnection, author: UserId, follower: UserId) -> Result<()> {
    if !end(conn, author, follower)? {
        return Err(Error::NotFound("subscription"));
    }
    feeds::remove_newest(conn, author, follower)?;
    garbage::author_left(conn, author, follower)
}

/// Ends a subscription, of which `former_subscription` remembers what follows from it; returns whether there was one.
pub(crate) fn end(conn: &mut PgConnection, author: UserId, follower: UserId) -> Result<bool> {
    locks::author_for_following(conn, author)?;
    let ended = sql_query(
        "WITH ended AS (DELETE FROM subscription WHERE author_id = $1 AND follower_id = $2 RETURNING *)
         INSERT INTO former_subscription
             (author_id, follower_id, since_tweet_id, created_at, after_tweet_id, upto_tweet_id)
         SELECT author_id, follower_id, since_tweet_id, created_at, after_tweet_id,
                coalesce((SELECT max(id) FROM tweet WHERE author_id = $1), 0)
         FROM ended",
    )
    .bind::<BigInt, _>(author.0)
    .bind::<BigInt, _>(follower.0)
    .execute(conn)?;
    Ok(ended > 0)
}

/// The author with the lowest id whom `follower` follows.
pub(crate) fn first_author_of(conn: &mut PgConnection, follower: UserId) -> Result<Option<UserId>> {
    let first = subscription::table
        .filter(subscription::follower_id.eq(follower.0))
        .order(subscription::author_id)
        .select(subscription::author_id)
        .first::<i64>(conn)
        .optional()?;
    Ok(first.map(UserId))
}

#[derive(QueryableByName)]
struct ChunkEnd {
    #[diesel(sql_type = diesel::sql_types::Nullable<BigInt>)]
    upto: Option<i64>,
}

/// The highest of the next at most `size` ids above `after` of `author`'s followers; `None` when there are no more.
pub fn next_chunk(conn: &mut PgConnection, author: UserId, after: UserId, size: u32) -> Result<Option<UserId>> {
    let end = sql_query(
        "SELECT max(follower_id) AS upto FROM
             (SELECT follower_id FROM subscription WHERE author_id = $1 AND follower_id > $2
              ORDER BY follower_id LIMIT $3) chunk",
    )
    .bind::<BigInt, _>(author.0)
    .bind::<BigInt, _>(after.0)
    .bind::<BigInt, _>(i64::from(size))
    .get_result::<ChunkEnd>(conn)?;
    Ok(end.upto.map(UserId))
}

/// The user on the other side of a subscription.
#[derive(Clone, Queryable)]
pub struct Party {
    /// The id.
    #[diesel(deserialize_as = i64)]
    pub id: UserId,
    /// The login.
    pub login: String,
}

/// The first `limit` users whom `follower` follows, by id.
pub fn authors_of(conn: &mut PgConnection, follower: UserId, limit: i64) -> Result<Vec<Party>> {
    Ok(subscription::table
        .inner_join(user::table.on(user::id.eq(subscription::author_id)))
        .filter(subscription::follower_id.eq(follower.0).and(user::deleted_at.is_null()))
        .order(subscription::author_id)
        .limit(limit)
        .select((user::id, user::login))
        .load(conn)?)
}

/// The first `limit` users who follow `author`, by id.
pub fn followers_of(conn: &mut PgConnection, author: UserId, limit: i64) -> Result<Vec<Party>> {
    Ok(subscription::table
        .inner_join(user::table.on(user::id.eq(subscription::follower_id)))
        .filter(subscription::author_id.eq(author.0).and(user::deleted_at.is_null()))
        .order(subscription::follower_id)
        .limit(limit)
        .select((user::id, user::login))
        .load(conn)?)
}
