//! Tables `user_balance` and `balance_delivery`: the effect of the ordering lab's messages, which nothing keeps in order
//! here, and what each consumer saw.

use chrono::{DateTime, Utc};
use diesel::{
    PgConnection,
    dsl::{count_star, exists, max, select},
    prelude::*,
    sql_query,
    sql_types::{BigInt, Bool, Integer, Text},
};
use std::ops::Range;
use storage::Result;

diesel::table! {
    balance_delivery (id) {
        id -> Int8,
        consumer_id -> Int4,
        user_id -> Int8,
        processed_at -> Timestamptz,
        version -> Int4,
        outcome -> Text,
        order_error -> Bool,
        value_error -> Bool,
        consumer_error -> Bool,
    }
}

diesel::table! {
    user_balance (user_id) {
        user_id -> Int8,
        value -> Int8,
        consumer_id -> Int4,
        processed_at -> Timestamptz,
        effects -> Int8,
    }
}

/// A message of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    /// The user.
    pub(crate) user_id: i64,
    /// What it adds to the user's balance.
    pub(crate) value_change: i64,
    /// What the balance is to be afterwards.
    pub(crate) expected_value: i64,
    /// Later than that of every earlier message of the user.
    pub(crate) processed_at: DateTime<Utc>,
    /// Which of the producer's topologies it was produced for.
    pub(crate) version: i32,
}

/// What was wrong when a message took effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Errors {
    /// Its time isn't later than that of the last one.
    pub(crate) order: bool,
    /// The new balance isn't the expected one.
    pub(crate) value: bool,
    /// The user's row was made by another consumer.
    pub(crate) consumer: bool,
}

/// A user's balance as a message finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Queryable)]
pub(crate) struct Balance {
    /// The balance.
    pub(crate) value: i64,
    /// The consumer that made the row.
    pub(crate) consumer_id: i32,
    /// The time of the last message.
    pub(crate) processed_at: DateTime<Utc>,
    /// Messages that took effect.
    pub(crate) effects: i64,
}

/// The user's balance, whose row nobody else changes until the transaction ends. `None` if there's no row: then somebody
/// else may come first.
pub(crate) fn lock(conn: &mut PgConnection, user_id: i64) -> Result<Option<Balance>> {
    Ok(user_balance::table
        .find(user_id)
        .select((user_balance::value, user_balance::consumer_id, user_balance::processed_at, user_balance::effects))
        .for_update()
        .first(conn)
        .optional()?)
}

/// Makes a user's row with a balance of 0, unless somebody else is first, and returns whether it did.
fn make(conn: &mut PgConnection, consumer_id: i32, change: &Change) -> Result<bool> {
    let made = diesel::insert_into(user_balance::table)
        .values((
            user_balance::user_id.eq(change.user_id),
            user_balance::value.eq(0),
            user_balance::consumer_id.eq(consumer_id),
            user_balance::processed_at.eq(change.processed_at),
            user_balance::effects.eq(0),
        ))
        .on_conflict_do_nothing()
        .execute(conn)?;
    Ok(made == 1)
}

/// What becomes of a message in [`apply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Applied {
    /// It took effect.
    Changed(Errors),
    /// It isn't newer than what took effect before, and changed nothing.
    Repeated,
}

/// Adds the message to its user's balance, whatever came before it, and notes what was wrong; `foreign` says of a row that
/// another consumer made whether that's an error. Where the effect is `idempotent`, a message that isn't newer than the
/// last one changes nothing. To be run in a transaction.
pub(crate) fn apply(
    conn: &mut PgConnection,
    consumer_id: i32,
    change: &Change,
    idempotent: bool,
    foreign: impl FnOnce(&Balance) -> bool,
) -> Result<Applied> {
    let mut before = lock(conn, change.user_id)?;
    if before.is_none() && !make(conn, consumer_id, change)? {
        before = lock(conn, change.user_id)?;
    }
    let before = before.filter(|before| before.effects > 0);
    if idempotent && before.is_some_and(|before| change.processed_at <= before.processed_at) {
        note(conn, consumer_id, change, Treatment::Repeated)?;
        return Ok(Applied::Repeated);
    }
    let value = before.map_or(0, |before| before.value) + change.value_change;
    let errors = Errors {
        order: before.is_some_and(|before| change.processed_at <= before.processed_at),
        value: value != change.expected_value,
        consumer: before.is_some_and(|before| before.consumer_id != consumer_id && foreign(&before)),
    };
    diesel::update(user_balance::table.find(change.user_id))
        .set((
            user_balance::value.eq(value),
            user_balance::processed_at.eq(change.processed_at),
            user_balance::effects.eq(user_balance::effects + 1),
        ))
        .execute(conn)?;
    insert(conn, consumer_id, change, Treatment::Applied, errors)?;
    Ok(Applied::Changed(errors))
}

