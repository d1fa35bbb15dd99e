//! What has become of account events, for people to look at: totals, accounts, the events of one account. Of that stream alone:
//! its effects are the rows of `account_effect`.
//!
//! Totals read each row once. Everything else reads no more rows than it answers, save for the keys that it looks at.

use crate::{Error, Result};
use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Integer, Nullable, Text, Timestamptz},
};
use domain::stream::{ACCOUNT_EVENT, AccountId};

/// Effects that are out of order among those of one account, and the effect before each. `$1` is the stream, `$2` what
/// the accounts' ids start with: `~` sorts behind every character that an id may hold.
///
/// An effect is out of order when its sequence isn't greater than the one before it (it's doubled, or goes backwards), or
/// when events in between that nobody skipped are left out.
const DISORDER: &str = "
    SELECT id, account_id, after, seq
    FROM (SELECT id, account_id, seq, lag(seq, 1, 0::bigint) OVER (PARTITION BY account_id ORDER BY id) AS after
          FROM account_effect WHERE account_id >= $2 AND account_id < $2 || '~') effect
    WHERE seq <= after
       OR (seq > after + 1 AND seq - after - 1 > (
          SELECT count(*) FROM stream_event e
          WHERE e.stream = $1 AND e.key = account_id AND e.seq > after AND e.seq < effect.seq
            AND e.outcome = 'skipped'))";

/// How many effects are out of order, of the accounts whose id starts with `prefix`: taking an account's rows of
/// `account_effect` by id, those whose sequence isn't greater than that of the row before, or that leave out an event which
/// nobody skipped.
pub fn order_errors(conn: &mut PgConnection, prefix: &str) -> Result<i64> {
    Ok(sql_query(format!("SELECT count(*) AS n FROM ({DISORDER}) disorder"))
        .bind::<Text, _>(ACCOUNT_EVENT)
        .bind::<Text, _>(prefix)
        .get_result::<crate::Count>(conn)?
        .n)
}

/// Two effects of one account, one right after the other, that are out of order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disorder {
    /// The sequence of the former; 0 where there is none.
    pub after: i64,
    /// The sequence of the latter, which is the one that is wrong.
    pub seq: i64,
}

/// An account with effects that are out of order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disordered {
    /// The account.
    pub key: String,
    /// How many effects are out of order.
    pub errors: i64,
    /// The first few of them.
    pub first: Vec<Disorder>,
}

/// The account whose events took the longest to handle, one after another.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Longest {
    /// The account.
    #[diesel(sql_type = Text)]
    pub key: String,
    /// Its events that took effect.
    #[diesel(sql_type = BigInt)]
    pub events: i64,
    /// How long handling these took by itself, all together.
    #[diesel(sql_type = BigInt)]
    pub work_ms: i64,
}

/// A process, and what it has applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worker {
    /// Its name.
    pub name: String,
    /// Events that it applied.
    pub applied: i64,
    /// When it applied the first of them.
    pub first_at: Option<DateTime<Utc>>,
    /// When it applied the last of them.
    pub last_at: Option<DateTime<Utc>>,
}

/// All accounts, or those whose id starts with a prefix, taken together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals {
    /// When this was so.
    pub at: DateTime<Utc>,
    /// Accounts with at least one event.
    pub accounts: i64,
    /// Accounts with an event that waits.
    pub waiting_accounts: i64,
    /// Accounts of which the next event waits for an operator.
    pub parked_accounts: i64,
    /// Events that wait because their account is parked.
    pub parked: i64,
    /// Events accepted.
    pub accepted: i64,
    /// Events that took effect.
    pub applied: i64,
    /// Events skipped by an operator.
    pub skipped: i64,
    /// When the first event was accepted.
    pub first_generated_at: Option<DateTime<Utc>>,
    /// When the last event took effect or was skipped.
    pub last_processed_at: Option<DateTime<Utc>>,
    /// The account that took the longest.
    pub longest: Option<Longest>,
    /// Who applied how many, in the order in which they began; the latest [`WORKERS_MAX`].
    pub workers: Vec<Worker>,
    /// Effects that are out of order; see [`order_errors`].
    pub order_errors: i64,
    /// Accounts that have such.
    pub disordered_accounts: i64,
    /// The first [`DISORDERED_MAX`] of these accounts, sorted.
    pub disordered: Vec<Disordered>,
}

