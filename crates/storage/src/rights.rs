//! What each service may do in the database: for each a role of its own, and what its statements need. Nobody but the owner may
//! make, change or drop a table.
//!
//! A new service, and a new table, need a line here: a test looks.

use crate::{Result, admin::quoted, locks};
use diesel::{
    PgConnection,
    prelude::*,
    sql_query,
    sql_types::{BigInt, Text},
};
use std::collections::BTreeMap;

/// A service's rights.
pub struct Rights {
    /// The service.
    pub service: &'static str,
    /// Privileges, and the tables, sequences or the function that they're for.
    pub grants: &'static [(&'static str, &'static str)],
}

/// Attempts at messages that may have killed a process, as every worker counts them.
const ATTEMPTS: (&str, &str) = ("SELECT, INSERT, UPDATE, DELETE", "attempt");

/// Locking a row is enough of a change to need the right to one. Nobody can set an identity to anything.
const TAKE: &str = "SELECT, DELETE, UPDATE (id)";

/// Every service.
pub const SERVICES: [Rights; 10] = [
    Rights {
        service: "api-gateway",
        grants: &[
            (
                "SELECT (id, login, channel, email, phone, age, is_active, roles, avatar_link, import_id, created_at, \
                 updated_at, deleted_at), \
                 INSERT (login, channel, email, phone, password_hash, age, is_active, roles, import_id), \
                 UPDATE (login, avatar_link, updated_at, deleted_at)",
                "\"user\"",
            ),
            ("SELECT, INSERT, UPDATE (content_type, image)", "avatar"),
            ("SELECT, INSERT, UPDATE (deleted_at)", "tweet"),
            ("USAGE, UPDATE", "SEQUENCE tweet_id_seq"),
            ("SELECT, INSERT, DELETE", "subscription"),
            ("INSERT", "former_subscription"),
            ("SELECT, INSERT, DELETE, UPDATE (tweet_id)", "feed_entry"),
            ("INSERT", "feed_garbage, email_notification, sms_notification, outbox, message_outbox"),
            ("SELECT, INSERT, UPDATE", "follower_import"),
            ("SELECT, INSERT, UPDATE (seq)", "stream_head"),
            ("SELECT, INSERT", "stream_cursor, stream_event"),
            (
                "SELECT",
                "stream, account_effect, message_partition, message, consumer_offset, __diesel_schema_migrations",
            ),
            ("USAGE", "SEQUENCE message_outbox_id"),
        ],
    },
    Rights {
        service: "outbox-relay",
        grants: &[
            (TAKE, "outbox"),
            ("SELECT, DELETE", "message_outbox"),
            ("SELECT", "SEQUENCE outbox_id_seq, message_outbox_id"),
            ("SELECT, UPDATE (seq, taken, unproven_upto)", "message_partition"),
            ("SELECT, INSERT", "message_epoch"),
            ("INSERT", "message_unused"),
            ("SELECT", "message_log, stream"),
            ("SELECT (dedup_key), INSERT", "dead_letter"),
        ],
    },
    Rights { service: "dead-letter-recorder", grants: &[("SELECT (dedup_key), INSERT", "dead_letter"), ATTEMPTS] },
    Rights {
        service: "follower-importer",
        grants: &[
            ("SELECT (id, login, deleted_at), INSERT (login, channel, email, phone, import_id)", "\"user\""),
            ("SELECT, INSERT, UPDATE", "follower_import"),
            ("SELECT (id, author_id, deleted_at)", "tweet"),
            ("SELECT, INSERT", "subscription"),
            ("SELECT, INSERT, UPDATE (tweet_id)", "feed_entry"),
            ATTEMPTS,
        ],
    },
    Rights {
        service: "feed-fanout",
        grants: &[
            ("SELECT (id, deleted_at)", "\"user\""),
            ("SELECT (id, author_id, deleted_at)", "tweet"),
            ("SELECT", "subscription"),
            ATTEMPTS,
        ],
    },
    Rights {
        service: "feed-updater",
        grants: &[
            // It clears deleted users' rows, and can neither read nor change what is personal.
            ("SELECT (id, deleted_at, erase_at, erased_at), UPDATE (erase_at)", "\"user\""),
            ("EXECUTE", "FUNCTION erase_user"),
            ("SELECT (user_id), DELETE", "avatar"),
            ("SELECT (id, author_id, text, deleted_at), UPDATE (text)", "tweet"),
            ("SELECT, DELETE", "subscription"),
            ("SELECT, INSERT", "former_subscription"),
            ("SELECT, INSERT, DELETE, UPDATE (tweet_id)", "feed_entry"),
            ("SELECT, INSERT, UPDATE, DELETE", "feed_garbage"),
            ("SELECT (user_id, source, source_id), DELETE", "email_notification, sms_notification"),
            (
                "SELECT (id, author_id, prefix, state), UPDATE (prefix, request_key, state, error, updated_at)",
                "follower_import",
            ),
            (
                "SELECT (id, body, state, settled_at, settled_by), UPDATE (body, headers, state, settled_at, settled_by)",
                "dead_letter",
            ),
            ATTEMPTS,
        ],
    },
    Rights {
        service: "email-notifier",
        grants: &[
            ("SELECT (id, channel, email, deleted_at)", "\"user\""),
            ("SELECT (id, author_id, deleted_at)", "tweet"),
            ("SELECT", "subscription"),
            ("INSERT (user_id, source, source_id, email, text)", "email_notification"),
            ATTEMPTS,
        ],
    },
    Rights {
        service: "sms-notifier",
        grants: &[
            ("SELECT (id, channel, phone, deleted_at)", "\"user\""),
            ("SELECT (id, author_id, deleted_at)", "tweet"),
            ("SELECT", "subscription"),
            ("INSERT (user_id, source, source_id, phone, text)", "sms_notification"),
            ATTEMPTS,
        ],
    },
    Rights {
        service: "event-processor",
        grants: &[
            ("SELECT", "stream, stream_head"),
            ("SELECT, UPDATE (seq, revision, attempts, deaths, retry_at, parked_at, last_error)", "stream_cursor"),
            ("SELECT, UPDATE (processed_at, worker, outcome, rests)", "stream_event"),
            ("INSERT", "account_effect"),
            ("SELECT, INSERT, UPDATE, DELETE", "lease, member"),
            ATTEMPTS,
        ],
    },
    Rights {
        service: "message-recorder",
        grants: &[
            ("SELECT", "message_partition, message_unused, message_epoch, message_log"),
            ("SELECT, INSERT, UPDATE", "consumer_offset"),
            ("SELECT, INSERT", "message, skipped_message"),
            ("SELECT, INSERT, UPDATE, DELETE", "lease, member"),
        ],
    },
];