/// What a consumer did with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Treatment {
    /// It took effect.
    Applied,
    /// It had taken effect before.
    Repeated,
    /// It went back to its queue, to be taken later.
    TurnedAway,
    /// The consumer failed at it.
    Failed,
}

impl Treatment {
    fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Repeated => "repeated",
            Self::TurnedAway => "turned_away",
            Self::Failed => "failed",
        }
    }
}

/// Notes that a consumer had a message in hand that didn't take effect.
pub(crate) fn note(conn: &mut PgConnection, consumer_id: i32, change: &Change, treatment: Treatment) -> Result<()> {
    insert(conn, consumer_id, change, treatment, Errors::default())
}

fn insert(
    conn: &mut PgConnection,
    consumer_id: i32,
    change: &Change,
    treatment: Treatment,
    errors: Errors,
) -> Result<()> {
    diesel::insert_into(balance_delivery::table)
        .values((
            balance_delivery::consumer_id.eq(consumer_id),
            balance_delivery::user_id.eq(change.user_id),
            balance_delivery::processed_at.eq(change.processed_at),
            balance_delivery::version.eq(change.version),
            balance_delivery::outcome.eq(treatment.as_str()),
            balance_delivery::order_error.eq(errors.order),
            balance_delivery::value_error.eq(errors.value),
            balance_delivery::consumer_error.eq(errors.consumer),
        ))
        .execute(conn)?;
    Ok(())
}

/// The newest version among the messages of these users that the consumer has given effect; 0 if there's none.
pub(crate) fn processed_version(conn: &mut PgConnection, consumer_id: i32, users: &Range<i64>) -> Result<i32> {
    let newest: Option<i32> = balance_delivery::table
        .filter(balance_delivery::consumer_id.eq(consumer_id).and(balance_delivery::outcome.eq("applied")))
        .filter(balance_delivery::user_id.ge(users.start).and(balance_delivery::user_id.lt(users.end)))
        .select(max(balance_delivery::version))
        .first(conn)?;
    Ok(newest.unwrap_or(0))
}

/// What one consumer has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, QueryableByName)]
pub(crate) struct Counted {
    /// The consumer.
    #[diesel(sql_type = Integer)]
    pub(crate) consumer_id: i32,
    /// Messages that took effect.
    #[diesel(sql_type = BigInt)]
    pub(crate) applied: i64,
    /// Messages that had taken effect before.
    #[diesel(sql_type = BigInt)]
    pub(crate) repeated: i64,
    /// Times that it turned a message away.
    #[diesel(sql_type = BigInt)]
    pub(crate) turned_away: i64,
    /// Times that it failed at a message.
    #[diesel(sql_type = BigInt)]
    pub(crate) failed: i64,
    /// Messages out of order.
    #[diesel(sql_type = BigInt)]
    pub(crate) order_errors: i64,
    /// Balances that weren't the expected ones.
    #[diesel(sql_type = BigInt)]
    pub(crate) value_errors: i64,
    /// Messages of users whose row another consumer had made.
    #[diesel(sql_type = BigInt)]
    pub(crate) consumer_errors: i64,
}

