//! Tables `stream`, `stream_head`, `stream_event` and `stream_cursor`: events that take effect strictly in order per key.
//!
//! A producer's [`append`] numbers the events of a key without a gap, in the order of the commits. A consumer's
//! [`advance`] moves the key's cursor from one event to the next, in the transaction of the effect, if nobody else has
//! done so. What is next is therefore always in the tables, whatever has become of a message.

use crate::{
    Error, Result, locks, outbox,
    schema::{stream, stream_head},
};
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Timestamptz},
};
use domain::stream::{Payload, StreamEvent as _, StreamKey, key_hash, shard};
use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

/// How a stream is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Queryable)]
pub struct Layout {
    /// Shards: a key belongs to `shard(key_hash, shards)`.
    pub shards: i32,
    /// Queues that exist; more than shards while a smaller number of shards is being brought about.
    pub queues: i32,
}

/// How the stream is divided.
///
/// # Errors
/// [`Error::NotFound`] when there's no such stream.
pub fn layout(conn: &mut PgConnection, name: &str) -> Result<Layout> {
    let row = stream::table.find(name).select((stream::shards, stream::queues)).first(conn).optional()?;
    row.ok_or(Error::NotFound("stream"))
}

/// Changes how the stream is divided, once every transaction that is appending by the old division is over. To be run in
/// a transaction of its own, in which others wait to append.
///
/// # Errors
/// [`Error::NotFound`] when there's no such stream.
pub fn divide(conn: &mut PgConnection, name: &str, layout: Layout) -> Result<()> {
    locks::stream_for_dividing(conn, name)?;
    let changed = diesel::update(stream::table.find(name))
        .set((stream::shards.eq(layout.shards), stream::queues.eq(layout.queues)))
        .execute(conn)?;
    if changed == 0 { Err(Error::NotFound("stream")) } else { Ok(()) }
}

/// The newest sequence of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head<K> {
    /// The key.
    pub key: K,
    /// Its newest sequence.
    pub seq: i64,
}

#[derive(QueryableByName)]
struct Numbered {
    #[diesel(sql_type = Text)]
    key: String,
    #[diesel(sql_type = BigInt)]
    seq: i64,
}

