//! Table `feed_entry`: the materialised home feeds.
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
    sql_types::{Array, BigInt},
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

/// The statement of [`page`], with `$1 …` for its parameters in the order reader, before, limit: for whoever compares
/// with it.
pub fn page_sql() -> String {
    let query = page_query(UserId(1), TweetId(2), 3);
    let text = diesel::debug_query::<diesel::pg::Pg, _>(&query).to_string();
    text.split(" -- binds").next().unwrap_or_default().to_owned()
}

diesel::alias!(const READER: Alias<ReaderRow> = user as reader_row);

/// One statement of the query builder, so that it's prepared once on each connection: planning these joins costs more
/// than running them.
#[diesel::dsl::auto_type(no_type_alias)]
fn page_query(reader: UserId, before: TweetId, limit: i64) -> _ {
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
