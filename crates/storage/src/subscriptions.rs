//! Tables `subscription` and `former_subscription`: who follows whom, and since which tweet.

use crate::{
    Error, Result, garbage, locks,
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

/// Lets `follower` follow `author`, and fills the author's newest tweets into the follower's feed. Answers whether
/// that's new. To be run in a transaction.
///
/// # Errors
/// [`Error::NotFound`] when either is unknown.
pub fn create(conn: &mut PgConnection, author: UserId, follower: UserId) -> Result<bool> {
    users::require(conn, author)?;
    users::require(conn, follower)?;
    Ok(add(conn, author, &[follower.0])? > 0)
}

#[derive(QueryableByName)]
struct Follower {
    #[diesel(sql_type = BigInt)]
    follower_id: i64,
}

/// Lets all these users, who are known to be there, follow `author`; answers how many didn't before.
pub(crate) fn add(conn: &mut PgConnection, author: UserId, followers: &[i64]) -> Result<usize> {
    locks::author_for_following(conn, author)?;
    // The lock comes first and the statement's snapshot after it, so this sees every tweet whose posting came before.
    let new: Vec<i64> = sql_query(
        "INSERT INTO subscription (author_id, follower_id, since_tweet_id)
         SELECT $1, f, coalesce((SELECT min(id) FROM (SELECT id FROM tweet WHERE author_id = $1 AND deleted_at IS NULL
                                                      ORDER BY id DESC LIMIT $3) newest), 0)
         FROM unnest($2) f ORDER BY f
         ON CONFLICT DO NOTHING RETURNING follower_id",
    )
    .bind::<BigInt, _>(author.0)
    .bind::<Array<BigInt>, _>(followers)
    .bind::<BigInt, _>(FILL_IN)
    .load::<Follower>(conn)?
    .into_iter()
    .map(|row| row.follower_id)
    .collect();
    sql_query(
        "INSERT INTO feed_entry (reader_id, tweet_id)
         SELECT f, t.id FROM unnest($2) f,
             (SELECT id FROM tweet WHERE author_id = $1 AND deleted_at IS NULL ORDER BY id DESC LIMIT $3) t
         ORDER BY f, t.id
         ON CONFLICT DO NOTHING",
    )
    .bind::<BigInt, _>(author.0)
    .bind::<Array<BigInt>, _>(&new)
    .bind::<BigInt, _>(FILL_IN)
    .execute(conn)?;
    Ok(new.len())
}

/// Ends that `follower` follows `author`; the author's tweets leave the follower's feed. To be run in a transaction.
///
/// # Errors
/// [`Error::NotFound`] when there's no such subscription.
pub fn remove(conn: &mut PgConnection, author: UserId, follower: UserId) -> Result<()> {
    locks::author_for_following(conn, author)?;
    let ended = sql_query(
        "WITH ended AS (DELETE FROM subscription WHERE author_id = $1 AND follower_id = $2 RETURNING *)
         INSERT INTO former_subscription (author_id, follower_id, since_tweet_id, created_at)
         SELECT author_id, follower_id, since_tweet_id, created_at FROM ended",
    )
    .bind::<BigInt, _>(author.0)
    .bind::<BigInt, _>(follower.0)
    .execute(conn)?;
    if ended == 0 {
        return Err(Error::NotFound("subscription"));
    }
    garbage::remove_author(conn, author, follower)?;
    garbage::author_left(conn, author, follower)
}

#[derive(QueryableByName)]
struct ChunkEnd {
    #[diesel(sql_type = diesel::sql_types::Nullable<BigInt>)]
    upto: Option<i64>,
}

/// The highest of the next at most `size` ids above `after` of `author`'s followers; `None` when there are no more.
///
/// # Errors
/// The database's.
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
///
/// # Errors
/// The database's.
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
///
/// # Errors
/// The database's.
pub fn followers_of(conn: &mut PgConnection, author: UserId, limit: i64) -> Result<Vec<Party>> {
    Ok(subscription::table
        .inner_join(user::table.on(user::id.eq(subscription::follower_id)))
        .filter(subscription::author_id.eq(author.0).and(user::deleted_at.is_null()))
        .order(subscription::follower_id)
        .limit(limit)
        .select((user::id, user::login))
        .load(conn)?)
}
