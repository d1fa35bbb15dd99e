//! Tables `lease` and `member`: who may work on what, for how long.
//!
//! A lease gives locality, not safety: a holder that freezes past its end may still believe in it, so what it does is to be
//! guarded where it takes effect. Times are the database's.

use crate::{
    Result,
    schema::{lease, member},
};
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Bool, Nullable, Text, Timestamptz},
};
use std::time::Duration;

fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Says that the member is there, forgets those that haven't said so for as long as `ttl`, and returns the others with
/// it, sorted. A row that another session holds stays as it is, and its member a member: nobody waits for it.
pub fn attend(conn: &mut PgConnection, service: &str, holder: &str, ttl: Duration) -> Result<Vec<String>> {
    sql_query(
        "WITH own AS (
             SELECT service, holder FROM member WHERE service = $1 AND holder = $2 FOR UPDATE SKIP LOCKED),
         seen AS (
             UPDATE member m SET seen_at = clock_timestamp() FROM own
             WHERE m.service = own.service AND m.holder = own.holder)
         INSERT INTO member (service, holder, seen_at)
         SELECT $1, $2, clock_timestamp()
         WHERE NOT EXISTS (SELECT FROM member WHERE service = $1 AND holder = $2) ON CONFLICT DO NOTHING",
    )
    .bind::<Text, _>(service)
    .bind::<Text, _>(holder)
    .execute(conn)?;
    // Whoever is just coming back keeps its row.
    sql_query(
        "DELETE FROM member WHERE (service, holder) IN (
             SELECT service, holder FROM member
             WHERE service = $1 AND seen_at < clock_timestamp() - $2 * interval '1 ms' FOR UPDATE SKIP LOCKED)",
    )
    .bind::<Text, _>(service)
    .bind::<BigInt, _>(ms(ttl))
    .execute(conn)?;
    Ok(member::table.filter(member::service.eq(service)).select(member::holder).order(member::holder).load(conn)?)
}

/// Takes the member off the list. Its leases stay.
pub fn depart(conn: &mut PgConnection, service: &str, holder: &str) -> Result<()> {
    sql_query(
        "DELETE FROM member WHERE (service, holder) IN (
             SELECT service, holder FROM member WHERE service = $1 AND holder = $2 FOR UPDATE SKIP LOCKED)",
    )
    .bind::<Text, _>(service)
    .bind::<Text, _>(holder)
    .execute(conn)?;
    Ok(())
}

/// Takes the member off the list, with all its leases: others may have them at once. What another session holds of it runs
/// out by itself.
pub fn leave(conn: &mut PgConnection, service: &str, holder: &str) -> Result<()> {
    depart(conn, service, holder)?;
    give_back(conn, holder, None)
}

/// Gives back the holder's leases, or those of them on these resources, but for rows that another session holds.
fn give_back(conn: &mut PgConnection, holder: &str, resources: Option<&[&str]>) -> Result<()> {
    sql_query(
        "UPDATE lease SET holder = NULL
         FROM (SELECT resource FROM lease WHERE holder = $1 AND ($2 IS NULL OR resource = ANY ($2))
               FOR UPDATE SKIP LOCKED) own
         WHERE lease.resource = own.resource",
    )
    .bind::<Text, _>(holder)
    .bind::<Nullable<Array<Text>>, _>(resources)
    .execute(conn)?;
    Ok(())
}

#[derive(QueryableByName)]
struct Resource {
    #[diesel(sql_type = Text)]
    resource: String,
}

/// Makes the holder's leases run from now on for `ttl`, and returns which they are. One that has run out counts too, as
/// long as nobody else has taken it; and so does one whose row another session holds, for nobody can take it meanwhile.
pub fn renew(conn: &mut PgConnection, holder: &str, ttl: Duration) -> Result<Vec<String>> {
    let renewed: Vec<Resource> = sql_query(
        "WITH free AS (SELECT resource FROM lease WHERE holder = $1 FOR UPDATE SKIP LOCKED),
         renewed AS (
             UPDATE lease SET expires_at = clock_timestamp() + $2 * interval '1 ms'
             FROM free WHERE lease.resource = free.resource)
         SELECT resource FROM lease WHERE holder = $1",
    )
    .bind::<Text, _>(holder)
    .bind::<BigInt, _>(ms(ttl))
    .load(conn)?;
    Ok(renewed.into_iter().map(|row| row.resource).collect())
}

/// A lease that was taken.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Claimed {
    /// What it's for.
    #[diesel(sql_type = Text)]
    pub resource: String,
    /// When it was taken from a holder who let it run out, and has likely died. `None` if it was free.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub taken_over_at: Option<DateTime<Utc>>,
}

/// Takes up to `limit` of the resources that nobody holds, or whose lease has run out.
pub fn claim(
    conn: &mut PgConnection,
    holder: &str,
    ttl: Duration,
    resources: &[&str],
    limit: i64,
) -> Result<Vec<Claimed>> {
    announce(conn, resources)?;
    Ok(sql_query(
        "WITH free AS (
             SELECT resource, holder FROM lease
             WHERE resource = ANY ($3) AND (holder IS NULL OR (holder <> $1 AND expires_at < clock_timestamp()))
             ORDER BY resource LIMIT $4 FOR UPDATE SKIP LOCKED)
         UPDATE lease SET holder = $1, expires_at = clock_timestamp() + $2 * interval '1 ms'
         FROM free WHERE lease.resource = free.resource
         RETURNING lease.resource, CASE WHEN free.holder IS NOT NULL THEN clock_timestamp() END AS taken_over_at",
    )
    .bind::<Text, _>(holder)
    .bind::<BigInt, _>(ms(ttl))
    .bind::<Array<Text>, _>(resources)
    .bind::<BigInt, _>(limit)
    .load(conn)?)
}

