//! Advisory locks, all in one place so that their keys can't collide: authors' locks use the author's id (positive), all
//! others a negative number.

use crate::Result;
use diesel::{PgConnection, RunQueryDsl, sql_query, sql_types::BigInt};
use domain::{UserId, stream::key_hash};

diesel::define_sql_function! {
    /// Takes the lock for the session, unless another has it; returns whether it did.
    fn pg_try_advisory_lock(key: BigInt) -> Bool;
}

/// Held by the session that changes the schema.
pub(crate) const MIGRATIONS: i64 = -1;

/// Held by the session of a relay that sleeps, and side by side by whoever inserts: see the migration `wake_relay`.
pub(crate) const OUTBOX_SLEEP: i64 = -3;
/// The same for the message log's.
pub(crate) const MESSAGE_OUTBOX_SLEEP: i64 = -4;

/// Held to the end of the transaction by whoever changes what services may do.
pub(crate) const RIGHTS: i64 = -5;

/// Held to the end of the transaction by whoever posts for `author`: alone, so that every follower is either in the
/// fan-out's view or finds the tweet when following.
pub(crate) fn author_for_posting(conn: &mut PgConnection, author: UserId) -> Result<()> {
    sql_query("SELECT pg_advisory_xact_lock($1)").bind::<BigInt, _>(author.0).execute(conn)?;
    Ok(())
}

/// Held to the end of the transaction by whoever changes who follows `author`: side by side with others of its kind.
pub(crate) fn author_for_following(conn: &mut PgConnection, author: UserId) -> Result<()> {
    sql_query("SELECT pg_advisory_xact_lock_shared($1)").bind::<BigInt, _>(author.0).execute(conn)?;
    Ok(())
}

/// A stream's, below all others.
fn stream(name: &str) -> i64 {
    -(1 << 32) - i64::from(key_hash(name))
}

/// Held to the end of the transaction by whoever appends to a stream: side by side with others of its kind.
pub(crate) fn stream_for_appending(conn: &mut PgConnection, name: &str) -> Result<()> {
    sql_query("SELECT pg_advisory_xact_lock_shared($1)").bind::<BigInt, _>(stream(name)).execute(conn)?;
    Ok(())
}

/// Held to the end of the transaction by whoever changes how a stream is divided: alone, so that whoever appends
/// afterwards sees the change.
pub(crate) fn stream_for_dividing(conn: &mut PgConnection, name: &str) -> Result<()> {
    sql_query("SELECT pg_advisory_xact_lock($1)").bind::<BigInt, _>(stream(name)).execute(conn)?;
    Ok(())
}

/// Held by the session that is resharding a stream, or, by the name of its exchange, adding partitions to the message log;
/// below those of the streams.
pub(crate) fn resharding(name: &str) -> i64 {
    -(1 << 33) - i64::from(key_hash(name))
}
