//! Table `feed_repair`: writing what is missing from feeds and notifications, and removing what is extra, while the fleet runs.
//!
//! A repair goes through tweets and their followers, then through feed rows, then through notifications, each in the order of
//! their keys and in pages of one transaction each, and remembers with each page how far it is.
//!
//! It needs no lock of an author. What is missing is written by the very statements that a chunk is handled by, so a repair
//! is a chunk that comes again: whoever follows, leaves or deletes meanwhile meets what may be under way at any time. What is
//! extra is removed as the sweep does it: locked first, judged after. A notification that is extra stays so, because
//! subscriptions only ever begin to count with later tweets.

use crate::{
    Error, Result, feeds, notifications,
    schema::{feed_repair, tweet, user},
};
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Bool, Text},
};
use domain::{
    TweetId, UserId,
    message::{FollowerRange, SendNotificationChunk, Tweet},
    values::{Channel, Login, TweetText},
};

/// What is being gone through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Tweets and their followers, for what is missing.
    Missing,
    /// Feed rows, for those that are extra.
    Feeds,
    /// Notifications of a channel, likewise.
    Notifications(Channel),
    /// Nothing any more.
    Over,
}

impl Phase {
    const ALL: [Self; 5] = [
        Self::Missing,
        Self::Feeds,
        Self::Notifications(Channel::Email),
        Self::Notifications(Channel::Phone),
        Self::Over,
    ];

    /// As the table has it.
    fn column(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Feeds => "feeds",
            Self::Notifications(channel) => channel.as_str(),
            Self::Over => "over",
        }
    }

    fn parse(column: &str) -> Self {
        Self::ALL.into_iter().find(|phase| phase.column() == column).unwrap_or(Self::Over)
    }

    fn next(self) -> Self {
        Self::ALL.into_iter().skip_while(|phase| *phase != self).nth(1).unwrap_or(Self::Over)
    }
}

/// How many rows a repair has written and removed, or would have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Missing from feeds, written.
    pub feed_rows_written: i64,
    /// Missing notifications, written.
    pub notifications_written: i64,
    /// Feed rows that no reader sees, removed: those that the sweep would have removed, too.
    pub feed_rows_removed: i64,
    /// Extra notifications, removed; only those that are recorded and nothing else yet.
    pub notifications_removed: i64,
}

impl Totals {
    /// All of them.
    pub fn sum(&self) -> i64 {
        self.feed_rows_written + self.notifications_written + self.feed_rows_removed + self.notifications_removed
    }
}

/// A repair, and how far it is.
#[derive(Clone, Debug)]
pub struct Repair {
    /// Its id; 0 for one that changes nothing.
    pub id: i64,
    /// Who began it.
    pub started_by: String,
    /// When.
    pub started_at: DateTime<Utc>,
    /// What it's going through.
    pub phase: Phase,
    /// Where: the key of the last row that it has looked at.
    after: (i64, String),
    /// What it has done.
    pub totals: Totals,
}

impl Repair {
    /// One that changes nothing, and counts what another one would do.
    pub fn rehearsal() -> Self {
        let totals = Totals::default();
        let after = (0, String::new());
        Self { id: 0, started_by: String::new(), started_at: Utc::now(), phase: Phase::Missing, after, totals }
    }

    /// Whether it has gone through everything.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// Where it is, for people.
    pub fn place(&self) -> String {
        let id = self.after.0;
        match self.phase {
            Phase::Missing => format!("what is missing, up to tweet {id}"),
            Phase::Feeds => format!("feed rows that are extra, up to reader {id}"),
            Phase::Notifications(channel) => {
                format!("notifications by {} that are extra, up to user {id}", channel.as_str())
            }
            Phase::Over => "done".into(),
        }
    }
}

/// The repair that isn't over, or a new one. To be run in a transaction.
pub fn open(conn: &mut PgConnection, by: &str) -> Result<Repair> {
    let unfinished = feed_repair::table.filter(feed_repair::finished_at.is_null()).select(feed_repair::id);
    let id = match unfinished.first(conn).optional()? {
        Some(id) => id,
        None => {
            // Another session may just be doing the same.
            diesel::insert_into(feed_repair::table)
                .values(feed_repair::started_by.eq(by))
                .on_conflict_do_nothing()
                .execute(conn)?;
            unfinished.first(conn)?
        }
    };
    load(conn, id)
}

