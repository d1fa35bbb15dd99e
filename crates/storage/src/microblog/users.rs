//! Table `user`.

use crate::{
    Error, Result,
    garbage::SWEEP_DELAY,
    schema::{subscription, user},
};
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    dsl::{exists, select},
    prelude::*,
    result::{DatabaseErrorKind, Error as Diesel},
    sql_query,
    sql_types::{Array, BigInt, Bool, Integer, Nullable, Text},
};
use domain::{
    ImportId, UserId,
    values::{Contact, Login, mailbox_prefix},
};
use std::ops::Range;

/// A user who isn't deleted. Its debug output holds no personal data.
#[derive(Clone, Queryable, Selectable)]
#[diesel(table_name = user, check_for_backend(diesel::pg::Pg))]
pub struct User {
    /// The id.
    #[diesel(deserialize_as = i64)]
    pub id: UserId,
    /// The login.
    pub login: String,
    /// Where notifications go, if by e-mail.
    pub email: Option<String>,
    /// Where notifications go, if by SMS.
    pub phone: Option<String>,
    /// In years.
    pub age: Option<i16>,
    /// As the client set it; nothing follows from it.
    pub is_active: bool,
    /// A JSON array of strings.
    pub roles: serde_json::Value,
    /// Path of the avatar at the gateway.
    pub avatar_link: Option<String>,
    /// When the user was made.
    pub created_at: DateTime<Utc>,
    /// When the row last changed.
    pub updated_at: DateTime<Utc>,
}

/// A user to be made.
pub struct NewUser<'a> {
    /// The login, not yet taken.
    pub login: &'a Login,
    /// Where notifications go.
    pub contact: &'a Contact,
    /// The password's argon2id hash in PHC form; without one the user can't log in.
    pub password_hash: Option<&'a str>,
    /// In years.
    pub age: Option<i16>,
    /// As the client says.
    pub is_active: bool,
    /// Names of roles.
    pub roles: &'a [String],
}

/// Makes a user.
///
/// # Errors
/// [`Error::Taken`] when somebody has the login.
pub fn create(conn: &mut PgConnection, new: &NewUser<'_>) -> Result<User> {
    let (email, phone) = match new.contact {
        Contact::Email(email) => (Some(email.as_str()), None),
        Contact::Phone(phone) => (None, Some(phone.as_str())),
    };
    diesel::insert_into(user::table)
        .values((
            user::login.eq(new.login.as_str()),
            user::channel.eq(new.contact.channel().as_str()),
            user::email.eq(email),
            user::phone.eq(phone),
            user::password_hash.eq(new.password_hash),
            user::age.eq(new.age),
            user::is_active.eq(new.is_active),
            user::roles.eq(serde_json::json!(new.roles)),
        ))
        // A violated constraint would be an error in the server's log, whenever a client likes.
        .on_conflict(user::login)
        .filter_target(user::deleted_at.is_null())
        .do_nothing()
        .returning(User::as_returning())
        .get_result(conn)
        .optional()?
        .ok_or(Error::Taken("login"))
}

#[derive(QueryableByName)]
struct Id {
    #[diesel(sql_type = BigInt)]
    id: i64,
}

/// Makes the users `<prefix>_<i>` for each `i` in the range, in one statement, and returns who is new: a login that is
/// taken is passed over. Every other one has a phone, of the range +999 that the numbering plan assigns to nobody; the
/// others an e-mail address at example.com, which is made of the login. To be run in a transaction.
pub fn create_series(
    conn: &mut PgConnection,
    prefix: &str,
    range: Range<i32>,
    import: Option<ImportId>,
) -> Result<Vec<UserId>> {
    let made = sql_query(
        r#"INSERT INTO "user" (login, channel, email, phone, import_id)
           SELECT login,
                  CASE i % 2 WHEN 0 THEN 'email' ELSE 'phone' END,
                  CASE i % 2 WHEN 0 THEN $5 || '_' || i || '@example.com' END,
                  CASE i % 2 WHEN 1 THEN
                      '+999' || lpad(((coalesce($4, 0) * 10000000 + i) % 1000000000000)::text, 12, '0') END,
                  $4
           FROM generate_series($1, $2 - 1) i, LATERAL (SELECT $3 || '_' || i AS login) named
           ORDER BY i
           ON CONFLICT (login) WHERE deleted_at IS NULL DO NOTHING
           RETURNING id"#,
    )
    .bind::<Integer, _>(range.start)
    .bind::<Integer, _>(range.end)
    .bind::<Text, _>(prefix)
    .bind::<Nullable<BigInt>, _>(import.map(|id| id.0))
    .bind::<Text, _>(mailbox_prefix(prefix))
    .load::<Id>(conn)?;
    Ok(made.into_iter().map(|user| UserId(user.id)).collect())
}

fn taken(error: Diesel) -> Error {
    match error {
        Diesel::DatabaseError(DatabaseErrorKind::UniqueViolation, ref info)
            if info.constraint_name() == Some("user_login_key") =>
        {
            Error::Taken("login")
        }
        error => error.into(),
    }
}

fn found(changed: usize) -> Result<()> {
    if changed == 0 { Err(Error::NotFound("user")) } else { Ok(()) }
}