/// Says that there are these resources, for anybody to take.
pub fn announce(conn: &mut PgConnection, resources: &[&str]) -> Result<()> {
    sql_query(
        "INSERT INTO lease (resource, expires_at) SELECT resource, clock_timestamp() FROM unnest($1) AS new (resource)
         WHERE NOT EXISTS (SELECT FROM lease WHERE lease.resource = new.resource) ORDER BY 1 ON CONFLICT DO NOTHING",
    )
    .bind::<Array<Text>, _>(resources)
    .execute(conn)?;
    Ok(())
}

/// Says that there aren't these resources any more, unless somebody has them.
pub fn remove(conn: &mut PgConnection, resources: &[&str]) -> Result<()> {
    sql_query("DELETE FROM lease WHERE resource = ANY ($1) AND (holder IS NULL OR expires_at < clock_timestamp())")
        .bind::<Array<Text>, _>(resources)
        .execute(conn)?;
    Ok(())
}

/// Gives leases back, if they are still the holder's.
pub fn release(conn: &mut PgConnection, holder: &str, resources: &[&str]) -> Result<()> {
    give_back(conn, holder, Some(resources))
}

/// What lasts for longer than it may, since the clock was set back: leases that would outlive a holder who has died, and
/// members who would count for as long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shortened {
    /// Leases.
    pub leases: usize,
    /// Members.
    pub members: usize,
}

/// Has the leases on these resources, and the service's members, last no longer than from now on: whoever is there renews
/// them in time, and whoever isn't is missed as usual. To be called before [`attend`] and [`claim`]. Twice as long as `ttl` is
/// let pass, for whoever was given a longer one lately.
pub fn shorten(conn: &mut PgConnection, service: &str, ttl: Duration, resources: &[&str]) -> Result<Shortened> {
    let members = sql_query(
        "UPDATE member SET seen_at = clock_timestamp()
         FROM (SELECT service, holder FROM member
               WHERE service = $1 AND seen_at > clock_timestamp() + $2 * interval '1 ms' FOR UPDATE SKIP LOCKED) late
         WHERE member.service = late.service AND member.holder = late.holder",
    )
    .bind::<Text, _>(service)
    .bind::<BigInt, _>(ms(ttl))
    .execute(conn)?;
    let leases = shorten_leases(conn, ttl, resources)?;
    Ok(Shortened { leases, members })
}

/// The same for leases alone; returns how many there were.
pub fn shorten_leases(conn: &mut PgConnection, ttl: Duration, resources: &[&str]) -> Result<usize> {
    Ok(sql_query(
        "UPDATE lease SET expires_at = clock_timestamp() + $1 * interval '1 ms'
         FROM (SELECT resource FROM lease
               WHERE resource = ANY ($2) AND holder IS NOT NULL
                 AND expires_at > clock_timestamp() + 2 * $1 * interval '1 ms' FOR UPDATE SKIP LOCKED) late
         WHERE lease.resource = late.resource",
    )
    .bind::<BigInt, _>(ms(ttl))
    .bind::<Array<Text>, _>(resources)
    .execute(conn)?)
}

/// A lease as it stands.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Lease {
    /// What it's for.
    #[diesel(sql_type = Text)]
    pub resource: String,
    /// Who has it.
    #[diesel(sql_type = Nullable<Text>)]
    pub holder: Option<String>,
    /// Whether it has run out.
    #[diesel(sql_type = Bool)]
    pub expired: bool,
}

/// The leases on these resources that there have been so far, sorted.
pub fn list(conn: &mut PgConnection, resources: &[&str]) -> Result<Vec<Lease>> {
    Ok(sql_query(
        "SELECT resource, holder, expires_at < clock_timestamp() AS expired FROM lease WHERE resource = ANY ($1)
         ORDER BY resource",
    )
    .bind::<Array<Text>, _>(resources)
    .load(conn)?)
}

/// A member of a service.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Member {
    /// Its name.
    #[diesel(sql_type = Text)]
    pub holder: String,
    /// How long ago it said that it's there.
    #[diesel(sql_type = BigInt)]
    pub seen_ms_ago: i64,
}

/// The members of a service, sorted, those included that have died lately.
pub fn members(conn: &mut PgConnection, service: &str) -> Result<Vec<Member>> {
    Ok(sql_query(
        "SELECT holder, (extract(epoch FROM clock_timestamp() - seen_at) * 1000)::bigint AS seen_ms_ago FROM member
         WHERE service = $1 ORDER BY holder",
    )
    .bind::<Text, _>(service)
    .load(conn)?)
}

/// The service whose members share these resources, as long as one of them holds any.
pub fn service(conn: &mut PgConnection, resources: &[&str]) -> Result<Option<String>> {
    let holders = lease::table.filter(lease::resource.eq_any(resources)).select(lease::holder);
    let service = member::table.filter(member::holder.nullable().eq_any(holders)).select(member::service);
    Ok(service.order(member::seen_at.desc()).first(conn).optional()?)
}