/// Gives up the repair that isn't over, so that the next one begins anew; what it did stays.
pub fn abandon(conn: &mut PgConnection) -> Result<()> {
    diesel::update(feed_repair::table.filter(feed_repair::finished_at.is_null()))
        .set(feed_repair::finished_at.eq(diesel::dsl::now))
        .execute(conn)?;
    Ok(())
}

fn load(conn: &mut PgConnection, id: i64) -> Result<Repair> {
    type Columns = (String, DateTime<Utc>, String, i64, String, (i64, i64, i64, i64));
    let (started_by, started_at, phase, after_id, after_key, totals): Columns = feed_repair::table
        .find(id)
        .select((
            feed_repair::started_by,
            feed_repair::started_at,
            feed_repair::phase,
            feed_repair::after_id,
            feed_repair::after_key,
            (
                feed_repair::feed_rows_written,
                feed_repair::notifications_written,
                feed_repair::feed_rows_removed,
                feed_repair::notifications_removed,
            ),
        ))
        .for_update()
        .first(conn)?;
    let (feed_rows_written, notifications_written, feed_rows_removed, notifications_removed) = totals;
    let totals = Totals { feed_rows_written, notifications_written, feed_rows_removed, notifications_removed };
    Ok(Repair { id, started_by, started_at, phase: Phase::parse(&phase), after: (after_id, after_key), totals })
}

/// Repairs the next page and returns how the repair then stands; several sessions may take turns. To be run in a transaction
/// of its own.
pub fn step(conn: &mut PgConnection, id: i64) -> Result<Repair> {
    // Chunks under way take no longer, and what they leave behind is swept a minute after.
    sql_query("SET LOCAL statement_timeout = '15s'").execute(conn)?;
    sql_query("SET LOCAL lock_timeout = '2s'").execute(conn)?;
    let before = load(conn, id)?;
    let repair = page(conn, before, true)?;
    let Totals { feed_rows_written, notifications_written, feed_rows_removed, notifications_removed } = repair.totals;
    diesel::update(feed_repair::table.find(id))
        .set((
            feed_repair::phase.eq(repair.phase.column()),
            feed_repair::after_id.eq(repair.after.0),
            feed_repair::after_key.eq(&repair.after.1),
            feed_repair::feed_rows_written.eq(feed_rows_written),
            feed_repair::notifications_written.eq(notifications_written),
            feed_repair::feed_rows_removed.eq(feed_rows_removed),
            feed_repair::notifications_removed.eq(notifications_removed),
            feed_repair::updated_at.eq(diesel::dsl::now),
            feed_repair::finished_at.eq(repair.is_over().then(Utc::now)),
        ))
        .execute(conn)?;
    Ok(repair)
}

/// Counts what the next page of a rehearsal would do. To be run in a transaction of its own.
pub fn rehearse(conn: &mut PgConnection, repair: &Repair) -> Result<Repair> {
    page(conn, repair.clone(), false)
}

fn page(conn: &mut PgConnection, mut repair: Repair, write: bool) -> Result<Repair> {
    let (id, key) = &repair.after;
    let after = match repair.phase {
        Phase::Missing => write_missing(conn, (*id, number(key)), &mut repair.totals, write)?,
        Phase::Feeds => remove_feed_rows(conn, (*id, number(key)), &mut repair.totals, write)?,
        Phase::Notifications(channel) => {
            remove_notifications(conn, channel, (*id, key.clone()), &mut repair.totals, write)?
        }
        Phase::Over => None,
    };
    match after {
        Some(after) => repair.after = after,
        None => (repair.phase, repair.after) = (repair.phase.next(), (0, String::new())),
    }
    Ok(repair)
}

/// The second part of a key of numbers.
fn number(key: &str) -> i64 {
    key.parse().unwrap_or(0)
}

/// How many pairs of a tweet and a follower, or rows, one transaction looks at.
const PAGE: i64 = 20_000;

/// How many tweets it looks at, however few followers they have.
const TWEETS: i64 = 1000;

#[derive(QueryableByName)]
struct Chunk {
    #[diesel(sql_type = BigInt)]
    tweet_id: i64,
    #[diesel(sql_type = BigInt)]
    after: i64,
    #[diesel(sql_type = BigInt)]
    upto: i64,
    /// What of the page is left after it.
    #[diesel(sql_type = BigInt)]
    room: i64,
}

