//! Sleeping until rows are inserted, at no cost for the database.

use crate::{Connection, Database, Result, locks};
use diesel::{
    QueryableByName, RunQueryDsl,
    connection::SimpleConnection as _,
    sql_query,
    sql_types::{BigInt, Bool},
};

/// What a sleeper sleeps for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Rows of `outbox`.
    Outbox,
    /// Rows of `message_outbox`.
    MessageOutbox,
}

impl Table {
    fn name(self) -> &'static str {
        match self {
            Self::Outbox => "outbox",
            Self::MessageOutbox => "message_outbox",
        }
    }

    fn lock(self) -> i64 {
        match self {
            Self::Outbox => locks::OUTBOX_SLEEP,
            Self::MessageOutbox => locks::MESSAGE_OUTBOX_SLEEP,
        }
    }
}

/// After how long the server ends a sleeper's session that says nothing: of a process that has frozen, say. Until then
/// whoever inserts calls it in vain, which costs the commit more.
const SILENT_MS: u32 = 10_000;

#[derive(QueryableByName)]
struct Asleep {
    #[diesel(sql_type = Bool)]
    asleep: bool,
}

/// Sleeps for a table. While it does, it holds the table's lock, which tells whoever inserts to call.
pub struct Sleeper {
    database: Database,
    table: Table,
    asleep: Option<Connection>,
}

impl Sleeper {
    /// One that takes its connection from `database`, and keeps it while it sleeps.
    #[must_use]
    pub fn new(database: Database, table: Table) -> Self {
        Self { database, table, asleep: None }
    }

    /// Whether it sleeps.
    #[must_use]
    pub fn is_asleep(&self) -> bool {
        self.asleep.is_some()
    }

    /// Falls asleep, or goes on sleeping; false if somebody is just inserting. Whoever inserts from now on calls. What was
    /// inserted before is committed, so it's to be looked for once more after this. To be repeated each second or so.
    ///
    /// # Errors
    /// The database's. Then it's awake.
    pub fn fall_asleep(&mut self) -> Result<bool> {
        let mut conn = match self.asleep.take() {
            Some(conn) => conn,
            None => {
                let mut conn = self.database.connection()?;
                let (silent, name) = (SILENT_MS, self.table.name());
                conn.batch_execute(&format!("SET idle_session_timeout = {silent}; LISTEN {name}"))?;
                // Calls from before.
                conn.notifications_iter().for_each(drop);
                conn
            }
        };
        // Where another relay sleeps already, both are called.
        let Asleep { asleep } = sql_query(
            "SELECT CASE WHEN pg_try_advisory_lock($1) THEN true ELSE EXISTS (
                 SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND mode = 'ExclusiveLock'
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                 AND (classid::bigint << 32) | objid::bigint = $1 AND objsubid = 1) END AS asleep",
        )
        .bind::<BigInt, _>(self.table.lock())
        .get_result(&mut **conn)?;
        if asleep {
            self.asleep = Some(conn);
        } else {
            give_back(conn);
        }
        Ok(asleep)
    }

    /// Whether it was called, or its connection is lost. Asks no server.
    pub fn is_called(&mut self) -> bool {
        self.asleep.as_mut().is_some_and(|conn| conn.notifications_iter().next().is_some())
    }

    /// Wakes up: nobody calls any more.
    pub fn wake(&mut self) {
        if let Some(conn) = self.asleep.take() {
            give_back(conn);
        }
    }
}

/// Lets go of the lock, which was taken as often as it was asked for. If that fails, the session has ended, and its locks too.
fn give_back(mut conn: Connection) {
    if let Err(error) = sql_query("SELECT pg_advisory_unlock_all()").execute(&mut **conn) {
        log::debug!("a sleeper's connection is lost: {error}");
    }
}