/// Appends events, the order in the list being the order per key, together with a message for each key that wakes; answers
/// the heads of the keys, sorted by key. To be run in a transaction: the keys' row locks are held to its end, so that the order
/// of sequences is the order of commits.
///
/// # Errors
/// [`Error::NotFound`] when there's no such stream.
pub fn append<K: StreamKey>(
    conn: &mut PgConnection,
    name: &str,
    events: &[(K, Payload)],
    correlation_id: Option<&str>,
) -> Result<Vec<Head<K>>> {
    locks::stream_for_appending(conn, name)?;
    let shards = layout(conn, name)?.shards;
    let mut counts = BTreeMap::<&K, i64>::new();
    events.iter().for_each(|(key, _)| *counts.entry(key).or_default() += 1);
    let keys: Vec<&str> = counts.keys().map(|key| key.as_str()).collect();
    // Sorted by key, as the map is: two batches that overlap and lock in different order would deadlock.
    let heads: BTreeMap<String, i64> = sql_query(
        "INSERT INTO stream_head AS head (stream, key, seq)
         SELECT $1, key, n FROM unnest($2, $3) AS new (key, n) ORDER BY key COLLATE \"C\"
         ON CONFLICT (stream, key) DO UPDATE SET seq = head.seq + excluded.seq
         RETURNING key, seq",
    )
    .bind::<Text, _>(name)
    .bind::<Array<Text>, _>(&keys)
    .bind::<Array<BigInt>, _>(counts.values().copied().collect::<Vec<_>>())
    .load::<Numbered>(conn)?
    .into_iter()
    .map(|row| (row.key, row.seq))
    .collect();
    let head = |key: &K| heads.get(key.as_str()).copied().unwrap_or_default();
    let fresh: Vec<&str> =
        counts.iter().filter(|(key, count)| head(key) == **count).map(|(key, _)| key.as_str()).collect();
    if !fresh.is_empty() {
        sql_query("INSERT INTO stream_cursor (stream, key) SELECT $1, key FROM unnest($2) AS new (key)")
            .bind::<Text, _>(name)
            .bind::<Array<Text>, _>(&fresh)
            .execute(conn)?;
    }

    let mut last: BTreeMap<&K, i64> = counts.iter().map(|(key, count)| (*key, head(key) - count)).collect();
    let generated_at = diesel::select(diesel::dsl::sql::<Timestamptz>("clock_timestamp()")).get_result(conn)?;
    let next = |(key, _): &(K, _)| {
        last.get_mut(key).map_or(0, |seq| {
            *seq += 1;
            *seq
        })
    };
    let seqs: Vec<i64> = events.iter().map(next).collect();
    let hashes: Vec<i32> = events.iter().map(|(key, _)| key_hash(key.as_str())).collect();
    sql_query(
        "INSERT INTO stream_event (stream, key, seq, key_hash, payload, generated_at)
         SELECT $1, key, seq, key_hash, payload::json, $6
         FROM unnest($2, $3, $4, $5) AS new (key, seq, key_hash, payload)",
    )
    .bind::<Text, _>(name)
    .bind::<Array<Text>, _>(events.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(&seqs)
    .bind::<Array<Integer>, _>(&hashes)
    .bind::<Array<Text>, _>(events.iter().map(|(_, payload)| payload.as_str()).collect::<Vec<_>>())
    .bind::<Timestamptz, _>(generated_at)
    .execute(conn)?;
    // One for each key: whoever it wakes goes on to the head. More would only get in other keys' way.
    let envelopes: Vec<_> = events
        .iter()
        .zip(seqs)
        .zip(hashes)
        .filter(|(((key, _), seq), _)| *seq == head(key) - counts[key] + 1)
        .map(|(((key, payload), seq), hash)| {
            let event = K::Event::new(key.clone(), seq, payload.clone(), generated_at);
            event.envelope(name, shard(hash, shards)).correlated(correlation_id)
        })
        .collect();
    outbox::push(conn, &envelopes)?;
    Ok(counts.keys().map(|key| Head { key: (*key).clone(), seq: head(key) }).collect())
}

/// An event that is next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// Its place.
    pub seq: i64,
    /// What happened, as JSON text.
    pub payload: String,
    /// When it was accepted.
    pub generated_at: DateTime<Utc>,
    /// Whether that is still to come, by the database's clock: which was set back since.
    pub ahead: bool,
}

/// How a key stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The key.
    pub key: String,
    /// The newest sequence; 0 for an unknown key.
    pub head: i64,
    /// The last event that took effect.
    pub cursor: i64,
    /// Which of the operator's changes this has seen.
    pub revision: i32,
    /// Attempts at the next event that failed.
    pub attempts: u32,
    /// Attempts at it that began on record and haven't ended.
    pub deaths: u32,
    /// Whether it waits for an operator.
    pub parked: bool,
    /// How long it's to be left alone after a failure.
    pub wait: Duration,
    /// What is next.
    pub next: Option<Next>,
}

#[derive(QueryableByName)]
struct StateRow {
    #[diesel(sql_type = Text)]
    key: String,
    #[diesel(sql_type = BigInt)]
    head: i64,
    #[diesel(sql_type = BigInt)]
    cursor: i64,
    #[diesel(sql_type = Integer)]
    revision: i32,
    #[diesel(sql_type = Integer)]
    attempts: i32,
    #[diesel(sql_type = Integer)]
    deaths: i32,
    #[diesel(sql_type = Bool)]
    parked: bool,
    #[diesel(sql_type = BigInt)]
    wait_ms: i64,
    #[diesel(sql_type = Nullable<Text>)]
    payload: Option<String>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    generated_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Bool)]
    ahead: bool,
}

