//! For benchmarks: plenty of rows quickly, the same rows written by plain statements, and when rows have arrived.

use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Double, Integer, Nullable, Text, Timestamptz},
};
use domain::{TweetId, UserId, log::Group, values::Channel};
use storage::{
    Result, feeds,
    messages::{self, NewMessage},
    notifications,
};

#[derive(QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    n: i64,
}

/// Makes `count` users with ids `first …`, every other one with a phone, in a database where those ids are free.
pub(crate) fn seed_users(conn: &mut PgConnection, prefix: &str, first: i64, count: i64) -> Result<()> {
    sql_query(
        r#"INSERT INTO "user" (id, login, channel, email, phone) OVERRIDING SYSTEM VALUE
           SELECT i, login, CASE i % 2 WHEN 0 THEN 'email' ELSE 'phone' END,
                  CASE i % 2 WHEN 0 THEN login || '@example.com' END,
                  CASE i % 2 WHEN 1 THEN '+999' || lpad(i::text, 12, '0') END
           FROM generate_series($1, $1 + $2 - 1) i, LATERAL (SELECT $3 || '_' || i AS login) named"#,
    )
    .bind::<BigInt, _>(first)
    .bind::<BigInt, _>(count)
    .bind::<Text, _>(prefix)
    .execute(conn)?;
    sql_query(r#"SELECT setval(pg_get_serial_sequence('"user"', 'id'), (SELECT max(id) FROM "user"))"#)
        .execute(conn)?;
    Ok(())
}

/// Lets the users with ids `first …` follow an author who has no tweets yet.
pub(crate) fn seed_followers(conn: &mut PgConnection, author: UserId, first: i64, count: i64) -> Result<()> {
    sql_query(
        "INSERT INTO subscription (author_id, follower_id, since_tweet_id, after_tweet_id)
         SELECT $1, i, 0, 0 FROM generate_series($2, $2 + $3 - 1) i",
    )
    .bind::<BigInt, _>(author.0)
    .bind::<BigInt, _>(first)
    .bind::<BigInt, _>(count)
    .execute(conn)?;
    Ok(())
}

/// Gives an author `count` tweets, and puts them into the feeds of the users with ids `first … first + readers - 1`,
/// who all follow the author.
pub(crate) fn seed_feeds(conn: &mut PgConnection, author: UserId, count: i64, first: i64, readers: i64) -> Result<()> {
    sql_query(
        "INSERT INTO tweet (author_id, text)
         SELECT $1, 'A tweet of times past, number ' || i FROM generate_series(1, $2) i",
    )
    .bind::<BigInt, _>(author.0)
    .bind::<BigInt, _>(count)
    .execute(conn)?;
    sql_query(
        "INSERT INTO feed_entry (reader_id, tweet_id)
         SELECT i, t.id FROM generate_series($2, $2 + $3 - 1) i,
             LATERAL (SELECT id FROM tweet WHERE author_id = $1 ORDER BY id) t",
    )
    .bind::<BigInt, _>(author.0)
    .bind::<BigInt, _>(first)
    .bind::<BigInt, _>(readers)
    .execute(conn)?;
    Ok(())
}

/// Brings the tables to the state that a database in use has: planned with statistics, visible to index-only scans.
pub(crate) fn settle(conn: &mut PgConnection) -> Result<()> {
    sql_query("VACUUM ANALYZE").execute(conn)?;
    checkpoint(conn)
}

/// Begins a measurement with no dirty pages left over by what came before.
pub(crate) fn checkpoint(conn: &mut PgConnection) -> Result<()> {
    sql_query("CHECKPOINT").execute(conn)?;
    Ok(())
}

/// Puts a tweet into every follower's feed, by one plain statement.
pub(crate) fn plain_feed_rows(conn: &mut PgConnection, author: UserId, tweet: TweetId) -> Result<usize> {
    Ok(sql_query(
        "INSERT INTO feed_entry (reader_id, tweet_id)
         SELECT follower_id, $2 FROM subscription WHERE author_id = $1 ORDER BY follower_id",
    )
    .bind::<BigInt, _>(author.0)
    .bind::<BigInt, _>(tweet.0)
    .execute(conn)?)
}

/// Notifies every follower of the channel of a tweet, by one plain statement.
pub(crate) fn plain_notifications(
    conn: &mut PgConnection,
    channel: Channel,
    author: UserId,
    tweet: TweetId,
    text: &str,
) -> Result<usize> {
    let address = channel.as_str();
    Ok(sql_query(format!(
        r#"INSERT INTO {} (user_id, source, source_id, {address}, text)
           SELECT u.id, 'tweet', $2::text, u.{address}, $3
           FROM subscription s JOIN "user" u ON u.id = s.follower_id AND u.channel = '{address}'
           WHERE s.author_id = $1 ORDER BY u.id"#,
        notifications::table(channel)
    ))
    .bind::<BigInt, _>(author.0)
    .bind::<BigInt, _>(tweet.0)
    .bind::<Text, _>(text)
    .execute(conn)?)
}

/// Which of these readers don't have the tweet in their feeds yet.
pub(crate) fn readers_without(conn: &mut PgConnection, tweet: TweetId, readers: &[i64]) -> Result<Vec<i64>> {
    let missing: Vec<Count> = sql_query(
        "SELECT wanted.id AS n FROM unnest($1) wanted (id)
         WHERE NOT EXISTS (SELECT FROM feed_entry f WHERE f.reader_id = wanted.id AND f.tweet_id = $2)",
    )
    .bind::<Array<BigInt>, _>(readers)
    .bind::<BigInt, _>(tweet.0)
    .load(conn)?;
    Ok(missing.into_iter().map(|row| row.n).collect())
}

/// Which of these users, who all have the channel, haven't been notified of the tweet yet.
pub(crate) fn users_without(
    conn: &mut PgConnection,
    channel: Channel,
    tweet: TweetId,
    users: &[i64],
) -> Result<Vec<i64>> {
    let missing: Vec<Count> = sql_query(format!(
        "SELECT wanted.id AS n FROM unnest($1) wanted (id)
         WHERE NOT EXISTS (SELECT FROM {} n
                           WHERE n.user_id = wanted.id AND n.source = 'tweet' AND n.source_id = $2)",
        notifications::table(channel)
    ))
    .bind::<Array<BigInt>, _>(users)
    .bind::<Text, _>(tweet.to_string())
    .load(conn)?;
    Ok(missing.into_iter().map(|row| row.n).collect())
}

/// How many feed rows and notifications of the tweet there are.
pub(crate) fn rows_of(conn: &mut PgConnection, tweet: TweetId) -> Result<(i64, i64)> {
    let feeds = sql_query("SELECT count(*) AS n FROM feed_entry WHERE tweet_id = $1")
        .bind::<BigInt, _>(tweet.0)
        .get_result::<Count>(conn)?;
    let notifications = sql_query(
        "SELECT (SELECT count(*) FROM email_notification WHERE source = 'tweet' AND source_id = $1)
              + (SELECT count(*) FROM sms_notification WHERE source = 'tweet' AND source_id = $1) AS n",
    )
    .bind::<Text, _>(tweet.to_string())
    .get_result::<Count>(conn)?;
    Ok((feeds.n, notifications.n))
}

/// The statement by which a page of a feed is read, with `$1 …` for its parameters in the order reader, before, limit.
pub(crate) fn feed_page_sql() -> String {
    feeds::page_sql()
}

/// The server's version.
pub(crate) fn server_version(conn: &mut PgConnection) -> Result<String> {
    #[derive(QueryableByName)]
    struct Version {
        #[diesel(sql_type = Text)]
        server_version: String,
    }
    Ok(sql_query("SELECT current_setting('server_version') AS server_version")
        .get_result::<Version>(conn)?
        .server_version)
}

/// What time it is for the database.
pub(crate) fn now(conn: &mut PgConnection) -> Result<DateTime<Utc>> {
    #[derive(QueryableByName)]
    struct Now {
        #[diesel(sql_type = Timestamptz)]
        now: DateTime<Utc>,
    }
    Ok(sql_query("SELECT clock_timestamp() AS now").get_result::<Now>(conn)?.now)
}

/// What account events leave behind, written by plain statements: `count` rows of `stream_event` that say they're applied,
/// and their effects, for accounts `<prefix>0 …` in turn.
pub(crate) fn plain_events(conn: &mut PgConnection, prefix: &str, accounts: i64, first: i64, count: i64) -> Result<()> {
    sql_query(
        r#"INSERT INTO stream_event (stream, key, seq, key_hash, payload, processed_at, worker, outcome)
           SELECT 'account_event', $1 || i % $2, i / $2 + 1, i % 1000000007, '{"n":1}', clock_timestamp(), 'plain', 'applied'
           FROM generate_series($3, $3 + $4 - 1) i"#,
    )
    .bind::<Text, _>(prefix)
    .bind::<BigInt, _>(accounts)
    .bind::<BigInt, _>(first)
    .bind::<BigInt, _>(count)
    .execute(conn)?;
    sql_query(
        "INSERT INTO account_effect (account_id, seq, worker, work_ms)
         SELECT $1 || i % $2, i / $2 + 1, 'plain', 0 FROM generate_series($3, $3 + $4 - 1) i",
    )
    .bind::<Text, _>(prefix)
    .bind::<BigInt, _>(accounts)
    .bind::<BigInt, _>(first)
    .bind::<BigInt, _>(count)
    .execute(conn)?;
    Ok(())
}

/// A number of milliseconds, if there's anything to measure.
#[derive(QueryableByName)]
struct Millis {
    #[diesel(sql_type = Nullable<Double>)]
    ms: Option<f64>,
}

/// The time in milliseconds from an event's acceptance to its effect that this share of the events doesn't exceed, of the
/// accounts whose id starts with `prefix`, save for one of them.
pub(crate) fn event_latency_ms(conn: &mut PgConnection, prefix: &str, except: &str, share: f64) -> Result<Option<f64>> {
    Ok(sql_query(
        "SELECT percentile_disc($3) WITHIN GROUP (ORDER BY extract(epoch FROM processed_at - generated_at)::float8 * 1000)
                AS ms
         FROM stream_event WHERE stream = 'account_event' AND key >= $1 AND key < $1 || '~' AND key <> $2",
    )
    .bind::<Text, _>(prefix)
    .bind::<Text, _>(except)
    .bind::<Double, _>(share)
    .get_result::<Millis>(conn)?
    .ms)
}

/// The longest time in milliseconds during which none of the events took effect of the accounts whose id starts with
/// `prefix`, from the first effect to the last acceptance.
pub(crate) fn longest_pause_ms(conn: &mut PgConnection, prefix: &str) -> Result<Option<f64>> {
    Ok(sql_query(
        "SELECT max(extract(epoch FROM pause)::float8 * 1000) AS ms
         FROM (SELECT applied_at - lag(applied_at) OVER (ORDER BY applied_at) AS pause
               FROM account_effect
               WHERE account_id >= $1 AND account_id < $1 || '~'
                 AND applied_at <= (SELECT max(generated_at) FROM stream_event
                                    WHERE stream = 'account_event' AND key >= $1 AND key < $1 || '~')) pauses",
    )
    .bind::<Text, _>(prefix)
    .get_result::<Millis>(conn)?
    .ms)
}

/// How many messages of the log are known to be in their streams.
pub(crate) fn messages_published(conn: &mut PgConnection) -> Result<i64> {
    let published: Count =
        sql_query("SELECT coalesce(sum(seq - cardinality(taken)), 0)::bigint AS n FROM message_partition")
            .get_result(conn)?;
    Ok(published.n)
}

/// Removes what the groups have recorded, so that every measurement begins with the same table. How far they are stays.
pub(crate) fn forget_messages(conn: &mut PgConnection) -> Result<()> {
    sql_query("TRUNCATE message").execute(conn)?;
    Ok(())
}

/// Makes a table for [`plain_messages`] to write, empty and like `message` in all.
pub(crate) fn create_plain_message(conn: &mut PgConnection) -> Result<()> {
    sql_query("CREATE TABLE plain_message (LIKE message INCLUDING ALL)").execute(conn)?;
    Ok(())
}

/// Removes that table.
pub(crate) fn drop_plain_message(conn: &mut PgConnection) -> Result<()> {
    sql_query("DROP TABLE plain_message").execute(conn)?;
    Ok(())
}

/// How plain statements bring their values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plain {
    /// As rows: `INSERT … VALUES (…), (…), …`, a batch insert as diesel makes it.
    Rows,
    /// As one array for each column, by the statement that [`messages::record`] has: the fastest that we know.
    Arrays,
}