/// The user with this id.
///
/// # Errors
/// [`Error::NotFound`].
pub fn by_id(conn: &mut PgConnection, id: UserId) -> Result<User> {
    user::table
        .filter(user::id.eq(id.0).and(user::deleted_at.is_null()))
        .select(User::as_select())
        .first(conn)
        .optional()?
        .ok_or(Error::NotFound("user"))
}

/// The user with this login.
///
/// # Errors
/// [`Error::NotFound`].
pub fn by_login(conn: &mut PgConnection, login: &str) -> Result<User> {
    user::table
        .filter(user::login.eq(login).and(user::deleted_at.is_null()))
        .select(User::as_select())
        .first(conn)
        .optional()?
        .ok_or(Error::NotFound("user"))
}

/// Users in order of their ids, `limit` of them after `offset`.
pub fn page(conn: &mut PgConnection, offset: i64, limit: i64) -> Result<Vec<User>> {
    Ok(user::table
        .filter(user::deleted_at.is_null())
        .order(user::id)
        .offset(offset)
        .limit(limit)
        .select(User::as_select())
        .load(conn)?)
}

/// The first `limit` users who have followers, by id.
pub fn followed(conn: &mut PgConnection, limit: i64) -> Result<Vec<UserId>> {
    let followed: Vec<i64> = user::table
        .select(user::id)
        .filter(user::deleted_at.is_null())
        .filter(exists(subscription::table.filter(subscription::author_id.eq(user::id))))
        .order(user::id)
        .limit(limit)
        .load(conn)?;
    Ok(followed.into_iter().map(UserId).collect())
}

/// Whether the user is there and not deleted.
///
/// # Errors
/// [`Error::NotFound`] when not.
pub fn require(conn: &mut PgConnection, id: UserId) -> Result<()> {
    // Every column that a statement names takes a right to it, and `exists` alone names all.
    let there = user::table.select(user::id).filter(user::id.eq(id.0).and(user::deleted_at.is_null()));
    let there = select(exists(there)).get_result::<bool>(conn)?;
    found(there.into())
}

/// Whether every one of these users has ever been made; deleted ones count.
///
/// # Errors
/// [`Error::NotFound`] when one hasn't.
pub fn require_known(conn: &mut PgConnection, ids: &[UserId]) -> Result<()> {
    let ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
    let unknown = sql_query(
        r#"SELECT count(*) AS n FROM unnest($1) AS wanted (id)
           WHERE NOT EXISTS (SELECT FROM "user" u WHERE u.id = wanted.id)"#,
    )
    .bind::<Array<BigInt>, _>(ids)
    .get_result::<crate::Count>(conn)?;
    if unknown.n == 0 { Ok(()) } else { Err(Error::NotFound("user")) }
}

#[derive(QueryableByName)]
struct Renamed {
    #[diesel(sql_type = Bool)]
    renamed: bool,
    #[diesel(sql_type = Bool)]
    known: bool,
}

/// Changes the login.
///
/// # Errors
/// [`Error::NotFound`], [`Error::Taken`].
pub fn rename(conn: &mut PgConnection, id: UserId, login: &Login) -> Result<()> {
    // Asks first, so that only who takes the login at the same moment makes this violate the constraint.
    let Renamed { renamed, known } = sql_query(
        r#"WITH renamed AS (
               UPDATE "user" SET login = $2, updated_at = now()
               WHERE id = $1 AND deleted_at IS NULL
                 AND NOT EXISTS (SELECT FROM "user" other WHERE other.login = $2 AND other.deleted_at IS NULL AND other.id <> $1)
               RETURNING id)
           SELECT EXISTS (SELECT FROM renamed) AS renamed,
                  EXISTS (SELECT FROM "user" WHERE id = $1 AND deleted_at IS NULL) AS known"#,
    )
    .bind::<BigInt, _>(id.0)
    .bind::<Text, _>(login.as_str())
    .get_result(conn)
    .map_err(taken)?;
    match (renamed, known) {
        (true, _) => Ok(()),
        (false, true) => Err(Error::Taken("login")),
        (false, false) => Err(Error::NotFound("user")),
    }
}

/// Marks the user as deleted. The login is free again, the tweets leave every feed, notifications stop; the sweep removes
/// the rows of both, and ends what the user follows. What is personal stays for some days: see [`crate::erasure`].
///
/// # Errors
/// [`Error::NotFound`], also when it's deleted already.
pub fn delete(conn: &mut PgConnection, id: UserId) -> Result<()> {
    let changed = sql_query(format!(
        r#"WITH gone AS (UPDATE "user" SET deleted_at = now() WHERE id = $1 AND deleted_at IS NULL RETURNING id)
           INSERT INTO feed_garbage (author_id, follower_id, due_at)
           SELECT author_id, follower_id, clock_timestamp() + {SWEEP_DELAY}
           FROM gone CROSS JOIN LATERAL (VALUES (id, NULL), (NULL, id)) piece (author_id, follower_id)"#
    ))
    .bind::<BigInt, _>(id.0)
    .execute(conn)?;
    found(changed)
}