/// How the keys stand, in no order; unknown ones too.
pub fn load(conn: &mut PgConnection, name: &str, keys: &[&str]) -> Result<Vec<State>> {
    let rows: Vec<StateRow> = sql_query(
        "SELECT k.key, coalesce(h.seq, 0) AS head, coalesce(c.seq, 0) AS cursor, coalesce(c.revision, 0) AS revision,
                coalesce(c.attempts, 0) AS attempts, coalesce(c.deaths, 0) AS deaths, c.parked_at IS NOT NULL AS parked,
                coalesce(ceil(extract(epoch FROM c.retry_at - clock_timestamp()) * 1000), 0)::bigint AS wait_ms,
                e.payload::text AS payload, e.generated_at, coalesce(e.generated_at > clock_timestamp(), false) AS ahead
         FROM unnest($2) AS k (key)
         LEFT JOIN stream_head h ON h.stream = $1 AND h.key = k.key
         LEFT JOIN stream_cursor c ON c.stream = $1 AND c.key = k.key
         LEFT JOIN stream_event e ON e.stream = $1 AND e.key = k.key AND e.seq = c.seq + 1",
    )
    .bind::<Text, _>(name)
    .bind::<Array<Text>, _>(keys)
    .load(conn)?;
    Ok(rows
        .into_iter()
        .map(|row| State {
            head: row.head,
            cursor: row.cursor,
            revision: row.revision,
            attempts: row.attempts.unsigned_abs(),
            deaths: row.deaths.unsigned_abs(),
            parked: row.parked,
            wait: Duration::from_millis(u64::try_from(row.wait_ms).unwrap_or(0)),
            next: row.payload.zip(row.generated_at).map(|(payload, generated_at)| Next {
                seq: row.cursor + 1,
                payload,
                generated_at,
                ahead: row.ahead,
            }),
            key: row.key,
        })
        .collect())
}

/// The newest sequence of each of the keys that there are, in no order.
pub fn heads(conn: &mut PgConnection, name: &str, keys: &[&str]) -> Result<Vec<(String, i64)>> {
    let rows = stream_head::table.filter(stream_head::stream.eq(name).and(stream_head::key.eq_any(keys)));
    Ok(rows.select((stream_head::key, stream_head::seq)).load(conn)?)
}

/// The event that a key is at, as it was when it was loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position<'a> {
    /// The key.
    pub key: &'a str,
    /// The event's place.
    pub seq: i64,
    /// The revision of the key's cursor.
    pub revision: i32,
}

/// Keys, sequences and revisions.
type Columns<'a> = (Vec<&'a str>, Vec<i64>, Vec<i32>);

fn columns<'a>(positions: impl IntoIterator<Item = Position<'a>>) -> Columns<'a> {
    let mut columns = Columns::default();
    for position in positions {
        columns.0.push(position.key);
        columns.1.push(position.seq);
        columns.2.push(position.revision);
    }
    columns
}

/// What became of a change of a key's cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It took place.
    Made,
    /// It didn't: the cursor isn't as it was when the event was loaded.
    Late,
    /// It didn't: another session holds the cursor just now. Nobody waits for it, so the same may be tried again.
    Busy,
}

#[derive(QueryableByName)]
struct KeyRow {
    #[diesel(sql_type = Text)]
    key: String,
}

/// Attempts at the next event of a key, as they were when it was loaded, or as this process has changed them since.
#[derive(Clone, Copy, Debug)]
pub struct Attempt<'a> {
    /// The event.
    pub position: Position<'a>,
    /// Attempts that failed.
    pub attempts: u32,
    /// Attempts that began on record and haven't ended; this one among them, if it's on record.
    pub deaths: u32,
}

fn number(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

/// The attempts as columns beside those of their positions.
fn counts<'a>(attempts: impl IntoIterator<Item = Attempt<'a>>) -> (Columns<'a>, Vec<i32>, Vec<i32>) {
    let attempts: Vec<Attempt<'a>> = attempts.into_iter().collect();
    let positions = columns(attempts.iter().map(|attempt| attempt.position));
    let failed = attempts.iter().map(|attempt| number(attempt.attempts)).collect();
    (positions, failed, attempts.iter().map(|attempt| number(attempt.deaths)).collect())
}

