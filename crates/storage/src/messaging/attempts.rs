//! Table `attempt`: attempts at redelivered messages.

use crate::Database;
use diesel::{
    prelude::*,
    sql_query,
    sql_types::{Array, Integer, Text},
};
use domain::{AttemptLedger, Failure, Suspect};
use std::collections::BTreeMap;

/// The ledger in Postgres.
#[derive(Clone)]
pub struct Ledger(Database);

impl Ledger {
    /// A ledger in this database.
    pub fn new(database: Database) -> Self {
        Self(database)
    }
}

#[derive(QueryableByName)]
struct Attempts {
    #[diesel(sql_type = Integer)]
    attempts: i32,
}

fn columns<'a, 's>(suspects: impl IntoIterator<Item = &'s Suspect<'a>>) -> (Vec<&'a str>, Vec<&'a str>)
where
    'a: 's,
{
    suspects.into_iter().map(|suspect| (suspect.queue, suspect.message_id)).unzip()
}

impl AttemptLedger for Ledger {
    fn counts(&self, suspects: &[Suspect<'_>]) -> Result<Vec<u32>, Failure> {
        let (queues, ids) = columns(suspects);
        let counts = self.0.transaction(|conn| {
            Ok(sql_query(
                "SELECT coalesce(a.attempts, 0) AS attempts
                 FROM unnest($1, $2) WITH ORDINALITY AS suspect (queue, message_id, n)
                 LEFT JOIN attempt a USING (queue, message_id) ORDER BY suspect.n",
            )
            .bind::<Array<Text>, _>(&queues)
            .bind::<Array<Text>, _>(&ids)
            .load::<Attempts>(conn)?)
        })?;
        Ok(counts.iter().map(|row| u32::try_from(row.attempts).unwrap_or(0)).collect())
    }

    fn begin(&self, suspects: &[(Suspect<'_>, u32)]) -> Result<(), Failure> {
        // Sorted, so that two workers can't deadlock, and each row once, as ON CONFLICT demands.
        let suspects: BTreeMap<_, _> = suspects.iter().copied().collect();
        let attempts: Vec<i32> =
            suspects.values().map(|known| i32::try_from(*known).unwrap_or(i32::MAX).saturating_add(1)).collect();
        let (queues, ids) = columns(suspects.keys());
        self.0.transaction(|conn| {
            sql_query(
                "INSERT INTO attempt AS a (queue, message_id, attempts)
                 SELECT queue, message_id, attempts FROM unnest($1, $2, $3) AS suspect (queue, message_id, attempts)
                 ON CONFLICT (queue, message_id)
                 DO UPDATE SET attempts = greatest(a.attempts, excluded.attempts), updated_at = clock_timestamp()",
            )
            .bind::<Array<Text>, _>(&queues)
            .bind::<Array<Text>, _>(&ids)
            .bind::<Array<Integer>, _>(&attempts)
            .execute(conn)?;
            Ok(())
        })?;
        Ok(())
    }

    fn clear(&self, suspects: &[Suspect<'_>]) -> Result<(), Failure> {
        let (queues, ids) = columns(suspects);
        self.0.transaction(|conn| {
            sql_query(
                "DELETE FROM attempt a USING unnest($1, $2) AS settled (queue, message_id)
                 WHERE a.queue = settled.queue AND a.message_id = settled.message_id",
            )
            .bind::<Array<Text>, _>(&queues)
            .bind::<Array<Text>, _>(&ids)
            .execute(conn)?;
            Ok(())
        })?;
        Ok(())
    }
}
