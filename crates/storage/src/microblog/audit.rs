//! Recomputes from users, subscriptions and tweets what the derived tables must hold, and says where they don't.
//!
//! Meaningful when the fleet is at rest: while messages are under way, what they will bring is missing.

use crate::{Count, Result};
use diesel::{
    PgConnection, RunQueryDsl, sql_query,
    sql_types::{BigInt, Text},
};

/// A kind of discrepancy, and a few of its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was checked, such as `feed rows missing`.
    pub check: &'static str,
    /// How many rows are wrong.
    pub count: u64,
    /// Some of them, described by ids.
    pub examples: Vec<String>,
}

#[derive(diesel::QueryableByName)]
struct Row {
    #[diesel(sql_type = Text)]
    example: String,
}

/// Each check's rows are the discrepancies themselves, each described by ids alone.
const CHECKS: &[(&str, &str)] = &[
    (
        "feed rows missing",
        r#"SELECT 'reader ' || s.follower_id || ', tweet ' || t.id AS example
         FROM subscription s
         JOIN tweet t ON t.author_id = s.author_id AND t.id >= s.since_tweet_id AND t.deleted_at IS NULL
         JOIN "user" a ON a.id = s.author_id AND a.deleted_at IS NULL
         WHERE NOT EXISTS (SELECT FROM feed_entry f WHERE f.reader_id = s.follower_id AND f.tweet_id = t.id)"#,
    ),
    (
        // What was left behind by a tweet or an author deleted, or an author left, stays unseen until the sweep; anything
        // else that the rule doesn't give has no business there.
        "feed rows extra",
        r#"SELECT 'reader ' || f.reader_id || ', tweet ' || f.tweet_id AS example
         FROM feed_entry f
         LEFT JOIN tweet t ON t.id = f.tweet_id
         LEFT JOIN subscription s
             ON s.author_id = t.author_id AND s.follower_id = f.reader_id AND s.since_tweet_id <= t.id
         WHERE t.id IS NULL
            OR (t.deleted_at IS NULL AND s.follower_id IS NULL AND NOT EXISTS (
                SELECT FROM former_subscription e WHERE e.author_id = t.author_id AND e.follower_id = f.reader_id)
                AND NOT EXISTS (SELECT FROM "user" a WHERE a.id = t.author_id AND a.deleted_at IS NOT NULL))"#,
    ),
    (
        "notifications missing",
        r#"SELECT u.channel || ' of user ' || u.id || ', tweet ' || t.id AS example
         FROM subscription s
         JOIN tweet t ON t.author_id = s.author_id AND s.after_tweet_id < t.id AND t.deleted_at IS NULL
         JOIN "user" a ON a.id = s.author_id AND a.deleted_at IS NULL
         JOIN "user" u ON u.id = s.follower_id AND u.deleted_at IS NULL
         WHERE NOT EXISTS (
             SELECT FROM email_notification n
             WHERE n.user_id = u.id AND n.source = 'tweet' AND n.source_id = t.id::text AND u.channel = 'email')
           AND NOT EXISTS (
             SELECT FROM sms_notification n
             WHERE n.user_id = u.id AND n.source = 'tweet' AND n.source_id = t.id::text AND u.channel = 'phone')"#,
    ),
    (
        "notifications extra",
        r#"SELECT n.channel || ' of user ' || n.user_id || ', tweet ' || n.source_id AS example
         FROM (SELECT user_id, source, source_id, 'email' AS channel FROM email_notification
               UNION ALL SELECT user_id, source, source_id, 'phone' FROM sms_notification) n
         LEFT JOIN tweet t ON t.id::text = n.source_id
         LEFT JOIN "user" u ON u.id = n.user_id AND u.channel = n.channel
         WHERE n.source = 'tweet'
           AND (t.id IS NULL OR u.id IS NULL OR NOT EXISTS (
               SELECT FROM subscription s
               WHERE s.author_id = t.author_id AND s.follower_id = n.user_id AND s.after_tweet_id < t.id
               UNION ALL
               SELECT FROM former_subscription s
               WHERE s.author_id = t.author_id AND s.follower_id = n.user_id
                 AND s.after_tweet_id < t.id AND t.id <= s.upto_tweet_id))"#,
    ),
    (
        // The keys of the tables exclude doubles within a channel, as long as they're there.
        "notifications doubled",
        "SELECT 'user ' || user_id || ', ' || source || ' ' || source_id || ', ' || count(*) || ' times' AS example
         FROM (SELECT user_id, source, source_id FROM email_notification
               UNION ALL SELECT user_id, source, source_id FROM sms_notification) n
         GROUP BY user_id, source, source_id HAVING count(*) > 1",
    ),
    (
        "feed rows doubled",
        "SELECT 'reader ' || reader_id || ', tweet ' || tweet_id || ', ' || count(*) || ' times' AS example
         FROM feed_entry GROUP BY reader_id, tweet_id HAVING count(*) > 1",
    ),
    (
        "imports that don't add up",
        r#"SELECT 'import ' || i.id AS example FROM follower_import i
         LEFT JOIN (SELECT import_id, count(*) AS users FROM "user" GROUP BY import_id) made ON made.import_id = i.id
         WHERE (i.state = 'done' AND i.next_index <> i.requested) OR i.created <> coalesce(made.users, 0)"#,
    ),
];

/// Runs every check; what it returns has a count of 0 where all is well. To be run in one repeatable-read
/// transaction, so that all checks see the same state.
pub fn run(conn: &mut PgConnection, mut progress: impl FnMut(&'static str)) -> Result<Vec<Finding>> {
    const EXAMPLES: i64 = 10;
    sql_query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY").execute(conn)?;
    sql_query("SET LOCAL statement_timeout = 0").execute(conn)?;
    let mut findings = Vec::new();
    for (check, query) in CHECKS {
        progress(check);
        let count = sql_query(format!("SELECT count(*) AS n FROM ({query}) q")).get_result::<Count>(conn)?.n;
        let rows: Vec<Row> = match count {
            0 => Vec::new(),
            _ => sql_query(format!("{query} LIMIT $1")).bind::<BigInt, _>(EXAMPLES).load(conn)?,
        };
        findings.push(Finding {
            check,
            count: u64::try_from(count).unwrap_or(0),
            examples: rows.into_iter().map(|row| row.example).collect(),
        });
    }
    Ok(findings)
}

/// How many checks [`run`] makes.
pub const CHECK_COUNT: usize = CHECKS.len();