/// Tables that no service has any business with: operators have.
pub const OF_THE_OPERATOR: [&str; 2] = ["feed_repair", "stream_change"];

/// The name of a service's role, and of its user at the broker.
pub fn role(prefix: &str, service: &str) -> String {
    format!("{prefix}_{}", service.replace('-', "_"))
}

/// Gives the role of each service what it needs, and takes away whatever else it had in this schema; returns the roles' names.
/// With passwords, by service, it makes the roles that aren't there, and lets them log in; without, it passes over them. To be run
/// in a transaction, by the tables' owner, who may make roles (`CREATEROLE`).
pub fn apply(
    conn: &mut PgConnection,
    prefix: &str,
    passwords: Option<&BTreeMap<String, String>>,
) -> Result<Vec<String>> {
    // Two at once would change the same rows of the server's own tables, which is an error there.
    sql_query("SELECT pg_advisory_xact_lock($1)").bind::<BigInt, _>(locks::RIGHTS).execute(conn)?;
    #[derive(QueryableByName)]
    struct Here {
        #[diesel(sql_type = Text)]
        schema: String,
        #[diesel(sql_type = Text)]
        database: String,
    }
    let Here { schema, database } =
        sql_query("SELECT current_schema()::text AS schema, current_database()::text AS database").get_result(conn)?;
    let (schema, database) = (quoted(&schema), quoted(&database));
    let mut roles = Vec::new();
    for Rights { service, grants } in &SERVICES {
        let name = role(prefix, service);
        let role = quoted(&name);
        let there = has_role(conn, &name)?;
        if !there && passwords.is_none() {
            continue;
        }
        if !there {
            sql_query(format!("CREATE ROLE {role}")).execute(conn)?;
        }
        if let Some(password) = passwords.and_then(|passwords| passwords.get(*service)) {
            let password = password.replace('\'', "''");
            sql_query(format!("ALTER ROLE {role} LOGIN PASSWORD '{password}'")).execute(conn)?;
        }
        for all in ["TABLES", "SEQUENCES", "FUNCTIONS"] {
            sql_query(format!("REVOKE ALL ON ALL {all} IN SCHEMA {schema} FROM {role}")).execute(conn)?;
        }
        sql_query(format!("GRANT CONNECT ON DATABASE {database} TO {role}")).execute(conn)?;
        sql_query(format!("GRANT USAGE ON SCHEMA {schema} TO {role}")).execute(conn)?;
        for (privileges, objects) in *grants {
            sql_query(format!("GRANT {privileges} ON {objects} TO {role}")).execute(conn)?;
        }
        roles.push(name);
    }
    if !roles.is_empty() {
        // From old times, everybody may make tables in `public`.
        sql_query(format!("REVOKE CREATE ON SCHEMA {schema} FROM PUBLIC")).execute(conn)?;
    }
    Ok(roles)
}

fn has_role(conn: &mut PgConnection, name: &str) -> Result<bool> {
    let count = sql_query("SELECT count(*) AS n FROM pg_roles WHERE rolname = $1")
        .bind::<Text, _>(name)
        .get_result::<crate::Count>(conn)?;
    Ok(count.n > 0)
}
