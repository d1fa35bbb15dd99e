//! Removing what nobody sees any more in feeds.
//!
//! A piece of garbage may be of any size: a deleted author's tweets in a million feeds. So it's swept in pages, each in a
//! transaction of its own, and pieces take turns. One that fails is put off, longer each time, and keeps no other waiting.

use crate::{
    Result, feeds, garbage,
    schema::{feed_garbage, tweet},
    subscriptions,
};
use diesel::{PgConnection, prelude::*, sql_query, sql_types::BigInt};
use domain::UserId;

/// How many feed rows one transaction looks for at most.
const PAGE: usize = 1000;

/// A piece of garbage whose turn it is.
#[derive(Debug, QueryableByName)]
pub struct Piece {
    #[diesel(sql_type = BigInt)]
    id: i64,
}

/// Takes a piece that is due, if there's any, and puts it off: whoever takes it either gets on with it, or it's due again
/// later. Any number of sweeps run side by side. To be committed before [`remove_page`].
pub fn take(conn: &mut PgConnection) -> Result<Option<Piece>> {
    Ok(sql_query(
        "UPDATE feed_garbage
         SET attempts = attempts + 1, due_at = clock_timestamp() + interval '1 minute' * (1 << least(attempts, 6))
         WHERE id = (SELECT id FROM feed_garbage WHERE due_at <= clock_timestamp()
                     ORDER BY due_at, id LIMIT 1 FOR UPDATE SKIP LOCKED)
         RETURNING id",
    )
    .get_result(conn)
    .optional()?)
}

/// What a piece is, and how far it's swept.
#[derive(Queryable)]
struct Garbage {
    author: Option<i64>,
    tweet: Option<i64>,
    follower: Option<i64>,
    swept_follower: i64,
    swept_tweet: i64,
}

/// Removes the next page of the rows of a piece, and returns how many it removed. What is left is due again, after the
/// others that are. To be run in a transaction.
pub fn remove_page(conn: &mut PgConnection, piece: &Piece) -> Result<usize> {
    // Whoever holds a row holds up this piece alone, and not for long.
    sql_query("SET LOCAL lock_timeout = '1s'").execute(conn)?;
    let garbage = feed_garbage::table
        .find(piece.id)
        .select((
            feed_garbage::author_id,
            feed_garbage::tweet_id,
            feed_garbage::follower_id,
            feed_garbage::swept_follower_id,
            feed_garbage::swept_tweet_id,
        ))
        .for_update()
        .first::<Garbage>(conn)
        .optional()?;
    let Some(garbage) = garbage else { return Ok(0) };
    let (removed, swept) = match (garbage.author, garbage.follower) {
        (None, Some(reader)) => (0, end_first(conn, UserId(reader))?.then_some((0, 0))),
        (Some(author), _) => {
            let page = garbage.page(conn, author)?;
            (feeds::remove_unseen(conn, &page.keys)?, page.swept)
        }
        // The table's condition excludes that.
        (None, None) => (0, None),
    };
    let row = feed_garbage::table.find(piece.id);
    match swept {
        Some((follower, tweet)) => diesel::update(row)
            .set((
                feed_garbage::swept_follower_id.eq(follower),
                feed_garbage::swept_tweet_id.eq(tweet),
                feed_garbage::attempts.eq(0),
                feed_garbage::due_at.eq(diesel::dsl::now),
            ))
            .execute(conn)?,
        None => diesel::delete(row).execute(conn)?,
    };
    Ok(removed)
}

/// Ends the first of a deleted reader's subscriptions; returns whether there was one. The rows become garbage by that.
fn end_first(conn: &mut PgConnection, reader: UserId) -> Result<bool> {
    let Some(author) = subscriptions::first_author_of(conn, reader)? else { return Ok(false) };
    if subscriptions::end(conn, author, reader)? {
        garbage::author_left(conn, author, reader)?;
    }
    Ok(true)
}

/// Keys of feed rows to look for, in order, and how far the piece is swept with them; `None` when it's swept to its end.
struct Page {
    keys: Vec<(i64, i64)>,
    swept: Option<(i64, i64)>,
}

impl Garbage {
    /// The next keys: a reader after the other, and of each the author's tweets.
    fn page(&self, conn: &mut PgConnection, author: i64) -> Result<Page> {
        let tweets = match self.tweet {
            Some(tweet) => vec![tweet],
            None => tweet::table
                .select(tweet::id)
                .filter(tweet::author_id.eq(author).and(tweet::id.gt(self.swept_tweet)))
                .order(tweet::id)
                .limit(PAGE as i64)
                .load(conn)?,
        };
        // More tweets than a page holds: readers are gone through one by one.
        let in_part = self.swept_tweet > 0 || tweets.len() == PAGE;
        if tweets.is_empty() && !in_part {
            return Ok(Page { keys: Vec::new(), swept: None });
        }
        let limit = if in_part { 1 } else { PAGE / tweets.len() };
        let readers = self.readers(conn, author, limit)?;
        let swept = match (readers.last(), tweets.last()) {
            (Some(_), Some(tweet)) if tweets.len() == PAGE => Some((self.swept_follower, *tweet)),
            (Some(reader), _) if self.follower.is_none() && readers.len() == limit => Some((*reader, 0)),
            _ => None,
        };
        let keys = readers.iter().flat_map(|reader| tweets.iter().map(|tweet| (*reader, *tweet))).collect();
        Ok(Page { keys, swept })
    }

    /// The next readers: whoever has a row follows the author, or did, so no index on the tweet is needed.
    fn readers(&self, conn: &mut PgConnection, author: i64, limit: usize) -> Result<Vec<i64>> {
        if let Some(follower) = self.follower {
            return Ok(if follower > self.swept_follower { vec![follower] } else { Vec::new() });
        }
        let readers: Vec<crate::Count> = sql_query(
            "SELECT follower_id AS n FROM (
                 (SELECT DISTINCT follower_id FROM subscription WHERE author_id = $1 AND follower_id > $2
                  ORDER BY follower_id LIMIT $3)
                 UNION (SELECT DISTINCT follower_id FROM former_subscription WHERE author_id = $1 AND follower_id > $2
                  ORDER BY follower_id LIMIT $3)
                 ORDER BY 1 LIMIT $3) reader ORDER BY 1",
        )
        .bind::<BigInt, _>(author)
        .bind::<BigInt, _>(self.swept_follower)
        .bind::<BigInt, _>(limit as i64)
        .load(conn)?;
        Ok(readers.into_iter().map(|reader| reader.n).collect())
    }
}