/// What each consumer has done with the messages of these users.
pub(crate) fn counts(conn: &mut PgConnection, users: &Range<i64>) -> Result<Vec<Counted>> {
    Ok(sql_query(
        "SELECT consumer_id, count(*) FILTER (WHERE outcome = 'applied') AS applied,
                count(*) FILTER (WHERE outcome = 'repeated') AS repeated,
                count(*) FILTER (WHERE outcome = 'turned_away') AS turned_away,
                count(*) FILTER (WHERE outcome = 'failed') AS failed,
                count(*) FILTER (WHERE order_error) AS order_errors, count(*) FILTER (WHERE value_error) AS value_errors,
                count(*) FILTER (WHERE consumer_error) AS consumer_errors
         FROM balance_delivery WHERE user_id >= $1 AND user_id < $2 GROUP BY consumer_id ORDER BY consumer_id",
    )
    .bind::<BigInt, _>(users.start)
    .bind::<BigInt, _>(users.end)
    .load(conn)?)
}

/// A message in a consumer's hand.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub(crate) struct Delivered {
    /// The consumer.
    #[diesel(sql_type = Integer)]
    pub(crate) consumer_id: i32,
    /// The user.
    #[diesel(sql_type = BigInt)]
    pub(crate) user_id: i64,
    /// The message's time.
    #[diesel(sql_type = diesel::sql_types::Timestamptz)]
    pub(crate) processed_at: DateTime<Utc>,
    /// What became of it, as the table has it.
    #[diesel(sql_type = Text)]
    pub(crate) outcome: String,
    /// Whether it was out of order.
    #[diesel(sql_type = Bool)]
    pub(crate) order_error: bool,
}

/// What consumers had in hand of these users, in the order of each consumer's commits.
pub(crate) fn deliveries(conn: &mut PgConnection, users: &Range<i64>) -> Result<Vec<Delivered>> {
    Ok(sql_query(
        "SELECT consumer_id, user_id, processed_at, outcome, order_error FROM balance_delivery
         WHERE user_id >= $1 AND user_id < $2 ORDER BY id",
    )
    .bind::<BigInt, _>(users.start)
    .bind::<BigInt, _>(users.end)
    .load(conn)?)
}

/// How many effects the messages of these users have had, as their balances count them.
pub(crate) fn effects(conn: &mut PgConnection, users: &Range<i64>) -> Result<i64> {
    #[derive(QueryableByName)]
    struct Sum {
        #[diesel(sql_type = BigInt)]
        n: i64,
    }
    let sum: Sum = sql_query(
        "SELECT coalesce(sum(effects), 0)::bigint AS n FROM user_balance WHERE user_id >= $1 AND user_id < $2",
    )
    .bind::<BigInt, _>(users.start)
    .bind::<BigInt, _>(users.end)
    .get_result(conn)?;
    Ok(sum.n)
}

/// The users' balances, by user.
pub(crate) fn values(conn: &mut PgConnection, users: &Range<i64>) -> Result<Vec<(i64, i64)>> {
    Ok(user_balance::table
        .filter(user_balance::user_id.ge(users.start).and(user_balance::user_id.lt(users.end)))
        .select((user_balance::user_id, user_balance::value))
        .order(user_balance::user_id)
        .load(conn)?)
}

/// How many of these users have a balance, or once did something.
pub(crate) fn known(conn: &mut PgConnection, users: &Range<i64>) -> Result<i64> {
    let balances: i64 = user_balance::table
        .filter(user_balance::user_id.ge(users.start).and(user_balance::user_id.lt(users.end)))
        .select(count_star())
        .first(conn)?;
    let deliveries = balance_delivery::table
        .filter(balance_delivery::user_id.ge(users.start).and(balance_delivery::user_id.lt(users.end)));
    let delivered: bool = select(exists(deliveries)).get_result(conn)?;
    Ok(balances.max(i64::from(delivered)))
}

/// Forgets these users.
pub(crate) fn forget(conn: &mut PgConnection, users: &Range<i64>) -> Result<()> {
    diesel::delete(
        balance_delivery::table
            .filter(balance_delivery::user_id.ge(users.start).and(balance_delivery::user_id.lt(users.end))),
    )
    .execute(conn)?;
    diesel::delete(
        user_balance::table.filter(user_balance::user_id.ge(users.start).and(user_balance::user_id.lt(users.end))),
    )
    .execute(conn)?;
    Ok(())
}
