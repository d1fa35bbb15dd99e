//! Table `feed_entry`: the materialised home feeds.
//!
//! A reader's feed is: for every present subscription, the author's undeleted tweets with `id >= since_tweet_id`, unless the
//! author is deleted. Reading joins the live rows, so leaving and deleting show at once.

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

/// Puts tweets into the feeds of ranges of their authors' followers, and returns how many rows are new. Deleted
/// tweets, those of deleted authors, and followers who may not see the tweet are passed over. To be run in a transaction.
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
             {LIVE_AUTHOR}
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

/// Joins to the tweet `t` that its author isn't deleted, by one look for each tweet.
pub(crate) const LIVE_AUTHOR: &str = r#"CROSS JOIN LATERAL (
    SELECT FROM "user" WHERE id = t.author_id AND deleted_at IS NULL OFFSET 0) author"#;

/// Joins to the feed row `f` whether its reader sees the tweet, as `seen.yes`: one look for each tweet, and one for each row.
pub(crate) const SEEN: &str = r#"LEFT JOIN LATERAL (
    SELECT t.author_id FROM tweet t
    CROSS JOIN LATERAL (SELECT FROM "user" WHERE id = t.author_id AND deleted_at IS NULL OFFSET 0) author
    WHERE t.id = f.tweet_id AND t.deleted_at IS NULL OFFSET 0) live ON true
LEFT JOIN LATERAL (
    SELECT true AS yes FROM subscription
    WHERE author_id = live.author_id AND follower_id = f.reader_id AND since_tweet_id <= f.tweet_id OFFSET 0) seen ON true"#;

/// The most of an author's tweets that leave a feed at once with them.
const NEWEST: i64 = 1000;

/// Removes the author's newest tweets from the reader's feed, who has just left: what is first in the feed is gone at once,
/// however much there is. The sweep goes through all.
pub(crate) fn remove_newest(conn: &mut PgConnection, author: UserId, reader: UserId) -> Result<usize> {
    let newest = tweet::table.select(tweet::id).filter(tweet::author_id.eq(author.0)).order(tweet::id.desc());
    let tweets: Vec<i64> = newest.limit(NEWEST).load(conn)?;
    let mut keys: Vec<_> = tweets.into_iter().map(|tweet| (reader.0, tweet)).collect();
    keys.reverse();
    remove_unseen(conn, &keys)
}

/// Of these feed rows `(reader, tweet)`, given in their order, removes those whose tweets their readers don't see, and returns
/// how many. To be run in a transaction.
///
/// Who follows again brings such a row back to life. So the rows are locked first, and only the next statement looks whether
/// they're seen: [`crate::subscriptions::create`] locks those that it finds, so it either waits and then writes them anew, or
/// is seen here.
pub(crate) fn remove_unseen(conn: &mut PgConnection, keys: &[(i64, i64)]) -> Result<usize> {
    #[derive(QueryableByName)]
    struct Key {
        #[diesel(sql_type = BigInt)]
        reader_id: i64,
        #[diesel(sql_type = BigInt)]
        tweet_id: i64,
    }
    // One descent of the index for each, in the order given.
    let locked: Vec<Key> = sql_query(
        "SELECT f.reader_id, f.tweet_id FROM unnest($1, $2) AS wanted (reader_id, tweet_id)
         CROSS JOIN LATERAL (
             SELECT reader_id, tweet_id FROM feed_entry
             WHERE reader_id = wanted.reader_id AND tweet_id = wanted.tweet_id FOR UPDATE OFFSET 0) f",
    )
    .bind::<Array<BigInt>, _>(keys.iter().map(|(reader, _)| *reader).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(keys.iter().map(|(_, tweet)| *tweet).collect::<Vec<_>>())
    .load(conn)?;
    if locked.is_empty() {
        return Ok(0);
    }
    let removed = sql_query(format!(
        "DELETE FROM feed_entry gone
         USING (SELECT f.reader_id, f.tweet_id FROM unnest($1, $2) AS f (reader_id, tweet_id)
                {SEEN} WHERE seen.yes IS NULL OFFSET 0) f
         WHERE gone.reader_id = f.reader_id AND gone.tweet_id = f.tweet_id"
    ))
    .bind::<Array<BigInt>, _>(locked.iter().map(|key| key.reader_id).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(locked.iter().map(|key| key.tweet_id).collect::<Vec<_>>())
    .execute(conn)?;
    Ok(removed)
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
