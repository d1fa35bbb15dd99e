//! Taking away what is personal of a deleted user, wherever it's kept, and the texts of deleted tweets. A user's row stays, under its id, without anything that says
//! who it was: what others did with it still adds up.
//!
//! A user may have millions of notifications, so it's done in steps, each a transaction of its own. One that fails, or whose
//! process dies, is due again some minutes later, and keeps no other waiting.

use crate::{Error, Result, notifications, users};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{BigInt, Bool},
};
use domain::{UserId, values::Channel};
use std::ops::AddAssign;

/// How many rows of each table one step changes at most.
const PAGE: i64 = 1000;

/// What was under way at the deletion has come to nothing, or to a dead letter, so long after it: longer than a statement and than
/// all attempts at a message take. Until then one more look is due.
const LAST_LOOK: &str = "interval '1 hour'";

/// When a step is due again that didn't end.
const PUT_OFF: &str = "interval '10 minutes'";

/// How many rows were cleared or removed, or would be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Erased {
    /// Users' rows: 1 or, where it's done already, 0.
    pub user: usize,
    /// Avatars, removed.
    pub avatar: usize,
    /// Imports for the user: their prefixes.
    pub imports: usize,
    /// Dead letters that name the user: their bodies. Those that were waiting are dropped.
    pub dead_letters: usize,
    /// Notifications of the user, removed.
    pub notifications: usize,
    /// The user's tweets: their texts.
    pub tweets: usize,
}

impl AddAssign for Erased {
    fn add_assign(&mut self, other: Self) {
        self.user += other.user;
        self.avatar += other.avatar;
        self.imports += other.imports;
        self.dead_letters += other.dead_letters;
        self.notifications += other.notifications;
        self.tweets += other.tweets;
    }
}

impl Erased {
    /// All of them.
    pub fn rows(&self) -> usize {
        self.user + self.avatar + self.imports + self.dead_letters + self.notifications + self.tweets
    }

    /// Whether any page was full.
    fn may_be_more(&self) -> bool {
        let page = PAGE as usize;
        self.dead_letters >= page || self.notifications >= page || self.tweets >= page
    }
}

#[derive(QueryableByName)]
struct Cleared {
    #[diesel(sql_type = Bool)]
    now: bool,
}

#[derive(QueryableByName)]
struct Taken {
    #[diesel(sql_type = BigInt)]
    id: i64,
}

/// Takes a user whose erasure is due, if there's any: one whose erasure has begun, or who was deleted so many days ago. Whoever takes
/// it either gets on with it, or it's due again later. Any number of sweeps run side by side. To be committed before [`step`].
pub fn take(conn: &mut PgConnection, keep_days: u32) -> Result<Option<UserId>> {
    let begun = sql_query(format!(
        r#"UPDATE "user" SET erase_at = clock_timestamp() + {PUT_OFF}
           WHERE id = (SELECT id FROM "user" WHERE erase_at <= now() AND deleted_at IS NOT NULL
                       ORDER BY erase_at, id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)
           RETURNING id"#
    ))
    .get_result::<Taken>(conn)
    .optional()?;
    if let Some(taken) = begun {
        return Ok(Some(UserId(taken.id)));
    }
    let over = sql_query(format!(
        r#"UPDATE "user" SET erase_at = clock_timestamp() + {PUT_OFF}
           WHERE id = (SELECT id FROM "user"
                       WHERE deleted_at <= now() - interval '1 day' * $1
                         AND deleted_at IS NOT NULL AND erase_at IS NULL AND erased_at IS NULL
                       ORDER BY deleted_at, id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)
           RETURNING id"#
    ))
    .bind::<BigInt, _>(i64::from(keep_days))
    .get_result::<Taken>(conn)
    .optional()?;
    Ok(over.map(|taken| UserId(taken.id)))
}