/// Returns what became of changes that were made for the keys `made`. Which of the others might still be made is asked for
/// only if there are others: `attempts` are those that they depend on, with the most deaths that each may have.
fn changes(
    conn: &mut PgConnection,
    name: &str,
    (keys, seqs, revisions): &Columns<'_>,
    attempts: Option<(&[i32], &[i32], i32)>,
    made: impl IntoIterator<Item = String>,
) -> Result<Vec<Change>> {
    let made: HashSet<String> = made.into_iter().collect();
    if made.len() == keys.len() {
        return Ok(vec![Change::Made; keys.len()]);
    }
    let (failed, deaths, more) = attempts.unwrap_or_default();
    let current: Vec<KeyRow> = sql_query(
        "SELECT c.key
         FROM unnest($2, $3, $4, $5, $6) AS wanted (key, seq, revision, attempts, deaths)
         JOIN stream_cursor c ON c.stream = $1 AND c.key = wanted.key
         WHERE c.seq = wanted.seq - 1 AND c.revision = wanted.revision
           AND c.attempts = coalesce(wanted.attempts, c.attempts)
           AND c.deaths BETWEEN coalesce(wanted.deaths, c.deaths) AND coalesce(wanted.deaths, c.deaths) + $7",
    )
    .bind::<Text, _>(name)
    .bind::<Array<Text>, _>(keys)
    .bind::<Array<BigInt>, _>(seqs)
    .bind::<Array<Integer>, _>(revisions)
    .bind::<Array<Integer>, _>(failed)
    .bind::<Array<Integer>, _>(deaths)
    .bind::<Integer, _>(more)
    .load(conn)?;
    let current: HashSet<String> = current.into_iter().map(|row| row.key).collect();
    let change = |key: &&str| match () {
        () if made.contains(*key) => Change::Made,
        () if current.contains(*key) => Change::Busy,
        () => Change::Late,
    };
    Ok(keys.iter().map(change).collect())
}

#[derive(QueryableByName)]
struct AdvancedRow {
    #[diesel(sql_type = Text)]
    key: String,
    #[diesel(sql_type = Bool)]
    rested: bool,
}

/// Moves the cursor of each key from the event before to this one, and marks the event as applied by `worker`: where
/// nobody else has, and no operator has changed what is next. Returns for each position what became of it. At most one
/// position for each key. To be run in the transaction of the effects, before them, and only those events whose cursors were
/// moved may have an effect.
pub fn advance(conn: &mut PgConnection, name: &str, positions: &[Position<'_>], worker: &str) -> Result<Vec<Change>> {
    let columns = columns(positions.iter().copied());
    // Nobody waits for a cursor: one that somebody holds would hold up all other keys, and two batches could deadlock.
    let won: Vec<AdvancedRow> = sql_query(
        "WITH locked AS (
             SELECT c.key, done.seq, c.parked_at IS NOT NULL OR c.retry_at IS NOT NULL AS rested
             FROM unnest($2, $3, $4) AS done (key, seq, revision)
             JOIN stream_cursor c ON c.stream = $1 AND c.key = done.key
             WHERE c.seq = done.seq - 1 AND c.revision = done.revision
             FOR UPDATE OF c SKIP LOCKED),
         won AS (
             UPDATE stream_cursor c
             SET seq = locked.seq, attempts = 0, deaths = 0, retry_at = NULL, parked_at = NULL, last_error = NULL
             FROM locked WHERE c.stream = $1 AND c.key = locked.key AND c.seq = locked.seq - 1
             RETURNING c.key, c.seq, locked.rested)
         UPDATE stream_event e SET processed_at = clock_timestamp(), worker = $5, outcome = 'applied'
         FROM won WHERE e.stream = $1 AND e.key = won.key AND e.seq = won.seq
         RETURNING e.key, won.rested",
    )
    .bind::<Text, _>(name)
    .bind::<Array<Text>, _>(&columns.0)
    .bind::<Array<BigInt>, _>(&columns.1)
    .bind::<Array<Integer>, _>(&columns.2)
    .bind::<Text, _>(worker)
    .load(conn)?;
    let rested: Vec<&str> = won.iter().filter(|row| row.rested).map(|row| row.key.as_str()).collect();
    rouse(conn, name, &rested)?;
    changes(conn, name, &columns, None, won.into_iter().map(|row| row.key))
}

/// A failed attempt.
#[derive(Clone, Copy, Debug)]
pub struct Failed<'a> {
    /// At which event.
    pub attempt: Attempt<'a>,
    /// Why, on one line, without what users wrote.
    pub error: &'a str,
    /// After how long to try again; `None` parks the key.
    pub retry_after: Option<Duration>,
    /// Whether it counts as an attempt, and with it those whose process died: not if something was away that every event
    /// needs.
    pub counts: bool,
}

