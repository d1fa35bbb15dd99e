//! Tables `email_notification` and `sms_notification`: what users are told, once each.

use crate::{Error, Result, feeds, tweets};
use diesel::{
    PgConnection, RunQueryDsl, sql_query,
    sql_types::{Array, BigInt, Text},
};
use domain::{UserId, message::SendNotificationChunk, values::Channel};

/// The table of this channel's notifications.
pub fn table(channel: Channel) -> &'static str {
    match channel {
        Channel::Email => "email_notification",
        Channel::Phone => "sms_notification",
    }
}

/// Notifies those followers in each range who have this channel and followed when the tweet was posted; returns how
/// many rows are new. A deleted tweet notifies nobody, nor does a deleted author's. To be run in a transaction.
///
/// # Errors
/// [`Error::NotFound`] when a tweet was never posted.
pub fn record_chunks(conn: &mut PgConnection, channel: Channel, chunks: &[&SendNotificationChunk]) -> Result<usize> {
    tweets::require_known(conn, &chunks.iter().map(|chunk| chunk.tweet_id).collect::<Vec<_>>())?;
    let column = |of: fn(&SendNotificationChunk) -> i64| chunks.iter().map(|chunk| of(chunk)).collect::<Vec<_>>();
    let (address, table, live_author) = (channel.as_str(), table(channel), feeds::LIVE_AUTHOR);
    feeds::insert_new(conn, |conn, on_conflict| {
        // Planned as `feeds::write` is.
        sql_query(format!(
            r#"INSERT INTO {table} (user_id, source, source_id, {address}, text)
               SELECT s.follower_id, 'tweet', t.id::text, u.{address}, chunk.text
               FROM unnest($1, $2, $3, $4) AS chunk (tweet_id, after, upto, text)
               JOIN tweet t ON t.id = chunk.tweet_id AND t.deleted_at IS NULL
               {live_author}
               CROSS JOIN LATERAL (
                   SELECT follower_id FROM subscription
                   WHERE author_id = t.author_id AND follower_id > chunk.after AND follower_id <= chunk.upto
                     AND after_tweet_id < t.id OFFSET 0) s
               CROSS JOIN LATERAL (
                   SELECT {address} FROM "user"
                   WHERE id = s.follower_id AND channel = '{address}' AND deleted_at IS NULL OFFSET 0) u
               ORDER BY 1, 2, 3 {on_conflict}"#
        ))
        .bind::<Array<BigInt>, _>(column(|chunk| chunk.tweet_id.0))
        .bind::<Array<BigInt>, _>(column(|chunk| chunk.followers.after.0))
        .bind::<Array<BigInt>, _>(column(|chunk| chunk.followers.upto.0))
        .bind::<Array<Text>, _>(chunks.iter().map(|chunk| chunk.text.as_str()).collect::<Vec<_>>())
        .execute(conn)
    })
}

/// A notification of one user, by another program's message.
pub struct Single<'a> {
    /// Whom.
    pub user_id: UserId,
    /// The AMQP message id: the same one again changes nothing.
    pub message_id: &'a str,
    /// What.
    pub text: &'a str,
}

/// Notifies single users; returns how many rows are new. Deleted users are passed over. To be run in a transaction.
///
/// # Errors
/// [`Error::NotFound`] when a user was never made or has no such channel.
pub fn record_singles(conn: &mut PgConnection, channel: Channel, singles: &[Single<'_>]) -> Result<usize> {
    let users: Vec<i64> = singles.iter().map(|single| single.user_id.0).collect();
    let address = channel.as_str();
    let unknown = sql_query(
        r#"SELECT count(*) AS n FROM unnest($1) AS wanted (id)
           WHERE NOT EXISTS (SELECT FROM "user" u WHERE u.id = wanted.id AND u.channel = $2)"#,
    )
    .bind::<Array<BigInt>, _>(&users)
    .bind::<Text, _>(address)
    .get_result::<crate::Count>(conn)?;
    if unknown.n > 0 {
        return Err(Error::NotFound(match channel {
            Channel::Email => "user with an e-mail address",
            Channel::Phone => "user with a phone number",
        }));
    }
    Ok(sql_query(format!(
        r#"INSERT INTO {table} (user_id, source, source_id, {address}, text)
           SELECT u.id, 'message', single.message_id, u.{address}, single.text
           FROM unnest($1, $2, $3) AS single (user_id, message_id, text)
           JOIN "user" u ON u.id = single.user_id AND u.deleted_at IS NULL
           ORDER BY 1, 2, 3
           ON CONFLICT DO NOTHING"#,
        table = table(channel)
    ))
    .bind::<Array<BigInt>, _>(&users)
    .bind::<Array<Text>, _>(singles.iter().map(|single| single.message_id).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(singles.iter().map(|single| single.text).collect::<Vec<_>>())
    .execute(conn)?)
}
