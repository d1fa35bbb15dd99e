//! Table `tweet`.

use crate::{
    Error, Result, garbage, locks,
    schema::{tweet, user},
    users,
};
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Bool, Text, Timestamptz},
};
use domain::{
    TweetId, UserId,
    message::Tweet,
    values::{Login, TweetText},
};
use std::collections::BTreeSet;

/// A tweet as readers see it.
#[derive(Clone, Queryable)]
pub struct Shown {
    /// The id.
    #[diesel(deserialize_as = i64)]
    pub id: TweetId,
    /// The author's login.
    pub author: String,
    /// The text.
    pub text: String,
    /// When it was posted.
    pub created_at: DateTime<Utc>,
}

/// Posts a tweet; nobody sees it yet. To be run in a transaction, which from here to its end keeps others from
/// posting for, following or leaving this author.
///
/// # Errors
/// [`Error::NotFound`] when there's no such author.
pub fn post(conn: &mut PgConnection, author: UserId, text: &TweetText) -> Result<Tweet> {
    locks::author_for_posting(conn, author)?;
    let login = users::by_id(conn, author)?.login;
    let mut posted = insert(conn, author, text)?;
    if posted.is_none() {
        log::warn!("the sequence of tweet ids was behind the tweets; it was moved past them");
        sql_query("SELECT setval('tweet_id_seq', (SELECT max(id) FROM tweet))").execute(conn)?;
        posted = insert(conn, author, text)?;
    }
    let Posted { id, created_at } = posted.ok_or(Error::Conflict("the sequence of tweet ids was set back"))?;
    let author_login = Login::parse(&login).map_err(|_| Error::Conflict("the author's login has no valid form"))?;
    Ok(Tweet { id: TweetId(id), author: author_login, author_id: author, text: text.clone(), created_at })
}

#[derive(QueryableByName)]
struct Posted {
    #[diesel(sql_type = BigInt)]
    id: i64,
    #[diesel(sql_type = Timestamptz)]
    created_at: DateTime<Utc>,
}

/// Inserts a tweet with the next id; `None` where that isn't above all of the author's. The id is given after the lock was
/// taken, so ids grow with every tweet of an author, and who sees and is told what follows from that. A sequence that was
/// set back, or whose numbers are handed out in advance, would break it.
fn insert(conn: &mut PgConnection, author: UserId, text: &TweetText) -> Result<Option<Posted>> {
    Ok(sql_query(
        "INSERT INTO tweet (id, author_id, text) OVERRIDING SYSTEM VALUE
         SELECT id, $1, $2 FROM (SELECT nextval('tweet_id_seq') AS id OFFSET 0) next
         WHERE id > coalesce((SELECT max(id) FROM tweet WHERE author_id = $1), 0)
         ON CONFLICT (id) DO NOTHING
         RETURNING id, created_at",
    )
    .bind::<BigInt, _>(author.0)
    .bind::<Text, _>(text.as_str())
    .get_result(conn)
    .optional()?)
}

/// Tweets, the newest first, `limit` of them after `offset`.
pub fn page(conn: &mut PgConnection, offset: i64, limit: i64) -> Result<Vec<Shown>> {
    Ok(tweet::table
        .inner_join(user::table)
        .filter(tweet::deleted_at.is_null().and(user::deleted_at.is_null()))
        .order(tweet::id.desc())
        .offset(offset)
        .limit(limit)
        .select((tweet::id, user::login, tweet::text, tweet::created_at))
        .load(conn)?)
}

/// The newest tweets of one author, the newest first.
pub fn of_author(conn: &mut PgConnection, author: UserId, limit: i64) -> Result<Vec<Shown>> {
    Ok(tweet::table
        .inner_join(user::table)
        .filter(tweet::author_id.eq(author.0).and(tweet::deleted_at.is_null()))
        .order(tweet::id.desc())
        .limit(limit)
        .select((tweet::id, user::login, tweet::text, tweet::created_at))
        .load(conn)?)
}

/// Deletes a tweet: it's gone from every feed at once, its rows there follow. To be run in a transaction.
///
/// # Errors
/// [`Error::NotFound`], also when it's deleted already.
pub fn delete(conn: &mut PgConnection, id: TweetId) -> Result<()> {
    let author = diesel::update(tweet::table.filter(tweet::id.eq(id.0).and(tweet::deleted_at.is_null())))
        .set(tweet::deleted_at.eq(diesel::dsl::now))
        .returning(tweet::author_id)
        .get_result::<i64>(conn)
        .optional()?
        .ok_or(Error::NotFound("tweet"))?;
    garbage::tweet_deleted(conn, UserId(author), id)
}

/// Whether each of these tweets has ever been posted; deleted ones count.
///
/// # Errors
/// [`Error::NotFound`] when one hasn't.
pub(crate) fn require_known(conn: &mut PgConnection, ids: &[TweetId]) -> Result<()> {
    let mut ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
    ids.sort_unstable();
    ids.dedup();
    let known: i64 = tweet::table.filter(tweet::id.eq_any(&ids)).count().get_result(conn)?;
    if usize::try_from(known) == Ok(ids.len()) { Ok(()) } else { Err(Error::NotFound("tweet")) }
}

/// Which of these tweets anybody may still see: neither they nor their authors are deleted.
///
/// # Errors
/// [`Error::NotFound`] when one was never posted by that author.
pub fn live(conn: &mut PgConnection, tweets: &[(TweetId, UserId)]) -> Result<BTreeSet<TweetId>> {
    #[derive(QueryableByName)]
    struct Known {
        #[diesel(sql_type = BigInt)]
        id: i64,
        #[diesel(sql_type = Bool)]
        live: bool,
    }
    let mut tweets = tweets.to_vec();
    tweets.sort_unstable();
    tweets.dedup();
    let known: Vec<Known> = sql_query(
        r#"SELECT t.id, t.deleted_at IS NULL AND a.deleted_at IS NULL AS live
           FROM unnest($1, $2) AS posted (id, author_id)
           JOIN tweet t ON t.id = posted.id AND t.author_id = posted.author_id
           JOIN "user" a ON a.id = t.author_id"#,
    )
    .bind::<Array<BigInt>, _>(tweets.iter().map(|(tweet, _)| tweet.0).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(tweets.iter().map(|(_, author)| author.0).collect::<Vec<_>>())
    .load(conn)?;
    if known.len() != tweets.len() {
        return Err(Error::NotFound("tweet of this author"));
    }
    Ok(known.into_iter().filter(|tweet| tweet.live).map(|tweet| TweetId(tweet.id)).collect())
}