impl Totals {
    /// Events that neither took effect nor were skipped.
    pub fn waiting(&self) -> i64 {
        self.accepted - self.applied - self.skipped
    }
}

/// The most workers that totals name.
pub const WORKERS_MAX: usize = 100;
/// The most accounts with disorder that totals name.
pub const DISORDERED_MAX: i64 = 1000;
/// The most pairs that are named of one of these.
pub const PAIRS_MAX: i32 = 5;

#[derive(QueryableByName)]
struct Keys {
    #[diesel(sql_type = Timestamptz)]
    at: DateTime<Utc>,
    #[diesel(sql_type = BigInt)]
    accounts: i64,
    #[diesel(sql_type = BigInt)]
    waiting_accounts: i64,
    #[diesel(sql_type = BigInt)]
    parked_accounts: i64,
    #[diesel(sql_type = BigInt)]
    parked: i64,
}

#[derive(QueryableByName)]
struct Group {
    #[diesel(sql_type = Nullable<Text>)]
    worker: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    outcome: Option<String>,
    #[diesel(sql_type = BigInt)]
    n: i64,
    #[diesel(sql_type = Timestamptz)]
    first_generated_at: DateTime<Utc>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    first_processed_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    last_processed_at: Option<DateTime<Utc>>,
}

#[derive(QueryableByName)]
struct DisorderedRow {
    #[diesel(sql_type = Text)]
    account_id: String,
    #[diesel(sql_type = BigInt)]
    errors: i64,
    #[diesel(sql_type = Array<BigInt>)]
    afters: Vec<i64>,
    #[diesel(sql_type = Array<BigInt>)]
    seqs: Vec<i64>,
    #[diesel(sql_type = BigInt)]
    all_errors: i64,
    #[diesel(sql_type = BigInt)]
    all_accounts: i64,
}

/// The totals of the accounts whose id starts with `prefix`. To be run in a transaction of its own, so that all of them
/// are of the same moment.
pub fn totals(conn: &mut PgConnection, prefix: &str) -> Result<Totals> {
    sql_query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY").execute(conn)?;
    let keys: Keys = sql_query(
        "SELECT clock_timestamp() AS at, count(*) AS accounts,
                count(*) FILTER (WHERE c.seq < h.seq) AS waiting_accounts,
                count(*) FILTER (WHERE c.parked_at IS NOT NULL) AS parked_accounts,
                coalesce(sum(h.seq - c.seq) FILTER (WHERE c.parked_at IS NOT NULL), 0)::bigint AS parked
         FROM stream_head h JOIN stream_cursor c USING (stream, key)
         WHERE stream = $1 AND key >= $2 AND key < $2 || '~'",
    )
    .bind::<Text, _>(ACCOUNT_EVENT)
    .bind::<Text, _>(prefix)
    .get_result(conn)?;
    let groups: Vec<Group> = sql_query(
        "SELECT worker, outcome, count(*) AS n, min(generated_at) AS first_generated_at,
                min(processed_at) AS first_processed_at, max(processed_at) AS last_processed_at
         FROM stream_event WHERE stream = $1 AND key >= $2 AND key < $2 || '~' GROUP BY worker, outcome",
    )
    .bind::<Text, _>(ACCOUNT_EVENT)
    .bind::<Text, _>(prefix)
    .load(conn)?;
    let longest: Option<Longest> = sql_query(
        "SELECT account_id AS key, count(*) AS events, sum(work_ms)::bigint AS work_ms
         FROM account_effect WHERE account_id >= $1 AND account_id < $1 || '~'
         GROUP BY account_id ORDER BY work_ms DESC, events DESC, account_id LIMIT 1",
    )
    .bind::<Text, _>(prefix)
    .get_result(conn)
    .optional()?;
    let disordered: Vec<DisorderedRow> = sql_query(format!(
        "SELECT account_id, count(*) AS errors,
                (array_agg(after ORDER BY id))[:{PAIRS_MAX}] AS afters, (array_agg(seq ORDER BY id))[:{PAIRS_MAX}] AS seqs,
                (sum(count(*)) OVER ())::bigint AS all_errors, count(*) OVER () AS all_accounts
         FROM ({DISORDER}) disorder GROUP BY account_id ORDER BY account_id LIMIT {DISORDERED_MAX}"
    ))
    .bind::<Text, _>(ACCOUNT_EVENT)
    .bind::<Text, _>(prefix)
    .load(conn)?;

    let count = |outcome: Option<&str>| -> i64 {
        groups
            .iter()
            .filter(|group| outcome.is_none() || group.outcome.as_deref() == outcome)
            .map(|group| group.n)
            .sum()
    };
    let (accepted, applied, skipped) = (count(None), count(Some("applied")), count(Some("skipped")));
    let first_generated_at = groups.iter().map(|group| group.first_generated_at).min();
    let last_processed_at = groups.iter().filter_map(|group| group.last_processed_at).max();
    let mut workers: Vec<Worker> = groups
        .into_iter()
        .filter(|group| group.outcome.as_deref() == Some("applied"))
        .map(|group| Worker {
            name: group.worker.unwrap_or_default(),
            applied: group.n,
            first_at: group.first_processed_at,
            last_at: group.last_processed_at,
        })
        .collect();
    workers.sort_by_key(|worker| std::cmp::Reverse(worker.last_at));
    workers.truncate(WORKERS_MAX);
    workers.sort_by(|a, b| (a.first_at, &a.name).cmp(&(b.first_at, &b.name)));
    Ok(Totals {
        at: keys.at,
        accounts: keys.accounts,
        waiting_accounts: keys.waiting_accounts,
        parked_accounts: keys.parked_accounts,
        parked: keys.parked,
        accepted,
        applied,
        skipped,
        first_generated_at,
        last_processed_at,
        longest,
        workers,
        order_errors: disordered.first().map_or(0, |row| row.all_errors),
        disordered_accounts: disordered.first().map_or(0, |row| row.all_accounts),
        disordered: disordered
            .into_iter()
            .map(|row| Disordered {
                key: row.account_id,
                errors: row.errors,
                first: row
                    .afters
                    .iter()
                    .zip(&row.seqs)
                    .map(|(after, seq)| Disorder { after: *after, seq: *seq })
                    .collect(),
            })
            .collect(),
    })
}

