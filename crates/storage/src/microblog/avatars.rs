//! Table `avatar`.

use crate::{
    Error, Result,
    schema::{avatar, user},
    users::{self, User},
};
use diesel::{PgConnection, prelude::*};
use domain::UserId;

/// Keeps the image as the user's avatar, in place of an earlier one, and notes the link to it.
///
/// # Errors
/// [`Error::NotFound`] when there's no such user.
pub fn put(conn: &mut PgConnection, id: UserId, content_type: &str, image: &[u8], link: &str) -> Result<User> {
    let changed = diesel::update(user::table.filter(user::id.eq(id.0).and(user::deleted_at.is_null())))
        .set((user::avatar_link.eq(link), user::updated_at.eq(diesel::dsl::now)))
        .execute(conn)?;
    if changed == 0 {
        return Err(Error::NotFound("user"));
    }
    let values = (avatar::content_type.eq(content_type), avatar::image.eq(image));
    diesel::insert_into(avatar::table)
        .values((avatar::user_id.eq(id.0), values))
        .on_conflict(avatar::user_id)
        .do_update()
        .set(values)
        .execute(conn)?;
    users::by_id(conn, id)
}

/// The content type and the image.
///
/// # Errors
/// [`Error::NotFound`].
pub fn get(conn: &mut PgConnection, id: UserId) -> Result<(String, Vec<u8>)> {
    avatar::table
        .inner_join(user::table)
        .filter(avatar::user_id.eq(id.0).and(user::deleted_at.is_null()))
        .select((avatar::content_type, avatar::image))
        .first(conn)
        .optional()?
        .ok_or(Error::NotFound("avatar"))
}