/// The longest wait for an attempt, so that the time that comes of it is one that the database knows.
const WAIT_MAX: Duration = Duration::from_secs(10 * 365 * 86_400);

fn ms(wait: Duration) -> i64 {
    i64::try_from(wait.min(WAIT_MAX).as_millis()).unwrap_or(i64::MAX)
}

/// Notes failed attempts, unless the event has taken effect, an operator has changed it, or other attempts at it have ended
/// or begun meanwhile: so one that is noted again, because no answer came, counts once. Returns what became of each.
pub fn fail(conn: &mut PgConnection, name: &str, failed: &[Failed<'_>]) -> Result<Vec<Change>> {
    let (columns, attempts, deaths) = counts(failed.iter().map(|failed| failed.attempt));
    let waits: Vec<Option<i64>> = failed.iter().map(|failed| failed.retry_after.map(ms)).collect();
    let made: Vec<KeyRow> = sql_query(
        "WITH locked AS (
             SELECT c.key, failed.error, failed.wait_ms, failed.counts
             FROM unnest($2, $3, $4, $5, $6, $7, $8, $9)
                  AS failed (key, seq, revision, attempts, deaths, error, wait_ms, counts)
             JOIN stream_cursor c ON c.stream = $1 AND c.key = failed.key
             WHERE c.seq = failed.seq - 1 AND c.revision = failed.revision
               AND c.attempts = failed.attempts AND c.deaths = failed.deaths
             FOR UPDATE OF c SKIP LOCKED)
         UPDATE stream_cursor c
         SET attempts = c.attempts + CASE WHEN locked.counts THEN greatest(c.deaths, 1) ELSE 0 END,
             deaths = CASE WHEN locked.counts THEN 0 ELSE greatest(c.deaths - 1, 0) END, last_error = locked.error,
             retry_at = clock_timestamp() + locked.wait_ms * interval '1 ms',
             parked_at = CASE WHEN locked.wait_ms IS NULL THEN clock_timestamp() END
         FROM locked WHERE c.stream = $1 AND c.key = locked.key
         RETURNING c.key",
    )
    .bind::<Text, _>(name)
    .bind::<Array<Text>, _>(&columns.0)
    .bind::<Array<BigInt>, _>(&columns.1)
    .bind::<Array<Integer>, _>(&columns.2)
    .bind::<Array<Integer>, _>(&attempts)
    .bind::<Array<Integer>, _>(&deaths)
    .bind::<Array<Text>, _>(failed.iter().map(|failed| failed.error).collect::<Vec<_>>())
    .bind::<Array<Nullable<BigInt>>, _>(waits)
    .bind::<Array<Bool>, _>(failed.iter().map(|failed| failed.counts).collect::<Vec<_>>())
    .load(conn)?;
    changes(conn, name, &columns, Some((&attempts, &deaths, 0)), made.into_iter().map(|row| row.key))
}