/// The next tweets by id, each with a range of its author's followers: as many as a page has room for.
fn next_chunks(conn: &mut PgConnection, (tweet, follower): (i64, i64)) -> Result<Vec<Chunk>> {
    Ok(sql_query(
        "WITH RECURSIVE walk AS (
             -- What is left of the tweet that the last page ended with.
             SELECT $1 AS tweet_id, $2 AS after, chunk.upto, $3 - chunk.taken AS room, 1::bigint AS place
             FROM (SELECT coalesce(max(follower_id), $2) AS upto, count(*) AS taken
                   FROM (SELECT s.follower_id FROM tweet t JOIN subscription s ON s.author_id = t.author_id
                         WHERE t.id = $1 AND s.follower_id > $2 ORDER BY s.follower_id LIMIT $3) f) chunk
             UNION ALL
             SELECT t.id, 0, chunk.upto, walk.room - chunk.taken, walk.place + 1
             FROM walk
             CROSS JOIN LATERAL (
                 SELECT id, author_id FROM tweet
                 WHERE id > walk.tweet_id AND deleted_at IS NULL ORDER BY id LIMIT 1) t
             CROSS JOIN LATERAL (
                 SELECT coalesce(max(follower_id), 0) AS upto, count(*) AS taken
                 FROM (SELECT follower_id FROM subscription WHERE author_id = t.author_id
                       ORDER BY follower_id LIMIT walk.room) f) chunk
             WHERE walk.room > 0 AND walk.place <= $4)
         SELECT tweet_id, after, upto, room FROM walk",
    )
    .bind::<BigInt, _>(tweet)
    .bind::<BigInt, _>(follower)
    .bind::<BigInt, _>(PAGE)
    .bind::<BigInt, _>(TWEETS)
    .load(conn)?)
}

#[derive(QueryableByName)]
struct Missing {
    #[diesel(sql_type = BigInt)]
    tweet_id: i64,
    #[diesel(sql_type = BigInt)]
    after: i64,
    #[diesel(sql_type = BigInt)]
    upto: i64,
    #[diesel(sql_type = BigInt)]
    feed_rows: i64,
    #[diesel(sql_type = BigInt)]
    emails: i64,
    #[diesel(sql_type = BigInt)]
    texts: i64,
}

impl Missing {
    fn range(&self) -> FollowerRange {
        FollowerRange { after: UserId(self.after), upto: UserId(self.upto) }
    }

    fn of(&self, channel: Channel) -> i64 {
        match channel {
            Channel::Email => self.emails,
            Channel::Phone => self.texts,
        }
    }
}

/// What is missing in these chunks, by the rules that [`feeds::write`] and [`notifications::record_chunks`] write by. Every
/// look is one descent of an index.
fn missing(conn: &mut PgConnection, chunks: &[Chunk]) -> Result<Vec<Missing>> {
    let column = |of: fn(&Chunk) -> i64| chunks.iter().map(of).collect::<Vec<_>>();
    Ok(sql_query(format!(
        r#"SELECT * FROM (
               SELECT chunk.tweet_id, chunk.after, chunk.upto,
                      count(*) FILTER (WHERE s.since_tweet_id <= t.id AND f.yes IS NULL) AS feed_rows,
                      count(*) FILTER (WHERE u.channel = 'email' AND n.yes IS NULL) AS emails,
                      count(*) FILTER (WHERE u.channel = 'phone' AND n.yes IS NULL) AS texts
               FROM unnest($1, $2, $3) AS chunk (tweet_id, after, upto)
               JOIN tweet t ON t.id = chunk.tweet_id AND t.deleted_at IS NULL
               {live_author}
               CROSS JOIN LATERAL (
                   SELECT follower_id, since_tweet_id, after_tweet_id FROM subscription
                   WHERE author_id = t.author_id AND follower_id > chunk.after AND follower_id <= chunk.upto OFFSET 0) s
               LEFT JOIN LATERAL (
                   SELECT true AS yes FROM feed_entry
                   WHERE reader_id = s.follower_id AND tweet_id = t.id OFFSET 0) f ON true
               LEFT JOIN LATERAL (
                   SELECT channel FROM "user"
                   WHERE s.after_tweet_id < t.id AND id = s.follower_id AND deleted_at IS NULL OFFSET 0) u ON true
               LEFT JOIN LATERAL (
                   SELECT true AS yes FROM email_notification
                   WHERE u.channel = 'email' AND user_id = s.follower_id AND source = 'tweet' AND source_id = t.id::text
                   UNION ALL SELECT true FROM sms_notification
                   WHERE u.channel = 'phone' AND user_id = s.follower_id AND source = 'tweet' AND source_id = t.id::text
                   OFFSET 0) n ON true
               GROUP BY chunk.tweet_id, chunk.after, chunk.upto) counts
           WHERE feed_rows + emails + texts > 0 ORDER BY tweet_id, after"#,
        live_author = feeds::LIVE_AUTHOR,
    ))
    .bind::<Array<BigInt>, _>(column(|chunk| chunk.tweet_id))
    .bind::<Array<BigInt>, _>(column(|chunk| chunk.after))
    .bind::<Array<BigInt>, _>(column(|chunk| chunk.upto))
    .load(conn)?)
}

