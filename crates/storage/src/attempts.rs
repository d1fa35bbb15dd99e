//! Table `attempt`: attempts at redelivered messages.

use crate::{Database, schema::attempt};
use diesel::{
    prelude::*,
    sql_query,
    sql_types::{Array, Integer, Text},
};
use domain::{AttemptLedger, Failure, Suspect};

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

fn columns<'a>(suspects: &[Suspect<'a>]) -> (Vec<&'a str>, Vec<&'a str>) {
    suspects.iter().map(|suspect| (suspect.queue, suspect.message_id)).unzip()
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

    fn begin(&self, suspects: &[Suspect<'_>]) -> Result<(), Failure> {
        // Sorted, so that two workers can't deadlock, and each row once, as ON CONFLICT demands.
        let mut suspects = suspects.to_vec();
        suspects.sort_unstable();
        suspects.dedup();
        let (queues, ids) = columns(&suspects);
        self.0.transaction(|conn| {
            sql_query(
                "INSERT INTO attempt AS a (queue, message_id, attempts)
                 SELECT queue, message_id, 1 FROM unnest($1, $2) AS suspect (queue, message_id)
                 ON CONFLICT (queue, message_id) DO UPDATE SET attempts = a.attempts + 1, updated_at = clock_timestamp()",
            )
            .bind::<Array<Text>, _>(&queues)
            .bind::<Array<Text>, _>(&ids)
            .execute(conn)?;
            Ok(())
        })?;
        Ok(())
    }

    fn clear(&self, suspects: &[Suspect<'_>]) -> Result<(), Failure> {
        let (queues, ids) = columns(suspects);
        self.0.transaction(|conn| {
            diesel::delete(attempt::table.filter(attempt::queue.eq_any(&queues).and(attempt::message_id.eq_any(&ids))))
                .execute(conn)?;
            Ok(())
        })?;
        Ok(())
    }
}