/// Puts attempts on record that may kill their process: committed before they begin, and gone when they have ended. Each is
/// one more than the deaths that are known of; if it's on record already, that was the same, whose answer was lost. Returns
/// what became of each: only those that are on record may begin.
pub fn begin(conn: &mut PgConnection, name: &str, attempts: &[Attempt<'_>]) -> Result<Vec<Change>> {
    change_deaths(conn, name, attempts, 1)
}

/// Takes back attempts on record that were given up, to be made again, if nothing else has ended or begun meanwhile. Returns
/// what became of each.
pub fn take_back(conn: &mut PgConnection, name: &str, attempts: &[Attempt<'_>]) -> Result<Vec<Change>> {
    change_deaths(conn, name, attempts, -1)
}

fn change_deaths(conn: &mut PgConnection, name: &str, attempts: &[Attempt<'_>], by: i32) -> Result<Vec<Change>> {
    let (columns, failed, deaths) = counts(attempts.iter().copied());
    let more = by.max(0);
    let made: Vec<KeyRow> = sql_query(
        "WITH locked AS (
             SELECT c.key, greatest(wanted.deaths + $7, 0) AS deaths
             FROM unnest($2, $3, $4, $5, $6) AS wanted (key, seq, revision, attempts, deaths)
             JOIN stream_cursor c ON c.stream = $1 AND c.key = wanted.key
             WHERE c.seq = wanted.seq - 1 AND c.revision = wanted.revision
               AND c.attempts = wanted.attempts AND c.deaths BETWEEN wanted.deaths AND wanted.deaths + $8
             FOR UPDATE OF c SKIP LOCKED)
         UPDATE stream_cursor c SET deaths = locked.deaths
         FROM locked WHERE c.stream = $1 AND c.key = locked.key
         RETURNING c.key",
    )
    .bind::<Text, _>(name)
    .bind::<Array<Text>, _>(&columns.0)
    .bind::<Array<BigInt>, _>(&columns.1)
    .bind::<Array<Integer>, _>(&columns.2)
    .bind::<Array<Integer>, _>(&failed)
    .bind::<Array<Integer>, _>(&deaths)
    .bind::<Integer, _>(by)
    .bind::<Integer, _>(more)
    .load(conn)?;
    changes(conn, name, &columns, Some((&failed, &deaths, more)), made.into_iter().map(|row| row.key))
}

/// The most events of a key that are marked as resting: so many at most are marked anew when it goes on. Keys with more of
/// them that wait are looked at with every sweep, as there are few.
const RESTING_MAX: i64 = 100;

/// A key that waits for longer than this rests: marking its events twice costs less than looking at it with every sweep.
const REST_AFTER: Duration = Duration::from_secs(30);

/// Keys of some shards, out of those with events that wait.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Keys that may go on, in order.
    pub keys: Vec<String>,
    /// Keys that may not for long: see [`rest`].
    pub resting: Vec<String>,
    /// Where the next sweep goes on; `None` when this one came to the end.
    pub after: Option<String>,
}

#[derive(QueryableByName)]
struct SweptRow {
    #[diesel(sql_type = Text)]
    key: String,
    #[diesel(sql_type = Bool)]
    due: bool,
    #[diesel(sql_type = Bool)]
    rests: bool,
}

/// Looks at up to `limit` keys beyond `after` (the empty string is before all) that have events which wait and don't rest, and
/// returns those of the shards that may go on now, and don't because of a retry: see [`due`].
pub fn sweep(conn: &mut PgConnection, name: &str, shards: i32, held: &[i32], after: &str, limit: i64) -> Result<Swept> {
    // Skips from key to key along the index of what waits, so that a long backlog of one key costs no more than a
    // short one.
    let rows: Vec<SweptRow> = sql_query(
        "WITH RECURSIVE pending AS (
             (SELECT key, key_hash FROM stream_event
              WHERE stream = $1 AND NOT rests AND key > $4 AND processed_at IS NULL ORDER BY key, seq LIMIT 1)
             UNION ALL
             SELECT further.* FROM pending, LATERAL (
                 SELECT key, key_hash FROM stream_event
                 WHERE stream = $1 AND NOT rests AND key > pending.key AND processed_at IS NULL
                 ORDER BY key, seq LIMIT 1) further),
         page AS (SELECT * FROM pending LIMIT $5)
         SELECT page.key, page.key_hash % $2 = ANY ($3) AND c.parked_at IS NULL AND c.retry_at IS NULL AS due,
                c.parked_at IS NOT NULL OR coalesce(c.retry_at > clock_timestamp() + $6 * interval '1 ms', false) AS rests
         FROM page JOIN stream_cursor c ON c.stream = $1 AND c.key = page.key ORDER BY page.key",
    )
    .bind::<Text, _>(name)
    .bind::<Integer, _>(shards)
    .bind::<Array<Integer>, _>(held)
    .bind::<Text, _>(after)
    .bind::<BigInt, _>(limit)
    .bind::<BigInt, _>(ms(REST_AFTER))
    .load(conn)?;
    let full = i64::try_from(rows.len()).unwrap_or(i64::MAX) >= limit;
    let mut swept = Swept { after: rows.last().filter(|_| full).map(|row| row.key.clone()), ..Swept::default() };
    for SweptRow { key, due, rests } in rows {
        if rests {
            swept.resting.push(key);
        } else if due {
            swept.keys.push(key);
        }
    }
    Ok(swept)
}