/// Which accounts a page is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Only {
    /// All of them.
    All,
    /// Those with an event that waits.
    Waiting,
    /// Those whose next event waits for an operator.
    Parked,
    /// These.
    Keys(Vec<String>),
}

/// In which order accounts come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// By id.
    Key,
    /// Those with the most events first.
    Events,
}

/// Part of a list of accounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What the accounts' ids start with.
    pub prefix: String,
    /// Which of them.
    pub only: Only,
    /// In which order.
    pub order: Order,
    /// How many to pass over.
    pub offset: i64,
    /// How many at most.
    pub limit: i64,
    /// How many of each account's events at most; the latest.
    pub events: i64,
}

/// How an account stands.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Standing {
    /// The account.
    #[diesel(sql_type = Text)]
    pub key: String,
    /// Its newest sequence.
    #[diesel(sql_type = BigInt)]
    pub head: i64,
    /// The last sequence that took effect or was skipped.
    #[diesel(sql_type = BigInt)]
    pub cursor: i64,
    /// Attempts at the next event that failed.
    #[diesel(sql_type = Integer)]
    pub attempts: i32,
    /// Since when the next event waits for an operator.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub parked_at: Option<DateTime<Utc>>,
    /// Why the last attempt failed.
    #[diesel(sql_type = Nullable<Text>)]
    pub last_error: Option<String>,
}

/// What has become of an event.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Event {
    /// Its place among the account's.
    #[diesel(sql_type = BigInt)]
    pub seq: i64,
    /// When it was accepted.
    #[diesel(sql_type = Timestamptz)]
    pub generated_at: DateTime<Utc>,
    /// When it took effect or was skipped.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub processed_at: Option<DateTime<Utc>>,
    /// The process that applied it, or the operator who skipped it.
    #[diesel(sql_type = Nullable<Text>)]
    pub worker: Option<String>,
    /// `applied` or `skipped`; `None` while it waits.
    #[diesel(sql_type = Nullable<Text>)]
    pub outcome: Option<String>,
}

#[derive(QueryableByName)]
struct EventRow {
    #[diesel(sql_type = Text)]
    key: String,
    #[diesel(embed)]
    event: Event,
}