/// Takes the next page away of what is kept of a deleted user. Returns what that was, and whether there may be more. To be run in a
/// transaction of its own.
///
/// # Errors
/// [`Error::NotFound`] when there's no such user, or it isn't deleted.
pub fn step(conn: &mut PgConnection, id: UserId) -> Result<(Erased, bool)> {
    // Whoever holds a row holds up this user alone, and not for long.
    sql_query("SET LOCAL lock_timeout = '1s'").execute(conn)?;
    let locked = sql_query(r#"SELECT id FROM "user" WHERE id = $1 AND deleted_at IS NOT NULL FOR NO KEY UPDATE"#)
        .bind::<BigInt, _>(id.0)
        .execute(conn)?;
    if locked == 0 {
        return Err(Error::NotFound("deleted user"));
    }
    let cleared: Cleared = sql_query("SELECT erase_user($1) AS now").bind::<BigInt, _>(id.0).get_result(conn)?;
    let avatar = sql_query("DELETE FROM avatar WHERE user_id = $1").bind::<BigInt, _>(id.0).execute(conn)?;
    let mut erased = Erased { user: cleared.now.into(), avatar, imports: imports(conn, id)?, ..Erased::default() };
    erased.dead_letters = dead_letters(conn, id)?;
    for channel in Channel::ALL {
        let table = notifications::table(channel);
        erased.notifications += sql_query(format!(
            "DELETE FROM {table} WHERE (user_id, source, source_id) IN (
                 SELECT user_id, source, source_id FROM {table}
                 WHERE user_id = $1 ORDER BY source, source_id LIMIT $2)"
        ))
        .bind::<BigInt, _>(id.0)
        .bind::<BigInt, _>(PAGE)
        .execute(conn)?;
    }
    erased.tweets = sql_query(
        "UPDATE tweet SET text = '(erased)'
         WHERE id IN (SELECT id FROM tweet WHERE author_id = $1 AND text <> '(erased)' ORDER BY id LIMIT $2)",
    )
    .bind::<BigInt, _>(id.0)
    .bind::<BigInt, _>(PAGE)
    .execute(conn)?;
    let more = erased.may_be_more();
    if more {
        sql_query(r#"UPDATE "user" SET erase_at = clock_timestamp() WHERE id = $1"#)
            .bind::<BigInt, _>(id.0)
            .execute(conn)?;
    } else {
        sql_query(format!(
            r#"UPDATE "user"
               SET erase_at = CASE WHEN deleted_at + {LAST_LOOK} > now() THEN deleted_at + {LAST_LOOK} END
               WHERE id = $1"#
        ))
        .bind::<BigInt, _>(id.0)
        .execute(conn)?;
    }
    Ok((erased, more))
}

/// What was asked for by the user. One that isn't over comes to nothing, as its next step would find.
fn imports(conn: &mut PgConnection, id: UserId) -> Result<usize> {
    Ok(sql_query(
        "UPDATE follower_import
         SET prefix = '', request_key = 'over:' || id, updated_at = clock_timestamp(),
             error = CASE WHEN state IN ('pending', 'running') THEN 'the author was deleted' END,
             state = CASE WHEN state IN ('pending', 'running') THEN 'failed' ELSE state END
         WHERE author_id = $1 AND prefix <> ''",
    )
    .bind::<BigInt, _>(id.0)
    .execute(conn)?)
}

fn dead_letters(conn: &mut PgConnection, id: UserId) -> Result<usize> {
    Ok(sql_query(
        "UPDATE dead_letter
         SET body = '', headers = '{}', state = CASE state WHEN 'waiting' THEN 'dropped' ELSE state END,
             settled_at = coalesce(settled_at, clock_timestamp()),
             settled_by = coalesce(settled_by, 'the erasure of user ' || $1)
         WHERE id IN (SELECT id FROM dead_letter WHERE users_in_message(body) @> ARRAY[$1] ORDER BY id LIMIT $2)",
    )
    .bind::<BigInt, _>(id.0)
    .bind::<BigInt, _>(PAGE)
    .execute(conn)?)
}

/// Takes away the texts of tweets, a page of them, that were deleted so many days ago; returns how many. To be run in a transaction.
pub fn deleted_tweets(conn: &mut PgConnection, keep_days: u32) -> Result<usize> {
    Ok(sql_query(
        "UPDATE tweet SET text = '(erased)'
         WHERE id IN (SELECT id FROM tweet
                      WHERE deleted_at <= now() - interval '1 day' * $1 AND deleted_at IS NOT NULL AND text <> '(erased)'
                      ORDER BY deleted_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED)",
    )
    .bind::<BigInt, _>(i64::from(keep_days))
    .bind::<BigInt, _>(PAGE)
    .execute(conn)?)
}

/// Begins at once, by deleting the user where that wasn't done; returns whether it was now. What is left is taken away by [`step`]s,
/// of the caller or of the sweep. To be run in a transaction.
///
/// # Errors
/// [`Error::NotFound`] when there's no such user.
pub fn begin(conn: &mut PgConnection, id: UserId) -> Result<bool> {
    users::require_known(conn, &[id])?;
    let deleted = match users::delete(conn, id) {
        Err(Error::NotFound(_)) => false,
        result => result.map(|()| true)?,
    };
    sql_query(r#"UPDATE "user" SET erase_at = clock_timestamp() WHERE id = $1"#)
        .bind::<BigInt, _>(id.0)
        .execute(conn)?;
    Ok(deleted)
}

/// What there is to be taken away of a user.
///
/// # Errors
/// [`Error::NotFound`] when there's no such user.
pub fn left(conn: &mut PgConnection, id: UserId) -> Result<Erased> {
    #[derive(QueryableByName)]
    struct Left {
        #[diesel(sql_type = BigInt)]
        kept: i64,
        #[diesel(sql_type = BigInt)]
        avatar: i64,
        #[diesel(sql_type = BigInt)]
        imports: i64,
        #[diesel(sql_type = BigInt)]
        dead_letters: i64,
        #[diesel(sql_type = BigInt)]
        notifications: i64,
        #[diesel(sql_type = BigInt)]
        tweets: i64,
    }
    users::require_known(conn, &[id])?;
    let left = sql_query(
        r#"SELECT (SELECT count(*) FROM "user" WHERE id = $1 AND erased_at IS NULL) AS kept,
                  (SELECT count(*) FROM avatar WHERE user_id = $1) AS avatar,
                  (SELECT count(*) FROM follower_import WHERE author_id = $1 AND prefix <> '') AS imports,
                  (SELECT count(*) FROM dead_letter WHERE users_in_message(body) @> ARRAY[$1]) AS dead_letters,
                  (SELECT count(*) FROM email_notification WHERE user_id = $1)
                      + (SELECT count(*) FROM sms_notification WHERE user_id = $1) AS notifications,
                  (SELECT count(*) FROM tweet WHERE author_id = $1 AND text <> '(erased)') AS tweets"#,
    )
    .bind::<BigInt, _>(id.0)
    .get_result::<Left>(conn)?;
    let number = |n| usize::try_from(n).unwrap_or(0);
    Ok(Erased {
        user: number(left.kept),
        avatar: number(left.avatar),
        imports: number(left.imports),
        dead_letters: number(left.dead_letters),
        notifications: number(left.notifications),
        tweets: number(left.tweets),
    })
}