/// Has the events of keys rest that are parked, or wait for long: the sweep passes them over until the key goes on. That an
/// event rests means that its key's cursor says so too, for both change under the cursor's lock; [`rouse`] ends it. Returns
/// how many events began to rest.
pub fn rest(conn: &mut PgConnection, name: &str, keys: &[String]) -> Result<usize> {
    if keys.is_empty() {
        return Ok(0);
    }
    Ok(sql_query(
        "WITH resting AS (
             SELECT key FROM stream_cursor
             WHERE stream = $1 AND key = ANY ($2)
               AND (parked_at IS NOT NULL OR retry_at > clock_timestamp() + $3 * interval '1 ms')
             FOR UPDATE SKIP LOCKED),
         few AS (
             SELECT key FROM resting WHERE $4 >= (
                 SELECT count(*) FROM (
                     SELECT FROM stream_event e WHERE e.stream = $1 AND e.rests = ANY ('{f,t}') AND e.key = resting.key
                     AND e.processed_at IS NULL LIMIT $4 + 1) waiting)),
         tired AS (
             SELECT e.key, e.seq FROM few JOIN stream_event e
             ON e.stream = $1 AND NOT e.rests AND e.key = few.key AND e.processed_at IS NULL
             FOR UPDATE OF e SKIP LOCKED)
         UPDATE stream_event e SET rests = true
         FROM tired WHERE e.stream = $1 AND e.key = tired.key AND e.seq = tired.seq",
    )
    .bind::<Text, _>(name)
    .bind::<Array<Text>, _>(keys)
    .bind::<BigInt, _>(ms(REST_AFTER))
    .bind::<BigInt, _>(RESTING_MAX)
    .execute(conn)?)
}

/// Ends the rest of these keys' events, in the transaction that changes what their cursors say.
pub(crate) fn rouse(conn: &mut PgConnection, name: &str, keys: &[&str]) -> Result<()> {
    if !keys.is_empty() {
        sql_query(
            "UPDATE stream_event SET rests = false
             WHERE stream = $1 AND rests AND key = ANY ($2) AND processed_at IS NULL",
        )
        .bind::<Text, _>(name)
        .bind::<Array<Text>, _>(keys)
        .execute(conn)?;
    }
    Ok(())
}

/// A key whose time for a retry has come.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Due {
    /// The key.
    #[diesel(sql_type = Text)]
    pub key: String,
    /// When it had come.
    #[diesel(sql_type = Timestamptz)]
    pub retry_at: DateTime<Utc>,
}

/// Returns up to `limit` keys whose time for a retry has come, behind the last one of the page before.
pub fn due(conn: &mut PgConnection, name: &str, behind: Option<&Due>, limit: i64) -> Result<Vec<Due>> {
    Ok(sql_query(
        "SELECT key, retry_at FROM stream_cursor
         WHERE stream = $1 AND retry_at <= clock_timestamp()
           AND (retry_at, key) > (coalesce($2, '-infinity'), $3)
         ORDER BY retry_at, key LIMIT $4",
    )
    .bind::<Text, _>(name)
    .bind::<Nullable<Timestamptz>, _>(behind.map(|due| due.retry_at))
    .bind::<Text, _>(behind.map_or("", |due| &due.key))
    .bind::<BigInt, _>(limit)
    .load(conn)?)
}

/// Has keys tried again at once that wait for longer than any wait may last: the clock was set back since. Returns how many
/// there were.
pub fn hasten(conn: &mut PgConnection, name: &str, longest: Duration) -> Result<usize> {
    Ok(sql_query(
        "UPDATE stream_cursor c SET retry_at = clock_timestamp()
         FROM (SELECT key FROM stream_cursor
               WHERE stream = $1 AND retry_at > clock_timestamp() + $2 * interval '1 ms'
               FOR UPDATE SKIP LOCKED) late
         WHERE c.stream = $1 AND c.key = late.key",
    )
    .bind::<Text, _>(name)
    .bind::<BigInt, _>(ms(longest))
    .execute(conn)?)
}