const STANDING: &str = "SELECT key, h.seq AS head, c.seq AS cursor, c.attempts, c.parked_at, c.last_error
                        FROM stream_head h JOIN stream_cursor c USING (stream, key)";

/// Accounts, and when they stood so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The time.
    pub at: DateTime<Utc>,
    /// The accounts, each with its latest events in sequence.
    pub accounts: Vec<(Standing, Vec<Event>)>,
}

/// Part of the accounts.
pub fn accounts(conn: &mut PgConnection, part: &Part) -> Result<Listed> {
    let only = match part.only {
        Only::All => "",
        Only::Waiting => "AND c.seq < h.seq",
        Only::Parked => "AND c.parked_at IS NOT NULL",
        Only::Keys(_) => "AND key = ANY ($5)",
    };
    let order = match part.order {
        Order::Key => "key",
        Order::Events => "h.seq DESC, key",
    };
    let query = sql_query(format!(
        "{STANDING} WHERE stream = $1 AND key >= $2 AND key < $2 || '~' {only} ORDER BY {order} OFFSET $3 LIMIT $4"
    ))
    .bind::<Text, _>(ACCOUNT_EVENT)
    .bind::<Text, _>(&part.prefix)
    .bind::<BigInt, _>(part.offset)
    .bind::<BigInt, _>(part.limit);
    let accounts: Vec<Standing> = match &part.only {
        Only::Keys(keys) => query.bind::<Array<Text>, _>(keys).load(conn)?,
        _ => query.load(conn)?,
    };
    let rows: Vec<EventRow> = sql_query(
        "SELECT k.key, e.* FROM unnest($2) AS k (key), LATERAL (
             SELECT seq, generated_at, processed_at, worker, outcome FROM stream_event e
             WHERE e.stream = $1 AND e.key = k.key ORDER BY seq DESC LIMIT $3) e",
    )
    .bind::<Text, _>(ACCOUNT_EVENT)
    .bind::<Array<Text>, _>(accounts.iter().map(|account| &account.key).collect::<Vec<_>>())
    .bind::<BigInt, _>(part.events)
    .load(conn)?;
    let mut events = std::collections::HashMap::<String, Vec<Event>>::new();
    rows.into_iter().for_each(|row| events.entry(row.key).or_default().push(row.event));
    let accounts = accounts.into_iter().map(|account| {
        let mut events = events.remove(&account.key).unwrap_or_default();
        events.sort_unstable_by_key(|event| event.seq);
        (account, events)
    });
    let at = diesel::select(diesel::dsl::sql::<Timestamptz>("clock_timestamp()")).get_result(conn)?;
    Ok(Listed { at, accounts: accounts.collect() })
}

/// An event of one account, with what happened.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Told {
    /// What has become of it.
    #[diesel(embed)]
    pub event: Event,
    /// What happened, as JSON text.
    #[diesel(sql_type = Text)]
    pub payload: String,
}

/// How one account stands, and its events beyond the sequence `after`, in sequence: at most `limit` of them, and no
/// further ones once their payloads have `bytes` together.
///
/// # Errors
/// [`Error::NotFound`] when it has no events.
pub fn account(
    conn: &mut PgConnection,
    account: &AccountId,
    after: i64,
    limit: i64,
    bytes: i64,
) -> Result<(Standing, Vec<Told>)> {
    let standing = sql_query(format!("{STANDING} WHERE stream = $1 AND key = $2"))
        .bind::<Text, _>(ACCOUNT_EVENT)
        .bind::<Text, _>(account.as_str())
        .get_result(conn)
        .optional()?
        .ok_or(Error::NotFound("account"))?;
    let events = sql_query(
        "SELECT * FROM (
             SELECT *, sum(octet_length(payload)) OVER (ORDER BY seq) - octet_length(payload) AS before FROM (
                 SELECT seq, generated_at, processed_at, worker, outcome, payload::text AS payload FROM stream_event
                 WHERE stream = $1 AND key = $2 AND seq > $3 ORDER BY seq LIMIT $4) page) sized
         WHERE before < $5 ORDER BY seq",
    )
    .bind::<Text, _>(ACCOUNT_EVENT)
    .bind::<Text, _>(account.as_str())
    .bind::<BigInt, _>(after)
    .bind::<BigInt, _>(limit)
    .bind::<BigInt, _>(bytes)
    .load(conn)?;
    Ok((standing, events))
}
