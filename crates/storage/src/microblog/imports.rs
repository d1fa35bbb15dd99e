//! Table `follower_import`: users made in bulk who follow one author, with progress.

use crate::{Error, Result, schema::follower_import, subscriptions, users};
use chrono::{DateTime, Utc};
use diesel::{PgConnection, prelude::*};
use domain::{ImportId, UserId, values::ImportPlan};

/// An import and how far it is.
#[derive(Clone, Debug, Queryable, Selectable)]
#[diesel(table_name = follower_import, check_for_backend(diesel::pg::Pg))]
pub struct Import {
    /// The id.
    #[diesel(deserialize_as = i64)]
    pub id: ImportId,
    /// Whom the new users follow.
    #[diesel(deserialize_as = i64)]
    pub author_id: UserId,
    /// What their logins start with.
    pub prefix: String,
    /// How many are asked for.
    pub requested: i32,
    /// Logins below this index are done.
    pub next_index: i32,
    /// Users made, all of whom follow the author.
    pub created: i32,
    /// Logins that were somebody else's.
    pub skipped: i32,
    /// `pending`, `running`, `done` or `failed`.
    pub state: String,
    /// Why it failed.
    pub error: Option<String>,
    /// When it last went on.
    pub updated_at: DateTime<Utc>,
}

/// Why an import fails whose author is deleted before it's done.
const AUTHOR_DELETED: &str = "the author was deleted";

impl Import {
    /// Whether nothing more will come of it.
    pub fn is_over(&self) -> bool {
        self.state == "done" || self.state == "failed"
    }
}

/// The import with this request key: the one that is there, or a new one. To be run in a transaction.
///
/// # Errors
/// [`Error::NotFound`] when there's no such author.
pub fn open(conn: &mut PgConnection, request_key: &str, author: UserId, plan: &ImportPlan) -> Result<Import> {
    let existing = follower_import::table.filter(follower_import::request_key.eq(request_key));
    if let Some(import) = existing.select(Import::as_select()).first(conn).optional()? {
        return Ok(import);
    }
    users::require(conn, author)?;
    diesel::insert_into(follower_import::table)
        .values((
            follower_import::request_key.eq(request_key),
            follower_import::author_id.eq(author.0),
            follower_import::prefix.eq(plan.prefix()),
            follower_import::requested.eq(i64::from(plan.count()) as i32),
        ))
        .on_conflict_do_nothing()
        .execute(conn)?;
    Ok(existing.select(Import::as_select()).first(conn)?)
}

/// The import with this id.
///
/// # Errors
/// [`Error::NotFound`].
pub fn get(conn: &mut PgConnection, id: ImportId) -> Result<Import> {
    follower_import::table
        .find(id.0)
        .select(Import::as_select())
        .first(conn)
        .optional()?
        .ok_or(Error::NotFound("import"))
}

/// Makes the next at most `size` users and lets them follow; returns how the import then stands. What is done is done:
/// a step runs on from where the last one committed, whoever made it. Where the author is deleted, the import fails. To be
/// run in a transaction of its own.
///
/// # Errors
/// [`Error::NotFound`] when there's no such import.
pub fn step(conn: &mut PgConnection, id: ImportId, size: u32) -> Result<Import> {
    let import: Import = follower_import::table
        .find(id.0)
        .select(Import::as_select())
        .for_update()
        .first(conn)
        .optional()?
        .ok_or(Error::NotFound("import"))?;
    if import.is_over() {
        return Ok(import);
    }
    match users::require(conn, import.author_id) {
        Err(Error::NotFound(_)) => {
            fail(conn, id, AUTHOR_DELETED)?;
            return get(conn, id);
        }
        result => result?,
    }
    let size = i32::try_from(size.max(1)).unwrap_or(i32::MAX);
    let upto = import.next_index.saturating_add(size).min(import.requested);
    let made = users::create_series(conn, &import.prefix, import.next_index..upto, Some(id))?;
    subscriptions::add(conn, import.author_id, &made.iter().map(|user| user.0).collect::<Vec<_>>())?;
    let created = i32::try_from(made.len()).unwrap_or(i32::MAX);
    let skipped = upto - import.next_index - created;
    Ok(diesel::update(follower_import::table.find(id.0))
        .set((
            follower_import::next_index.eq(upto),
            follower_import::created.eq(import.created + created),
            follower_import::skipped.eq(import.skipped + skipped),
            follower_import::state.eq(if upto == import.requested { "done" } else { "running" }),
            follower_import::updated_at.eq(diesel::dsl::now),
        ))
        .returning(Import::as_returning())
        .get_result(conn)?)
}

/// Frees the request key of an import that is over, so that the same request is a new import from now on. Changes
/// nothing where it isn't over.
pub fn release(conn: &mut PgConnection, id: ImportId) -> Result<()> {
    diesel::update(follower_import::table.find(id.0).filter(follower_import::state.eq_any(["done", "failed"])))
        .set(follower_import::request_key.eq(format!("over:{id}")))
        .execute(conn)?;
    Ok(())
}

/// Ends an import that can't go on; what it did stays. Changes nothing where it's over already.
pub fn fail(conn: &mut PgConnection, id: ImportId, error: &str) -> Result<()> {
    diesel::update(follower_import::table.find(id.0))
        .filter(follower_import::state.eq_any(["pending", "running"]))
        .set((
            follower_import::state.eq("failed"),
            follower_import::error.eq(error),
            follower_import::updated_at.eq(diesel::dsl::now),
        ))
        .execute(conn)?;
    Ok(())
}