fn write_missing(
    conn: &mut PgConnection,
    after: (i64, i64),
    totals: &mut Totals,
    write: bool,
) -> Result<Option<(i64, String)>> {
    let chunks = next_chunks(conn, after)?;
    let missing = missing(conn, &chunks)?;
    let feed_rows: Vec<_> = missing
        .iter()
        .filter(|missing| missing.feed_rows > 0)
        .map(|missing| (TweetId(missing.tweet_id), missing.range()))
        .collect();
    totals.feed_rows_written += match write {
        true if feed_rows.is_empty() => 0,
        true => feeds::write(conn, &feed_rows)? as i64,
        false => missing.iter().map(|missing| missing.feed_rows).sum(),
    };
    for channel in Channel::ALL {
        let missing: Vec<_> = missing.iter().filter(|missing| missing.of(channel) > 0).collect();
        totals.notifications_written += match write {
            true if missing.is_empty() => 0,
            true => {
                let chunks = notification_chunks(conn, channel, &missing)?;
                notifications::record_chunks(conn, channel, &chunks.iter().collect::<Vec<_>>())? as i64
            }
            false => missing.iter().map(|missing| missing.of(channel)).sum(),
        };
    }
    Ok(chunks.last().and_then(|last| match last.room {
        // The page ended somewhere in this tweet's followers.
        ..=0 => Some((last.tweet_id, last.upto.to_string())),
        _ if chunks.len() as i64 > TWEETS => Some((last.tweet_id, i64::MAX.to_string())),
        _ => None,
    }))
}

/// What the notifiers would have got.
fn notification_chunks(
    conn: &mut PgConnection,
    channel: Channel,
    missing: &[&Missing],
) -> Result<Vec<SendNotificationChunk>> {
    const INVALID: Error = Error::Conflict("a tweet that is there has no valid form");
    type Columns = (i64, i64, String, String, DateTime<Utc>);
    let tweets: Vec<Columns> = tweet::table
        .inner_join(user::table)
        .filter(tweet::id.eq_any(missing.iter().map(|missing| missing.tweet_id)))
        .select((tweet::id, tweet::author_id, user::login, tweet::text, tweet::created_at))
        .load(conn)?;
    let mut chunks = Vec::with_capacity(missing.len());
    for (id, author_id, login, text, created_at) in tweets {
        let tweet = Tweet {
            id: TweetId(id),
            author: Login::parse(&login).map_err(|_| INVALID)?,
            author_id: UserId(author_id),
            text: TweetText::parse(&text).map_err(|_| INVALID)?,
            created_at,
        };
        let its = missing.iter().filter(|missing| missing.tweet_id == id);
        chunks.extend(its.map(|missing| SendNotificationChunk::of(&tweet, missing.range(), channel)));
    }
    Ok(chunks)
}

