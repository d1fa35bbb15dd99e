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
    sql_types::{Array, BigInt},
};
use domain::{
    TweetId, UserId,
    message::Tweet,
    values::{Login, TweetText},
};

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
    // Id and time are given after the lock was taken, so both grow with every tweet of this author.
    let (id, created_at) = diesel::insert_into(tweet::table)
        .values((tweet::author_id.eq(author.0), tweet::text.eq(text.as_str())))
        .returning((tweet::id, tweet::created_at))
        .get_result::<(i64, DateTime<Utc>)>(conn)?;
    let author_login = Login::parse(&login).map_err(|_| Error::Conflict("the author's login has no valid form"))?;
    Ok(Tweet { id: TweetId(id), author: author_login, author_id: author, text: text.clone(), created_at })
}

/// Tweets, the newest first, `limit` of them after `offset`.
///
/// # Errors
/// The database's.
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
///
/// # Errors
/// The database's.
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

/// Whether each of these tweets has ever been posted by that author; deleted ones count.
///
/// # Errors
/// [`Error::NotFound`] when one hasn't.
pub fn require_posted(conn: &mut PgConnection, tweets: &[(TweetId, UserId)]) -> Result<()> {
    let unknown = sql_query(
        "SELECT count(*) AS n FROM unnest($1, $2) AS posted (id, author_id)
         WHERE NOT EXISTS (SELECT FROM tweet t WHERE t.id = posted.id AND t.author_id = posted.author_id)",
    )
    .bind::<Array<BigInt>, _>(tweets.iter().map(|(tweet, _)| tweet.0).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(tweets.iter().map(|(_, author)| author.0).collect::<Vec<_>>())
    .get_result::<crate::Count>(conn)?;
    if unknown.n == 0 { Ok(()) } else { Err(Error::NotFound("tweet of this author")) }
}
