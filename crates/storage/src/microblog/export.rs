//! All that the tables hold of one user, for the user to have: every column but the password's hash.

use crate::{Error, Result};
use diesel::{PgConnection, prelude::*, sql_query, sql_types::Jsonb};
use domain::UserId;
use serde_json::Value;
use std::ops::ControlFlow;

/// The section that has one row exactly.
pub const USER: &str = "user";

/// What there is, in the order in which it's exported: a section's name, and its rows. `wanted` is the user.
const SECTIONS: [(&str, &str); 11] = [
    (
        USER,
        r#"SELECT to_jsonb(u) - 'password_hash' || jsonb_build_object('has_password', password_hash IS NOT NULL) AS row
           FROM "user" u JOIN wanted w ON u.id = w.id"#,
    ),
    (
        "avatar",
        r"SELECT to_jsonb(a) || jsonb_build_object('image', translate(encode(image, 'base64'), E'\n', '')) AS row
          FROM avatar a JOIN wanted w ON a.user_id = w.id",
    ),
    ("tweets", "SELECT to_jsonb(t) AS row FROM tweet t JOIN wanted w ON t.author_id = w.id ORDER BY t.id"),
    (
        "follows",
        "SELECT to_jsonb(s) AS row FROM subscription s JOIN wanted w ON s.follower_id = w.id ORDER BY s.author_id",
    ),
    (
        "followed",
        "SELECT to_jsonb(s) AS row FROM former_subscription s JOIN wanted w ON s.follower_id = w.id
         ORDER BY s.author_id, s.created_at",
    ),
    (
        "followers",
        "SELECT to_jsonb(s) AS row FROM subscription s JOIN wanted w ON s.author_id = w.id ORDER BY s.follower_id",
    ),
    (
        "former_followers",
        "SELECT to_jsonb(s) AS row FROM former_subscription s JOIN wanted w ON s.author_id = w.id
         ORDER BY s.follower_id, s.created_at",
    ),
    (
        "email_notifications",
        "SELECT to_jsonb(n) AS row FROM email_notification n JOIN wanted w ON n.user_id = w.id
         ORDER BY n.source, n.source_id",
    ),
    (
        "sms_notifications",
        "SELECT to_jsonb(n) AS row FROM sms_notification n JOIN wanted w ON n.user_id = w.id
         ORDER BY n.source, n.source_id",
    ),
    (
        "follower_imports",
        "SELECT to_jsonb(i) AS row FROM follower_import i JOIN wanted w ON i.author_id = w.id ORDER BY i.id",
    ),
    (
        "dead_letters",
        r"SELECT to_jsonb(d) || jsonb_build_object('body', translate(encode(body, 'base64'), E'\n', '')) AS row
          FROM dead_letter d JOIN wanted w ON users_in_message(d.body) @> ARRAY[w.id] ORDER BY d.id",
    ),
];

/// What the sections are called.
pub fn sections() -> impl Iterator<Item = &'static str> {
    SECTIONS.iter().map(|(name, _)| *name)
}

#[derive(QueryableByName)]
struct Row {
    #[diesel(sql_type = Jsonb)]
    row: Value,
}

/// Hands out each row of each section until `take` breaks, a page at a time, all as they were at one moment. What is of the user
/// alone can't be of any size, but notifications and followers may be millions.
///
/// # Errors
/// [`Error::NotFound`] when there's no such user.
pub fn run(
    conn: &mut PgConnection,
    id: UserId,
    mut take: impl FnMut(&'static str, Value) -> ControlFlow<()>,
) -> Result<()> {
    conn.transaction(|conn| {
        sql_query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY").execute(conn)?;
        for (section, rows) in SECTIONS {
            let id = id.0;
            sql_query(format!(
                "DECLARE exported NO SCROLL CURSOR FOR WITH wanted AS (SELECT {id}::bigint AS id) {rows}"
            ))
            .execute(conn)?;
            let mut found = false;
            loop {
                let page: Vec<Row> = sql_query("FETCH 1000 FROM exported").load(conn)?;
                if page.is_empty() {
                    break;
                }
                found = true;
                for Row { row } in page {
                    if take(section, row).is_break() {
                        return Ok(());
                    }
                }
            }
            sql_query("CLOSE exported").execute(conn)?;
            if section == USER && !found {
                return Err(Error::NotFound("user"));
            }
        }
        Ok(())
    })
}