fn remove_feed_rows(
    conn: &mut PgConnection,
    (reader, tweet): (i64, i64),
    totals: &mut Totals,
    write: bool,
) -> Result<Option<(i64, String)>> {
    #[derive(QueryableByName)]
    struct Row {
        #[diesel(sql_type = BigInt)]
        reader_id: i64,
        #[diesel(sql_type = BigInt)]
        tweet_id: i64,
        #[diesel(sql_type = Bool)]
        seen: bool,
    }
    let rows: Vec<Row> = sql_query(format!(
        "SELECT f.reader_id, f.tweet_id, seen.yes IS NOT NULL AS seen
         FROM (SELECT reader_id, tweet_id FROM feed_entry WHERE (reader_id, tweet_id) > ($1, $2)
               ORDER BY reader_id, tweet_id LIMIT $3) f
         {}
         ORDER BY 1, 2",
        feeds::SEEN
    ))
    .bind::<BigInt, _>(reader)
    .bind::<BigInt, _>(tweet)
    .bind::<BigInt, _>(PAGE)
    .load(conn)?;
    let extra: Vec<_> = rows.iter().filter(|row| !row.seen).map(|row| (row.reader_id, row.tweet_id)).collect();
    totals.feed_rows_removed += match write {
        true if extra.is_empty() => 0,
        true => feeds::remove_unseen(conn, &extra)? as i64,
        false => extra.len() as i64,
    };
    Ok(rows.last().map(|last| (last.reader_id, last.tweet_id.to_string())))
}

fn remove_notifications(
    conn: &mut PgConnection,
    channel: Channel,
    (user, source_id): (i64, String),
    totals: &mut Totals,
    write: bool,
) -> Result<Option<(i64, String)>> {
    #[derive(QueryableByName)]
    struct Row {
        #[diesel(sql_type = BigInt)]
        user_id: i64,
        #[diesel(sql_type = Text)]
        source_id: String,
        #[diesel(sql_type = Bool)]
        extra: bool,
    }
    let table = notifications::table(channel);
    // What has been sent, or is being sent, is known by nothing else than its row.
    let rows: Vec<Row> = sql_query(format!(
        r#"SELECT n.user_id, n.source_id, n.state = 'recorded' AND due.yes IS NULL AS extra
           FROM (SELECT user_id, source_id, state FROM {table}
                 WHERE (user_id, source, source_id) > ($1, 'tweet', $2) AND source = 'tweet'
                 ORDER BY user_id, source, source_id LIMIT $3) n
           LEFT JOIN LATERAL (
               SELECT id, author_id FROM tweet
               WHERE id = CASE WHEN n.source_id ~ '^[1-9][0-9]{{0,17}}$' THEN n.source_id::bigint END OFFSET 0) t ON true
           LEFT JOIN LATERAL (
               SELECT true AS yes
               FROM (SELECT id FROM "user" WHERE id = n.user_id AND channel = $4 OFFSET 0) u
               CROSS JOIN LATERAL (
                   SELECT 1 FROM subscription
                   WHERE author_id = t.author_id AND follower_id = u.id AND after_tweet_id < t.id
                   UNION ALL SELECT 1 FROM former_subscription
                   WHERE author_id = t.author_id AND follower_id = u.id AND after_tweet_id < t.id AND t.id <= upto_tweet_id
               ) s LIMIT 1) due ON true
           ORDER BY 1, n.source_id"#
    ))
    .bind::<BigInt, _>(user)
    .bind::<Text, _>(source_id)
    .bind::<BigInt, _>(PAGE)
    .bind::<Text, _>(channel.as_str())
    .load(conn)?;
    let extra: Vec<_> = rows.iter().filter(|row| row.extra).collect();
    totals.notifications_removed += match write {
        true if extra.is_empty() => 0,
        true => sql_query(format!(
            "WITH locked AS MATERIALIZED (
                 SELECT n.user_id, n.source_id FROM unnest($1, $2) AS extra (user_id, source_id)
                 CROSS JOIN LATERAL (
                     SELECT user_id, source_id FROM {table}
                     WHERE user_id = extra.user_id AND source = 'tweet' AND source_id = extra.source_id
                       AND state = 'recorded' FOR UPDATE OFFSET 0) n)
             DELETE FROM {table} n USING locked
             WHERE n.user_id = locked.user_id AND n.source = 'tweet' AND n.source_id = locked.source_id"
        ))
        .bind::<Array<BigInt>, _>(extra.iter().map(|row| row.user_id).collect::<Vec<_>>())
        .bind::<Array<Text>, _>(extra.iter().map(|row| row.source_id.as_str()).collect::<Vec<_>>())
        .execute(conn)? as i64,
        false => extra.len() as i64,
    };
    Ok(rows.last().map(|last| (last.user_id, last.source_id.clone())))
}