/// Writes what a process has recorded of a partition for a group, by one plain statement; outside of any transaction it's one
/// of its own.
pub(crate) fn plain_messages(conn: &mut PgConnection, plain: Plain, messages: &[NewMessage<'_>]) -> Result<()> {
    match plain {
        Plain::Arrays => messages::insert_into(conn, "plain_message", messages)?,
        Plain::Rows => {
            let rows: Vec<_> = messages
                .iter()
                .map(|new| {
                    (
                        plain_message::group.eq(new.group),
                        plain_message::partition.eq(new.partition),
                        plain_message::offset.eq(new.offset),
                        plain_message::seq.eq(new.seq),
                        plain_message::message_id.eq(new.message_id),
                        plain_message::key.eq(new.key),
                        plain_message::text.eq(new.text),
                        plain_message::accepted_at.eq(new.accepted_at),
                        plain_message::recorded_by.eq(new.recorded_by),
                    )
                })
                .collect();
            diesel::insert_into(plain_message::table).values(&rows).execute(conn)?;
        }
    }
    Ok(())
}

mod schema {
    diesel::table! {
        plain_message (group, partition, offset) {
            group -> Text,
            partition -> Integer,
            offset -> BigInt,
            seq -> Nullable<BigInt>,
            message_id -> Nullable<Text>,
            key -> Nullable<Text>,
            text -> Text,
            accepted_at -> Nullable<Timestamptz>,
            recorded_by -> Text,
        }
    }
}
use schema::plain_message;

/// The time in milliseconds from a message's acceptance to its record that this share of what the group has recorded doesn't
/// exceed.
pub(crate) fn message_latency_ms(conn: &mut PgConnection, group: &Group, share: f64) -> Result<Option<f64>> {
    Ok(sql_query(
        r#"SELECT percentile_disc($2) WITHIN GROUP (ORDER BY extract(epoch FROM recorded_at - accepted_at)::float8 * 1000)
                  AS ms
           FROM message WHERE "group" = $1"#,
    )
    .bind::<Text, _>(group.as_str())
    .bind::<Double, _>(share)
    .get_result::<Millis>(conn)?
    .ms)
}

/// How many milliseconds after `since` the last of these partitions is read again by anybody but `gone`; `None` as long as
/// one isn't.
pub(crate) fn read_again_ms(
    conn: &mut PgConnection,
    group: &Group,
    partitions: &[i32],
    gone: &str,
    since: DateTime<Utc>,
) -> Result<Option<f64>> {
    Ok(sql_query(
        r#"SELECT CASE WHEN count(*) = cardinality($2) THEN max(ms) END AS ms
           FROM (SELECT extract(epoch FROM min(recorded_at) - $4)::float8 * 1000 AS ms
                 FROM message
                 WHERE "group" = $1 AND partition = ANY ($2) AND recorded_by <> $3 AND recorded_at > $4
                 GROUP BY partition) first"#,
    )
    .bind::<Text, _>(group.as_str())
    .bind::<Array<Integer>, _>(partitions)
    .bind::<Text, _>(gone)
    .bind::<Timestamptz, _>(since)
    .get_result::<Millis>(conn)?
    .ms)
}
