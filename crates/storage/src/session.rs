//! A session's settings that the code relies on, whatever the server, the database and the role have for defaults.

use crate::{Settings, error::is_lost};
use diesel::{
    PgConnection, RunQueryDsl,
    connection::SimpleConnection as _,
    result::Error as Diesel,
    sql_query,
    sql_types::{Array, Text},
};
use std::collections::HashMap;

/// What any role may set for itself.
const FIXED: [(&str, &str); 14] = [
    // A snapshot that is older than a lock shows what was before those who had it.
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_deferrable", "off"),
    // The pool keeps sessions without using them.
    ("idle_session_timeout", "0"),
    // A refused statement, such as a login that is taken, isn't the end of the session.
    ("exit_on_error", "off"),
    // Texts to values and back.
    ("TimeZone", "UTC"),
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("standard_conforming_strings", "on"),
    ("client_encoding", "UTF8"),
    ("bytea_output", "hex"),
    ("array_nulls", "on"),
    ("transform_null_equals", "off"),
    // As it was tested; policies are somebody else's.
    ("row_security", "on"),
    // How often the server looks whether the client of a running statement is still there: a session whose process was
    // killed lets go of its locks soon, even while it waits for others. Whoever handles the same rows next would run into
    // its own time limit over them.
    ("client_connection_check_interval", "1000"),
];

/// The rest of what can be set: not by name alone, since it depends on the default, the server's version or the role.
const ARRANGE: &str = "
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') <> 'remote_apply';
    SELECT set_config('transaction_timeout', '0', false)
        WHERE current_setting('transaction_timeout', true) IS NOT NULL;
    SELECT set_config('session_replication_role', 'origin', false), set_config('lc_messages', 'C', false)
        WHERE current_setting('is_superuser') = 'on';";

/// What has to be so besides: by the operator's hand, where it isn't.
const REQUIRED: [(&str, &str); 2] = [
    // A standby, or an operator's brake.
    ("transaction_read_only", "off"),
    // Otherwise no foreign key is kept.
    ("session_replication_role", "origin"),
];

const LANGUAGE: &str = "lc_messages";

/// What a session is to be like.
pub(crate) struct Expected(Vec<(&'static str, String)>);

impl Expected {
    pub(crate) fn new(settings: &Settings) -> Self {
        let own = [
            ("search_path", settings.schema.clone()),
            ("statement_timeout", settings.statement_timeout_ms.to_string()),
            ("lock_timeout", settings.lock_timeout_ms.to_string()),
            ("idle_in_transaction_session_timeout", settings.call_timeout_ms.saturating_mul(2).to_string()),
        ];
        Self(FIXED.map(|(name, value)| (name, value.to_owned())).into_iter().chain(own).collect())
    }

    /// The same as libpq's `options`, percent-encoded: a session that begins with these needs no round trip for them.
    pub(crate) fn options(&self) -> String {
        let options = self.0.iter().map(|(name, value)| format!("-c%20{name}%3D{}", value.replace(' ', "%5C%20")));
        options.collect::<Vec<_>>().join("%20")
    }

    /// Sets what the options couldn't, and says what isn't as it must be: what the role may not set, and what the options
    /// didn't bring about, since a pooler between didn't hand them on.
    pub(crate) fn arrange(&self, conn: &mut PgConnection) -> Result<(), String> {
        let lost = |error: Diesel| error.to_string();
        conn.batch_execute(ARRANGE).map_err(lost)?;
        let own = self.0.iter().map(|(name, value)| (*name, value.as_str()));
        let expected: Vec<_> = own.chain(REQUIRED).collect();
        let names: Vec<_> = expected.iter().map(|(name, _)| *name).chain([LANGUAGE]).collect();
        let found: HashMap<String, String> = sql_query("SELECT name, setting FROM pg_settings WHERE name = ANY ($1)")
            .bind::<Array<Text>, _>(names)
            .load::<Setting>(conn)
            .map_err(lost)?
            .into_iter()
            .map(|Setting { name, setting }| (name, setting))
            .collect();
        let found = |name: &str| found.get(name).map_or("unknown", String::as_str);
        let wrong = expected.into_iter().filter(|(name, value)| found(name) != *value);
        let mut wrong: Vec<_> =
            wrong.map(|(name, value)| format!("{name} is `{}` and must be `{value}`", found(name))).collect();
        if !is_english(found(LANGUAGE), conn).map_err(lost)? {
            wrong.push(format!("{LANGUAGE} is `{}` and must be `C` or English", found(LANGUAGE)));
        }
        if wrong.is_empty() { Ok(()) } else { Err(format!("this session can't be used: {}", wrong.join(", "))) }
    }
}

#[derive(diesel::QueryableByName)]
struct Setting {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Text)]
    setting: String,
}

/// Whether the server's messages are English: diesel hides the code of a deadlock and of a time limit, so that they're
/// known by their texts.
fn is_english(language: &str, conn: &mut PgConnection) -> Result<bool, Diesel> {
    if matches!(language, "C" | "POSIX") || ["C.", "en", "English"].iter().any(|prefix| language.starts_with(prefix)) {
        return Ok(true);
    }
    // A server may lack the translations that its locale asks for, so its word counts.
    match sql_query("SELECT 1 / 0").execute(conn) {
        Err(error) if is_lost(&error) => Err(error),
        Err(Diesel::DatabaseError(_, info)) => Ok(info.message() == "division by zero"),
        _ => Ok(false),
    }
}
